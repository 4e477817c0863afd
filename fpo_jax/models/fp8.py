"""Matrix products in 8-bit floating point, forward and backward, with one scale for each operand.

    y = s_x s_w sum(q(x / s_x) q(w / s_w))    q rounds to float8_e4m3fn, gradients to float8_e5m2

A scale is a power of two, the least at which the largest magnitude of its array fits the format: dividing by it and
multiplying with it are exact, and an entry is rounded to the same number whatever else is in its array, unless it is
smaller than the largest by the format's whole range (2^-15 of it for e4m3). So the log-probs of a text depend on the
batch that it stands in by those alone. Formats and their use: Micikevicius et al., "FP8 formats for deep learning",
arXiv 2209.05433.

Products sum in float32 on the hardware and are rounded to the type of the input, those for a weight to the weight's.
"""

import functools

import jax
import jax.numpy as jnp

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2


def einsum(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """Return `jnp.einsum(equation, x, weight)` of both rounded to 8 bits, in the dtype of x.

    The gradients are products of 8-bit numbers too: of the rounded operands of the forward pass and the rounded
    gradient of the result. What is not finite in an operand makes the whole result NaN.

    Args:
        equation: of two operands that name no axis twice, and no axis of a result that is in neither.
        x: bfloat16 or float32.
        weight: any float dtype.
    """
    return jnp.asarray(_einsum(equation, x, weight))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    return _forward(equation, x, weight)[0]


def _forward(equation: str, x: jax.Array, weight: jax.Array):
    # Empty arrays carry the dtypes, which residuals of a custom_vjp cannot name.
    kinds = (jnp.zeros(0, x.dtype), jnp.zeros(0, weight.dtype))
    left, right = _quantised(x, FORWARD), _quantised(weight, FORWARD)
    return _product(equation, left, right, x.dtype), (left, right, kinds)


def _backward(equation: str, kept, gradient: jax.Array):
    left, right, (of_x, of_weight) = kept
    given, result = equation.split("->")
    read, weight = given.split(",")
    scaled = _quantised(gradient, BACKWARD)
    return (
        _product(f"{result},{weight}->{read}", scaled, right, of_x.dtype),
        _product(f"{read},{result}->{weight}", left, scaled, of_weight.dtype),
    )


_einsum.defvjp(_forward, _backward)


def _quantised(x: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """Return x / s in 8 bits, and s, float32."""
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    scale = power_of_two(largest / float(jnp.finfo(dtype).max))
    return (x.astype(jnp.float32) / scale).astype(dtype), scale


def power_of_two(x: jax.Array) -> jax.Array:
    """Return the least power of two that is not below a normal float32; 1 for 0, and NaN for what is not finite."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)  # 8 bits of exponent above 23 of mantissa
    up = jax.lax.bitcast_convert_type((bits + jnp.uint32(0x7FFFFF)) & jnp.uint32(0x7F800000), jnp.float32)
    return jnp.where(jnp.isfinite(x), jnp.where(up == 0, 1.0, up), jnp.nan)


def _product(equation: str, left: tuple, right: tuple, dtype) -> jax.Array:
    (a, a_scale), (b, b_scale) = left, right
    out = jnp.einsum(equation, a, b, preferred_element_type=dtype)
    return out * (a_scale * b_scale).astype(dtype)
