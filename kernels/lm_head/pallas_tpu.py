"""`token_stats` in Pallas for TPUs: logits live in VMEM only, one tile at a time.

In: hidden states, head, targets. Out: `TokenStats`. The forward pass is one kernel, the backward pass XLA blocks (8NDV
floating-point operations in all, a workspace of `spec.workspace_bytes`). Runs on v5e, v5p, v6e and v7x; anywhere else
with `spec.interpret`.

A tile of logits is [W, M], vocabulary down and tokens across, so that every per-token number is a row vector: the
softmax reduces over sublanes, and [1, N] arrays need no lane padding. The head is read as it is, [V, D]: no padded
copy for an odd V, no cast copy of a float32 master head. Ragged edges are masked in the kernel.

Letters: W rows of the head and M tokens in a tile, D model width.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fpo_jax.kernels.lm_head import blocks, chunked, tiling
from fpo_jax.kernels.lm_head import spec as specs

VMEM_BYTES = 64 * 2**20  # of one TensorCore of a v5p or v7x; a v5e or v6e has twice that
VMEM_MARGIN = 6 * 2**20  # for what the compiler keeps beside our tiles
TILES = ((1024, 1024), (1024, 512), (512, 512), (512, 256), (256, 256), (256, 128), (128, 128))  # (tokens, head rows)


def token_stats(
    hidden_ND: specs.Array, head_VD: specs.Array, targets_N: specs.Array, *, spec: specs.HeadSpec
) -> specs.TokenStats:
    """Compute target logit and log-sum-exp of every token; forward in one kernel, backward in XLA blocks.

    Args, returns and gradients are those of `chunked.token_stats`, in bfloat16 or float32.

    Raises:
        ValueError: shapes or dtypes that do not fit (see `spec.check`), or that `unsupported` names.
    """
    return blocks.token_stats(hidden_ND, head_VD, targets_N, spec=spec, engine=ENGINE)


def unsupported(*, width: int, head_dtype, dtype) -> str:
    """Return why these kernels cannot run, in words; "" where they can.

    Args:
        width: D.
        head_dtype: of the head in memory.
        dtype: of the operands.
    """
    if jnp.dtype(dtype).name not in ("bfloat16", "float32"):
        return f"{jnp.dtype(dtype).name} operands; the TPU kernels multiply bfloat16 or float32"
    if _tiles(width, head_dtype, dtype) is None:
        smallest = _vmem_bytes(*TILES[-1], width, head_dtype, dtype)
        return (
            f"D={width}: the smallest tile of the forward kernel takes {smallest / 2**20:.0f} MiB of VMEM, "
            f"{(VMEM_BYTES - VMEM_MARGIN) / 2**20:.0f} MiB are there"
        )
    return ""


def _obstacle(hidden_ND, head_VD, spec: specs.HeadSpec) -> str:
    operand = specs.operand_dtype(hidden_ND.dtype, head_VD.dtype, spec)
    return unsupported(width=hidden_ND.shape[1], head_dtype=head_VD.dtype, dtype=operand)


def forward_block(
    hidden_MD, head_WD, targets_M, first, last, *, spec: specs.HeadSpec, running: blocks.Partials | None = None
) -> blocks.Partials:
    """Fold the rows [first, last) of a block of the head into the running softmax, in place, in one kernel."""
    call = Call.of(hidden_MD, head_WD, targets_M, (first, last))
    row = jax.ShapeDtypeStruct((1, hidden_MD.shape[0]), jnp.float32)
    before = () if running is None else running
    partials_1M = pl.pallas_call(
        functools.partial(_forward_kernel, call=call, spec=spec),
        grid=call.grid,
        in_specs=[*call.in_specs, *[call.row_spec] * len(before)],
        out_specs=[call.row_spec] * 4,
        out_shape=[row] * 4,
        input_output_aliases={len(call.inputs) + field: field for field in range(len(before))},
        compiler_params=parameters("parallel", "arbitrary"),
        interpret=spec.interpret,
        name="token_stats",
    )(*call.inputs, *before)
    return blocks.Partials(*partials_1M)


def _forward_kernel(window, hidden, head, targets, *references, call, spec):
    """Fold one tile of logits into the running softmax, which stays in the outputs until its row of tiles ends."""
    before, outputs = references[:-4], references[-4:]

    @pl.when(pl.program_id(1) == 0)
    def _():
        write(outputs, [x[...] for x in before] or (blocks.MASKED_LOGIT, 0.0, 0.0, 0.0))

    write(outputs, fold_tile(outputs, window, hidden, head, targets, call=call, spec=spec))


def write(references, values) -> None:
    """Store one value in each reference."""
    for reference, value in zip(references, values, strict=True):
        reference[...] = jnp.broadcast_to(value, reference.shape)


def fold_tile(partials, window, hidden, head, targets, *, call, spec: specs.HeadSpec) -> blocks.Partials:
    """Fold a tile of logits into the running softmax held in `partials`; every field is [1, M]."""
    max_1M, sum_1M, target_logit_1M, centred_1M = (reference[...] for reference in partials)
    logits_WM, columns_WM = _logits(window, hidden, head, call=call, spec=spec)
    new_max_1M = jnp.maximum(max_1M, jnp.max(logits_WM, axis=0, keepdims=True))
    shift_1M, shifted_WM = max_1M - new_max_1M, logits_WM - new_max_1M
    scale_1M, exp_WM = jnp.exp(shift_1M), jnp.exp(shifted_WM)
    if spec.want_entropy:
        centred_1M = scale_1M * (centred_1M + shift_1M * sum_1M) + jnp.sum(exp_WM * shifted_WM, 0, keepdims=True)
    is_target_WM = (columns_WM == targets[...]) & (columns_WM >= window[0]) & (columns_WM < window[1])
    target_logit_1M += jnp.sum(jnp.where(is_target_WM, logits_WM, 0), axis=0, keepdims=True)
    sum_1M = scale_1M * sum_1M + jnp.sum(exp_WM, axis=0, keepdims=True)
    return blocks.Partials(new_max_1M, sum_1M, target_logit_1M, centred_1M)


def _logits(window, hidden, head, *, call, spec: specs.HeadSpec):
    """Logits of a tile, and the columns of the block they belong to."""
    raw_WM = specs.product(head[...].astype(hidden.dtype), hidden[...], 1, 1)
    columns_WM = pl.program_id(1) * call.rows + lax.broadcasted_iota(jnp.int32, raw_WM.shape, 0)
    logits_WM, _ = specs.cap(raw_WM, spec)
    counts_WM = (columns_WM >= window[0]) & (columns_WM < window[1])
    return jnp.where(counts_WM, logits_WM, blocks.MASKED_LOGIT), columns_WM


class Call(NamedTuple):
    """How the kernel walks the plane: tiles of tokens by tiles of the head, the head inside."""

    rows: int  # of the head in a tile
    grid: tuple[int, int]
    in_specs: list
    inputs: tuple
    row_spec: pl.BlockSpec  # of a [1, N] array

    @staticmethod
    def of(hidden_MD, head_WD, targets_M, window) -> "Call":
        """Cut the plane; `window` are the rows of the head that count."""
        (token_total, width), row_total = hidden_MD.shape, head_WD.shape[0]
        tiles = _tiles(width, head_WD.dtype, hidden_MD.dtype)
        assert tiles is not None, "check() comes first"
        tokens, rows = min(tiles[0], token_total), min(tiles[1], row_total)
        row_spec = pl.BlockSpec((1, tokens), lambda i, j: (0, i))
        in_specs = [
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((tokens, width), lambda i, j: (i, 0)),
            pl.BlockSpec((rows, width), lambda i, j: (j, 0)),
            row_spec,
        ]
        inputs = (jnp.array(window, jnp.int32), hidden_MD, head_WD, targets_M[None])
        return Call(rows, (pl.cdiv(token_total, tokens), pl.cdiv(row_total, rows)), in_specs, inputs, row_spec)


def _tiles(width: int, head_dtype, dtype) -> tuple[int, int] | None:
    """Largest (tokens, head rows) of TILES that the kernel has room for in VMEM; None if not even the smallest."""
    for tokens, rows in TILES:
        if _vmem_bytes(tokens, rows, width, head_dtype, dtype) <= VMEM_BYTES - VMEM_MARGIN:
            return tokens, rows
    return None


def _vmem_bytes(tokens: int, rows: int, width: int, head_dtype, dtype) -> int:
    """VMEM of the kernel: operands twice (the pipeline), and four tiles of logits."""
    operand, head = jnp.dtype(dtype).itemsize, jnp.dtype(head_dtype).itemsize
    cast = 0 if operand == head else rows * width * operand
    return 2 * width * (tokens * operand + rows * head) + cast + 4 * tokens * rows * 4


def parameters(*semantics: Literal["parallel", "arbitrary"]) -> pltpu.CompilerParams:
    """Return what the compiler is told: how each axis of the grid may run, and how much VMEM there is."""
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_BYTES - VMEM_MARGIN // 2)


def _plan_whole(tokens: int, head_rows: int, head_dtype, dtype, *, spec: specs.HeadSpec) -> tiling.Blocks:
    """One block, unless the head has to be gathered: then as many as the workspace holds, or as `vocab_block` says."""
    if specs.axes(spec).width or spec.vocab_block is not None:
        return chunked.plan(tokens, head_rows, head_dtype, dtype, spec=spec)
    return tiling.whole(tokens, head_rows)


# The groups of one row of a batch are independent of the others': both TensorCores of a chip take rows.
LOSS_PARAMETERS = parameters("parallel")
ENGINE = chunked.engine(
    forward_block,
    chunked.backward_block,
    forward_tiles=_plan_whole,
    backward_tiles=chunked.plan,
    loss_parameters=LOSS_PARAMETERS,
    obstacle=_obstacle,
)
