"""`grouped_product` in Pallas Triton for NVIDIA GPUs from sm_80 on: the product, and the gradient of the matrices.

    grouped_rows      out[m] = x[m] @ W[e], or @ W[e]^T, m of group e
    grouped_gradient  dW[e] = sum over m of group e of x[m]^T dout[m]

Rows are cut in blocks of R at multiples of R, whatever the groups. A program multiplies one block by the columns of a
tile of one group's matrix, and stores the rows that are of that group: a block that several groups share is multiplied
once for each of them, which is cdiv(M, R) + E blocks at most.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from fpo_jax.kernels.lm_head import pallas_triton
from fpo_jax.kernels.lm_head import spec as specs
from fpo_jax.kernels.lm_head.pallas_triton import plgpu

TOGETHER = 8  # blocks of rows whose tiles run one after the other, so that they share columns of a matrix


def unsupported(*, width: int, columns: int, dtype: jax.typing.DTypeLike, compute_capability: str) -> str:
    """Return why these kernels cannot run, in words; "" where they can.

    Args:
        width: K.
        columns: N.
        dtype: of the operands.
        compute_capability: of the device, such as "8.0".
    """
    return pallas_triton.unsupported(
        width=width, rows=columns, dtype=dtype, compute_capability=compute_capability
    ) or pallas_triton.unsupported(width=columns, rows=width, dtype=dtype, compute_capability=compute_capability)


def grouped_rows(
    rows_MK: jax.Array, matrices: jax.Array, sizes_E: jax.Array, *, transposed: bool, interpret: bool
) -> jax.Array:
    """Return [M, N]: each row times the matrix of its group, [E, K, N], or transposed [E, N, K]; 0 beyond the groups.

    Args:
        rows_MK: bfloat16 or float32, K and N multiples of 16.
        matrices: in the dtype of the rows.
        sizes_E: rows of each group, int32.
        transposed: whether the matrices are [E, N, K].
        interpret: emulate the kernel.

    Raises:
        ValueError: an operand or the result has 2^31 elements or more.
    """
    (count, width), columns = rows_MK.shape, matrices.shape[1 if transposed else 2]
    tile = _tile(rows_MK.dtype, columns, width)
    blocks, across = pl.cdiv(count, tile.rows), columns // tile.columns
    pieces = blocks + sizes_E.shape[0]
    if (most := max(count * width, count * columns, matrices.size)) >= 2**31:
        raise ValueError(
            f"rows [{count}, {width}] of experts {list(matrices.shape)} are {most} elements, and the kernel counts to"
            " 2^31; use smaller micro-batches (train.micro_batch_per_device)."
        )
    block_P, group_P, begin_P, end_P = _pieces(sizes_E, count, tile.rows, pieces)

    def grouped_rows(rows_ref, matrices_ref, block_ref, group_ref, begin_ref, end_ref, out_ref):
        piece, across_index = _located(pl.program_id(0), pieces, across)
        start, group = block_ref[piece] * tile.rows, group_ref[piece]
        rows_R = start + jnp.arange(tile.rows, dtype=jnp.int32)
        read_R, of_columns = jnp.minimum(rows_R, count - 1), pl.ds(across_index * tile.columns, tile.columns)
        stages = width // tile.depth * (group < sizes_E.shape[0]).astype(jnp.int32)  # no matrix beyond the groups
        group = jnp.minimum(group, sizes_E.shape[0] - 1)

        def add_stage(step, sum_RC):
            depth = pl.ds(step * tile.depth, tile.depth)
            if transposed:
                return sum_RC + specs.product(rows_ref[read_R, depth], matrices_ref[group, of_columns, depth], 1, 1)
            return sum_RC + specs.product(rows_ref[read_R, depth], matrices_ref[group, depth, of_columns], 1, 0)

        nothing_RC = jnp.zeros((tile.rows, tile.columns), jnp.float32)
        sum_RC = lax.fori_loop(0, stages, add_stage, nothing_RC)
        own_R = (rows_R >= begin_ref[piece]) & (rows_R < end_ref[piece])
        plgpu.store(
            out_ref.at[pl.ds(start, tile.rows), of_columns],
            sum_RC.astype(out_ref.dtype),
            mask=jnp.broadcast_to(own_R[:, None], sum_RC.shape),
        )

    out_shape = jax.ShapeDtypeStruct((blocks * tile.rows, columns), rows_MK.dtype)
    launch = _launch(grouped_rows, (pieces * across,), tile, out_shape=out_shape, interpret=interpret)
    return launch(rows_MK, matrices, block_P, group_P, begin_P, end_P)[:count]


def grouped_gradient(rows_MK: jax.Array, dout_MN: jax.Array, sizes_E: jax.Array, *, interpret: bool) -> jax.Array:
    """Return [E, K, N]: of each group the sum over its rows of x[m]^T dout[m], in their dtype; 0 of an empty group.

    Args:
        rows_MK: bfloat16 or float32, K and N multiples of 16.
        dout_MN: in the dtype of the rows.
        sizes_E: rows of each group, int32.
        interpret: emulate the kernel.
    """
    (count, width), columns, groups = rows_MK.shape, dout_MN.shape[1], sizes_E.shape[0]
    tile = _tile(rows_MK.dtype, columns, width)
    down_size = next(size for size in (tile.rows, 64, 32, 16) if width % size == 0)
    down, across = width // down_size, columns // tile.columns
    ends_E = jnp.cumsum(sizes_E).astype(jnp.int32)

    def grouped_gradient(rows_ref, dout_ref, begins_ref, ends_ref, out_ref):
        begin, end = begins_ref[pl.program_id(0)], ends_ref[pl.program_id(0)]
        of_width = pl.ds(lax.div(pl.program_id(1), across) * down_size, down_size)
        of_columns = pl.ds(lax.rem(pl.program_id(1), across) * tile.columns, tile.columns)
        steps = lax.div(end - begin, tile.depth)

        def loaded(step):
            rows_S = begin + step * tile.depth + jnp.arange(tile.depth, dtype=jnp.int32)
            read_S = jnp.minimum(rows_S, count - 1)
            return rows_ref[read_S, of_width], dout_ref[read_S, of_columns], (rows_S < end)[:, None]

        def add_stage(step, sum_KC):
            x_SK, dout_SC, _ = loaded(step)
            return sum_KC + specs.product(x_SK, dout_SC, 0, 0)

        sum_KC = lax.fori_loop(0, steps, add_stage, jnp.zeros((down_size, tile.columns), jnp.float32))
        x_SK, dout_SC, own_S1 = loaded(steps)  # the rest, among rows of other groups that need not be finite
        sum_KC += specs.product(jnp.where(own_S1, x_SK, 0), jnp.where(own_S1, dout_SC, 0), 0, 0)
        out_ref[...] = sum_KC.astype(out_ref.dtype)

    out_spec = pl.BlockSpec(
        (None, down_size, tile.columns), lambda group, part: (group, lax.div(part, across), lax.rem(part, across))
    )
    out_shape = jax.ShapeDtypeStruct((groups, width, columns), rows_MK.dtype)
    launch = _launch(
        grouped_gradient, (groups, down * across), tile, out_shape=out_shape, out_specs=out_spec, interpret=interpret
    )
    return launch(rows_MK, dout_MN, ends_E - sizes_E, ends_E)


def _pieces(sizes_E, count, rows, pieces):
    """Cut the groups at the multiples of `rows`: block, group, first row and the one after the last of each piece.

    What is left over has no rows. The rows beyond the groups are one group more.
    """
    ends_E = jnp.append(jnp.cumsum(sizes_E), count).astype(jnp.int32)
    begins_E = jnp.append(0, ends_E[:-1])
    first_E = lax.div(begins_E, rows)
    spans_E = jnp.where(ends_E > begins_E, lax.div(ends_E + (rows - 1), rows) - first_E, 0)
    until_E = jnp.cumsum(spans_E)
    piece_P = jnp.arange(pieces, dtype=jnp.int32)
    group_P = jnp.minimum(jnp.searchsorted(until_E, piece_P, side="right"), sizes_E.shape[0]).astype(jnp.int32)
    block_P = first_E[group_P] + piece_P - (until_E - spans_E)[group_P]
    begin_P, end_P = begins_E[group_P], jnp.where(piece_P < until_E[-1], ends_E[group_P], 0)
    return jnp.clip(block_P, 0, pl.cdiv(count, rows) - 1), group_P, begin_P, end_P


def _located(program, pieces, across):
    """Piece and tile of the columns: some pieces go through the columns together."""
    group, within = lax.div(program, TOGETHER * across), lax.rem(program, TOGETHER * across)
    size = jnp.minimum(pieces - group * TOGETHER, TOGETHER)
    return group * TOGETHER + lax.rem(within, size), lax.div(within, size)


def _tile(dtype, columns, width):
    """The tile of a dtype, cut until it divides the columns and the width."""
    tile = pallas_triton.tile_of(dtype, plain=True)
    fits = next(size for size in (256, 128, 64, 32, 16) if size <= tile.columns and columns % size == 0)
    depth = next(size for size in (64, 32, 16) if size <= tile.depth and width % size == 0)
    return tile._replace(columns=fits, depth=depth)


def _launch(kernel, grid, tile, *, out_shape, interpret, **options):
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=grid,
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=kernel.__name__,
        **options,
    )
