"""Matrices held in four bits (NF4), which a layer multiplies by as they are in its compute dtype.

    w = scale[block] * LEVELS[code]      a block is 64 inputs of one output, its scale their largest magnitude

QLoRA, arXiv 2305.14314: the 16 levels of its appendix E are quantiles of a normal distribution, exactly 0 among them.
Blocks lie along the inputs, as bitsandbytes finds them in the matrices of transformers, so that both hold the same
numbers. Scales are float32, and not quantised once more (0.5 bits a weight instead of 0.127).

    input_axis(entry)         which parameters can be held so, and how
    quantise(weight, axis)    -> NF4, which stands in a tree of parameters where an array does
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from fpo_jax import sharding
from fpo_jax.models.param_table import Entry, groups

BLOCK = 64
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@functools.partial(jax.tree_util.register_dataclass, data_fields=("codes", "scales"), meta_fields=("axis",))
@dataclasses.dataclass(frozen=True)
class NF4:
    """A stack of matrices in four bits; `[...]` is what they stand for."""

    codes: jax.Array  # uint8, two along the axis of the inputs: the first in the upper bits
    scales: jax.Array  # float32, one for each block along that axis
    axis: int  # counted from the end: of a layer as of all layers

    def __getitem__(self, index: object) -> jax.Array:
        """Return the whole in float32."""
        if index is not Ellipsis:
            raise IndexError("matrices in four bits are read whole: write [...]")
        axis = self.axis + self.codes.ndim
        both = jnp.stack([self.codes >> 4, self.codes & 15], axis=axis + 1)
        shape = (*self.codes.shape[:axis], 2 * self.codes.shape[axis], *self.codes.shape[axis + 1 :])
        blocks = (*shape[:axis], shape[axis] // BLOCK, BLOCK, *shape[axis + 1 :])
        levels = jnp.asarray(LEVELS, jnp.float32)[both.reshape(blocks)]
        return (levels * jnp.expand_dims(self.scales, axis + 1)).reshape(shape)


def quantise(weight: jax.Array, axis: int) -> NF4:
    """Round a matrix to four bits: each weight to the level that is nearest, relative to the largest of its block.

    Args:
        weight: any float dtype.
        axis: of the inputs, whose size is a multiple of 64; negative, counted from the end.
    """
    place = axis + weight.ndim
    shape = weight.shape
    blocks = weight.astype(jnp.float32).reshape(*shape[:place], -1, BLOCK, *shape[place + 1 :])
    scales = jnp.max(jnp.abs(blocks), axis=place + 1)
    relative = blocks / jnp.expand_dims(jnp.where(scales > 0, scales, 1.0), place + 1)
    levels = jnp.asarray(LEVELS, jnp.float32)
    codes = sum((relative > middle).astype(jnp.uint8) for middle in (levels[1:] + levels[:-1]) / 2)
    pairs = jnp.asarray(codes).reshape(*shape[:place], -1, 2, *shape[place + 1 :])
    upper, lower = jnp.take(pairs, 0, axis=place + 1), jnp.take(pairs, 1, axis=place + 1)
    return NF4((upper << 4) | lower, scales, axis)


def input_axis(entry: Entry, *, transposed: bool) -> int | None:
    """Return the axis, counted from the end, along which a parameter's blocks lie; None = it is not held in four bits.

    That is the last of the inputs of a layer's matrix. A router is none, nor what has no multiple of 64 inputs there.

    Args:
        entry: of the parameter.
        transposed: whether the family's matrices lie on disk with their inputs first.
    """
    if not (entry.stacked and entry.decay) or entry.path.endswith("/router"):
        return None
    *experts, first, last = groups(entry.hf_letters)  # experts in one tensor have their inputs first
    inputs = first if transposed or experts else last
    axis = entry.letters.index(inputs[-1]) - len(entry.letters)
    return None if entry.shape[axis] % BLOCK else axis


def abstract(entry: Entry, axis: int) -> NF4:
    """Return shapes and dtypes of a parameter that is held in four bits."""
    whole = jax.ShapeDtypeStruct(entry.shape, jnp.float32)
    return jax.eval_shape(functools.partial(quantise, axis=axis), whole)


@functools.partial(jax.jit, static_argnames=("axis", "place"))
def quantise_layers(weight: jax.Array, *, axis: int, place: NF4) -> NF4:
    """Quantise a stacked parameter layer by layer, so that no more than one of them is in float32."""
    held = jax.lax.map(functools.partial(quantise, axis=axis), weight)
    return jax.lax.with_sharding_constraint(held, place)


def placed(place: NamedSharding, shape: tuple[int, ...], axis: int) -> NF4:
    """Return where codes and scales live: as the matrix, but scales whole along axes that do not divide them."""

    def cut(size: int) -> NamedSharding:
        sizes = [*shape]
        sizes[axis] = size
        return sharding.fitted(place, sizes)

    return NF4(cut(shape[axis] // 2), cut(shape[axis] // BLOCK), axis)  # type: ignore[arg-type]
