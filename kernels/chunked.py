"""`token_stats` by blocks of the vocabulary: the path for every platform, in plain XLA, without ever holding [N, V].

In: hidden states, head, targets. Out: `TokenStats`, the same numbers as `kernels/reference.py` to float32 rounding.

Forward: scan over blocks of head rows; each block's [N, block] logits are folded into a running maximum, sum and
target logit. Backward: scan once more, recompute each block's logits, and turn them into dlogits, the block's rows of
dhead (written once, no [V, D] accumulator) and a float32 running dhidden. 2NDV + 6NDV floating-point operations; kept
between the passes: the inputs and lse, nothing of size N*V. With a frozen head the dhead product is dead code and XLA
drops it.

A vocabulary that is no multiple of the block is not padded: the last block is shifted left and its overlap masked.
Letters beyond `spec.py`: W rows of a head block, M tokens of a token block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fpo_jax.kernels import spec as specs

MASKED_LOGIT = -1e30  # finite, so that no inf - inf can arise
LANES = 128  # block sizes are multiples of the widest vector unit's row
MAX_TOKEN_BLOCK = 65536  # above it, blocks of the head become too thin for a matrix unit


class Blocks(NamedTuple):
    """How the N x vocab_size plane of logits is cut."""

    tokens: int  # rows of hidden per block, per device
    vocab: int  # rows of the head per block
    token_count: int  # blocks of tokens
    vocab_count: int  # blocks of the head
    workspace_bytes: int  # float32 logits and rounded dlogits of one block, per device


def plan_blocks(tokens: int, head_rows: int, dtype, *, spec: specs.HeadSpec) -> Blocks:
    """Choose the largest blocks whose logits and dlogits fit in `spec.workspace_bytes`, evenly cut.

        workspace = tokens * vocab_block * (bytes of a float32 logit + bytes of an operand)   [6 in bfloat16]

    Blocks of the head are multiples of 128 rows, at least 128; more than 128 real rows are cut in two at least, so
    that no [N, V] array exists however small the problem. Tokens are cut only above 65,536, or where even 128 rows
    exceed the budget; tokens spread over devices are never cut, as the blocks would be gathered.

    Args:
        tokens: N, over all devices.
        head_rows: V.
        dtype: of the operands.
        spec: `workspace_bytes`, `vocab_block`, `vocab_size` and `token_shards` are read.

    Returns:
        Blocks; the last block of either axis may overlap the one before.

    >>> plan_blocks(8192, 128256, "bfloat16", spec=specs.HeadSpec())
    Blocks(tokens=8192, vocab=5376, token_count=1, vocab_count=24, workspace_bytes=264241152)
    """
    vocab_size = spec.vocab_size or head_rows
    logit_bytes = specs.accumulator_dtype(dtype).itemsize + jnp.dtype(dtype).itemsize
    rows = _ceil_div(tokens, spec.token_shards)
    token_count = 1
    if spec.token_shards == 1:
        limit = spec.workspace_bytes // (min(spec.vocab_block or LANES, vocab_size) * logit_bytes)
        token_count = _ceil_div(rows, max(1, min(MAX_TOKEN_BLOCK, limit)))
        rows = _ceil_div(rows, token_count)

    if spec.vocab_block is not None:
        block = spec.vocab_block
    else:
        largest = max(LANES, spec.workspace_bytes // (rows * logit_bytes) // LANES * LANES)
        count = max(2, _ceil_div(vocab_size, largest))
        block = _ceil_div(_ceil_div(vocab_size, count), LANES) * LANES
    block = min(block, vocab_size)
    return Blocks(rows, block, token_count, _ceil_div(vocab_size, block), rows * block * logit_bytes)


def token_stats(
    hidden_ND: specs.Array, head_VD: specs.Array, targets_N: specs.Array, *, spec: specs.HeadSpec
) -> specs.TokenStats:
    """Compute target logit and log-sum-exp of every token without holding their logits.

        z[n, v] = logit_scale * cap(x[n, v]),  x[n, v] = hidden[n] . head[v]
        target_logit[n] = z[n, target[n]];  lse[n] = log sum_v exp z[n, v]
        dx[n, v] = (g_target[n] * [v == target[n]] + g_lse[n] * softmax(z[n])[v]) * logit_scale * cap'(x[n, v])

    Products take their operands in `spec.compute_dtype` and accumulate in float32; logits, softmax and sums are
    float32 and never rounded; only dx is rounded, after the one-hot is folded in, as operand of the two gradient
    products. Reverse mode only. Gradients come in the dtypes of hidden and head.

    Args:
        hidden_ND: final hidden states, bfloat16, float32 or float64.
        head_VD: LM head, one row per vocabulary entry.
        targets_N: token ids, integers in [0, vocab_size); outside it the target logit is NaN.
        spec: options of the head; static under jit.

    Returns:
        TokenStats of shape [N]; float32, or float64 when given float64.

    Raises:
        ValueError: shapes or dtypes that do not fit (see `spec.check`).

    >>> stats = token_stats(jnp.ones((1, 1)), jnp.log(jnp.array([[1.0], [3.0]])), jnp.array([1]), spec=specs.HeadSpec())
    >>> print(f"{jnp.exp(stats.target_logit_N - stats.lse_N)[0]:.4f}")  # logits log 1 and log 3: p = 3 / (1 + 3)
    0.7500
    """
    specs.check(hidden_ND, head_VD, targets_N, spec)
    hidden_ND, head_VD, targets_N = jnp.asarray(hidden_ND), jnp.asarray(head_VD), jnp.asarray(targets_N)
    with jax.named_scope("token_stats"):
        stats = _token_stats(hidden_ND, head_VD, targets_N, spec)
        in_vocab_N = (targets_N >= 0) & (targets_N < (spec.vocab_size or head_VD.shape[0]))
        return stats._replace(target_logit_N=jnp.where(in_vocab_N, stats.target_logit_N, jnp.nan))


def _forward(hidden_ND, head_VD, targets_N, spec) -> specs.TokenStats:
    """Forward pass over all token blocks."""
    blocks, operand = _plan(hidden_ND, head_VD, spec)
    hidden_ND = hidden_ND.astype(operand)
    tokens = hidden_ND.shape[0]
    if blocks.token_count == 1:
        return _forward_block(hidden_ND, head_VD, targets_N, spec=spec, vocab_block=blocks.vocab)

    def token_block(start):
        hidden_MD = lax.dynamic_slice_in_dim(hidden_ND, start, blocks.tokens)
        targets_M = lax.dynamic_slice_in_dim(targets_N, start, blocks.tokens)
        return _forward_block(hidden_MD, head_VD, targets_M, spec=spec, vocab_block=blocks.vocab)

    firsts = _first_rows(blocks.tokens, blocks.token_count)
    stats = lax.map(token_block, jnp.minimum(firsts, tokens - blocks.tokens))
    overlap = blocks.token_count * blocks.tokens - tokens
    return jax.tree.map(lambda x: jnp.concatenate([x[:-1].reshape(-1), x[-1, overlap:]]), stats)


def _forward_with_residuals(hidden_ND, head_VD, targets_N, spec):
    """Forward pass, and what the backward pass needs of it."""
    stats = _forward(hidden_ND, head_VD, targets_N, spec)
    return stats, (hidden_ND, head_VD, targets_N, stats.lse_N)


def _forward_block(hidden_MD, head_VD, targets_M, *, spec, vocab_block):
    """Statistics of one block of tokens: online softmax over the blocks of the head."""
    vocab_size = spec.vocab_size or head_VD.shape[0]
    accumulator = specs.accumulator_dtype(hidden_MD.dtype)
    count = _ceil_div(vocab_size, vocab_block)

    def add_block(running, first):
        max_M, sum_M, target_logit_M, centred_M = running
        start, head_WD = _head_block(head_VD, first, vocab_block, vocab_size, hidden_MD.dtype)
        logits_MW, _ = _logits(hidden_MD, head_WD, spec)
        if count * vocab_block != vocab_size:
            logits_MW = jnp.where(start + jnp.arange(vocab_block) >= first, logits_MW, MASKED_LOGIT)

        new_max_M = jnp.maximum(max_M, jnp.max(logits_MW, axis=1))
        shift_M = max_M - new_max_M
        exp_MW = jnp.exp(logits_MW - new_max_M[:, None])
        if spec.want_entropy:  # sum of exp(z - max) * (z - max), moved to the new maximum
            block_centred_M = jnp.sum(exp_MW * (logits_MW - new_max_M[:, None]), axis=1)
            centred_M = jnp.exp(shift_M) * (centred_M + shift_M * sum_M) + block_centred_M
        sum_M = jnp.exp(shift_M) * sum_M + jnp.sum(exp_MW, axis=1)

        column_M = jnp.clip(targets_M - start, 0, vocab_block - 1)
        found_M = jnp.take_along_axis(logits_MW, column_M[:, None], axis=1, mode="promise_in_bounds")[:, 0]
        is_here_M = (targets_M >= first) & (targets_M < first + vocab_block)
        return (new_max_M, sum_M, jnp.where(is_here_M, found_M, target_logit_M), centred_M), None

    zeros_M = jnp.zeros_like(targets_M, accumulator)  # like an input: sharded and varying over a mesh as it is
    start = (zeros_M + MASKED_LOGIT, zeros_M, zeros_M, zeros_M)
    (max_M, sum_M, target_logit_M, centred_M), _ = lax.scan(add_block, start, _first_rows(vocab_block, count))
    entropy_M = jnp.log(sum_M) - centred_M / sum_M if spec.want_entropy else None
    is_argmax_M = (target_logit_M >= max_M).astype(accumulator) if spec.want_argmax else None
    return specs.TokenStats(target_logit_M, max_M + jnp.log(sum_M), entropy_M, is_argmax_M)


def _backward(spec, residuals, cotangents):
    """Backward pass: head blocks outside, token blocks inside, so that each block of dhead is written once, finished.

    The blocks run from last to first: the shifted last block writes zeros over its overlap, which the block before
    replaces.
    """
    hidden_ND, head_VD, targets_N, lse_N = residuals
    blocks, operand = _plan(hidden_ND, head_VD, spec)
    rows_N = (hidden_ND.astype(operand), targets_N, lse_N, cotangents.target_logit_N, cotangents.lse_N)
    tokens, vocab_size = hidden_ND.shape[0], spec.vocab_size or head_VD.shape[0]
    token_firsts = _first_rows(blocks.tokens, blocks.token_count)

    def head_block(grads, first):
        dhidden_ND, dhead_VD = grads
        start, head_WD = _head_block(head_VD, first, blocks.vocab, vocab_size, operand)
        columns_W = start + jnp.arange(blocks.vocab)
        is_fresh_W = None if blocks.vocab_count * blocks.vocab == vocab_size else columns_W >= first
        grads_of = functools.partial(_grads, columns_W=columns_W, is_fresh_W=is_fresh_W, spec=spec)

        def token_block(inner, token_first):
            dhidden_ND, dhead_WD = inner
            token_start = jnp.minimum(token_first, tokens - blocks.tokens)
            hidden_MD, targets_M, lse_M, *cotangents_M = (
                lax.dynamic_slice_in_dim(x, token_start, blocks.tokens) for x in rows_N
            )
            is_new_M = token_start + jnp.arange(blocks.tokens) >= token_first
            cotangents_M = [jnp.where(is_new_M, g_M, 0) for g_M in cotangents_M]
            dhidden_MD, more_WD = grads_of(hidden_MD, head_WD, targets_M, lse_M, *cotangents_M)
            dhidden_MD += lax.dynamic_slice_in_dim(dhidden_ND, token_start, blocks.tokens)
            return (lax.dynamic_update_slice_in_dim(dhidden_ND, dhidden_MD, token_start, 0), dhead_WD + more_WD), None

        if blocks.token_count == 1:
            more_ND, dhead_WD = grads_of(rows_N[0], head_WD, *rows_N[1:])
            dhidden_ND += more_ND
        else:
            no_dhead_WD = jnp.zeros(head_WD.shape, dhidden_ND.dtype)
            (dhidden_ND, dhead_WD), _ = lax.scan(token_block, (dhidden_ND, no_dhead_WD), token_firsts)
        dhead_VD = lax.dynamic_update_slice_in_dim(dhead_VD, dhead_WD.astype(dhead_VD.dtype), start, 0)
        return (dhidden_ND, dhead_VD), None

    grads = (jnp.zeros_like(hidden_ND, specs.accumulator_dtype(operand)), jnp.zeros_like(head_VD))
    firsts = _first_rows(blocks.vocab, blocks.vocab_count)
    (dhidden_ND, dhead_VD), _ = lax.scan(head_block, grads, firsts, reverse=True)
    return dhidden_ND.astype(hidden_ND.dtype), dhead_VD, None


def _grads(hidden_MD, head_WD, targets_M, lse_M, dtarget_M, dlse_M, *, columns_W, is_fresh_W, spec):
    """Gradients of one block of logits: its share of dhidden and its rows of dhead, unrounded."""
    logits_MW, slope_MW = _logits(hidden_MD, head_WD, spec)
    dlogits_MW = dlse_M[:, None] * jnp.exp(logits_MW - lse_M[:, None])
    dlogits_MW += jnp.where(columns_W == targets_M[:, None], dtarget_M[:, None], 0)
    dlogits_MW *= slope_MW
    if is_fresh_W is not None:
        dlogits_MW = jnp.where(is_fresh_W, dlogits_MW, 0)
    dlogits_MW = dlogits_MW.astype(hidden_MD.dtype)
    return _product(dlogits_MW, head_WD, 1, 0), _product(dlogits_MW, hidden_MD, 0, 0)


def _logits(hidden_MD, head_WD, spec):
    """Logits of one block, and their derivative with respect to the raw product, in the accumulator dtype."""
    raw_MW = _product(hidden_MD, head_WD, 1, 1)
    if spec.softcap is None:
        return spec.logit_scale * raw_MW, spec.logit_scale
    tanh_MW = jnp.tanh(raw_MW / spec.softcap)
    return spec.logit_scale * spec.softcap * tanh_MW, spec.logit_scale * (1 - tanh_MW * tanh_MW)


def _product(left, right, left_axis, right_axis):
    """Matrix product over one axis of each, accumulated in float32.

    Precision is explicit: by default a TPU would multiply float32 in bfloat16 passes, and a GPU in TF32.
    """
    precision = lax.Precision.DEFAULT if left.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    return lax.dot_general(
        left,
        right,
        (((left_axis,), (right_axis,)), ((), ())),
        precision=precision,
        preferred_element_type=specs.accumulator_dtype(left.dtype),
    )


def _plan(hidden_ND, head_VD, spec):
    """Blocks and operand dtype of a call: the forward and the backward pass must agree on them."""
    operand = specs.operand_dtype(hidden_ND.dtype, head_VD.dtype, spec)
    return plan_blocks(hidden_ND.shape[0], head_VD.shape[0], operand, spec=spec), operand


def _head_block(head_VD, first, vocab_block, vocab_size, dtype):
    """Block of the head responsible for rows [first, first + block): (row it starts at, its rows in `dtype`)."""
    start = jnp.minimum(first, vocab_size - vocab_block)
    return start, lax.dynamic_slice_in_dim(head_VD, start, vocab_block).astype(dtype)


def _first_rows(block, count):
    """First row that each of `count` blocks is responsible for, int32."""
    return jnp.arange(count, dtype=np.int32) * block


def _ceil_div(numerator, denominator):
    """Quotient of two positive integers, rounded up."""
    return -(-numerator // denominator)


_token_stats = jax.custom_vjp(_forward, nondiff_argnums=(3,))
_token_stats.defvjp(_forward_with_residuals, _backward)
