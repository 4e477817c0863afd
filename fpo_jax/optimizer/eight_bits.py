"""Arrays in eight bits with a scale for every block: how AdamW's moments are kept between two updates.

The code is the dynamic tree of Dettmers et al., "8-bit optimizers via block-wise quantization", arXiv 2110.02861. A
magnitude relative to its block's largest is written in M bits (seven beside a sign, eight without one): the highest bit
that is set, i, names the power of ten, the i bits below it one of 2^i equal bins of that decade, whose middle is the
value:

    10^(i + 1 - M) (0.1 + 0.9 (bin + 0.5) / 2^i)    i = 0 .. M - 1

So the largest magnitudes have a precision of 1 %, and M decades are told apart. Three things differ from the paper.
The scale makes the largest of a block exact. A block ends with the last axis of its array: it lies within one shard.
And a square that is not zero never becomes zero, for a moment divided by the root of nothing would be an update of any
size.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

BLOCK = 256  # entries that share a scale, along the last axis
SMALLEST = 4096  # entries of an array from which on it is kept in eight bits


class EightBits(NamedTuple):
    """An array of floats; beside its codes it takes 4 / BLOCK bytes an entry."""

    codes: Any  # [*rest, n], uint8; in a tree of shapes or of places, one of those
    scales: Any  # [*rest, blocks], float32: value of the largest magnitude of a block


def encode(x: Float[jax.Array, "*rest n"], *, signed: bool) -> EightBits:
    """Return the nearest codes; what is not finite makes its block NaN.

    Args:
        x: float32.
        signed: False for squares.
    """
    bits = 7 if signed else 8
    scales = jnp.max(jnp.abs(_blocks(x)), axis=-1)
    whole = _entries(jnp.where(scales == 0, 1.0, scales), x.shape)
    relative = jnp.abs(x) / whole * _value(2**bits - 1, bits)  # the largest has the highest code's value
    decade = jnp.zeros(x.shape, jnp.int32)  # i
    for power in range(1, bits):
        decade += relative > 10.0 ** (power - bits)
    bins = jnp.exp2(decade.astype(jnp.float32))
    place = jnp.floor((relative * _power_of_ten(bits - 1 - decade) - 0.1) / 0.9 * bins)
    code = bins + jnp.clip(place, 0, bins - 1)
    least = _value(1, bits) / 2 if signed else 0.0
    code = jnp.where(relative > least, code, 0).astype(jnp.uint8)
    if signed:
        code |= jnp.where(x < 0, 128, 0).astype(jnp.uint8)
    return EightBits(code, scales)


def decode(x: EightBits, *, signed: bool) -> Float[jax.Array, "*rest n"]:
    """Return the float32 values."""
    bits = 7 if signed else 8
    code = x.codes.astype(jnp.int32)
    magnitude = _value(code & 127 if signed else code, bits)
    values = magnitude / _value(2**bits - 1, bits) * _entries(x.scales, x.codes.shape)
    return jnp.where(code & 128, -values, values) if signed else values


def holds(node: object) -> bool:
    """Return whether a node of an optimiser's state is an array in eight bits."""
    return isinstance(node, EightBits)


def worth(x: jax.ShapeDtypeStruct | jax.Array) -> bool:
    """Return whether an array is kept in eight bits: not a small one, as its block would be."""
    return x.ndim > 0 and x.size >= SMALLEST


def _value(code, bits: int):
    """Relative magnitude of a code, not yet divided by that of the highest."""
    code = jnp.asarray(code, jnp.int32)
    decade = 31 - jax.lax.clz(jnp.maximum(code, 1))
    bins = jnp.exp2(decade.astype(jnp.float32))
    fraction = 0.1 + 0.9 * (code.astype(jnp.float32) - bins + 0.5) / bins
    return jnp.where(code == 0, 0.0, fraction / _power_of_ten(bits - 1 - decade))


def _power_of_ten(exponent):
    """10^exponent for 0 to 7, exact in float32."""
    return sum(jnp.where(exponent == power, jnp.float32(10.0**power), 0.0) for power in range(8))


def _blocks(x):
    """Split the last axis into blocks, the last of them filled up with zeros."""
    size = min(BLOCK, x.shape[-1])
    filled = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)])
    return filled.reshape(*x.shape[:-1], -1, size)


def _entries(scales, shape: tuple[int, ...]):
    """Give every entry the scale of its block."""
    return jnp.repeat(scales, min(BLOCK, shape[-1]), axis=-1)[..., : shape[-1]]
