"""Log-probs of the completions: hidden states, LM head and a batch's scored positions in, one number per row out.

The R scored positions of every row are gathered before the head, so neither prompts nor padding cost a logit, and the
head is applied by a kernel of `kernels/` that never holds [N, R, V]. `completion_losses` goes one step further, to the
losses of the groups, in one kernel where there is one. `dispatch.py` decides which kernel runs. What this does not
do: losses of its own, and the reference policy (its log-probs are this function called with other weights).

Letter beyond `types.py`: M = N*R, the scored positions in one row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from fpo_jax.kernels.lm_head import head_loss
from fpo_jax.kernels.lm_head import spec as specs
from fpo_jax.kernels.lm_head.head_loss import sum_slots
from fpo_jax.logprobs.dispatch import (
    ENGINES,
    PLATFORMS,
    HeadShapes,
    Target,
    implementation_of,
    select,
)
from fpo_jax.types import Array


class CompletionLogps(NamedTuple):
    """Per row, over its scored positions; float32 (float64 when given float64)."""

    sum_N: Array  # log-prob of the completion in nats; 0 for a row without a scored position
    count_N: Array  # scored positions
    # mean over scored positions of the mean raw logit; no gradient; None for a soft-capped head
    mean_logit_N: Array | None


def completion_logps(
    hidden_NTD: Float[Array, "N T D"],
    head_VD: Float[Array, "V D"],
    predictors_NR: Int[Array, "N R"],
    targets_NR: Int[Array, "N R"],
    loss_mask_NR: Bool[Array, "N R"],
    *,
    slots_NR: Int[Array, "N R"] | None = None,
    slots: int = 1,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    implementation: str = "auto",
    interpret: bool = False,
    workspace_bytes: int = specs.DEFAULT_WORKSPACE_BYTES,
    kept_bytes: int | None = None,
    placement: specs.Placement | None = None,
) -> CompletionLogps:
    """Sum the log-probs of every row's scored targets.

        sum[n] = sum over scored r of log softmax(cap(head . hidden[n, predictors[n, r]]) / temperature)[targets[n, r]]

    The head is multiplied in the dtype of `hidden_NTD`, accumulated in float32, and its gradient comes in its own
    dtype: pass the float32 master head of a bfloat16 model as it is. Positions that are not scored give exactly zero
    to value and gradient, whatever their hidden state holds, NaN included.

    Args:
        hidden_NTD: final hidden states, after the last norm.
        head_VD: LM head (or tied embedding), one row per vocabulary entry.
        predictors_NR: position whose hidden state predicts the target, in [0, T); any value in range where not scored.
        targets_NR: token ids in [0, vocab_size); any value where not scored. A scored target outside gives NaN.
        loss_mask_NR: True = counts.
        slots_NR: of rows that hold several completions: which of them a position belongs to, in [0, slots); None: a row
            is one.
        slots: completions that a row has places for.
        temperature: sampling temperature that divides the logits, > 0.
        softcap: cap of the model's head, before the temperature; None for none.
        vocab_size: real rows of the head; rows beyond are padding with probability 0. None: all V.
        implementation: "auto", or a key of IMPLEMENTATIONS. "auto" asks jax for its first device; where the program is
            compiled for another one, settle it with `select` and pass the result.
        interpret: emulate a Pallas kernel on the CPU; slow, for tests.
        workspace_bytes: memory for one block of logits, per device, at least 1 MiB; where all of them fit on one
            device, "chunked" keeps them for the backward pass. The dense reference has no blocks.
        kept_bytes: memory for logits that are kept for the backward pass, per device; see `HeadSpec`.
        placement: where rows and head live on a mesh; None for one device.

    Returns:
        CompletionLogps, each field of shape [N], with slots [N * slots], those of a row next to each other.

    Raises:
        ValueError: an option or a shape outside its range; an unknown implementation.

    >>> import numpy as np
    >>> hidden_NTD = np.ones((1, 3, 1), np.float32)  # the same at each of 3 tokens; logits log 1 and log 3
    >>> head_VD = np.log(np.array([[1.0], [3.0]], np.float32))
    >>> predictors_NR, targets_NR = np.array([[0, 1, 0]]), np.array([[1, 0, 0]])
    >>> loss_mask_NR = np.array([[True, True, False]])
    >>> logps = completion_logps(hidden_NTD, head_VD, predictors_NR, targets_NR, loss_mask_NR)
    >>> print(f"{logps.sum_N[0]:.4f}, {logps.count_N[0]:.0f} tokens")  # log 3/4 + log 1/4
    -1.6740, 2 tokens
    """
    if implementation == "auto":
        shapes = HeadShapes(targets_NR.size, head_VD.shape[1], head_VD.shape[0])
        target = Target.of(jax.devices()[0])
        implementation = select(
            target=target, shapes=shapes, dtype=hidden_NTD.dtype, head_dtype=head_VD.dtype, placement=placement
        ).implementation
    spec = _spec(hidden_NTD, temperature, softcap, vocab_size, interpret, workspace_bytes, kept_bytes, placement)
    with jax.named_scope("completion_logps"):
        hidden_MD, targets_M, scored_M = _scored(hidden_NTD, predictors_NR, targets_NR, loss_mask_NR)
        stats = implementation_of(implementation)(hidden_MD, head_VD, targets_M, spec=spec)
        logps_M = jnp.where(scored_M, stats.target_logit_N - stats.lse_N, 0)
        sum_N = sum_slots(logps_M.reshape(loss_mask_NR.shape), slots_NR, slots=slots).reshape(-1)
        return _completion(sum_N, hidden_MD, head_VD, loss_mask_NR, spec, slots_NR, slots)


def completion_losses(
    hidden_NTD: Float[Array, "N T D"],
    head_VD: Float[Array, "V D"],
    predictors_NR: Int[Array, "N R"],
    targets_NR: Int[Array, "N R"],
    loss_mask_NR: Bool[Array, "N R"],
    operands: head_loss.Operands,
    *,
    group_loss: head_loss.GroupLoss,
    groups: tuple[int, int],
    slots_NR: Int[Array, "N R"] | None = None,
    implementation: str,
    fuse_loss: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    interpret: bool = False,
    workspace_bytes: int = specs.DEFAULT_WORKSPACE_BYTES,
    kept_bytes: int | None = None,
    placement: specs.Placement | None = None,
) -> tuple[Array, CompletionLogps]:
    """Return the losses of B groups of K rows, and the log-probs they come from; both carry gradients.

    Args, beyond those of `completion_logps`:
        operands: what else the group loss reads, [B, K] arrays and scalars, without gradient.
        group_loss: (logps_BK, operands) -> losses_B, such as `Loss.of_logps`.
        groups: (B, K), N = B*K; with slots B*K = N * slots.
        implementation: a key of IMPLEMENTATIONS.
        fuse_loss: run the group loss in a kernel too; an implementation of PLATFORMS can.

    Raises:
        ValueError: as `completion_logps`; fuse_loss with an implementation that cannot.
    """
    if fuse_loss and implementation not in PLATFORMS:
        raise ValueError(
            f"fuse_loss with implementation {implementation!r}, which has no kernel for the loss; use one of"
            f" {', '.join(PLATFORMS)}"
        )
    spec = _spec(hidden_NTD, temperature, softcap, vocab_size, interpret, workspace_bytes, kept_bytes, placement)
    slots = groups[0] * groups[1] // len(loss_mask_NR)
    with jax.named_scope("completion_losses"):
        hidden_MD, targets_M, scored_M = _scored(hidden_NTD, predictors_NR, targets_NR, loss_mask_NR)
        inputs = (hidden_MD, head_VD, targets_M, scored_M, operands)
        options = {"group_loss": group_loss, "groups": groups, "spec": spec, "rows": len(loss_mask_NR)}
        options["slots_N"] = None if slots_NR is None else jnp.asarray(slots_NR).reshape(-1)
        if fuse_loss:
            out = head_loss.fused_head_loss(*inputs, **options, engine=ENGINES[implementation])
        else:
            out = head_loss.fpo_head_loss(*inputs, **options, token_stats=implementation_of(implementation))
        return out.losses_B, _completion(
            out.logps_BK.reshape(-1), hidden_MD, head_VD, loss_mask_NR, spec, slots_NR, slots
        )


def _spec(
    hidden_NTD, temperature, softcap, vocab_size, interpret, workspace_bytes, kept_bytes, placement
) -> specs.HeadSpec:
    """Options of the head, for the kernels."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} is not > 0; use 1.0 for the model's own distribution")
    return specs.HeadSpec(
        logit_scale=1.0 / temperature,
        softcap=softcap,
        vocab_size=vocab_size,
        compute_dtype=jnp.dtype(hidden_NTD.dtype).name,
        workspace_bytes=workspace_bytes,
        kept_bytes=kept_bytes,
        placement=placement,
        interpret=interpret,
    )


def _scored(hidden_NTD, predictors_NR, targets_NR, loss_mask_NR):
    """Hidden states, targets and mask of the scored positions, in one row of M."""
    hidden_NRD = jnp.take_along_axis(jnp.asarray(hidden_NTD), predictors_NR[:, :, None], axis=1)
    hidden_NRD = jnp.where(loss_mask_NR[:, :, None], hidden_NRD, 0)  # before the head: 0 * NaN is NaN in its gradient
    safe_targets_NR = jnp.where(loss_mask_NR, targets_NR, 0)
    return (
        hidden_NRD.reshape(-1, hidden_NTD.shape[-1]),
        safe_targets_NR.reshape(-1),
        jnp.asarray(loss_mask_NR).reshape(-1),
    )


def _completion(sum_N, hidden_MD, head_VD, loss_mask_NR, spec: specs.HeadSpec, slots_NR, slots: int) -> CompletionLogps:
    """The sums, with what goes into metrics."""
    count_N = sum_slots(jnp.asarray(loss_mask_NR, sum_N.dtype), slots_NR, slots=slots).reshape(-1)
    if spec.softcap is not None:
        return CompletionLogps(sum_N, count_N, None)
    hidden_NRD, head_VD = jax.lax.stop_gradient((hidden_MD.reshape(*loss_mask_NR.shape, -1), jnp.asarray(head_VD)))
    mean_head_D = jnp.mean(head_VD[: spec.vocab_size], axis=0, dtype=count_N.dtype)
    if slots_NR is None:
        mean_hidden_ND = jnp.sum(hidden_NRD, axis=1, dtype=count_N.dtype) / jnp.maximum(count_N, 1)[:, None]
        mean_N = jnp.einsum("ND,D->N", mean_hidden_ND, mean_head_D, precision=jax.lax.Precision.HIGHEST)
        return CompletionLogps(sum_N, count_N, mean_N)
    # Mean raw logit over the vocabulary and the scored positions, by linearity, without logits; 0 where none is scored.
    mean_NR = jnp.einsum(
        "NRD,D->NR", hidden_NRD.astype(count_N.dtype), mean_head_D, precision=jax.lax.Precision.HIGHEST
    )
    mean_N = sum_slots(mean_NR, slots_NR, slots=slots).reshape(-1) / jnp.maximum(count_N, 1)
    return CompletionLogps(sum_N, count_N, mean_N)
