"""What the attention kernels share: two warpgroups that multiply beside one that copies, and values laid out for them.

Letters as in `kernels.py`.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

plgpu: Any = None
try:
    from jax.experimental.pallas import mosaic_gpu as plgpu
except ImportError:  # a jaxlib built without it
    pass

ROWS = 64  # positions of a warpgroup: the M of a WGMMA instruction
MULTIPLIERS = 2  # warpgroups that multiply; a third one copies
BLOCK = MULTIPLIERS * ROWS  # positions that a thread block works on
COPY_REGISTERS, MULTIPLY_REGISTERS = 24, 240  # (24 + 2 * 240) * 128 threads = 64,512 of 65,536


def launch(kernel, *, out_type, scratch, grid: tuple[int, int, int], interpret: bool):
    """Run a kernel on blocks, rows and heads; neighbours in time are heads, which share keys, and rows."""
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=grid,
        grid_names=("blocks", "rows", "heads"),
        num_threads=MULTIPLIERS + 1,
        thread_name="group",
        # No thread reads shared memory that it wrote: each barrier that is needed is written out.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )


def in_parts(copy, multiply) -> None:
    """Run `copy()` in one warpgroup and `multiply(group)` in the others."""
    group = lax.axis_index("group")

    def copying():
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        copy()

    def multiplying():
        plgpu.set_max_registers(MULTIPLY_REGISTERS, action="increase")
        multiply(group)

    lax.cond(group == MULTIPLIERS, copying, multiplying)


def drain(count, stages: int, *barriers) -> None:
    """Wait until all that was copied is read."""

    @pl.loop(jnp.maximum(count - stages, 0), count)
    def _wait(index):
        for barrier in barriers:
            plgpu.barrier_wait(barrier.at[index % stages])


def store(*copies) -> None:
    """Copy values [64, C] through tiles of shared memory, whose last product is done, to global memory."""
    plgpu.commit_smem()  # all warps are done with the tiles
    for tile, value, _ in copies:
        tile[...] = value
    plgpu.commit_smem()
    for tile, _, ref in copies:
        plgpu.copy_smem_to_gmem(tile, ref)
    plgpu.wait_smem_to_gmem(0)


def add_products(*terms, interpret: bool) -> tuple:
    """Return sum + left . right of each (sum, left, right); right lies in shared memory, left there or in registers."""
    if interpret:  # jax 0.11 emulates no product that adds to given values
        sums = tuple(
            sum_QC + jnp.dot(left[...], right_ref[...], preferred_element_type=jnp.float32)
            for sum_QC, left, right_ref in terms
        )
        plgpu.commit_smem()  # its race detection wants it between these loads and the next copy; products need none
        return sums

    def add(sum_refs):
        for sum_ref, (_, left, right_ref) in zip(sum_refs, terms, strict=True):
            plgpu.wgmma(sum_ref, left, right_ref)

    return pl.run_state(add)(tuple(plgpu.ACC.init(sum_QC) for sum_QC, _, _ in terms))


def seen(bounds_Q, first_key, tile: tuple[int, int], *, queries: int):
    """Return whether the queries of a tile, which lie along axis `queries`, see the keys along the other.

    Places of queries come from memory: a compiler that numbers them keeps the numbers in registers that are not there.
    """
    places_S = plgpu.broadcasted_iota(jnp.int32, (tile[1 - queries],), 0, layout=plgpu.Layout.WGMMA.reduce(queries))
    j = lax.broadcast_in_dim(first_key + places_S, tile, (1 - queries,))
    i, own, first, end = (lax.broadcast_in_dim(x_Q, tile, (queries,)) for x_Q in bounds_Q)
    return ((own <= j) & (j <= i)) | ((first <= j) & (j < end))


def late_first(P: int):
    """Block of queries of a thread block: the last ones, which see most, are begun first."""
    return P // BLOCK - 1 - lax.axis_index("blocks")


def load(ref, *, axis: int):
    """Values laid out like the rows of an accumulator (`axis` 1, which is reduced) or its columns (0)."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(axis), optimized=False)


def spread(x_Q, size: int):
    """One value per row, spread over columns."""
    return lax.broadcast_in_dim(x_Q, (ROWS, size), (0,))


def splat(value: float):
    """Return one value for every row."""
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def zeros(width: int):
    """Return an accumulator of zeros."""
    return plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), plgpu.Layout.WGMMA)
