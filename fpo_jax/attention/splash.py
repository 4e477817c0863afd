"""The splash kernel that ships with JAX, for TPUs: flash attention that never visits blocks that the mask hides.

Rows are padded to whole blocks; causality keeps the added keys from every query of the row. Segment ids of the kernel
are equal or not, so texts that follow another one come as a mask of their row, which all heads read: T * T bytes of a
row and pass, where the logits of H heads take 4 H T * T.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from fpo_jax import types
from fpo_jax.attention import segment_mask as segments_

LANES = 128
MAX_BLOCK = 512
# The fused backward kernel computes five matrix products where the two separate ones compute seven, but writes the
# gradient of the queries once per block of keys, to be summed afterwards: at most so many copies, of such blocks.
MAX_QUERY_GRADIENTS = 4
MAX_FUSED_BLOCK = 1024
MAX_MASKED = 8192  # positions of a row with a mask of its own: 64 MiB, twice with the one of the backward pass


class _Blocks(NamedTuple):
    """Positions of a padded row and of its blocks."""

    padded: int
    block: int
    fused: int | None  # keys per step of the fused backward kernel; None = two kernels


def attend(
    q_NTHC: jax.Array,
    k_NTGC: jax.Array,
    v_NTGC: jax.Array,
    segments: types.Segments | None,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    sinks_H: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attend causally; the contract of `fpo_jax.attention.attend`, on one device.

    Args:
        q_NTHC: queries.
        k_NTGC: keys.
        v_NTGC: values.
        segments: of packed rows; None = a row is one text.
        scale: factor on the logits; goes into the queries and is rounded to their dtype, as the kernel has none.
        window: positions a query sees, itself included; None = all before it.
        soft_cap: bound on the logits; None for none.
        sinks_H: one more logit of every query of a head, whose value is zero; None for none.
        interpret: emulate the kernel.
    """
    T, H = q_NTHC.shape[1:3]
    padded, block, fused = _cut(T)
    make = functools.partial(
        splash_attention_kernel.make_splash_mha_single_device,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=fused or block,
            block_kv_dkv_compute=block,
            block_q_dq=None if fused else block,
            block_kv_dq=None if fused else block,
            use_fused_bwd_kernel=fused is not None,
        ),
        attn_logits_soft_cap=soft_cap,
        interpret=interpret,
    )

    def padded_rows(x_NTHC):
        return jnp.pad(x_NTHC, ((0, 0), (0, padded - T), (0, 0), (0, 0)))

    q_NTHC, k_NTGC, v_NTGC = (
        padded_rows((q_NTHC * scale).astype(q_NTHC.dtype)),
        padded_rows(k_NTGC),
        padded_rows(v_NTGC),
    )
    sinks_NH = None if sinks_H is None else jnp.broadcast_to(_float32_gradient(sinks_H), (len(q_NTHC), H))
    heads_first = [jnp.einsum("NTHC->NHTC", x_NTHC) for x_NTHC in (q_NTHC, k_NTGC, v_NTGC)]
    if segments is not None and segments.parents_NT is not None:
        mask_NTT = _mask(segments, padded, window=window)
        out_NHTC = jax.vmap(lambda mask_TT, sinks_H, *qkv: _masked(make(mask_TT[None]))(*qkv, sinks=sinks_H))(
            mask_NTT, sinks_NH, *heads_first
        )
    else:
        ids = None
        if segments is not None:
            ids_NT = jnp.pad(segments.ids_NT, ((0, 0), (0, padded - T)))
            ids = splash_attention_kernel.SegmentIds(ids_NT, ids_NT)
        mask = splash_attention_mask.CausalMask((padded, padded))
        if window is not None:
            mask = splash_attention_mask.LocalMask((padded, padded), (window - 1, 0), offset=0)
        kernel = make(splash_attention_mask.MultiHeadMask([mask] * H))
        out_NHTC = jax.vmap(lambda sinks_H, *given: kernel(*given, sinks=sinks_H))(sinks_NH, *heads_first, ids)
    return jnp.einsum("NHTC->NTHC", out_NHTC)[:, :T]


@jax.custom_vjp
def _float32_gradient(x: jax.Array) -> jax.Array:
    """Return x; its gradient, which the kernel gives for each row in the dtype of the queries, is summed in float32."""
    return x


_float32_gradient.defvjp(lambda x: (x, None), lambda _, gradient: (gradient.astype(jnp.float32),))


def _masked(kernel: splash_attention_kernel.SplashAttentionKernel) -> splash_attention_kernel.SplashAttentionKernel:
    """Under jit JAX makes an array of the flag for a mask's kind and then branches on it; make it a bool again."""
    kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)
    return kernel


def _mask(segments: types.Segments, padded: int, *, window: int | None) -> jax.Array:
    """Return who sees whom in rows of `padded` positions; those that were added see each other, so that all see one."""
    wide = jax.tree.map(lambda x_NT: jnp.pad(x_NT, ((0, 0), (0, padded - x_NT.shape[1])), constant_values=-1), segments)
    return segments_.seen(wide, wide, window=window) & jnp.tri(padded, dtype=bool)


def _cut(T: int) -> _Blocks:
    """Pad T to whole lanes and cut it into equal blocks of a multiple of 128 positions."""
    unit = LANES if T <= MAX_BLOCK else 2 * LANES  # an even number of lanes has blocks of 256 at least
    padded = -(-T // unit) * unit
    block = max(size for size in range(LANES, MAX_BLOCK + 1, LANES) if padded % size == 0)
    fused = [
        size
        for size in range(block, MAX_FUSED_BLOCK + 1, block)
        if padded % size == 0 and padded // size <= MAX_QUERY_GRADIENTS
    ]
    return _Blocks(padded, block, min(fused, default=None))
