"""Attention in blocks of queries and keys, in plain XLA: the logits of one pair of blocks exist at a time.

For where neither cuDNN nor splash can run. Online softmax (FlashAttention, arXiv 2205.14135) with float32 statistics;
the backward pass computes the blocks again, from the log-sum-exp of every query. Pairs of blocks beyond the causal
band, the sliding window or, in packed rows, the group of texts are never visited.

Letters beyond `types.py`: R query heads per key/value head, X blocks of a row, Q positions of a block of queries, S of
a block of keys (as many).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fpo_jax import types
from fpo_jax.attention import segment_mask as segments_

WORKSPACE_BYTES = 32 * 2**20  # of the float32 logits of one pair of blocks, all rows and heads of a device
MIN_BLOCK, MAX_BLOCK = 128, 256  # at 512 a CPU, out of its caches, takes twice as long
RESULTS = "attention_results"  # by which `jax.checkpoint` knows what the forward pass leaves to the backward pass
_MASKED = -1e30  # finite, so that a query that has seen no key yet gives 0 and not NaN


class _Spec(NamedTuple):
    """Static facts."""

    block: int
    scale: float
    window: int | None
    soft_cap: float | None

    def keys_of(self, block: jax.Array, packed: "_Packed | None") -> tuple[jax.Array, jax.Array]:
        """First and last + 1 block of keys that a block of queries sees."""
        if packed is not None:
            return packed.first_X[block], block + 1
        reach = jnp.int32(0) if self.window is None else block * self.block - (self.window - 1)
        return jnp.maximum(reach, 0) // self.block, block + 1

    def queries_of(self, block: jax.Array, blocks: int, packed: "_Packed | None") -> tuple[jax.Array, jax.Array]:
        """First and last + 1 block of queries that see a block of keys."""
        if packed is not None:
            return block, packed.last_X[block] + 1
        if self.window is None:
            return block, jnp.int32(blocks)
        return block, jnp.minimum(((block + 1) * self.block - 1 + self.window - 1) // self.block + 1, blocks)


class _Packed(NamedTuple):
    """Rows of several texts, cut into blocks."""

    segments_XNQ: types.Segments  # its arrays have the blocks in front
    first_X: jax.Array  # first block of keys that a block of queries sees anything of
    last_X: jax.Array  # last block of queries that sees anything of a block of keys


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
    block: int | None = None,
) -> jax.Array:
    """Attend causally; the contract of `fpo_jax.attention.attend`, on one device.

    Args:
        q_NTHC: queries.
        k_NTGC: keys.
        v_NTGC: values.
        segments: of packed rows; None = a row is one text.
        scale: factor on the logits.
        window: positions a query sees, itself included; None = all before it.
        soft_cap: bound on the logits; None for none.
        sinks_H: one more logit of every query of a head, whose value is zero; None for none.
        block: positions per block; None = as many as fit WORKSPACE_BYTES, up to MAX_BLOCK.
    """
    N, T, H, _ = q_NTHC.shape
    G = k_NTGC.shape[2]
    blocks, size = _cut(T, block or _block(N * H))
    spec = _Spec(size, scale, window, soft_cap)

    def split(x):  # [N, T, ...] -> [X, N, Q, ...]; what is added at the end is seen by no query of the row
        padded = jnp.pad(x, ((0, 0), (0, blocks * size - T)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(N, blocks, size, *x.shape[2:]), 1, 0)

    # Heads before positions: no product has to move an axis, or XLA keeps whole rows of q and of its gradient twice.
    q_XNGRQC = jnp.einsum("XNQGRC->XNGRQC", split(q_NTHC.reshape(N, T, G, H // G, -1)))
    k_XNGSC, v_XNGSC = (jnp.einsum("XNSGC->XNGSC", split(x)) for x in (k_NTGC, v_NTGC))
    packed = None
    if segments is not None:
        first_NT, last_NT = (split(reach) for reach in segments_.reach(segments))
        packed = _Packed(
            jax.tree.map(split, segments),
            jnp.min(first_NT, axis=(1, 2)) // size,
            jnp.max(last_NT, axis=(1, 2)) // size,
        )
    sinks_GR = None if sinks_H is None else sinks_H.astype(jnp.float32).reshape(G, H // G)
    out_XNGRQC: jax.Array = _attend(spec, q_XNGRQC, k_XNGSC, v_XNGSC, sinks_GR, packed)
    return jnp.einsum("XNGRQC->NXQGRC", out_XNGRQC).reshape(N, blocks * size, H, -1)[:, :T]


def _block(rows_and_heads: int) -> int:
    """Positions per block whose logits fit the workspace."""
    fits = int((WORKSPACE_BYTES / (4 * rows_and_heads)) ** 0.5)
    return min(max(fits // MIN_BLOCK * MIN_BLOCK, MIN_BLOCK), MAX_BLOCK)


def _cut(T: int, block: int) -> tuple[int, int]:
    """Cut T positions into equal blocks of at most `block`, a multiple of 8: their number and size."""
    blocks = -(-T // block)
    return blocks, -(-T // (8 * blocks)) * 8


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec: _Spec, q_XNGRQC, k_XNGSC, v_XNGSC, sinks_GR, packed) -> jax.Array:
    return chunked_attention_fwd(spec, q_XNGRQC, k_XNGSC, v_XNGSC, sinks_GR, packed)[0]


# The two passes are programs with names, by which `flops` knows them: how often their loops run is not in the jaxpr.
@functools.partial(jax.jit, static_argnums=0)
def chunked_attention_fwd(spec: _Spec, q_XNGRQC, k_XNGSC, v_XNGSC, sinks_GR, packed):
    """Return the attended values and the log-sum-exp of every query's logits, the sink among them."""
    X, N, G, R, Q, C = q_XNGRQC.shape
    dtype = q_XNGRQC.dtype

    def attend_block(_, i):
        def see(j, carry):
            out_NGRQC, max_NGRQ, sum_NGRQ = carry
            logits_NGRQS, seen_NQS = _logits(spec, q_XNGRQC, k_XNGSC, packed, i, j)[:2]
            logits_NGRQS = jnp.where(seen_NQS, logits_NGRQS, _MASKED)
            new_NGRQ = jnp.maximum(max_NGRQ, jnp.max(logits_NGRQS, axis=-1))
            weights_NGRQS = jnp.where(seen_NQS, jnp.exp(logits_NGRQS - new_NGRQ[..., None]), 0)
            keep_NGRQ = jnp.exp(max_NGRQ - new_NGRQ)
            seen_NGRQC = _product("NGRQS,NGSC->NGRQC", weights_NGRQS.astype(dtype), v_XNGSC[j])
            return (
                out_NGRQC * keep_NGRQ[..., None] + seen_NGRQC,
                new_NGRQ,
                sum_NGRQ * keep_NGRQ + jnp.sum(weights_NGRQS, axis=-1),
            )

        zeros_NGRQ = jnp.zeros((N, G, R, Q), jnp.float32)
        statistics = (zeros_NGRQ + _MASKED, zeros_NGRQ)
        if sinks_GR is not None:  # as if it had been seen, and had the value zero
            statistics = (zeros_NGRQ + sinks_GR[:, :, None], zeros_NGRQ + 1)
        start = (jnp.zeros((N, G, R, Q, C), jnp.float32), *statistics)
        out_NGRQC, max_NGRQ, sum_NGRQ = jax.lax.fori_loop(*spec.keys_of(i, packed), see, start)
        return None, ((out_NGRQC / sum_NGRQ[..., None]).astype(dtype), max_NGRQ + jnp.log(sum_NGRQ))

    _, (out_XNGRQC, lse_XNGRQ) = jax.lax.scan(attend_block, None, jnp.arange(X))
    return out_XNGRQC, (q_XNGRQC, k_XNGSC, v_XNGSC, sinks_GR, packed, out_XNGRQC, lse_XNGRQ)


@functools.partial(jax.jit, static_argnums=0)
def chunked_attention_bwd(spec: _Spec, residuals, grad_XNGRQC):
    """Visit the blocks of keys one by one; the gradient of the queries accumulates in float32."""
    q_XNGRQC, k_XNGSC, v_XNGSC, sinks_GR, packed, out_XNGRQC, lse_XNGRQ = residuals
    X, dtype = q_XNGRQC.shape[0], q_XNGRQC.dtype
    # sum_j p_ij dp_ij, of every query
    mean_XNGRQ = jnp.sum(grad_XNGRQC.astype(jnp.float32) * out_XNGRQC.astype(jnp.float32), axis=-1)

    def key_block(dq_XNGRQC, j):
        def seen_by(i, carry):
            dq_XNGRQC, dk_NGSC, dv_NGSC = carry
            logits_NGRQS, seen_NQS, slope_NGRQS = _logits(spec, q_XNGRQC, k_XNGSC, packed, i, j)
            p_NGRQS = jnp.where(seen_NQS, jnp.exp(logits_NGRQS - lse_XNGRQ[i][..., None]), 0)
            dp_NGRQS = _product("NGRQC,NGSC->NGRQS", grad_XNGRQC[i], v_XNGSC[j])
            dlogits_NGRQS = (p_NGRQS * (dp_NGRQS - mean_XNGRQ[i][..., None]) * slope_NGRQS).astype(dtype)
            dq_NGRQC = _product("NGRQS,NGSC->NGRQC", dlogits_NGRQS, k_XNGSC[j])
            return (
                dq_XNGRQC.at[i].add(dq_NGRQC),
                dk_NGSC + _product("NGRQS,NGRQC->NGSC", dlogits_NGRQS, q_XNGRQC[i]),
                dv_NGSC + _product("NGRQS,NGRQC->NGSC", p_NGRQS.astype(dtype), grad_XNGRQC[i]),
            )

        zeros_NGSC = jnp.zeros(k_XNGSC.shape[1:], jnp.float32)
        dq_XNGRQC, dk_NGSC, dv_NGSC = jax.lax.fori_loop(
            *spec.queries_of(j, X, packed), seen_by, (dq_XNGRQC, zeros_NGSC, zeros_NGSC)
        )
        return dq_XNGRQC, (dk_NGSC.astype(dtype), dv_NGSC.astype(dtype))

    start = jnp.zeros(q_XNGRQC.shape, jnp.float32)
    dq_XNGRQC, (dk_XNGSC, dv_XNGSC) = jax.lax.scan(key_block, start, jnp.arange(X))
    dsinks_GR = None
    if sinks_GR is not None:  # its weight p times (0 - mean), as its value is zero
        p_XNGRQ = jnp.exp(sinks_GR[:, :, None] - lse_XNGRQ)
        dsinks_GR = -jnp.sum(p_XNGRQ * mean_XNGRQ, axis=(0, 1, 4))
    return dq_XNGRQC.astype(dtype), dk_XNGSC, dv_XNGSC, dsinks_GR, None


def _attend_fwd(spec: _Spec, q_XNGRQC, k_XNGSC, v_XNGSC, sinks_GR, packed):
    out_XNGRQC, (*inputs, _, lse_XNGRQ) = chunked_attention_fwd(spec, q_XNGRQC, k_XNGSC, v_XNGSC, sinks_GR, packed)
    out_XNGRQC, lse_XNGRQ = checkpoint_name(out_XNGRQC, RESULTS), checkpoint_name(lse_XNGRQ, RESULTS)
    return out_XNGRQC, (*inputs, out_XNGRQC, lse_XNGRQ)


_attend.defvjp(_attend_fwd, chunked_attention_bwd)


def _logits(spec: _Spec, q_XNGRQC, k_XNGSC, packed: _Packed | None, i, j):
    """Return logits [N, G, R, Q, S] of query block i and key block j, what is seen, and dlogits / d(q . k)."""
    logits_NGRQS = spec.scale * _product("NGRQC,NGSC->NGRQS", q_XNGRQC[i], k_XNGSC[j])
    slope_NGRQS = spec.scale
    if spec.soft_cap is not None:
        tanh_NGRQS = jnp.tanh(logits_NGRQS / spec.soft_cap)
        logits_NGRQS, slope_NGRQS = spec.soft_cap * tanh_NGRQS, spec.scale * (1 - tanh_NGRQS * tanh_NGRQS)
    positions = jnp.arange(spec.block)
    behind_QS = (i * spec.block + positions)[:, None] - (j * spec.block + positions)[None]
    seen_NQS = (behind_QS >= 0)[None]
    if packed is not None:
        queries, keys = (jax.tree.map(lambda x, block=block: x[block], packed.segments_XNQ) for block in (i, j))
        seen_NQS &= segments_.seen(queries, keys, window=spec.window)
    elif spec.window is not None:
        seen_NQS &= behind_QS < spec.window
    return logits_NGRQS, seen_NQS[:, None, None], slope_NGRQS


def _product(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """Multiply and accumulate in float32. Precision is explicit: float32 is never TF32 or bfloat16 passes."""
    exact = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.einsum(equation, left, right, precision=exact, preferred_element_type=jnp.float32)
