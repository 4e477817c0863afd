"""Small numerical pieces of the losses that stay accurate and finite where the textbook form does not.

Everything is float32 (float64 when given float64). Two constants say where mathematics ends and saturation begins.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from fpo_jax.shapes import Array

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
    top = jnp.argmax(scores, axis=-1, keepdims=True)
    is_top = jnp.arange(scores.shape[-1]) == top
    # The top's own 0 is a constant, so that its gradient is not 1 - 1 + p but p.
    relative = jnp.where(is_top, 0.0, scores - jnp.take_along_axis(scores, top, axis=-1))
    others = jnp.sum(jnp.where(is_top, 0.0, jnp.exp(relative)), axis=-1, keepdims=True)
    return relative - jnp.log1p(others)


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
    return jnp.where(a_larger, -1.0, 1.0) * saturating_exp(jnp.maximum(log_a, log_b)) * jnp.expm1(minus_distance)


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
    near = jnp.expm1(jnp.minimum(exponent, SATURATION))
    return (near + jnp.exp(SATURATION) * jnp.maximum(exponent - SATURATION, 0.0)) / power
