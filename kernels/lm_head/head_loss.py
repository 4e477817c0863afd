"""The loss of preference groups straight from hidden states: log-softmax, gather, sequence sums and D_f in one call.

In: hidden states of the scored tokens, head, targets, and a group loss. Out: one loss per group and the log-probs of
its completions. The group loss is any JAX function of the B groups' log-probs, such as `Loss.of_logps` of
`fpo_jax/losses`: kernels neither know nor restrict which divergence it is.

`fpo_head_loss` composes any `token_stats` with the group loss. `fused_head_loss` is the same function with all of it in
kernels: those of an engine leave each token's partial softmax, and `loss_kernel.py` makes losses of it.

Letters beyond `spec.py`: B groups, K completions of a group, S = B*K completions.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fpo_jax.kernels.lm_head import blocks, loss_kernel
from fpo_jax.kernels.lm_head import spec as specs

Operands = Any  # a pytree of [B, K] arrays and scalars
GroupLoss = Callable[[jax.Array, Operands], jax.Array]  # (logps_BK, operands) -> losses_B


class HeadLoss(NamedTuple):
    """Of B groups; float32 (float64 when given float64). Losses and log-probs carry gradients, by-products none."""

    losses_B: specs.Array
    logps_BK: specs.Array  # sum of the completion's scored tokens, nats
    entropy_N: specs.Array | None  # of each token; None unless asked for
    is_argmax_N: specs.Array | None


def fpo_head_loss(
    hidden_ND: specs.Array,
    head_VD: specs.Array,
    targets_N: specs.Array,
    loss_mask_N: specs.Array,
    operands: Operands,
    *,
    group_loss: GroupLoss,
    groups: tuple[int, int],
    spec: specs.HeadSpec,
    token_stats: Callable[..., specs.TokenStats],
    slots_N: specs.Array | None = None,
    rows: int = 1,
) -> HeadLoss:
    """Compute the losses of B groups of K completions from the hidden states of their tokens.

        logp[b, k] = sum over scored r of  z[n, target[n]] - lse[n],  n = (b*K + k)*R + r
        loss[b] = group_loss(logp, operands)[b]

    Args:
        hidden_ND: final hidden states, N = B*K*R, completion after completion; finite, also where not scored.
        head_VD: LM head.
        targets_N: token ids; any id of the vocabulary where not scored. A scored target outside gives NaN.
        loss_mask_N: bool, True = counts.
        operands: what else the group loss reads: reference log-probs, rewards, lengths. Constants: no gradient.
        group_loss: (logps_BK, operands) -> losses_B; the loss of a group depends on that group alone.
        groups: (B, K).
        spec: options of the head.
        token_stats: an implementation.
        slots_N: of tokens in `rows` equal stretches: which of the completions of its stretch a token belongs to, in
            [0, S / rows); any value where not scored. None: completions have N / S tokens each, one after the other.
        rows: stretches of tokens, each with whole groups; read with `slots_N`.

    Returns:
        HeadLoss.

    Raises:
        ValueError: shapes that do not fit.
    """
    check(hidden_ND, loss_mask_N, operands, groups, rows=None if slots_N is None else rows)
    operands = jax.lax.stop_gradient(operands)
    stats = token_stats(hidden_ND, head_VD, targets_N, spec=spec)
    logps_N = jnp.where(loss_mask_N, stats.target_logit_N - stats.lse_N, 0)
    if slots_N is not None:
        slots = groups[0] * groups[1] // rows
        logps_N = sum_slots(logps_N.reshape(rows, -1), slots_N.reshape(rows, -1), slots=slots)
    logps_BK = logps_N.reshape(*groups, -1).sum(axis=-1)
    return HeadLoss(group_loss(logps_BK, operands), logps_BK, stats.entropy_N, stats.is_argmax_N)


def fused_head_loss(
    hidden_ND: specs.Array,
    head_VD: specs.Array,
    targets_N: specs.Array,
    loss_mask_N: specs.Array,
    operands: Operands,
    *,
    group_loss: GroupLoss,
    groups: tuple[int, int],
    spec: specs.HeadSpec,
    engine: blocks.Engine,
    slots_N: specs.Array | None = None,
    rows: int = 1,
) -> HeadLoss:
    """Compute what `fpo_head_loss` does, the loss included, in kernels; bfloat16 or float32 operands.

    Args, beyond those of `fpo_head_loss`:
        group_loss: hashable; elementwise functions and reductions over K.
        engine: with `loss_parameters`.

    Raises:
        ValueError: shapes that do not fit, an engine that cannot run or has no kernel for the loss, groups that the
            devices do not divide, or a group loss that does more.
    """
    blocks.check(hidden_ND, head_VD, targets_N, spec, engine)
    if engine.loss_parameters is None:
        raise ValueError("this implementation has no kernel for the loss; use fpo_head_loss with its token_stats")
    if slots_N is None:  # a row is a group, whose completions have as many tokens each
        check(hidden_ND, loss_mask_N, operands, groups)
        rows = groups[0]
        slots_N = (
            jnp.arange(len(loss_mask_N), dtype=jnp.int32) // (len(loss_mask_N) // (groups[0] * groups[1])) % groups[1]
        )
    check(hidden_ND, loss_mask_N, operands, groups, rows=rows)
    shards = specs.shards(spec, specs.axes(spec).tokens)
    if rows % shards:
        raise ValueError(
            f"{rows} rows of whole groups are not divisible by the {shards} devices along {specs.axes(spec).tokens}"
        )
    operands = jax.tree.map(lambda x: jax.lax.stop_gradient(jnp.asarray(x, jnp.float32)), operands)
    slots_N = jnp.where(loss_mask_N, slots_N, -1).astype(jnp.int32)
    arrays = (jnp.asarray(hidden_ND), jnp.asarray(head_VD), jnp.asarray(targets_N), slots_N, operands)
    with jax.named_scope("fused_head_loss"):
        return _fused(*arrays, group_loss, groups, rows, spec, engine)


def sum_slots(values_NR: jax.Array, slots_NR: specs.Array | None, *, slots: int) -> jax.Array:
    """Sum values over the positions of every completion in a row: [..., N, slots]; without slots over the row.

    >>> sum_slots(jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[0, 1, 1]]), slots=3).tolist()
    [[1.0, 6.0, 0.0]]
    """
    if slots_NR is None:
        return jnp.sum(values_NR, axis=-1, keepdims=True)
    mine_NRP = slots_NR[..., None] == jnp.arange(slots)
    return jnp.sum(jnp.where(mine_NRP, values_NR[..., None], 0), axis=-2)


def check(
    hidden_ND: specs.Array,
    loss_mask_N: specs.Array,
    operands: Operands,
    groups: tuple[int, int],
    *,
    rows: int | None = None,
) -> None:
    """Check what is particular to groups; `rows`: stretches of tokens that hold whole groups, None where all are equal.

    Raises:
        ValueError: tokens that do not divide into B*K completions or groups and tokens that do not divide into rows, a
            mask of another shape or type, or operands that are neither [B, K] nor scalars.
    """
    tokens = hidden_ND.shape[0]
    if rows is None and tokens % (groups[0] * groups[1]):
        raise ValueError(
            f"{tokens} tokens do not divide into B*K = {groups[0]}*{groups[1]} completions; pad them to R each"
        )
    if rows is not None and (tokens % rows or groups[0] % rows):
        raise ValueError(f"{tokens} tokens and {groups[0]} groups do not divide into {rows} rows; fill up the rows")
    if loss_mask_N.shape != (tokens,) or loss_mask_N.dtype != bool:
        raise ValueError(
            f"loss_mask_N is {loss_mask_N.dtype}{list(loss_mask_N.shape)}, not {tokens} bools; pass one per token"
        )
    for leaf in jax.tree.leaves(operands):
        if jnp.shape(leaf) not in ((), tuple(groups)):
            raise ValueError(f"an operand has shape {jnp.shape(leaf)}; use [B, K] = {list(groups)} or a scalar")


def _run(hidden_ND, head_VD, targets_N, slots_N, operands, group_loss, groups, rows, spec, engine, gradient_of=()):
    """Run the kernels on every device: (Finished, Saved)."""
    in_vocab_N = (targets_N >= 0) & (targets_N < (spec.vocab_size or head_VD.shape[0]))
    shards = specs.shards(spec, specs.axes(spec).tokens)
    on_device = functools.partial(
        loss_kernel.finish,
        group_loss=group_loss,
        groups=(groups[0] // shards, groups[1]),
        rows=rows // shards,
        spec=spec,
        parameters=engine.loss_parameters,
    )

    def finish(partials, in_vocab_N, *extras):
        flagged_PN = jnp.where(in_vocab_N, partials.target_logit_PM, jnp.nan)
        return on_device(partials._replace(target_logit_PM=flagged_PN), *extras)

    args = (hidden_ND, head_VD, targets_N, in_vocab_N, slots_N, operands)
    return blocks.forward_saving(*args, spec=spec, engine=engine, finish=finish, gradient_of=gradient_of)


def _head_loss(done: loss_kernel.Finished) -> HeadLoss:
    return HeadLoss(done.losses_B, done.logps_BK, done.entropy_N, done.is_argmax_N)


def _forward(hidden_ND, head_VD, targets_N, slots_N, operands, *static) -> HeadLoss:
    return _head_loss(_run(hidden_ND, head_VD, targets_N, slots_N, operands, *static)[0])


def _forward_with_residuals(hidden_ND, head_VD, targets_N, slots_N, operands, *static):
    """Losses, and what the backward pass needs: that of the head, and the derivative of each loss."""
    primals = (hidden_ND, head_VD, targets_N, slots_N, operands)
    args = jax.tree.map(lambda x: x.value, primals, is_leaf=_is_primal)
    done, saved = _run(*args, *static, gradient_of=blocks.gradient_of(hidden_ND, head_VD))
    return _head_loss(done), (saved, args[3], args[4], done.slopes_BK)


def _backward(group_loss, groups, rows, spec, engine, residuals, cotangents):
    """Give every token the derivative of its completion, dlogp = dloss * slope + dlogp, then go on as any head does."""
    del group_loss, groups
    saved, slots_N, operands, slopes_BK = residuals
    dlosses_B, dlogps_BK = blocks.known(cotangents.losses_B), blocks.known(cotangents.logps_BK)
    dlogps_BK = dlosses_B[:, None] * slopes_BK + dlogps_BK
    dlogps_CS, slots_CT = dlogps_BK.reshape(rows, -1), slots_N.reshape(rows, -1)
    dlogps_CT = jnp.take_along_axis(dlogps_CS, jnp.maximum(slots_CT, 0), axis=1)
    dlogps_N = jnp.where(slots_CT >= 0, dlogps_CT, 0).reshape(-1)
    grads = blocks.backward(saved, dlogps_N, -dlogps_N, spec=spec, engine=engine)
    return (*grads, None, None, jax.tree.map(jnp.zeros_like, operands))


def _is_primal(x) -> bool:
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)


_fused = jax.custom_vjp(_forward, nondiff_argnums=(5, 6, 7, 8, 9))
_fused.defvjp(_forward_with_residuals, _backward, symbolic_zeros=True)
