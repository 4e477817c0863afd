"""Flash attention in Pallas Mosaic GPU for Hopper GPUs (sm_90a), for rows of several texts above all.

Online softmax (FlashAttention, arXiv 2205.14135) with float32 statistics. The backward pass computes the weights again
from the log-sum-exp of every query, in two kernels: one for the queries' gradient, one for the keys' and values', which
adds up the query heads that read a key/value head. Nothing is added up in an order that may vary.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from fpo_jax import types
from fpo_jax.attention import block_mask
from fpo_jax.kernels.attention import mosaic_kernels, tiles

DEPTH = 64  # head dims are padded to a multiple: 128 bytes, the widest swizzle
MAX_HEAD_DIM = 128  # with 256 the float32 accumulators alone fill the registers
UNIT = 8  # positions of a row that a copy of swizzled rows moves together


def unsupported(*, dtype: jax.typing.DTypeLike, head_dim: int, soft_cap: float | None, compute_capability: str) -> str:
    """Return why these kernels cannot run, in words; "" where they can.

    Args:
        dtype: of queries, keys and values.
        head_dim: C.
        soft_cap: bound on the logits; None for none.
        compute_capability: of the device, such as "9.0"; empty for none.
    """
    name = jnp.dtype(dtype).name
    if compute_capability != "9.0":
        found = compute_capability or "an unknown one"
        return f"Mosaic attention needs a Hopper GPU, of compute capability 9.0, not {found}"
    if name not in ("bfloat16", "float16"):
        return f"Mosaic attention needs bfloat16 or float16, not {name}"
    if head_dim > MAX_HEAD_DIM:
        return f"Mosaic attention needs a head_dim of at most {MAX_HEAD_DIM}, not {head_dim}"
    if soft_cap is not None:
        return f"Mosaic attention has no soft-cap, and the model has one of {soft_cap}"
    if not hasattr(tiles.plgpu, "InterpretGPUParams"):
        return f"Mosaic attention needs jax 0.11, not {jax.__version__}"
    return ""


def attend(
    q_NTHC: jax.Array,
    k_NTGC: jax.Array,
    v_NTGC: jax.Array,
    segments: types.Segments | None,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    interpret: bool = False,
) -> jax.Array:
    """Attend causally; the contract of `fpo_jax.attention.attend`, on one device.

    Args:
        q_NTHC: queries, bfloat16 or float16.
        k_NTGC: keys.
        v_NTGC: values.
        segments: of packed rows; None = a row is one text. Positions grow by one within a segment.
        scale: factor on the logits, above 0.
        window: positions a query sees, itself included; None = all before it.
        soft_cap: must be None.
        interpret: emulate the kernels.

    Raises:
        ValueError: what `unsupported` names, or a scale that is not positive.
    """
    N, T, _, C = q_NTHC.shape
    reason = unsupported(dtype=q_NTHC.dtype, head_dim=C, soft_cap=soft_cap, compute_capability="9.0")
    if scale <= 0:
        reason = f"Mosaic attention needs a scale above 0, not {scale}"
    if reason:
        raise ValueError(f"{reason}; take the implementation from attention.select.")
    bounds_N4P = block_mask.bounds(
        segments, rows=N, positions=T, padded=pl.cdiv(T, tiles.BLOCK) * tiles.BLOCK, window=window
    )
    plan = mosaic_kernels.Plan(
        bounds_N4P,
        block_mask.visits(bounds_N4P, queries=tiles.BLOCK, keys=mosaic_kernels.FORWARD_KEYS)[0],
        block_mask.visits(bounds_N4P, queries=tiles.BLOCK, keys=mosaic_kernels.DQ_KEYS)[0],
        block_mask.visits(bounds_N4P, queries=mosaic_kernels.DKV_QUERIES, keys=tiles.BLOCK)[1],
    )

    def whole(x_NTHC):  # positions and head dims that a copy moves together
        return jnp.pad(x_NTHC, ((0, 0), (0, -T % UNIT), (0, 0), (0, -C % DEPTH)))

    out_NTHC: jax.Array = _attend(
        mosaic_kernels.Spec(scale, interpret), whole(q_NTHC), whole(k_NTGC), whole(v_NTGC), plan
    )
    return out_NTHC[:, :T, :, :C]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec: mosaic_kernels.Spec, q_NTHC, k_NTGC, v_NTGC, plan) -> jax.Array:
    return mosaic_kernels.forward(spec, q_NTHC, k_NTGC, v_NTGC, plan)[0]


def _attend_fwd(spec: mosaic_kernels.Spec, q_NTHC, k_NTGC, v_NTGC, plan):
    out_NTHC, lse_NHP = mosaic_kernels.forward(spec, q_NTHC, k_NTGC, v_NTGC, plan)
    return out_NTHC, (q_NTHC, k_NTGC, v_NTGC, plan, out_NTHC, lse_NHP)


def _attend_bwd(spec: mosaic_kernels.Spec, residuals, dout_NTHC):
    q_NTHC, k_NTGC, v_NTGC, plan, out_NTHC, lse_NHP = residuals
    # sum_j p_ij dp_ij, of every query
    mean_NHT = jnp.einsum("NTHC,NTHC->NHT", dout_NTHC, out_NTHC, precision="highest", preferred_element_type="float32")
    mean_NHP = jnp.pad(mean_NHT, ((0, 0), (0, 0), (0, lse_NHP.shape[-1] - mean_NHT.shape[-1])))
    inputs = q_NTHC, k_NTGC, v_NTGC, dout_NTHC
    dq_NTHC = mosaic_kernels.dq(spec, *inputs, lse_NHP, mean_NHP, plan)
    if spec.interpret:  # the emulator runs one kernel at a time, so let the second one need the first one's result
        mean_NHP += 0 * dq_NTHC[0, 0, 0, 0].astype(jnp.float32)
    return (dq_NTHC, *mosaic_kernels.dkv(spec, *inputs, lse_NHP, mean_NHP, plan), None)


_attend.defvjp(_attend_fwd, _attend_bwd)
