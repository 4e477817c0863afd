"""`token_stats` in Pallas Mosaic GPU for Hopper GPUs (sm_90a): logits live in registers only, one tile at a time.

In: hidden states, head, targets, multiplied in bfloat16. Out: `TokenStats`. This module computes one block of logits:
its partial softmax, or the rounded dlogits that two ordinary products turn into gradients. The forward pass is one
block, the backward pass as many as `spec.workspace_bytes` asks for (8NDV floating-point operations in all);
`blocks.py` cuts the plane and knows the mesh, nothing here does.

Both kernels multiply alike. A pair of thread blocks (a cluster) works on 2 x 128 tokens and the same 256 rows of the
head; each loads half of these and multicasts it. In a thread block one warpgroup issues copies into a ring of stages in
shared memory, two multiply 64 tokens each into float32 registers and apply the softmax there. They differ in what
becomes of a tile: the forward kernel folds the tiles of a row into a running softmax, the backward one stores each.
What lies outside the arrays is read as zeros and never stored; only tokens that are no multiple of 8 are padded.

Letters beyond `spec.py`: W rows of the head block, M tokens, R the 64 tokens of a warpgroup, C columns of a tile (or of
a part of one), S splits of the vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from fpo_jax.kernels.lm_head import blocks, chunked, pallas_triton
from fpo_jax.kernels.lm_head import spec as specs

plgpu: Any = None
try:
    from jax.experimental.pallas import mosaic_gpu as plgpu
except ImportError:  # a jaxlib built without it
    pass

ROWS = 64  # tokens of a warpgroup: the M of a WGMMA instruction
COLUMNS = 256  # the largest N of one: 128 float32 accumulators per thread
DEPTH = 64  # of D per stage: 128 bytes, the widest swizzle
STAGES = 4  # of 48 KiB; with the 32 KiB of the backward kernel 224 of 227 KiB
MULTIPLIERS = 2  # warpgroups that multiply; a third one copies
PAIR = 2  # thread blocks of a cluster
PAIR_ROWS = PAIR * MULTIPLIERS * ROWS
PROCESSORS = 132  # of an H100 SXM or H200: decides how work is cut, not what comes out
COPY_REGISTERS, MULTIPLY_REGISTERS = 40, 232  # (40 + 2 * 232) * 128 threads = 64,512 of 65,536
HIDDEN_BYTES = 16 * 2**20  # hidden states that the thread blocks at work may share; a third of the L2 cache
MASKED_LOGIT = 2 * blocks.MASKED_LOGIT  # below where the running maximum starts, so that exp of the difference is 0


def token_stats(
    hidden_ND: specs.Array, head_VD: specs.Array, targets_N: specs.Array, *, spec: specs.HeadSpec
) -> specs.TokenStats:
    """Compute target logit and log-sum-exp of every token; the softmax in one kernel, dlogits in another.

    Args, returns and gradients are those of `chunked.token_stats`, in bfloat16. A float32 head is cast block by block.

    Raises:
        ValueError: shapes or dtypes that do not fit (see `spec.check`), or that `unsupported` names.
    """
    return blocks.token_stats(hidden_ND, head_VD, targets_N, spec=spec, engine=ENGINE)


def unsupported(*, width: int, rows: int, dtype, compute_capability: str = "9.0") -> str:
    """Return why these kernels cannot run, in words; "" where they can.

    Args:
        width: D.
        rows: V, on one device.
        dtype: of the operands.
        compute_capability: of the device, such as "9.0"; empty for none.
    """
    if compute_capability != "9.0":
        return f"compute capability {compute_capability or 'of no GPU'} is not 9.0 (Hopper: H100, H200)"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"{jnp.dtype(dtype).name} operands; the GPU kernels multiply bfloat16"
    if width % DEPTH:
        return f"hidden width {width} is not a multiple of {DEPTH}"
    if rows % 8:
        return f"{rows} rows of the head are not a multiple of 8, which a copy of swizzled rows moves together"
    return ""


def missing() -> str:
    """Return what the installed jax lacks to run these kernels, in words; "" where it lacks nothing."""
    if hasattr(plgpu, "InterpretGPUParams"):
        return ""
    return f"jax {jax.__version__} has no Mosaic GPU as these kernels use it; install jax>=0.11"


def forward_block(
    hidden_MD: specs.Array,
    head_WD: specs.Array,
    targets_M: specs.Array,
    first: int | specs.Array,
    last: int | specs.Array,
    *,
    spec: specs.HeadSpec,
    running: blocks.Partials | None = None,
) -> blocks.Partials:
    """Compute the softmax over columns [first, last) of a block, unnormalised.

        z[m, w] = logit_scale * cap(hidden[m] . head[w])

    Args:
        hidden_MD: bfloat16, D a multiple of 64.
        head_WD: cast to bfloat16, W a multiple of 8.
        targets_M: columns of the block, any int32; one outside [first, last) has target logit 0.
        first: first column that counts.
        last: the one after the last; both may be traced.
        spec: `logit_scale`, `softcap`, `want_entropy` and `interpret` are read.
        running: the softmax over other blocks, merged into the result; None before the first.

    Returns:
        Partials, float32 [S, M], one row per split. Of an empty split: max -1e30 and zeros. `centred_PM` is 0 unless
        the entropy is wanted.
    """
    (tokens, width), rows = hidden_MD.shape, head_WD.shape[0]
    head_WD = head_WD.astype(jnp.bfloat16)
    pairs, tiles = pl.cdiv(tokens, PAIR_ROWS), pl.cdiv(rows, COLUMNS)
    splits = _splits(pairs, tiles, width)

    def partial_softmax(hidden_ref, head_ref, targets_ref, window_ref, out_ref, *ring):
        first, last = window_ref[0], window_ref[1]
        pair, split = lax.axis_index("pairs") // splits, lax.axis_index("pairs") % splits
        row = _first_row(pair)
        # Only tiles that hold columns that count, evenly cut.
        tile, end = first // COLUMNS, pl.cdiv(last, COLUMNS)
        share = pl.cdiv(jnp.maximum(end - tile, 0), splits)
        tile = tile + split * share
        count = jnp.clip(end - tile, 0, share)

        def locate(index):
            return row, (tile + index) * COLUMNS

        def fold_tiles(group, product):
            rows_R = pl.ds(row + group * ROWS, ROWS)
            targets_R = _load(targets_ref, rows_R)

            def fold_tile(index, folded):
                z_RC, _ = _logits(product(index), spec)
                columns_RC, counts_RC = _columns(locate(index)[1], COLUMNS, first, last)
                return _fold(folded, jnp.where(counts_RC, z_RC, MASKED_LOGIT), columns_RC, targets_R, spec)

            nothing_R = _splat(0.0)
            nothing = (_splat(blocks.MASKED_LOGIT), nothing_R, nothing_R, nothing_R)
            for statistic, value_R in enumerate(lax.fori_loop(0, count, fold_tile, nothing)):
                out_ref[statistic, split, rows_R] = value_R

        _multiply(hidden_ref, head_ref, *ring, count=count, locate=locate, consume=fold_tiles)

    args = (hidden_MD, head_WD, targets_M, (), first, last)
    out_type = jax.ShapeDtypeStruct((4, splits, pairs * PAIR_ROWS), jnp.float32)
    out_4SM = _launch(partial_softmax, *args, out_type=out_type, pairs=pairs * splits, spec=spec)
    return blocks.merge(running, blocks.Partials(*out_4SM[:, :, :tokens]))


def dlogits_block(
    hidden_MD: specs.Array,
    head_WD: specs.Array,
    targets_M: specs.Array,
    lse_M: specs.Array,
    dtarget_M: specs.Array,
    dlse_M: specs.Array,
    first: int | specs.Array,
    last: int | specs.Array,
    *,
    spec: specs.HeadSpec,
) -> jax.Array:
    """Compute the gradient with respect to the raw products x = hidden . head of a block.

        dx[m, w] = (dtarget[m] * [w == target[m]] + dlse[m] * exp(z[m, w] - lse[m])) * logit_scale * cap'(x[m, w])

    Args:
        hidden_MD: bfloat16, D a multiple of 64.
        head_WD: bfloat16, W a multiple of 8.
        targets_M: columns of the block, any int32; one outside [first, last) has no one-hot here.
        lse_M: log-sum-exp over the whole vocabulary, float32.
        dtarget_M: cotangent of the target logit, float32.
        dlse_M: cotangent of lse, float32.
        first: first column that counts.
        last: the one after the last; both may be traced.
        spec: `logit_scale`, `softcap` and `interpret` are read.

    Returns:
        [M, W] bfloat16, rounded once, the one-hot included; exactly 0 outside [first, last).
    """
    (tokens, _), rows = hidden_MD.shape, head_WD.shape[0]
    plane = pl.cdiv(tokens, PAIR_ROWS), pl.cdiv(rows, COLUMNS)
    tiles = plane[0] * plane[1]
    at_work = min(tiles, PROCESSORS // PAIR)

    def dlogits(hidden_ref, head_ref, targets_ref, *refs):
        lse_ref, dtarget_ref, dlse_ref, window_ref, out_ref, out_smem, *ring = refs
        first, last = window_ref[0], window_ref[1]
        start = lax.axis_index("pairs")

        def locate(index):
            """Tiles at work at the same time share rows of hidden and of the head, which the L2 cache then holds."""
            pair, tile = plgpu.planar_snake(start + index * at_work, plane, minor_dim=0, tile_width=8)
            return _first_row(pair), tile * COLUMNS

        def store_tiles(group, product):
            @pl.loop(0, count)
            def _store_tile(index):
                row, column = locate(index)
                rows_R = pl.ds(row + group * ROWS, ROWS)
                per_token = (targets_ref, lse_ref, dtarget_ref, dlse_ref)
                targets_R, lse_R, dtarget_R, dlse_R = (_load(ref, rows_R) for ref in per_token)
                x_RC = product(index)
                # In parts: the registers do not hold a whole tile's dlogits and what they are made of. An array of one
                # part has no second one to leave out: the hardware would store it over the first.
                for part in range(min(COLUMNS, out_ref.shape[1]) // DEPTH):
                    columns = pl.ds(column + part * DEPTH, DEPTH)
                    z_RC, slope_RC = _logits(x_RC[:, part * DEPTH : (part + 1) * DEPTH], spec)
                    columns_RC, counts_RC = _columns(columns.start, DEPTH, first, last)
                    dx_RC = _spread(dlse_R, DEPTH) * jnp.exp(z_RC - _spread(lse_R, DEPTH))
                    dx_RC += jnp.where(columns_RC == _spread(targets_R, DEPTH), _spread(dtarget_R, DEPTH), 0.0)
                    buffer = out_smem.at[group, part % 2]
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the other buffer may still be on its way
                    buffer[...] = jnp.where(counts_RC, dx_RC * slope_RC, 0.0).astype(jnp.bfloat16)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(buffer, out_ref.at[rows_R, columns])

            plgpu.wait_smem_to_gmem(0)

        count = (tiles - start + at_work - 1) // at_work
        _multiply(hidden_ref, head_ref, *ring, count=count, locate=locate, consume=store_tiles)

    args = (hidden_MD, head_WD, targets_M, (lse_M, dtarget_M, dlse_M), first, last)
    out_type = jax.ShapeDtypeStruct((pl.cdiv(tokens, 8) * 8, pl.cdiv(rows, DEPTH) * DEPTH), jnp.bfloat16)
    buffers = _smem(MULTIPLIERS, 2, ROWS, DEPTH)
    return _launch(dlogits, *args, out_type=out_type, pairs=at_work, spec=spec, scratch=[buffers])[:tokens, :rows]


def backward_block(
    hidden_MD, head_WD, targets_M, lse_M, dtarget_M, dlse_M, first, last, *, spec: specs.HeadSpec, dtypes
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients through one block of logits: its share of dhidden and its rows of dhead."""
    head_WD = head_WD.astype(jnp.bfloat16)
    dlogits_MW = dlogits_block(hidden_MD, head_WD, targets_M, lse_M, dtarget_M, dlse_M, first, last, spec=spec)
    return chunked.products(dlogits_MW, hidden_MD, head_WD, dtypes=dtypes)


def _obstacle(hidden_ND, head_VD, spec: specs.HeadSpec) -> str:
    if spec.vocab_block is not None and spec.vocab_block % 8:
        return f"vocab_block={spec.vocab_block} is not a multiple of 8, which a copy of swizzled rows moves together"
    operand = specs.operand_dtype(hidden_ND.dtype, head_VD.dtype, spec)
    rows = head_VD.shape[0] // specs.shards(spec, specs.axes(spec).vocab)
    return missing() or unsupported(width=head_VD.shape[1], rows=rows, dtype=operand)


def _launch(kernel, hidden_MD, head_WD, targets_M, floats_M, first, last, *, out_type, pairs, spec, scratch=()):
    """Run a kernel on `pairs` clusters of two thread blocks, with the ring of stages that `_multiply` wants.

    Its arguments: hidden, head, the targets inside the window (-1, which is no column, for others), each of `floats_M`,
    the window as two integers, the output, `scratch`, the ring.
    """
    window = jnp.stack([jnp.clip(jnp.asarray(x, jnp.int32), 0, head_WD.shape[0]) for x in (first, last)])
    targets_M = jnp.where((targets_M >= window[0]) & (targets_M < window[1]), targets_M, -1).astype(jnp.int32)
    per_token = (_pad(x, PAIR_ROWS) for x in (targets_M, *(x.astype(jnp.float32) for x in floats_M)))
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=[
            *scratch,
            _smem(STAGES, MULTIPLIERS * ROWS, DEPTH),
            _smem(STAGES, COLUMNS, DEPTH),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),  # filled, by two copies
            plgpu.ClusterBarrier(collective_axes=("pair",), num_arrivals=MULTIPLIERS, num_barriers=STAGES),  # free
        ],
        grid=(pairs,),
        grid_names=("pairs",),
        cluster=(PAIR,),
        cluster_names=("pair",),
        num_threads=MULTIPLIERS + 1,
        thread_name="group",
        # No thread reads shared memory that it wrote: each barrier that is needed is written out.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if spec.interpret else None,
    )(_pad(hidden_MD, 8), head_WD, *per_token, window)


def _multiply(hidden_ref, head_ref, hidden_smem, head_smem, filled, free, *, count, locate, consume):
    """Compute `count` tiles of hidden . head, those at (row, column) `locate(index)`.

    In the warpgroups that multiply `consume(group, product)` runs; it must call `product(index)`, which returns 64 rows
    of the tile in float32, once per tile and in order. `count` must be the same in both thread blocks of a pair.
    """
    steps = hidden_ref.shape[1] // DEPTH
    group = lax.axis_index("group")

    def copy():
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")

        @pl.loop(0, count * steps)
        def _fill_stage(step):
            stage = step % STAGES
            row, column = locate(step // steps)
            depth = pl.ds(step % steps * DEPTH, DEPTH)
            pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(free.at[stage]))
            hidden_tile = hidden_ref.at[pl.ds(row, MULTIPLIERS * ROWS), depth]
            head_tile = head_ref.at[pl.ds(column, COLUMNS), depth]
            plgpu.copy_gmem_to_smem(hidden_tile, hidden_smem.at[stage], filled.at[stage])
            plgpu.copy_gmem_to_smem(head_tile, head_smem.at[stage], filled.at[stage], collective_axes="pair")

        @pl.loop(jnp.maximum(count * steps - STAGES, 0), count * steps)
        def _stay_until_all_is_read(step):  # the other block of the pair still signals this one
            plgpu.barrier_wait(free.at[step % STAGES])

    def multiply():
        plgpu.set_max_registers(MULTIPLY_REGISTERS, action="increase")
        rows = pl.ds(group * ROWS, ROWS)

        def product(index):
            def accumulate(sum_ref):
                @pl.loop(0, steps)
                def _add_stage(k):
                    step = index * steps + k
                    stage = step % STAGES
                    plgpu.barrier_wait(filled.at[stage])
                    plgpu.wgmma(sum_ref, hidden_smem.at[stage, rows], head_smem.at[stage].T)
                    plgpu.wgmma_wait(1)  # this product runs on; the one before is done with its stage
                    pl.when(k > 0)(lambda: plgpu.barrier_arrive(free.at[(step - 1) % STAGES]))

                sum_RC = sum_ref[...]
                plgpu.barrier_arrive(free.at[(index * steps + steps - 1) % STAGES])
                return sum_RC

            return pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((ROWS, COLUMNS)))

        consume(group, product)

    lax.cond(group == MULTIPLIERS, copy, multiply)


def _fold(running, z_RC, columns_RC, targets_R, spec):
    """Fold a tile of logits into the (max, sum, target logit, centred sum) of its rows so far."""
    max_R, sum_R, target_R, centred_R = running
    new_max_R = jnp.maximum(max_R, jnp.max(z_RC, axis=1))
    target_R += jnp.sum(jnp.where(columns_RC == _spread(targets_R, COLUMNS), z_RC, 0.0), axis=1)
    shift_R = max_R - new_max_R
    scale_R = jnp.exp(shift_R)
    z_RC = z_RC - _spread(new_max_R, COLUMNS)
    exp_RC = jnp.exp(z_RC)
    if spec.want_entropy:  # sum of exp(z - max) * (z - max), moved to the new maximum
        centred_R = scale_R * (centred_R + shift_R * sum_R) + jnp.sum(exp_RC * z_RC, axis=1)
    return new_max_R, scale_R * sum_R + jnp.sum(exp_RC, axis=1), target_R, centred_R


def _logits(raw_RC, spec):
    """Logits of a tile, and their derivative with respect to the raw product.

    tanh x = 1 - 2 / (1 + exp 2x) and 1 / y = rsqrt(y)^2: the hardware's tanh is good to 11 bits only, and an exact
    division takes ten times the instructions. exp and rsqrt are the hardware's, good to 22 bits.
    """
    if spec.softcap is None:
        return spec.logit_scale * raw_RC, spec.logit_scale
    root_RC = lax.rsqrt(1.0 + jnp.exp(raw_RC * (2.0 / spec.softcap)))
    tanh_RC = 1.0 - 2.0 * (root_RC * root_RC)
    return (spec.logit_scale * spec.softcap) * tanh_RC, spec.logit_scale * (1.0 - tanh_RC * tanh_RC)


def _columns(start, size, first, last):
    """Columns `start` to `start + size` of the block, and whether they count, spread over rows."""
    columns_RC = start + plgpu.broadcasted_iota(jnp.int32, (ROWS, size), 1, layout=plgpu.Layout.WGMMA)
    return columns_RC, (columns_RC >= first) & (columns_RC < last)


def _spread(x_R, size):
    """One value per row, spread over columns."""
    return lax.broadcast_in_dim(x_R, (ROWS, size), (0,))


def _splat(value):
    """One float32 per row, laid out like the rows of an accumulator."""
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def _load(ref, rows_R):
    """Values of a warpgroup's rows, laid out like the rows of an accumulator."""
    return plgpu.load(ref.at[rows_R], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def _first_row(pair):
    """First token of this thread block."""
    return (pair * PAIR + lax.axis_index("pair")) * (MULTIPLIERS * ROWS)


def _smem(*shape):
    """Shared memory for bfloat16 tiles; the compiler finds that WGMMA and the copies want them swizzled."""
    return plgpu.SMEM(shape, jnp.bfloat16)


def _splits(pairs, tiles, width):
    """Cut the vocabulary so that few processors idle and the hidden states at work stay in the L2 cache."""
    clusters = PROCESSORS // PAIR
    resident = max(1, HIDDEN_BYTES // (PAIR_ROWS * width * 2))
    least = min(tiles, pl.cdiv(clusters, min(resident, pairs)))
    tiles_in_turn = {s: pl.cdiv(pairs * s, clusters) * pl.cdiv(tiles, s) for s in range(least, 2 * least + 1)}
    return min((s for s in tiles_in_turn if s <= tiles), key=tiles_in_turn.__getitem__)


def _pad(x, multiple):
    """Zeros behind the first axis, up to a multiple; no copy where it is one."""
    return jnp.pad(x, [(0, -x.shape[0] % multiple)] + [(0, 0)] * (x.ndim - 1))


ENGINE = chunked.engine(
    forward_block,
    backward_block,
    forward_tiles=pallas_triton.forward_tiles,
    backward_tiles=pallas_triton.backward_tiles,
    loss_parameters=pallas_triton.LOSS_PARAMETERS,
    obstacle=_obstacle,
)
