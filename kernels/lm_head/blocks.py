"""The driver of every blocked head kernel: cuts the plane of logits, merges the softmax, talks to the mesh.

In: an `Engine`, two functions that compute one block of logits. Out: `token_stats` with its gradient. An engine knows
nothing of other blocks or devices; this module knows nothing of how a block is computed.

Forward: scan over blocks of head rows; the partial softmax of each block is merged into a running one. Backward: scan
once more; each block's logits are recomputed, its rows of dhead are finished and written once, dhidden is a running
float32 sum. Kept between the passes: the inputs and lse, nothing of size N*V. With a frozen head the dhead products are
dead code. On one device, a plane that fits the workspace whole is computed once instead, and kept (`kept_tiles`).

On a mesh (`HeadSpec.placement`) everything happens inside `shard_map`: tokens stay where they are; a head that is cut
over its width is gathered one block at a time and its gradient scattered back the same way; a head that is cut over its
rows stays cut, and the partial softmax of the devices is merged like that of blocks.

Letters beyond `spec.py`: W rows of a head block, M tokens of a token block.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from fpo_jax.kernels.lm_head import frozen, head_blocks, tiling
from fpo_jax.kernels.lm_head import spec as specs

MASKED_LOGIT = -1e30  # finite, so that no inf - inf can arise


class Partials(NamedTuple):
    """The softmax of a token over P parts of the vocabulary; float32 (float64 when given float64).

    The parts lie side by side: splits of a kernel, or devices. `finish` merges them, here or in a kernel.
    """

    max_PM: specs.Array  # max of the logits
    sum_PM: specs.Array  # sum of exp(z - max)
    target_logit_PM: specs.Array  # z[target] where the target is among them, else 0
    centred_PM: specs.Array  # sum of exp(z - max) * (z - max); anything finite unless the entropy is wanted


class Saved(NamedTuple):
    """What the backward pass reads besides its cotangents. Nothing is of size N*V, but a plane that is kept."""

    hidden_ND: jax.Array
    head_VD: jax.Array
    targets_N: jax.Array
    lse_N: jax.Array
    raw_NV: jax.Array | None  # hidden . head, where it is kept
    pulled: frozen.Pulled | None  # where the head is frozen


Finish = Callable[..., Any]  # (Partials, *extras) -> a pytree with a field `lse_N`


@dataclasses.dataclass(frozen=True)
class Engine:
    """How one block of the plane is computed and cut. Columns outside [first, last) have probability 0, gradient 0.

    Targets are columns of the block and may lie outside it. `first` and `last` are integers where known at trace time.

    forward(hidden_MD, head_WD, targets_M, first, last, *, spec, running) -> Partials, merged into `running` unless None
    backward(hidden_MD, head_WD, targets_M, lse_M, dtarget_M, dlse_M, first, last, *, spec, dtypes) ->
        (dhidden_MD, dhead_WD) in `dtypes`: those of hidden and head where the block is the whole plane, else float32
    forward_tiles, backward_tiles, pull_tiles(tokens, head_rows, head_dtype, dtype, *, spec) -> Blocks
    kept_tiles(tokens, head_rows, width, head_dtype, dtype, *, spec) -> Blocks, or None where no logits are kept
    plane: whose forward and backward take hidden . head of the whole plane as `raw_MW`; None: its own
    pull(hidden_MD, head_WD, targets_M, first, last, *, spec, running) -> (Partials, pulled_PMD), see `frozen.py`; None
        where a frozen head is treated like any other
    loss_parameters: what the compiler of `loss_kernel.py` is told; None where that has no kernel
    obstacle(hidden_ND, head_VD, spec) -> why the engine cannot run, in words; "" where it can
    """

    forward: Callable[..., Partials]
    backward: Callable[..., tuple[jax.Array, jax.Array]]
    forward_tiles: Callable[..., tiling.Blocks]
    backward_tiles: Callable[..., tiling.Blocks]
    kept_tiles: Callable[..., tiling.Blocks | None] = lambda *_, **__: None
    plane: "Engine | None" = None
    pull: Callable[..., tuple[Partials, jax.Array]] | None = None
    pull_tiles: Callable[..., tiling.Blocks] = tiling.whole
    loss_parameters: Any = None
    obstacle: Callable[..., str] = lambda *_: ""

    def reading(self, raw_NV: jax.Array | None) -> "Engine":
        """Return the engine of one block that reads the kept plane; itself where nothing is kept."""
        if raw_NV is None:
            return self
        plane = self.plane or self
        forward = functools.partial(plane.forward, raw_MW=raw_NV)
        backward = functools.partial(plane.backward, raw_MW=raw_NV)
        return Engine(forward, backward, tiling.whole, tiling.whole)


def token_stats(
    hidden_ND: specs.Array, head_VD: specs.Array, targets_N: specs.Array, *, spec: specs.HeadSpec, engine: Engine
) -> specs.TokenStats:
    """Compute target logit and log-sum-exp of every token, block by block.

        z[n, v] = logit_scale * cap(x[n, v]),  x[n, v] = hidden[n] . head[v]
        target_logit[n] = z[n, target[n]];  lse[n] = log sum_v exp z[n, v]
        dx[n, v] = (g_target[n] * [v == target[n]] + g_lse[n] * softmax(z[n])[v]) * logit_scale * cap'(x[n, v])

    Args, returns and errors are those of `reference.token_stats`. Reverse mode only; gradients come in the dtypes of
    hidden and head.
    """
    check(hidden_ND, head_VD, targets_N, spec, engine)
    hidden_ND, head_VD, targets_N = jnp.asarray(hidden_ND), jnp.asarray(head_VD), jnp.asarray(targets_N)
    with jax.named_scope("token_stats"):
        return flag_targets(_token_stats(hidden_ND, head_VD, targets_N, spec, engine), targets_N, head_VD, spec)


def check(hidden_ND, head_VD, targets_N, spec: specs.HeadSpec, engine: Engine) -> None:
    """Check what `spec.check` does, and that the engine can run.

    Raises:
        ValueError: with the reason.
    """
    specs.check(hidden_ND, head_VD, targets_N, spec)
    reason = engine.obstacle(hidden_ND, head_VD, spec)
    if reason:
        raise ValueError(f"{reason}; use the implementation 'chunked'")


def flag_targets(stats: specs.TokenStats, targets_N, head_VD, spec: specs.HeadSpec) -> specs.TokenStats:
    """Set the target logit to NaN where the target is outside the vocabulary."""
    in_vocab_N = (targets_N >= 0) & (targets_N < (spec.vocab_size or head_VD.shape[0]))
    return stats._replace(target_logit_N=jnp.where(in_vocab_N, stats.target_logit_N, jnp.nan))


def forward(hidden_ND, head_VD, targets_N, *extras, spec: specs.HeadSpec, engine: Engine, finish: Finish):
    """Run the forward pass, on every device of the placement; the result is what `finish` returns.

    Args:
        hidden_ND: as `token_stats`.
        head_VD: as `token_stats`.
        targets_N: as `token_stats`.
        extras: pytrees for `finish`, of arrays cut over the devices as the tokens are, and of scalars.
        spec: options of the head.
        engine: how a block is computed.
        finish: (partials, *extras) -> a pytree of arrays, their first axis along the tokens'; runs on every device.
    """
    return forward_saving(hidden_ND, head_VD, targets_N, *extras, spec=spec, engine=engine, finish=finish)[0]


def forward_saving(hidden_ND, head_VD, targets_N, *extras, spec, engine: Engine, finish: Finish, gradient_of=()):
    """Run the forward pass as `forward` does, and save what the backward pass needs: (what `finish` returns, Saved).

    `gradient_of` names which of "hidden" and "head" there will be a gradient of.
    """
    axes = specs.axes(spec)
    rows, plane = PartitionSpec(axes.tokens), PartitionSpec(axes.tokens, axes.vocab)
    operands, raw_NV = (hidden_ND, head_VD), None
    extra_specs = jax.tree.map(lambda x: rows if jnp.ndim(x) else PartitionSpec(), extras)
    if gradient_of and planned_to_keep(hidden_ND, head_VD, spec=spec, engine=engine):
        product = functools.partial(_product_on_device, spec=spec)
        raw_NV = on_mesh(product, operands, spec, in_specs=_operand_specs(axes), out_specs=plane)
    pulls = gradient_of == ("hidden",) and raw_NV is None and engine.pull is not None
    run = functools.partial(_forward_on_device, spec=spec, engine=engine, finish=finish, pulls=pulls)
    out, pulled = on_mesh(
        run,
        (*operands, targets_N, raw_NV, extras),
        spec,
        in_specs=(*_operand_specs(axes), rows, plane, extra_specs),
        out_specs=rows,
    )
    return out, Saved(hidden_ND, head_VD, targets_N, out.lse_N, raw_NV, pulled)


def backward(saved: Saved, dtarget_N, dlse_N, *, spec: specs.HeadSpec, engine: Engine):
    """Run the backward pass, on every device of the placement: (dhidden, dhead) in the dtypes of hidden and head.

    dhead is None for a frozen head whose gradient was prepared by the forward pass.
    """
    axes = specs.axes(spec)
    operands, rows = _operand_specs(axes), PartitionSpec(axes.tokens)
    tokens_N = (saved.lse_N, dtarget_N, dlse_N)
    if saved.pulled is not None:
        operand = specs.operand_dtype(saved.hidden_ND.dtype, saved.head_VD.dtype, spec)
        run = functools.partial(frozen.pull_back, spec=spec, dtype=operand)
        args = (saved.head_VD, saved.targets_N, saved.pulled, *tokens_N)
        dhidden_ND = on_mesh(run, args, spec, in_specs=(operands[1], *[rows] * 5), out_specs=operands[0])
        return dhidden_ND.astype(saved.hidden_ND.dtype), None
    run = functools.partial(_backward_on_device, spec=spec, engine=engine)
    args = (saved.hidden_ND, saved.head_VD, saved.targets_N, saved.raw_NV, *tokens_N)
    in_specs = (*operands, rows, PartitionSpec(axes.tokens, axes.vocab), rows, rows, rows)
    return on_mesh(run, args, spec, in_specs=in_specs, out_specs=operands)


def planned_to_keep(hidden_ND, head_VD, *, spec: specs.HeadSpec, engine: Engine) -> tiling.Blocks | None:
    """Return the plan of a plane that is kept, per device; None where the logits are computed again."""
    axes, operand = specs.axes(spec), specs.operand_dtype(hidden_ND.dtype, head_VD.dtype, spec)
    tokens = hidden_ND.shape[0] // specs.shards(spec, axes.tokens)
    rows = head_VD.shape[0] // specs.shards(spec, axes.vocab)
    return engine.kept_tiles(tokens, rows, head_VD.shape[1], head_VD.dtype, operand, spec=spec)


def on_mesh(function: Callable, args: tuple, spec: specs.HeadSpec, *, in_specs, out_specs):
    """Call `function` once per device of the placement, or directly where there is none."""
    if spec.placement is None:
        return function(*args)
    # Values that differ between devices are told apart here, by in_specs and out_specs, not by the type system.
    where = specs.mesh_or_rest(spec.placement.mesh)
    sharded = jax.shard_map(function, **where, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return sharded(*args)


def _operand_specs(axes: specs.Axes):
    return PartitionSpec(axes.tokens, None), PartitionSpec(axes.vocab, axes.width or None)


def _product_on_device(hidden_ND, head_VD, *, spec: specs.HeadSpec) -> jax.Array:
    """All raw products that a device is responsible for."""
    operand, share = specs.operand_dtype(hidden_ND.dtype, head_VD.dtype, spec), head_blocks.Share.of(head_VD, spec)
    whole = tiling.whole(hidden_ND.shape[0], share.rows)
    head_WD = head_blocks.fetch(head_VD, 0, share=share, blocks=whole, dtype=operand, spec=spec)
    return specs.product(hidden_ND.astype(operand), head_WD.astype(operand), 1, 1)


def _forward_on_device(hidden_ND, head_VD, targets_N, raw_NV, extras, *, spec, engine: Engine, finish: Finish, pulls):
    """Partial softmax of every token, then `finish`: (what that returns, Pulled or None)."""
    operand = specs.operand_dtype(hidden_ND.dtype, head_VD.dtype, spec)
    hidden_ND, axes, share = hidden_ND.astype(operand), specs.axes(spec), head_blocks.Share.of(head_VD, spec)
    engine = engine.reading(raw_NV)
    block_of = engine.forward
    plan = engine.forward_tiles
    if pulls:
        assert engine.pull is not None
        block_of, plan = engine.pull, engine.pull_tiles
    blocks = plan(hidden_ND.shape[0], share.rows, head_VD.dtype, operand, spec=spec)
    scan = functools.partial(_scan_head, head_VD=head_VD, share=share, blocks=blocks, spec=spec, block_of=block_of)
    found: Any = _over_token_blocks(scan, hidden_ND, targets_N - share.first_row, blocks=blocks)
    own, pulled_PND = found if pulls else (found, None)
    partials = own
    if axes.vocab:  # the parts of all devices, as they are: a few numbers per token
        partials = Partials(*lax.all_gather(jnp.stack(own), axes.vocab, axis=1, tiled=True))
    out = finish(partials, *extras)
    return out, None if pulled_PND is None else frozen.finish(pulled_PND, own, partials, out.lse_N, spec=spec)


def statistics(partials: Partials, *, spec: specs.HeadSpec) -> specs.TokenStats:
    """Finish the softmax of every token: merge its parts, in their order."""
    max_M, sum_M, target_logit_M, centred_M = (x_PM[0] for x_PM in joined(partials))
    lse_M = max_M + jnp.log(sum_M)
    entropy_M = jnp.log(sum_M) - centred_M / sum_M if spec.want_entropy else None
    is_argmax_M = (target_logit_M >= max_M).astype(lse_M.dtype) if spec.want_argmax else None
    return specs.TokenStats(target_logit_M, lse_M, entropy_M, is_argmax_M)


def joined(partials: Partials) -> Partials:
    """Merge the parts of the vocabulary into one."""
    if len(partials.max_PM) == 1:
        return partials
    max_PM = jnp.max(partials.max_PM, axis=0, keepdims=True)
    return Partials(max_PM, *(jnp.sum(x_PM, axis=0, keepdims=True) for x_PM in _move(partials, max_PM)[1:]))


def _scan_head(hidden_MD, targets_M, *, head_VD, share, blocks, spec, block_of):
    """The softmax of one block of tokens: that of each block of the head, merged into the one so far."""

    def of_block(running, index, head_WD):
        start, first, last = head_blocks.window(index, share, blocks)
        return block_of(hidden_MD, head_WD, targets_M - start, first, last, spec=spec, running=running)

    fetch = functools.partial(head_blocks.fetch, head_VD, share=share, blocks=blocks, dtype=hidden_MD.dtype, spec=spec)
    if blocks.vocab_count == 1:
        return of_block(None, 0, fetch(0))
    nothing = nothing_of(jax.eval_shape(of_block, None, 0, jax.eval_shape(fetch, 0)))
    order = np.arange(blocks.vocab_count, dtype=np.int32)
    return head_blocks.walk(of_block, fetch, nothing, order, ahead=bool(specs.axes(spec).width))


def nothing_of(shapes):
    """The softmax over no part of the vocabulary, of the same shapes."""
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    partials = nothing if isinstance(nothing, Partials) else nothing[0]
    partials = partials._replace(max_PM=partials.max_PM + MASKED_LOGIT)
    return partials if isinstance(nothing, Partials) else (partials, *nothing[1:])


def merge(running: Partials | None, block: Partials) -> Partials:
    """Softmax over the union of two disjoint parts of the vocabulary; `running` is None before the first."""
    if running is None:
        return block
    max_PM = jnp.maximum(running.max_PM, block.max_PM)
    running, block = _move(running, max_PM), _move(block, max_PM)
    return Partials(max_PM, *(a + b for a, b in zip(running[1:], block[1:], strict=True)))


def _move(partials: Partials, max_PM) -> Partials:
    """Express the sums relative to a larger maximum."""
    shift_PM = partials.max_PM - max_PM
    scale_PM = jnp.exp(shift_PM)
    centred_PM = scale_PM * (partials.centred_PM + shift_PM * partials.sum_PM)
    return Partials(partials.max_PM, scale_PM * partials.sum_PM, partials.target_logit_PM, centred_PM)


def _over_token_blocks(scan, hidden_ND, targets_N, *, blocks: tiling.Blocks):
    """Run `scan` on each block of tokens and join the results; the last block overlaps the one before."""
    if blocks.token_count == 1:
        return scan(hidden_ND, targets_N)
    tokens = hidden_ND.shape[0]

    def of_block(first):
        start = jnp.minimum(first, tokens - blocks.tokens)
        return scan(*(lax.dynamic_slice_in_dim(x, start, blocks.tokens) for x in (hidden_ND, targets_N)))

    partials = lax.map(of_block, _first_rows(blocks.tokens, blocks.token_count))
    overlap = blocks.token_count * blocks.tokens - tokens
    return jax.tree.map(lambda x: jnp.concatenate([*x[:-1], x[-1][:, overlap:]], axis=1), partials)


def _backward_on_device(hidden_ND, head_VD, targets_N, raw_NV, lse_N, dtarget_N, dlse_N, *, spec, engine: Engine):
    """Head blocks outside, token blocks inside, so that each block of dhead is written once, finished.

    The blocks run from last to first: the shifted last block writes zeros over its overlap, which the block before
    replaces.
    """
    operand = specs.operand_dtype(hidden_ND.dtype, head_VD.dtype, spec)
    accumulator, engine = specs.accumulator_dtype(operand), engine.reading(raw_NV)
    axes, share = specs.axes(spec), head_blocks.Share.of(head_VD, spec)
    rows_N = (hidden_ND.astype(operand), targets_N - share.first_row, lse_N, dtarget_N, dlse_N)
    blocks = engine.backward_tiles(hidden_ND.shape[0], share.rows, head_VD.dtype, operand, spec=spec)
    grads_of = functools.partial(_block_grads, rows_N, blocks=blocks, spec=spec, engine=engine)

    if blocks.vocab_count == 1 and blocks.token_count == 1 and not spec.placement:
        head_WD = head_blocks.fetch(head_VD, 0, share=share, blocks=blocks, dtype=operand, spec=spec)
        _, first, last = head_blocks.window(0, share, blocks)
        return grads_of(head_WD, 0, first, last, dtypes=(hidden_ND.dtype, head_VD.dtype))

    def write(dhead_VD, start, dhead_WD):
        dhead_WD = head_blocks.sum_over_tokens(dhead_WD, axes).astype(dhead_VD.dtype)
        return lax.dynamic_update_slice_in_dim(dhead_VD, dhead_WD, start, 0)

    def head_block(carry, index, head_WD):
        """What a block before this one is summed over devices while this one is computed, where that takes a while."""
        dhidden_ND, dhead_VD, *before = carry
        dhead_VD = write(dhead_VD, *before) if before else dhead_VD
        start, first, last = head_blocks.window(index, share, blocks)
        more_ND, dhead_WD = grads_of(head_WD, start, first, last, dtypes=(accumulator, accumulator))
        if before:
            return dhidden_ND + more_ND, dhead_VD, start, dhead_WD
        return dhidden_ND + more_ND, write(dhead_VD, start, dhead_WD)

    fetch = functools.partial(head_blocks.fetch, head_VD, share=share, blocks=blocks, dtype=operand, spec=spec)
    order, ahead = (
        np.arange(blocks.vocab_count, dtype=np.int32)[::-1],
        bool(axes.width) and blocks.vocab_count > 1,
    )
    carry: tuple = (jnp.zeros_like(hidden_ND, accumulator), jnp.zeros_like(head_VD))
    if ahead:  # a first block of zeros, where the last one will be written
        zeros_WD = jnp.zeros((blocks.vocab, hidden_ND.shape[1]), accumulator)
        carry = (*carry, jnp.int32(head_blocks.window(order[0], share, blocks)[0]), zeros_WD)
    dhidden_ND, dhead_VD, *before = head_blocks.walk(head_block, fetch, carry, order, ahead=ahead)
    dhead_VD = write(dhead_VD, *before) if before else dhead_VD
    if axes.vocab:
        dhidden_ND = lax.psum(dhidden_ND, axes.vocab)
    return dhidden_ND.astype(hidden_ND.dtype), dhead_VD


def _block_grads(rows_N, head_WD, start, first, last, *, dtypes, blocks: tiling.Blocks, spec, engine: Engine):
    """Gradients through one block of the head: (dhidden of all tokens, its rows of dhead)."""
    backward_block = functools.partial(engine.backward, spec=spec, dtypes=dtypes)
    hidden_ND, targets_N, *others_N = rows_N
    if blocks.token_count == 1:
        return backward_block(hidden_ND, head_WD, targets_N - start, *others_N, first, last)
    tokens = hidden_ND.shape[0]

    def token_block(grads, token_first):
        dhidden_ND, dhead_WD = grads
        token_start = jnp.minimum(token_first, tokens - blocks.tokens)
        hidden_MD, targets_M, lse_M, *cotangents_M = (
            lax.dynamic_slice_in_dim(x, token_start, blocks.tokens) for x in rows_N
        )
        is_new_M = token_start + jnp.arange(blocks.tokens) >= token_first
        cotangents_M = [jnp.where(is_new_M, g_M, 0) for g_M in cotangents_M]
        more_MD, more_WD = backward_block(hidden_MD, head_WD, targets_M - start, lse_M, *cotangents_M, first, last)
        more_MD += lax.dynamic_slice_in_dim(dhidden_ND, token_start, blocks.tokens)
        return (lax.dynamic_update_slice_in_dim(dhidden_ND, more_MD, token_start, 0), dhead_WD + more_WD), None

    nothing = (jnp.zeros_like(hidden_ND, dtypes[0]), jnp.zeros(head_WD.shape, dtypes[1]))
    return lax.scan(token_block, nothing, _first_rows(blocks.tokens, blocks.token_count))[0]


def _first_rows(block, count):
    """First row that each of `count` blocks is responsible for, int32."""
    return jnp.arange(count, dtype=np.int32) * block


def gradient_of(hidden, head) -> tuple[str, ...]:
    """Which of the two there will be a gradient of, as `jax.custom_vjp` tells the forward pass."""
    return tuple(name for name, primal in (("hidden", hidden), ("head", head)) if primal.perturbed)


def known(cotangent: Any) -> jax.Array:
    """A cotangent, as an array also where it is zero."""
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        aval: Any = cotangent.aval
        return jnp.zeros(aval.shape, aval.dtype)
    return cotangent


def _statistics_of(hidden_ND, head_VD, targets_N, spec: specs.HeadSpec, engine: Engine) -> specs.TokenStats:
    finish = functools.partial(statistics, spec=spec)
    return forward(hidden_ND, head_VD, targets_N, spec=spec, engine=engine, finish=finish)


def _statistics_forward(hidden_ND, head_VD, targets_N, spec: specs.HeadSpec, engine: Engine):
    finish, wanted = functools.partial(statistics, spec=spec), gradient_of(hidden_ND, head_VD)
    args = (hidden_ND.value, head_VD.value, targets_N.value)
    return forward_saving(*args, spec=spec, engine=engine, finish=finish, gradient_of=wanted)


def _statistics_backward(spec: specs.HeadSpec, engine: Engine, saved: Saved, cotangents):
    dtarget_N, dlse_N = known(cotangents.target_logit_N), known(cotangents.lse_N)
    return (*backward(saved, dtarget_N, dlse_N, spec=spec, engine=engine), None)


_token_stats = jax.custom_vjp(_statistics_of, nondiff_argnums=(3, 4))
_token_stats.defvjp(_statistics_forward, _statistics_backward, symbolic_zeros=True)
