"""`token_stats` in Pallas Triton for NVIDIA GPUs from sm_80 on: logits live in registers only, one tile at a time.

In: hidden states, head, targets, in bfloat16 or float32. Out: `TokenStats`. This module computes one block of logits:
its partial softmax, or the rounded dlogits that two ordinary products turn into gradients, as `pallas_gpu.py` does for
Hopper GPUs alone. What copies and multiplies there is written by hand; here the compiler of Triton chooses it for each
GPU. `blocks.py` cuts the plane and knows the mesh, nothing here does.

A program is a thread block. In the forward pass it works through the tiles of one piece of the tokens and one split of
the vocabulary, and folds them into a running softmax; in the backward pass it stores one tile. Rows that a ragged edge
lacks are read as the last one there is, and what they give is masked or never stored.

Letters beyond `spec.py`: W rows of the head block, M tokens, R tokens of a tile, C columns of a tile, S splits of the
vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from fpo_jax.kernels.lm_head import blocks, chunked, tiling
from fpo_jax.kernels.lm_head import spec as specs

plgpu: Any = None
try:
    from jax.experimental.pallas import triton as plgpu
except ImportError:  # jax announces that it will leave Triton to another package
    pass


class Tile(NamedTuple):
    """What a program multiplies at a time; powers of 2, as Triton wants them."""

    rows: int
    columns: int
    depth: int  # of D per stage, at most
    stages: int  # of copies to shared memory
    warps: int


# Of bfloat16. Shared memory holds as many stages from sm_90 on, one less before.
TILE = Tile(128, 128, 64, 4, 8)  # 96 KiB, and the GPUs that have least of it have 99; 128 KiB from sm_90 on
# Beginnings of `device_kind` -> a wider tile, which reads a quarter less: of GPUs that have the shared memory, for
# logits that take no more than a product, since a soft-cap or the entropy would spill registers.
WIDE_TILES = {
    "NVIDIA A100": Tile(128, 256, 32, 5, 8),  # 96 of 163 KiB; 64 deep would spill
    "NVIDIA H": Tile(128, 256, 64, 4, 8),  # 192 of 227 KiB; H100, H200
    "NVIDIA GH": Tile(128, 256, 64, 4, 8),
    "NVIDIA B": Tile(128, 256, 64, 4, 8),  # the same; B200, B300
    "NVIDIA GB200": Tile(128, 256, 64, 4, 8),
    "NVIDIA GB300": Tile(128, 256, 64, 4, 8),
}
FLOAT32 = Tile(64, 64, 32, 3, 4)  # without tensor cores, which would round to TF32
GROUP = 8  # pieces of tokens whose tiles of dlogits run one after the other, so that they share rows of the head
PROCESSORS = 108  # of a GPU that does not say how many it has
HIDDEN_BYTES = 16 * 2**20  # hidden states that the programs at work may share; at most 40 % of the L2 cache
MASKED_LOGIT = 2 * blocks.MASKED_LOGIT  # below where the running maximum starts, so that exp of the difference is 0


def token_stats(
    hidden_ND: specs.Array, head_VD: specs.Array, targets_N: specs.Array, *, spec: specs.HeadSpec
) -> specs.TokenStats:
    """Compute target logit and log-sum-exp of every token; the softmax in one kernel, dlogits in another.

    Args, returns and gradients are those of `chunked.token_stats`, but for float64. A head in another dtype than the
    operands' is cast block by block.

    Raises:
        ValueError: shapes or dtypes that do not fit (see `spec.check`), or that `unsupported` names.
    """
    return blocks.token_stats(hidden_ND, head_VD, targets_N, spec=spec, engine=ENGINE)


def unsupported(*, width: int, rows: int, dtype, compute_capability: str = "8.0") -> str:
    """Return why these kernels cannot run, in words; "" where they can.

    Args:
        width: D.
        rows: V, on one device; any will do.
        dtype: of the operands.
        compute_capability: of the device, such as "8.0"; empty for none.
    """
    del rows
    major, _, _ = compute_capability.partition(".")
    if not major.isdigit() or int(major) < 8:
        return f"compute capability {compute_capability or 'of no GPU'} is not 8.0 or above (NVIDIA A100 or newer)"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"{jnp.dtype(dtype).name} operands; the Triton kernels multiply bfloat16 and float32"
    if width % 16:
        return f"hidden width {width} is not a multiple of 16"
    if plgpu is None:
        return f"jax {jax.__version__} has no Pallas Triton; install jax<0.13"
    return ""


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
    """Compute the softmax over columns [first, last) of a block, unnormalised and in splits of these columns.

        z[m, w] = logit_scale * cap(hidden[m] . head[w])

    Args:
        hidden_MD: bfloat16 or float32, D a multiple of 16.
        head_WD: cast to the dtype of hidden.
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
    tile = tile_of(hidden_MD.dtype, plain=spec.softcap is None and not spec.want_entropy)
    pieces, tiles = pl.cdiv(tokens, tile.rows), pl.cdiv(rows, tile.columns)
    splits = _splits(pieces, tiles, tile.rows * width * hidden_MD.dtype.itemsize)

    def partial_softmax(hidden_ref, head_ref, targets_ref, window_ref, *out_refs):
        first, last = window_ref[0], window_ref[1]
        piece, split = lax.div(pl.program_id(0), splits), lax.rem(pl.program_id(0), splits)
        rows_R = _clipped(piece * tile.rows, tile.rows, tokens)
        targets_R = targets_ref[rows_R]
        # Only tiles that hold columns that count, evenly cut.
        start, end = lax.div(first, tile.columns), lax.div(last + (tile.columns - 1), tile.columns)
        share = lax.div(jnp.maximum(end - start, 0) + (splits - 1), splits)
        start += split * share

        def fold_tile(index, folded):
            columns_RC, counts_RC = _columns(index * tile.columns, tile, first, last)
            z_RC, _ = _logits(_product(hidden_ref, head_ref, rows_R, index * tile.columns, tile), spec)
            return _fold(folded, jnp.where(counts_RC, z_RC, MASKED_LOGIT), columns_RC, targets_R, spec)

        nothing_R = jnp.zeros(tile.rows, jnp.float32)
        nothing = (nothing_R + blocks.MASKED_LOGIT, nothing_R, nothing_R, nothing_R)
        folded = lax.fori_loop(start, jnp.minimum(start + share, end), fold_tile, nothing)
        for out_ref, statistic_R in zip(out_refs, folded, strict=True):
            out_ref[...] = statistic_R

    part = pl.BlockSpec((None, tile.rows), lambda program: (lax.rem(program, splits), lax.div(program, splits)))
    out_shape = [jax.ShapeDtypeStruct((splits, pieces * tile.rows), jnp.float32)] * 4
    launch = _launch(partial_softmax, pieces * splits, tile, out_shape=out_shape, out_specs=[part] * 4, spec=spec)
    statistics_SM = launch(hidden_MD, *_operands(hidden_MD, head_WD, targets_M, first, last))
    return blocks.merge(running, blocks.Partials(*(statistic_SM[:, :tokens] for statistic_SM in statistics_SM)))


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
        hidden_MD: bfloat16 or float32, D a multiple of 16.
        head_WD: cast to the dtype of hidden.
        targets_M: columns of the block, any int32; one outside [first, last) has no one-hot here.
        lse_M: log-sum-exp over the whole vocabulary, float32.
        dtarget_M: cotangent of the target logit, float32.
        dlse_M: cotangent of lse, float32.
        first: first column that counts.
        last: the one after the last; both may be traced.
        spec: `logit_scale`, `softcap` and `interpret` are read.

    Returns:
        [M, W] in the dtype of hidden, rounded once, the one-hot included; exactly 0 outside [first, last).
    """
    tokens, rows = hidden_MD.shape[0], head_WD.shape[0]
    tile = tile_of(hidden_MD.dtype, plain=spec.softcap is None)
    pieces, tiles = pl.cdiv(tokens, tile.rows), pl.cdiv(rows, tile.columns)

    def locate(program):
        """Piece of the tokens and tile of the vocabulary: a group of pieces goes through the tiles together."""
        group, within = lax.div(program, GROUP * tiles), lax.rem(program, GROUP * tiles)
        size = jnp.minimum(pieces - group * GROUP, GROUP)
        return group * GROUP + lax.rem(within, size), lax.div(within, size)

    def dlogits(hidden_ref, head_ref, targets_ref, lse_ref, dtarget_ref, dlse_ref, window_ref, out_ref):
        piece, index = locate(pl.program_id(0))
        rows_R = _clipped(piece * tile.rows, tile.rows, tokens)
        columns_RC, counts_RC = _columns(index * tile.columns, tile, window_ref[0], window_ref[1])
        x_RC = _product(hidden_ref, head_ref, rows_R, index * tile.columns, tile)
        z_RC, slope_RC = _logits(x_RC, spec)
        dx_RC = dlse_ref[rows_R][:, None] * jnp.exp(z_RC - lse_ref[rows_R][:, None])
        dx_RC += jnp.where(columns_RC == targets_ref[rows_R][:, None], dtarget_ref[rows_R][:, None], 0.0)
        dx_RC = jnp.where(counts_RC, dx_RC * slope_RC, 0.0).astype(out_ref.dtype)
        exists_R = piece * tile.rows + jnp.arange(tile.rows) < tokens
        plgpu.store(out_ref, dx_RC, mask=exists_R[:, None] & (columns_RC < rows))

    out_shape = jax.ShapeDtypeStruct((tokens, rows), hidden_MD.dtype)
    part = pl.BlockSpec((tile.rows, tile.columns), locate)
    launch = _launch(dlogits, pieces * tiles, tile, out_shape=out_shape, out_specs=part, spec=spec)
    head_WD, targets_M, window = _operands(hidden_MD, head_WD, targets_M, first, last)
    per_token = (x_M.astype(jnp.float32) for x_M in (lse_M, dtarget_M, dlse_M))
    return launch(hidden_MD, head_WD, targets_M, *per_token, window)


def backward_block(
    hidden_MD, head_WD, targets_M, lse_M, dtarget_M, dlse_M, first, last, *, spec: specs.HeadSpec, dtypes
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients through one block of logits: its share of dhidden and its rows of dhead."""
    head_WD = head_WD.astype(hidden_MD.dtype)
    dlogits_MW = dlogits_block(hidden_MD, head_WD, targets_M, lse_M, dtarget_M, dlse_M, first, last, spec=spec)
    return chunked.products(dlogits_MW, hidden_MD, head_WD, dtypes=dtypes)


def _obstacle(hidden_ND, head_VD, spec: specs.HeadSpec) -> str:
    operand = specs.operand_dtype(hidden_ND.dtype, head_VD.dtype, spec)
    return unsupported(width=head_VD.shape[1], rows=head_VD.shape[0], dtype=operand)


def backward_tiles(tokens: int, head_rows: int, head_dtype, dtype, *, spec: specs.HeadSpec) -> tiling.Blocks:
    """Cut the plane so that a block's dlogits fill half the workspace; its rows of dhead take the rest."""
    del head_dtype
    return tiling.plan_blocks(tokens, head_rows, 2 * jnp.dtype(dtype).itemsize, spec=spec)


def forward_tiles(tokens: int, head_rows: int, head_dtype, dtype, *, spec: specs.HeadSpec) -> tiling.Blocks:
    """One block, unless the head has to be cast or gathered: then as the backward pass."""
    if specs.axes(spec).width or spec.vocab_block is not None or jnp.dtype(head_dtype) != jnp.dtype(dtype):
        return backward_tiles(tokens, head_rows, head_dtype, dtype, spec=spec)
    return tiling.whole(tokens, head_rows)


def _launch(kernel, programs, tile, *, out_shape, out_specs, spec):
    """Return the call of a kernel on so many programs, compiled by Triton whatever else jax could use."""
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=(programs,),
        out_specs=out_specs,
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=spec.interpret,
        name=kernel.__name__,
    )


def _operands(hidden_MD, head_WD, targets_M, first, last):
    """The head as it is multiplied, the targets inside the window (-1, which is no column, for others), the window."""
    window = jnp.stack([jnp.clip(jnp.asarray(x, jnp.int32), 0, head_WD.shape[0]) for x in (first, last)])
    targets_M = jnp.where((targets_M >= window[0]) & (targets_M < window[1]), targets_M, -1).astype(jnp.int32)
    return head_WD.astype(hidden_MD.dtype), targets_M, window


def _product(hidden_ref, head_ref, rows_R, column, tile):
    """Rows of hidden times the rows of the head from `column` on, in float32."""
    width = hidden_ref.shape[1]
    depth = next(size for size in (64, 32, 16) if size <= tile.depth and width % size == 0)
    head_rows_C = _clipped(column, tile.columns, head_ref.shape[0])

    def add_stage(step, sum_RC):
        columns = pl.ds(step * depth, depth)
        return sum_RC + specs.product(hidden_ref[rows_R, columns], head_ref[head_rows_C, columns], 1, 1)

    return lax.fori_loop(0, width // depth, add_stage, jnp.zeros((tile.rows, tile.columns), jnp.float32))


def _fold(running, z_RC, columns_RC, targets_R, spec):
    """Fold a tile of logits into the (max, sum, target logit, centred sum) of its rows so far."""
    max_R, sum_R, target_R, centred_R = running
    new_max_R = jnp.maximum(max_R, jnp.max(z_RC, axis=1))
    target_R += jnp.sum(jnp.where(columns_RC == targets_R[:, None], z_RC, 0.0), axis=1)
    shift_R = max_R - new_max_R
    scale_R = jnp.exp(shift_R)
    z_RC -= new_max_R[:, None]
    exp_RC = jnp.exp(z_RC)
    if spec.want_entropy:  # sum of exp(z - max) * (z - max), moved to the new maximum
        centred_R = scale_R * (centred_R + shift_R * sum_R) + jnp.sum(exp_RC * z_RC, axis=1)
    return new_max_R, scale_R * sum_R + jnp.sum(exp_RC, axis=1), target_R, centred_R


def _logits(raw_RC, spec):
    """Logits of a tile, and their derivative with respect to the raw product.

    tanh x = 1 - 2 / (1 + exp 2x), with the hardware's exp and quotient, which are good to 22 bits: the library's tanh
    takes several times the instructions.
    """
    if spec.softcap is None:
        return spec.logit_scale * raw_RC, spec.logit_scale
    tanh_RC = 1.0 - 2.0 / (1.0 + jnp.exp(raw_RC * (2.0 / spec.softcap)))
    return (spec.logit_scale * spec.softcap) * tanh_RC, spec.logit_scale * (1.0 - tanh_RC * tanh_RC)


def _columns(start, tile, first, last):
    """Columns of a tile, from `start` on, and whether they count; [1, C], the same for each row."""
    columns_RC = (start + jnp.arange(tile.columns, dtype=jnp.int32))[None, :]
    return columns_RC, (columns_RC >= first) & (columns_RC < last)


def _clipped(start, size, count):
    """Indices from `start` on; the last one there is stands in for those that are none."""
    return jnp.minimum(start + jnp.arange(size, dtype=jnp.int32), count - 1)


def tile_of(dtype: jax.typing.DTypeLike, *, plain: bool) -> Tile:
    """Return the tile for operands of a dtype on the GPU that the program is compiled for.

    Args:
        dtype: bfloat16 or float32.
        plain: whether what is made of the products takes no registers to speak of.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return FLOAT32
    kind = _device().device_kind
    wide = (tile for start, tile in WIDE_TILES.items() if kind.startswith(start))
    return next(wide, TILE) if plain else TILE


def _device():
    """What the program is compiled for: a device, or one that is not here."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def _splits(pieces, tiles, piece_bytes):
    """Cut the vocabulary so that few processors idle and the hidden states at work stay in the L2 cache."""
    device = _device()
    processors = getattr(device, "num_cores", None) or getattr(device, "core_count", None) or PROCESSORS
    resident = max(1, HIDDEN_BYTES // piece_bytes)
    least = min(tiles, pl.cdiv(processors, min(resident, pieces)))
    tiles_in_turn = {s: pl.cdiv(pieces * s, processors) * pl.cdiv(tiles, s) for s in range(least, 2 * least + 1)}
    return min((s for s in tiles_in_turn if s <= tiles), key=tiles_in_turn.__getitem__)


LOSS_PARAMETERS = plgpu and plgpu.CompilerParams(num_warps=4)
ENGINE = chunked.engine(
    forward_block,
    backward_block,
    forward_tiles=forward_tiles,
    backward_tiles=backward_tiles,
    loss_parameters=LOSS_PARAMETERS,
    obstacle=_obstacle,
)
