"""Small numerical pieces of the losses that stay accurate and finite where the textbook form does not.

Everything is float32 (float64 when given float64), and made of elementwise functions and reductions that a TPU kernel
can run, since the fused kernel traces the losses as they are: no gather, no sort, no reversal. Two constants say where
mathematics ends and saturation begins.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from fpo_jax.types import Array

# exp(x) continues as its tangent above x = 30: 1e13 is beyond any useful loss, and value, gradient and squared gradient
# norm still fit float32 at x = 1e4. Only terms that truly overflow (chi-squared, alpha outside [0, 1]) get there.
SATURATION = 30.0
# A hard label's log q: 0 * 1e30 is 0 where 0 * inf would be NaN, and q^alpha is still 0 at alpha = 1e-12.
LOG_ZERO = -1e30
# (u^t - 1)/t is log u to 1e-12 |log u| relative below this |t|; t itself may be denormal in float32 there.
TINY_POWER = 1e-12


def as_float(*arrays: Any) -> tuple[jax.Array, ...]:
    """Return the arrays in one dtype: float64 if any of them is, else float32.

    >>> import numpy as np
    >>> [x.dtype.name for x in as_float(jnp.bfloat16(1), np.arange(2))]
    ['float32', 'float32']
    """
    dtype = jnp.result_type(jnp.float32, *arrays)
    return tuple(jnp.asarray(array, dtype) for array in arrays)


def log_softmax(scores: Float[Array, "*batch K"]) -> Float[jax.Array, "*batch K"]:
    """Return log softmax over the last axis, each entry right to a few ulp *relative*.

    log p_i = s_i - s_top - log1p(Σ_{j≠top} exp(s_j - s_top)). The usual form adds the top's 1 to that sum, so that the
    log-prob of a confident winner (-6e-6 at a margin of 12), which is its DPO loss, keeps no correct digit in float32.

    Args:
        scores: in nats; finite.

    Returns:
        Same shape, <= 0.

    >>> [round(float(x), 8) for x in log_softmax(jnp.array([12.0, 0.0]))]
    [-6.14e-06, -12.00000572]
    """
    (scores,) = as_float(scores)
    is_top = first_of(scores == jnp.max(scores, axis=-1, keepdims=True))
    # The top's own 0 is a constant, so that its gradient is not 1 - 1 + p but p.
    relative = jnp.where(is_top, 0.0, scores - jnp.sum(jnp.where(is_top, scores, 0.0), axis=-1, keepdims=True))
    others = jnp.sum(jnp.where(is_top, 0.0, jnp.exp(relative)), axis=-1, keepdims=True)
    return relative - jnp.log1p(others)


def first_of(mask: Bool[Array, "*batch K"]) -> Bool[jax.Array, "*batch K"]:
    """Keep the first True of the last axis.

    >>> first_of(jnp.array([False, True, True])).tolist()
    [False, True, False]
    """
    index = jax.lax.broadcasted_iota(jnp.int32, mask.shape, len(mask.shape) - 1)
    return index == jnp.min(jnp.where(mask, index, mask.shape[-1]), axis=-1, keepdims=True)


def last_of(mask: Bool[Array, "*batch K"]) -> Bool[jax.Array, "*batch K"]:
    """Keep the last True of the last axis.

    >>> last_of(jnp.array([False, True, True])).tolist()
    [False, False, True]
    """
    index = jax.lax.broadcasted_iota(jnp.int32, mask.shape, len(mask.shape) - 1)
    return index == jnp.max(jnp.where(mask, index, -1), axis=-1, keepdims=True)


@jax.custom_jvp
def expm1(x: Float[Array, "*shape"]) -> Float[jax.Array, "*shape"]:
    """Return e^x - 1, right to a few ulp relative: below ½ by its series x (1 + x/2 (1 + x/3 (1 + ...))).

    TPU kernels have no expm1 of their own; float64, which they do not have either, uses jnp.expm1.

    >>> float(expm1(jnp.float32(1e-6))) / 1e-6 - 1 < 1e-6, round(float(expm1(jnp.float32(-1.0))), 6)
    (True, -0.632121)
    """
    if x.dtype == jnp.float64:
        return jnp.expm1(x)
    is_small = jnp.abs(x) < 0.5
    small, series = jnp.where(is_small, x, 0.0), 1.0
    for n in range(10, 1, -1):  # the first term left out, x^10/11!, is 2e-11 of the sum at ½
        series = 1.0 + small / n * series
    return jnp.where(is_small, small * series, jnp.exp(x) - 1.0)


@expm1.defjvp
def _expm1_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return expm1(x), jnp.exp(x) * dx


def saturating_exp(x: Float[Array, "*shape"]) -> Float[jax.Array, "*shape"]:
    """Return exp(x), continued above SATURATION by its tangent: finite value and gradient, convex, no jump.

    >>> float(saturating_exp(jnp.array(0.0))), bool(jnp.isfinite(saturating_exp(jnp.array(1e4))))
    (1.0, True)
    """
    (x,) = as_float(x)
    return jnp.exp(jnp.minimum(x, SATURATION)) * (1.0 + jnp.maximum(x - SATURATION, 0.0))


def difference(
    log_a: Float[Array, "*shape"], log_b: Float[Array, "*shape"], log_ratio: Float[Array, "*shape"]
) -> Float[jax.Array, "*shape"]:
    """Return a - b from logarithms without cancellation: max(a, b)·expm1(-|log a/b|), signed.

    Args:
        log_a: log a, any finite value; a saturates like `saturating_exp`.
        log_b: log b, likewise.
        log_ratio: log a - log b; passed in because callers know it without the rounding of that subtraction.

    >>> a, b = jnp.log(3.0), jnp.log(2.0)
    >>> round(float(difference(a, b, a - b)), 6), round(float(difference(b, a, b - a)), 6)
    (1.0, -1.0)
    """
    log_a, log_b, log_ratio = as_float(log_a, log_b, log_ratio)
    a_larger = log_ratio > 0
    # `where`, not `abs` or `minimum`: at a == b the slope must be that of one side, never their mean.
    minus_distance = jnp.where(a_larger, -log_ratio, log_ratio)
    return jnp.where(a_larger, -1.0, 1.0) * saturating_exp(jnp.maximum(log_a, log_b)) * expm1(minus_distance)


def box_cox(log_u: Float[Array, "*shape"], *, power: float) -> Float[jax.Array, "*shape"]:
    """Return (u^power - 1)/power, which is log u at power 0; u^power saturates like `saturating_exp`.

    >>> u = jnp.log(4.0)
    >>> [round(float(box_cox(u, power=t)), 4) for t in (1.0, 0.5, 1e-6, 0.0, -1.0)]
    [3.0, 2.0, 1.3863, 1.3863, 0.75]
    """
    (log_u,) = as_float(log_u)
    if abs(power) < TINY_POWER:
        return log_u
    exponent = power * log_u
    near = expm1(jnp.minimum(exponent, SATURATION))
    return (near + jnp.exp(SATURATION) * jnp.maximum(exponent - SATURATION, 0.0)) / power
