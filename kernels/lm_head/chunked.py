"""`token_stats` by blocks of the vocabulary in plain XLA, without holding [N, V]: the path for every platform.

In: hidden states, head, targets. Out: `TokenStats`, the same numbers as `reference.py` to float32 rounding.
This module computes one block of logits and its gradients; `blocks.py` does the rest. 2NDV floating-point
operations forward, 6NDV backward; 4NDV on one device whose workspace the whole plane fits, which keeps the logits.
"""

import jax
import jax.numpy as jnp

from fpo_jax.kernels.lm_head import blocks, tiling
from fpo_jax.kernels.lm_head import spec as specs


def token_stats(
    hidden_ND: specs.Array, head_VD: specs.Array, targets_N: specs.Array, *, spec: specs.HeadSpec
) -> specs.TokenStats:
    """Compute target logit and log-sum-exp of every token without holding their logits; see `blocks.token_stats`.

    Products take their operands in `spec.compute_dtype` and accumulate in float32; logits, softmax and sums are
    float32 and never rounded; only dlogits are rounded, after the one-hot is folded in, as operand of the two gradient
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
    return blocks.token_stats(hidden_ND, head_VD, targets_N, spec=spec, engine=ENGINE)


def plan(tokens: int, head_rows: int, head_dtype, dtype, *, spec: specs.HeadSpec) -> tiling.Blocks:
    """Cut the plane so that a block's float32 logits and rounded dlogits fit the workspace: in bfloat16, 6 bytes."""
    del head_dtype
    logit_bytes = specs.accumulator_dtype(dtype).itemsize + jnp.dtype(dtype).itemsize
    return tiling.plan_blocks(tokens, head_rows, logit_bytes, spec=spec)


def kept_tiles(tokens: int, head_rows: int, width: int, head_dtype, dtype, *, spec: specs.HeadSpec, limit=None):
    """Keep the plane where `limit` holds all of a backward pass in one block; see `tiling.kept_tiles`.

    It holds most while the logits, float32, become rounded dlogits, or with a cap capped logits, beside a gathered head
    or after that, dlogits beside the head's copy, if it is gathered or cast, and its gradient in float32, if that is
    summed over devices or rounded. `limit` None is `spec.kept_bytes`, and where that is None the workspace, on one
    device.
    """
    accumulator, operand = specs.accumulator_dtype(dtype), jnp.dtype(dtype)
    axes, limits = specs.axes(spec), (limit, spec.kept_bytes, 0 if spec.placement else spec.workspace_bytes)
    beside = accumulator if spec.softcap else operand
    copied, gathered = head_dtype != operand or axes.width, bool(axes.width)
    summed = head_dtype != accumulator or len(axes.tokens) > 0
    of_row = max(
        tokens * (accumulator.itemsize + beside.itemsize) + width * gathered * operand.itemsize,
        tokens * operand.itemsize + width * (bool(copied) * operand.itemsize + summed * accumulator.itemsize),
    )
    limit = next(each for each in limits if each is not None)
    return tiling.kept_tiles(tokens, head_rows, head_rows * of_row, limit=limit, spec=spec)


def plan_kept_if_asked(*args, spec: specs.HeadSpec):
    """Keep the plane only where `spec.kept_bytes` says so: for engines that hold no logits."""
    return kept_tiles(*args, spec=spec, limit=spec.kept_bytes or 0)


def forward_block(
    hidden_MD, head_WD, targets_M, first, last, *, spec: specs.HeadSpec, running=None, raw_MW=None
) -> blocks.Partials:
    """Return the partial softmax of one block of logits, whose raw products may be given."""
    logits_MW, _ = _logits(hidden_MD, head_WD.astype(hidden_MD.dtype), raw_MW, spec)
    return blocks.merge(running, _softmax(logits_MW, targets_M, first, last, spec)[1])


def pull_block(hidden_MD, head_WD, targets_M, first, last, *, spec: specs.HeadSpec, running=None):
    """Return the partial softmax of a block, and its products with the rows of the head: see `frozen.py`."""
    head_WD = head_WD.astype(hidden_MD.dtype)
    logits_MW, slope_MW = _logits(hidden_MD, head_WD, None, spec)
    exp_MW, partials = _softmax(logits_MW, targets_M, first, last, spec)
    others_MW = jnp.where(jnp.arange(logits_MW.shape[1]) == targets_M[:, None], 0, exp_MW * slope_MW)
    pulled_PMD = specs.product(others_MW.astype(hidden_MD.dtype), head_WD, 1, 0)[None]
    if running is None:
        return partials, pulled_PMD
    before, pulled_before_PMD = running
    merged = blocks.merge(before, partials)
    shares = (jnp.exp(part.max_PM - merged.max_PM)[:, :, None] for part in (before, partials))
    return merged, next(shares) * pulled_before_PMD + next(shares) * pulled_PMD


def _softmax(logits_MW, targets_M, first, last, spec: specs.HeadSpec):
    """Exponentials, relative to the maximum, and Partials of a block of logits."""
    counts_W = _counted(logits_MW.shape[1], first, last)
    if counts_W is not None:
        logits_MW = jnp.where(counts_W, logits_MW, blocks.MASKED_LOGIT)
    max_M = jnp.max(logits_MW, axis=1)
    shifted_MW = logits_MW - max_M[:, None]
    exp_MW = jnp.exp(shifted_MW)
    column_M = jnp.clip(targets_M, 0, logits_MW.shape[1] - 1)
    found_M = jnp.take_along_axis(logits_MW, column_M[:, None], axis=1, mode="promise_in_bounds")[:, 0]
    target_logit_M = jnp.where((targets_M >= first) & (targets_M < last), found_M, 0)
    centred_M = jnp.sum(exp_MW * shifted_MW, axis=1) if spec.want_entropy else jnp.zeros_like(max_M)
    parts = (max_M, jnp.sum(exp_MW, axis=1), target_logit_M, centred_M)
    return exp_MW, blocks.Partials(*(x_M[None] for x_M in parts))


def backward_block(
    hidden_MD, head_WD, targets_M, lse_M, dtarget_M, dlse_M, first, last, *, spec: specs.HeadSpec, dtypes, raw_MW=None
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients through one block of logits: its share of dhidden and its rows of dhead."""
    head_WD = head_WD.astype(hidden_MD.dtype)
    logits_MW, slope_MW = _logits(hidden_MD, head_WD, raw_MW, spec)
    dlogits_MW = dlse_M[:, None] * jnp.exp(logits_MW - lse_M[:, None])
    dlogits_MW += jnp.where(jnp.arange(logits_MW.shape[1]) == targets_M[:, None], dtarget_M[:, None], 0)
    dlogits_MW *= slope_MW
    counts_W = _counted(logits_MW.shape[1], first, last)
    if counts_W is not None:
        dlogits_MW = jnp.where(counts_W, dlogits_MW, 0)
    return products(dlogits_MW.astype(hidden_MD.dtype), hidden_MD, head_WD, dtypes=dtypes)


def products(dlogits_MW, hidden_MD, head_WD, *, dtypes) -> tuple[jax.Array, jax.Array]:
    """Return dlogits . head and dlogits^T . hidden, accumulated in float32."""
    dhidden_MD, dhead_WD = specs.product(dlogits_MW, head_WD, 1, 0), specs.product(dlogits_MW, hidden_MD, 0, 0)
    return dhidden_MD.astype(dtypes[0]), dhead_WD.astype(dtypes[1])


def _logits(hidden_MD, head_WD, raw_MW, spec: specs.HeadSpec):
    """Logits of one block, and their derivative with respect to the raw product, in the accumulator dtype."""
    return specs.cap(specs.product(hidden_MD, head_WD, 1, 1) if raw_MW is None else raw_MW, spec)


def _counted(width, first, last):
    """Which columns of the block count; None where all do."""
    if isinstance(first, int) and isinstance(last, int) and (first, last) == (0, width):
        return None
    columns_W = jnp.arange(width)
    return (columns_W >= first) & (columns_W < last)


ENGINE = blocks.Engine(
    forward_block,
    backward_block,
    forward_tiles=plan,
    backward_tiles=plan,
    kept_tiles=kept_tiles,
    pull=pull_block,
    pull_tiles=plan,
)


def engine(forward, backward, *, forward_tiles, backward_tiles, loss_parameters, obstacle) -> blocks.Engine:
    """Return an engine of kernels: a plane that is kept, and a head that is frozen, are read by XLA."""
    return blocks.Engine(
        forward,
        backward,
        forward_tiles,
        backward_tiles,
        kept_tiles=plan_kept_if_asked,
        plane=ENGINE,
        pull=pull_block,
        pull_tiles=plan,
        loss_parameters=loss_parameters,
        obstacle=obstacle,
    )
