"""The driver of every blocked head kernel: cuts the plane of logits, merges the softmax, talks to the mesh.

In: an `Engine`, two functions that compute one block of logits. Out: `token_stats` with its gradient. An engine knows
nothing of other blocks or devices; this module knows nothing of how a block is computed.

Forward: scan over blocks of head rows; the partial softmax of each block is merged into a running one. Backward: scan
once more; each block's logits are recomputed, its rows of dhead are finished and written once, dhidden is a running
float32 sum. Kept between the passes: the inputs and lse, nothing of size N*V. With a frozen head the dhead products are
dead code. On one device, a plane that fits the workspace whole is computed once instead, and kept (`plan_kept`).

On a mesh (`HeadSpec.placement`) everything happens inside `shard_map`: tokens stay where they are; a head that is cut
over its width is gathered one block at a time and its gradient scattered back the same way; a head that is cut over its
rows stays cut, and the partial softmax of the devices is merged like that of blocks.

Letters beyond `spec.py`: W rows of a head block, M tokens of a token block.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from fpo_jax.kernels import spec as specs

MASKED_LOGIT = -1e30  # finite, so that no inf - inf can arise
LANES = 128  # block sizes are multiples of the widest vector unit's row
MAX_TOKEN_BLOCK = 65536  # above it, blocks of the head become too thin for a matrix unit


class Partials(NamedTuple):
    """The softmax of a token over some of the vocabulary; float32 (float64 when given float64)."""

    max_M: specs.Array  # max of the logits
    sum_M: specs.Array  # sum of exp(z - max)
    target_logit_M: specs.Array  # z[target] where the target is among them, else 0
    centred_M: specs.Array  # sum of exp(z - max) * (z - max); anything finite unless the entropy is wanted


class Blocks(NamedTuple):
    """How the N x V plane of logits is cut, on one device."""

    tokens: int  # rows of hidden per block
    vocab: int  # rows of the head per block
    token_count: int  # blocks of tokens
    vocab_count: int  # blocks of the head
    workspace_bytes: int  # what is held of one block's logits


@dataclasses.dataclass(frozen=True)
class Engine:
    """How one block of the plane is computed and cut. Columns outside [first, last) have probability 0, gradient 0.

    Targets are columns of the block and may lie outside it. `first` and `last` are integers where known at trace time.

    forward(hidden_MD, head_WD, targets_M, first, last, *, spec) -> Partials
    backward(hidden_MD, head_WD, targets_M, lse_M, dtarget_M, dlse_M, first, last, *, spec, dtypes) ->
        (dhidden_MD, dhead_WD) in `dtypes`: those of hidden and head where the block is the whole plane, else float32
    plan_forward, plan_backward(tokens, head_rows, head_dtype, dtype, *, spec) -> Blocks
    plan_kept(tokens, head_rows, width, head_dtype, dtype, *, spec) -> Blocks, or None where no logits are kept. Where
        there are Blocks, forward and backward take hidden . head of the whole plane as `raw_MW`.
    """

    forward: Callable[..., Partials]
    backward: Callable[..., tuple[jax.Array, jax.Array]]
    plan_forward: Callable[..., Blocks]
    plan_backward: Callable[..., Blocks]
    plan_kept: Callable[..., Blocks | None] = lambda *_, **__: None

    def reading(self, raw_NV: jax.Array | None) -> "Engine":
        """Return the engine of one block that reads the kept plane; itself where nothing is kept."""
        if raw_NV is None:
            return self
        forward, backward = (
            functools.partial(self.forward, raw_MW=raw_NV),
            functools.partial(self.backward, raw_MW=raw_NV),
        )
        return Engine(forward, backward, whole, whole)


def plan_blocks(tokens: int, head_rows: int, logit_bytes: int, *, spec: specs.HeadSpec) -> Blocks:
    """Choose the largest blocks whose logits fit in `spec.workspace_bytes`, evenly cut.

        workspace = tokens * vocab_block * logit_bytes

    Blocks of the head are multiples of 128 rows, at least 128; more than 128 rows are cut in two at least, so that no
    [N, V] array exists however small the problem (`plan_kept` is the exception). Tokens are cut only above 65,536, or
    where even 128 rows exceed the budget.

    Args:
        tokens: on one device.
        head_rows: on one device, without padding.
        logit_bytes: held per logit.
        spec: `workspace_bytes` and `vocab_block` are read.

    Returns:
        Blocks; the last block of either axis may overlap the one before.

    >>> plan_blocks(8192, 128256, 6, spec=specs.HeadSpec(workspace_bytes=256 * 2**20))
    Blocks(tokens=8192, vocab=5376, token_count=1, vocab_count=24, workspace_bytes=264241152)
    """
    limit = spec.workspace_bytes // (min(spec.vocab_block or LANES, head_rows) * logit_bytes)
    token_count = _ceil_div(tokens, max(1, min(MAX_TOKEN_BLOCK, limit)))
    rows = _ceil_div(tokens, token_count)
    if spec.vocab_block is not None:
        block = spec.vocab_block
    else:
        largest = max(LANES, spec.workspace_bytes // (rows * logit_bytes) // LANES * LANES)
        count = max(2, _ceil_div(head_rows, largest))
        block = _ceil_div(_ceil_div(head_rows, count), LANES) * LANES
    block = min(block, head_rows)
    return Blocks(rows, block, token_count, _ceil_div(head_rows, block), rows * block * logit_bytes)


def plan_kept(tokens: int, head_rows: int, logit_bytes: int, row_bytes: int, *, spec: specs.HeadSpec) -> Blocks | None:
    """Plan one block whose logits stay from the forward pass to the backward pass; None where they do not.

        workspace = head_rows * (tokens * logit_bytes + row_bytes)

    They stay where that fits `spec.workspace_bytes`, but on a mesh and where `spec.vocab_block` asks for more blocks.
    A forward pass without a gradient keeps nothing and goes by `plan_blocks`.

    Args:
        tokens: rows of hidden.
        head_rows: with padding, as one block is the head as it is.
        logit_bytes: held per logit.
        row_bytes: held per row of the head.
        spec: `workspace_bytes`, `vocab_block` and `placement` are read.

    >>> plan_kept(512, 32000, 8, 0, spec=specs.HeadSpec())
    Blocks(tokens=512, vocab=32000, token_count=1, vocab_count=1, workspace_bytes=131072000)
    """
    held = head_rows * (tokens * logit_bytes + row_bytes)
    if spec.placement or held > spec.workspace_bytes or (spec.vocab_block or head_rows) < head_rows:
        return None
    return Blocks(tokens, head_rows, 1, 1, held)


def whole(tokens: int, head_rows: int, *_, **__) -> Blocks:
    """Return the plan of one block, for kernels that cut the plane themselves and hold none of it."""
    return Blocks(tokens, head_rows, 1, 1, 0)


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
    specs.check(hidden_ND, head_VD, targets_N, spec)
    hidden_ND, head_VD, targets_N = jnp.asarray(hidden_ND), jnp.asarray(head_VD), jnp.asarray(targets_N)
    with jax.named_scope("token_stats"):
        return flag_targets(_token_stats(hidden_ND, head_VD, targets_N, spec, engine), targets_N, head_VD, spec)


def flag_targets(stats: specs.TokenStats, targets_N, head_VD, spec: specs.HeadSpec) -> specs.TokenStats:
    """Set the target logit to NaN where the target is outside the vocabulary."""
    in_vocab_N = (targets_N >= 0) & (targets_N < (spec.vocab_size or head_VD.shape[0]))
    return stats._replace(target_logit_N=jnp.where(in_vocab_N, stats.target_logit_N, jnp.nan))


def forward(hidden_ND, head_VD, targets_N, spec: specs.HeadSpec, engine: Engine) -> specs.TokenStats:
    """Run the forward pass, on every device of the placement."""
    axes = specs.axes(spec)
    run = functools.partial(_forward_on_device, spec=spec, engine=engine)
    rows = PartitionSpec(axes.tokens)
    return on_mesh(run, (hidden_ND, head_VD, targets_N), spec, in_specs=(*_operand_specs(axes), rows), out_specs=rows)


def backward(hidden_ND, head_VD, targets_N, lse_N, dtarget_N, dlse_N, *, spec: specs.HeadSpec, engine: Engine):
    """Run the backward pass, on every device of the placement: (dhidden, dhead) in the dtypes of hidden and head."""
    axes = specs.axes(spec)
    run = functools.partial(_backward_on_device, spec=spec, engine=engine)
    operands, rows = _operand_specs(axes), PartitionSpec(axes.tokens)
    args = (hidden_ND, head_VD, targets_N, lse_N, dtarget_N, dlse_N)
    return on_mesh(run, args, spec, in_specs=(*operands, rows, rows, rows, rows), out_specs=operands)


def on_mesh(function: Callable, args: tuple, spec: specs.HeadSpec, *, in_specs, out_specs):
    """Call `function` once per device of the placement, or directly where there is none."""
    if spec.placement is None:
        return function(*args)
    # Values that differ between devices are told apart here, by in_specs and out_specs, not by the type system.
    sharded = jax.shard_map(function, mesh=spec.placement.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return sharded(*args)


def _operand_specs(axes: specs.Axes):
    return PartitionSpec(axes.tokens, None), PartitionSpec(axes.vocab, axes.width)


def _forward_on_device(hidden_ND, head_VD, targets_N, *, spec: specs.HeadSpec, engine: Engine) -> specs.TokenStats:
    operand = specs.operand_dtype(hidden_ND.dtype, head_VD.dtype, spec)
    hidden_ND, axes = hidden_ND.astype(operand), specs.axes(spec)
    share = _Share.of(head_VD, spec)
    blocks = engine.plan_forward(hidden_ND.shape[0], share.rows, head_VD.dtype, operand, spec=spec)
    scan = functools.partial(_scan_head, head_VD=head_VD, share=share, blocks=blocks, spec=spec, engine=engine)
    partials = _over_token_blocks(scan, hidden_ND, targets_N - share.first_row, blocks=blocks)
    if axes.vocab:
        partials = _merge_devices(partials, axes.vocab)
    lse_N = partials.max_M + jnp.log(partials.sum_M)
    entropy_N = is_argmax_N = None
    if spec.want_entropy:
        entropy_N = jnp.log(partials.sum_M) - partials.centred_M / partials.sum_M
    if spec.want_argmax:
        is_argmax_N = (partials.target_logit_M >= partials.max_M).astype(lse_N.dtype)
    return specs.TokenStats(partials.target_logit_M, lse_N, entropy_N, is_argmax_N)


def _scan_head(hidden_MD, targets_M, *, head_VD, share, blocks, spec, engine) -> Partials:
    """Statistics of one block of tokens: the partial softmax of each block of the head, merged."""

    def of_block(index):
        start, first, last, head_WD = _head_block(head_VD, index, share, blocks, hidden_MD.dtype, spec)
        return engine.forward(hidden_MD, head_WD, targets_M - start, first, last, spec=spec)

    if blocks.vocab_count == 1:
        return of_block(0)
    nothing_M = jnp.zeros_like(targets_M, specs.accumulator_dtype(hidden_MD.dtype))  # sharded as an input is
    nothing = Partials(nothing_M + MASKED_LOGIT, nothing_M, nothing_M, nothing_M)
    indices = jnp.arange(blocks.vocab_count, dtype=np.int32)
    return lax.scan(lambda running, index: (_merge(running, of_block(index)), None), nothing, indices)[0]


def _merge(left: Partials, right: Partials) -> Partials:
    """Softmax over the union of two disjoint parts of the vocabulary."""
    max_M = jnp.maximum(left.max_M, right.max_M)
    left, right = _move(left, max_M), _move(right, max_M)
    return Partials(max_M, *(a + b for a, b in zip(left[1:], right[1:], strict=True)))


def _merge_devices(partials: Partials, axis: str) -> Partials:
    """Softmax over the parts of the vocabulary that the devices along a mesh axis hold."""
    max_M = lax.pmax(partials.max_M, axis)
    return Partials(max_M, *lax.psum(_move(partials, max_M)[1:], axis))


def _move(partials: Partials, max_M) -> Partials:
    """Express the sums relative to a larger maximum."""
    shift_M = partials.max_M - max_M
    scale_M = jnp.exp(shift_M)
    centred_M = scale_M * (partials.centred_M + shift_M * partials.sum_M)
    return Partials(max_M, scale_M * partials.sum_M, partials.target_logit_M, centred_M)


def _over_token_blocks(scan, hidden_ND, targets_N, *, blocks: Blocks) -> Partials:
    """Run `scan` on each block of tokens and join the results; the last block overlaps the one before."""
    if blocks.token_count == 1:
        return scan(hidden_ND, targets_N)
    tokens = hidden_ND.shape[0]

    def of_block(first):
        start = jnp.minimum(first, tokens - blocks.tokens)
        return scan(*(lax.dynamic_slice_in_dim(x, start, blocks.tokens) for x in (hidden_ND, targets_N)))

    partials = lax.map(of_block, _first_rows(blocks.tokens, blocks.token_count))
    overlap = blocks.token_count * blocks.tokens - tokens
    return jax.tree.map(lambda x: jnp.concatenate([x[:-1].reshape(-1), x[-1, overlap:]]), partials)


def _backward_on_device(hidden_ND, head_VD, targets_N, lse_N, dtarget_N, dlse_N, *, spec, engine):
    """Head blocks outside, token blocks inside, so that each block of dhead is written once, finished.

    The blocks run from last to first: the shifted last block writes zeros over its overlap, which the block before
    replaces.
    """
    operand = specs.operand_dtype(hidden_ND.dtype, head_VD.dtype, spec)
    accumulator = specs.accumulator_dtype(operand)
    axes, share = specs.axes(spec), _Share.of(head_VD, spec)
    rows_N = (hidden_ND.astype(operand), targets_N - share.first_row, lse_N, dtarget_N, dlse_N)
    blocks = engine.plan_backward(hidden_ND.shape[0], share.rows, head_VD.dtype, operand, spec=spec)
    grads_of = functools.partial(_block_grads, rows_N, blocks=blocks, spec=spec, engine=engine)

    if blocks.vocab_count == 1 and blocks.token_count == 1 and not spec.placement:
        _, first, last, head_WD = _head_block(head_VD, 0, share, blocks, operand, spec)
        return grads_of(head_WD, 0, first, last, dtypes=(hidden_ND.dtype, head_VD.dtype))

    def head_block(grads, index):
        dhidden_ND, dhead_VD = grads
        start, first, last, head_WD = _head_block(head_VD, index, share, blocks, operand, spec)
        more_ND, dhead_WD = grads_of(head_WD, start, first, last, dtypes=(accumulator, accumulator))
        dhead_WD = _sum_over_tokens(dhead_WD, axes).astype(dhead_VD.dtype)
        return (dhidden_ND + more_ND, lax.dynamic_update_slice_in_dim(dhead_VD, dhead_WD, start, 0)), None

    nothing = (jnp.zeros_like(hidden_ND, accumulator), jnp.zeros_like(head_VD))
    indices = jnp.arange(blocks.vocab_count, dtype=np.int32)
    (dhidden_ND, dhead_VD), _ = lax.scan(head_block, nothing, indices, reverse=True)
    if axes.vocab:
        dhidden_ND = lax.psum(dhidden_ND, axes.vocab)
    return dhidden_ND.astype(hidden_ND.dtype), dhead_VD


def _block_grads(rows_N, head_WD, start, first, last, *, dtypes, blocks: Blocks, spec, engine: Engine):
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


def _sum_over_tokens(dhead_WD, axes: specs.Axes):
    """Add up what the devices' tokens contribute to a block of dhead; each keeps its columns."""
    if axes.width:
        dhead_WD = lax.psum_scatter(dhead_WD, axes.width, scatter_dimension=1, tiled=True)
    others = tuple(axis for axis in axes.tokens if axis != axes.width)
    return lax.psum(dhead_WD, others) if others else dhead_WD


class _Share(NamedTuple):
    """The part of the vocabulary that one device holds."""

    first_row: int | jax.Array  # of the device's head, in the vocabulary
    rows: int  # to be cut in blocks
    last: int | jax.Array  # rows beyond are padding

    @staticmethod
    def of(head_VD, spec: specs.HeadSpec) -> "_Share":
        """On a head that is cut over its rows, where the vocabulary ends depends on the device."""
        axes, rows = specs.axes(spec), head_VD.shape[0]
        if not axes.vocab:
            vocab_size = spec.vocab_size or rows
            return _Share(0, vocab_size, vocab_size)
        first_row = lax.axis_index(axes.vocab) * rows
        total = spec.vocab_size or rows * specs.shards(spec, axes.vocab)
        return _Share(first_row, rows, jnp.clip(total - first_row, 0, rows))


def _head_block(head_VD, index, share: _Share, blocks: Blocks, dtype, spec: specs.HeadSpec):
    """Block `index` of the head: (row it starts at, first and last column that count in it, the rows).

    One block is the head as it is, padding rows and dtype included: a slice or a cast would be a copy.
    """
    axes, width = specs.axes(spec), blocks.vocab
    if blocks.vocab_count == 1:
        start, first, last, head_WD = 0, 0, share.last, head_VD
    else:
        wanted = index * width
        start = jnp.minimum(wanted, share.rows - width)
        first, last = wanted - start, jnp.minimum(share.last - start, width)
        if isinstance(share.last, int) and share.rows % width == 0:
            first, last = 0, width
        head_WD = lax.dynamic_slice_in_dim(head_VD, start, width)
        if head_VD.dtype == jnp.float32 and dtype == jnp.bfloat16:
            # XLA for TPUs would see that float32 is never needed, and hold the whole head in bfloat16 beside it.
            bits_WD = lax.optimization_barrier(lax.bitcast_convert_type(head_WD, jnp.uint32))
            head_WD = lax.bitcast_convert_type(bits_WD, jnp.float32)
    if axes.width:  # cast first: half the bytes to gather
        head_WD = lax.all_gather(head_WD.astype(dtype), axes.width, axis=1, tiled=True)
    return start, first, last, head_WD


def _first_rows(block, count):
    """First row that each of `count` blocks is responsible for, int32."""
    return jnp.arange(count, dtype=np.int32) * block


def _ceil_div(numerator, denominator):
    """Quotient of two positive integers, rounded up."""
    return -(-numerator // denominator)


def _forward_with_residuals(hidden_ND, head_VD, targets_N, spec, engine):
    """Forward pass, and what the backward pass needs of it."""
    operand, raw_NV = specs.operand_dtype(hidden_ND.dtype, head_VD.dtype, spec), None
    if engine.plan_kept(hidden_ND.shape[0], *head_VD.shape, head_VD.dtype, operand, spec=spec):
        raw_NV = specs.product(hidden_ND.astype(operand), head_VD.astype(operand), 1, 1)
    stats = forward(hidden_ND, head_VD, targets_N, spec, engine.reading(raw_NV))
    return stats, (hidden_ND, head_VD, targets_N, stats.lse_N, raw_NV)


def _backward_with_residuals(spec, engine, residuals, cotangents):
    hidden_ND, head_VD, targets_N, lse_N, raw_NV = residuals
    dtarget_N, dlse_N = cotangents.target_logit_N, cotangents.lse_N
    engine = engine.reading(raw_NV)
    grads = backward(hidden_ND, head_VD, targets_N, lse_N, dtarget_N, dlse_N, spec=spec, engine=engine)
    return (*grads, None)


_token_stats = jax.custom_vjp(forward, nondiff_argnums=(3, 4))
_token_stats.defvjp(_forward_with_residuals, _backward_with_residuals)
