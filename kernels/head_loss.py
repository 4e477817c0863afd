"""The loss of preference groups straight from hidden states: log-softmax, gather, sequence sums and D_f in one call.

In: hidden states of the scored tokens, head, targets, and a group loss. Out: one loss per group and the log-probs of
its candidates. The group loss is any JAX function of the B groups' log-probs, such as `Loss.loss` of `fpo_jax/losses`:
kernels neither know nor restrict which divergence it is.

`fpo_head_loss` composes any `token_stats` with the group loss. `pallas_tpu.fused_head_loss` is the same function as one
TPU kernel, with the group loss and its derivative traced into the kernel's last step.

Letters beyond `spec.py`: B groups, K candidates of a group, S = B*K candidates.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fpo_jax.kernels import spec as specs

Operands = Any  # a pytree of [B, K] arrays and scalars
GroupLoss = Callable[[jax.Array, Operands], jax.Array]  # (logps_BK, operands) -> losses_B


class HeadLoss(NamedTuple):
    """Of B groups; float32 (float64 when given float64). Losses and log-probs carry gradients, by-products none."""

    losses_B: specs.Array
    logps_BK: specs.Array  # sum of the candidate's scored tokens, nats
    entropy_N: specs.Array | None  # of each token; None unless asked for
    is_argmax_N: specs.Array | None


def fpo_head_loss(
    hidden_ND: specs.Array,
    head_VD: specs.Array,
    targets_N: specs.Array,
    scored_N: specs.Array,
    operands: Operands,
    *,
    group_loss: GroupLoss,
    groups: tuple[int, int],
    spec: specs.HeadSpec,
    token_stats: Callable[..., specs.TokenStats],
    candidate_sums: Callable[[jax.Array], jax.Array] | None = None,
) -> HeadLoss:
    """Compute the losses of B groups of K candidates from the hidden states of their tokens.

        logp[b, k] = sum over scored r of  z[n, target[n]] - lse[n],  n = (b*K + k)*R + r
        loss[b] = group_loss(logp, operands)[b]

    Args:
        hidden_ND: final hidden states, N = B*K*R, candidate after candidate; finite, also where not scored.
        head_VD: LM head.
        targets_N: token ids; any id of the vocabulary where not scored. A scored target outside gives NaN.
        scored_N: bool, True = counts.
        operands: what else the group loss reads: reference log-probs, rewards, lengths. Constants: no gradient.
        group_loss: (logps_BK, operands) -> losses_B; the loss of a group depends on that group alone.
        groups: (B, K).
        spec: options of the head.
        token_stats: an implementation.
        candidate_sums: log-probs [N] of the tokens, 0 where not scored -> sums [B, K]; None: candidates have N / (B*K)
            tokens each, one after the other.

    Returns:
        HeadLoss.

    Raises:
        ValueError: shapes that do not fit.
    """
    check(hidden_ND, scored_N, operands, groups, equal=candidate_sums is None)
    operands = jax.lax.stop_gradient(operands)
    stats = token_stats(hidden_ND, head_VD, targets_N, spec=spec)
    logps_N = jnp.where(scored_N, stats.target_logit_N - stats.lse_N, 0)
    logps_BK = logps_N.reshape(*groups, -1).sum(axis=-1) if candidate_sums is None else candidate_sums(logps_N)
    return HeadLoss(group_loss(logps_BK, operands), logps_BK, stats.entropy_N, stats.is_argmax_N)


def check(
    hidden_ND: specs.Array, scored_N: specs.Array, operands: Operands, groups: tuple[int, int], *, equal: bool = True
) -> None:
    """Check what is particular to groups; `equal`: whether candidates have as many tokens each.

    Raises:
        ValueError: tokens that do not divide into B*K candidates, a mask of another shape or type, or operands that are
            neither [B, K] nor scalars.
    """
    tokens = hidden_ND.shape[0]
    if equal and tokens % (groups[0] * groups[1]):
        raise ValueError(
            f"{tokens} tokens do not divide into B*K = {groups[0]}*{groups[1]} candidates; pad them to R each"
        )
    if scored_N.shape != (tokens,) or scored_N.dtype != bool:
        raise ValueError(f"scored is {scored_N.dtype}{list(scored_N.shape)}, not {tokens} bools; pass one per token")
    for leaf in jax.tree.leaves(operands):
        if jnp.shape(leaf) not in ((), tuple(groups)):
            raise ValueError(f"an operand has shape {jnp.shape(leaf)}; use [B, K] = {list(groups)} or a scalar")
