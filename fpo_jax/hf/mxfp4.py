"""MXFP4, in which gpt-oss publishes its experts: four bits a weight and a scale for each 32; read as bfloat16.

A value is E2M1, a sign, two bits of exponent and one of mantissa; a scale is E8M0, a byte s that stands for 2^(s - 127)
(OCP Microscaling Formats specification 1.0, 5.3 and 5.4). bfloat16 holds every product of the two exactly. On disk
`NAME_blocks` is uint8 [E, outputs, inputs / 32, 16], the first of two values in the low half of a byte, and
`NAME_scales` the same without the last axis; together they are the tensor `NAME`, [E, inputs, outputs].
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

BLOCK = 32  # values that share a scale
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_MAGNITUDES, *(-one for one in _MAGNITUDES)], np.float32)
_PAIRS = np.stack([_VALUES[np.arange(256) & 15], _VALUES[np.arange(256) >> 4]], axis=-1)  # of a byte: low half first
_FACTORS = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))  # the last one is no number
# The two bfloat16 values of every scale and byte, 256 KiB: looking them up is faster than multiplying.
with np.errstate(over="ignore"):
    _TABLE = (_FACTORS[:, None, None] * _PAIRS).astype(jnp.bfloat16).view(np.uint32).reshape(-1)
_SLAB = 64  # rows that are turned at a time


def decoded(blocks: UInt8[np.ndarray, "rows groups 16"], scales: UInt8[np.ndarray, "rows groups"]) -> np.ndarray:
    """Return the values [rows, 32 groups], bfloat16.

    >>> decoded(np.full((1, 1, 16), 0x97, np.uint8), np.full((1, 1), 128, np.uint8))[0, :3].tolist()
    [12.0, -1.0, 12.0]
    """
    places = (scales.astype(np.uint16) << 8)[..., None] | blocks
    return np.take(_TABLE, places).view(jnp.bfloat16).reshape(len(blocks), -1)


class Stored(Protocol):
    """A tensor on the disk, as `load.Tensor` reads it."""

    @property
    def path(self) -> Path:
        """Its file."""
        ...

    @property
    def dtype(self) -> str:
        """As safetensors spells it."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    def read(self, shape: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        """Read entries of the first axis, in the given shape."""
        ...


class Tensor(NamedTuple):
    """A matrix of all experts in two tensors on the disk, to be read as one of bfloat16, an expert at a time."""

    blocks: Stored
    scales: Stored

    @property
    def path(self) -> Path:
        """The file of the values."""
        return self.blocks.path

    @property
    def dtype(self) -> str:
        """What is read, as safetensors spells it."""
        return "BF16"

    @property
    def shape(self) -> tuple[int, ...]:
        """E, inputs and outputs."""
        experts, outputs, groups, _ = self.blocks.shape
        return experts, groups * BLOCK, outputs

    def row_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of one expert, as it is read."""
        return 2 * math.prod(shape[1:])

    def read(self, shape: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        """Read the experts `start` to `stop - 1` in the given shape.

        Raises:
            ValueError: the file ends before them.
        """
        found = np.empty((stop - start, *self.shape[1:]), jnp.bfloat16)
        for index in range(start, stop):
            blocks, scales = (one.read(one.shape, index, index + 1)[0] for one in (self.blocks, self.scales))
            for row in range(0, len(blocks), _SLAB):
                part = slice(row, row + _SLAB)
                found[index - start, :, part] = decoded(blocks[part], scales[part]).T
        return found.reshape(stop - start, *shape[1:])

    def mapped(self, shape: tuple[int, ...]) -> np.ndarray:
        """Read all experts."""
        return self.read(shape, 0, shape[0])


def joined(tensors: Mapping[str, Stored]) -> tuple[dict[str, Any], list[str]]:
    """Put blocks and scales together, by name; the rest stays as it is.

    Returns:
        Tensors by name, and in words what of them is no MXFP4.
    """
    found: dict[str, Any] = dict(tensors)
    problems: list[str] = []
    for name in [name for name in tensors if name.endswith("_blocks")]:
        stem = name.removesuffix("_blocks")
        blocks, scales = found.pop(name), found.pop(f"{stem}_scales", None)
        if scales is None:
            problems.append(f"{name} has no {stem}_scales")
        elif stem in found:
            problems.append(f"{stem} stands in the files twice, once as blocks and scales")
        elif (blocks.dtype, scales.dtype) != ("U8", "U8") or (*scales.shape, BLOCK // 2) != blocks.shape:
            problems.append(
                f"{name} is {blocks.dtype} {blocks.shape} and its scales are {scales.dtype} {scales.shape}, MXFP4 is U8"
                " [E, outputs, inputs / 32, 16] and the same without the last axis"
            )
        elif len(blocks.shape) != 4:
            problems.append(f"{name} has {len(blocks.shape)} axes, and MXFP4 experts have 4")
        else:
            found[stem] = Tensor(blocks, scales)
    return found, problems
