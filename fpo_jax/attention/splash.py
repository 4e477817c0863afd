"""The splash kernel that ships with JAX, for TPUs: flash attention that never visits blocks that the mask hides.

Rows are padded to whole blocks; causality keeps the added keys from every query of the row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from fpo_jax import shapes

LANES = 128
MAX_BLOCK = 512
# The fused backward kernel computes five matrix products where the two separate ones compute seven, but writes the
# gradient of the queries once per block of keys, to be summed afterwards: at most so many copies, of such blocks.
MAX_QUERY_GRADIENTS = 4
MAX_FUSED_BLOCK = 1024


class _Blocks(NamedTuple):
    """Positions of a padded row and of its blocks."""

    padded: int
    block: int
    fused: int | None  # keys per step of the fused backward kernel; None = two kernels


def attend(
    q_NTHC: jax.Array,
    k_NTGC: jax.Array,
    v_NTGC: jax.Array,
    segments: shapes.Segments | None,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    interpret: bool = False,
) -> jax.Array:
    """Attend causally; the contract of `fpo_jax.attention.attend`, on one device.

    Args:
        q_NTHC: queries.
        k_NTGC: keys.
        v_NTGC: values.
        segments: of packed rows, whose texts follow no other; None = a row is one text.
        scale: factor on the logits; goes into the queries and is rounded to their dtype, as the kernel has none.
        window: positions a query sees, itself included; None = all before it.
        soft_cap: bound on the logits; None for none.
        interpret: emulate the kernel.
    """
    if segments is not None and segments.parents_NT is not None:
        raise ValueError(
            "attention implementation 'splash' takes no texts that follow another one; take the implementation from"
            " attention.choose."
        )
    T, H = q_NTHC.shape[1:3]
    padded, block, fused = _cut(T)
    if window is None:
        mask = splash_attention_mask.CausalMask((padded, padded))
    else:
        mask = splash_attention_mask.LocalMask((padded, padded), (window - 1, 0), offset=0)
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([mask] * H),
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

    def heads_first(x_NTHC):
        return jnp.einsum("NTHC->NHTC", jnp.pad(x_NTHC, ((0, 0), (0, padded - T), (0, 0), (0, 0))))

    ids = None
    if segments is not None:
        ids_NT = jnp.pad(segments.ids_NT, ((0, 0), (0, padded - T)))
        ids = splash_attention_kernel.SegmentIds(ids_NT, ids_NT)
    scaled_NTHC = (q_NTHC * scale).astype(q_NTHC.dtype)
    out_NHTC = jax.vmap(kernel)(heads_first(scaled_NTHC), heads_first(k_NTGC), heads_first(v_NTGC), ids)
    return jnp.einsum("NHTC->NTHC", out_NHTC)[:, :T]


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
