"""Bytes that a checkpoint takes on its disk, told before it is written.

Orbax compresses: float32 weights shrink by 8 %, bfloat16 ones by 25 %, moments of rows that no step reached vanish.
The newest sealed step says what the next one will take; before there is one, a sample of every array is compressed.
"""

import shutil
from pathlib import Path

import jax
import numpy as np
import tensorstore

from fpo_jax import types
from fpo_jax.checkpoint import integrity

SAMPLE_BYTES = 2**20  # of an array, compressed to learn how it shrinks
_ZSTD = {"id": "zstd", "level": 1}  # as orbax writes


def raw(state: types.PyTree) -> int:
    """Return the bytes of a state as it lies in memory, of arrays or of their shapes."""
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(state))


def estimate(folder: Path, state: types.PyTree) -> int:
    """Return the bytes that a checkpoint of `state` will take.

    Args:
        folder: of the checkpoints.
        state: arrays; every process has its part of them.
    """
    return _newest(folder) or sum(round(raw(leaf) * _ratio(leaf)) for leaf in jax.tree.leaves(state))


def bound(folder: Path, state: types.PyTree) -> int:
    """Return the bytes that a checkpoint takes, or before there is one at most: shapes have no values to compress."""
    return _newest(folder) or raw(state)


def free(folder: Path) -> int:
    """Return the bytes that the folder's disk still takes."""
    return shutil.disk_usage(folder).free


def gb(count: float) -> str:
    """Bytes as text.

    >>> gb(1_234_567_890), gb(12_000_000)
    ('1.23 GB', '12.0 MB')
    """
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _newest(folder: Path) -> int | None:
    """Return the bytes of the newest sealed step; None where there is none."""
    for number in reversed(integrity.steps(folder)):
        try:
            files = integrity.parse(folder / str(number) / integrity.MANIFEST)["files"]
        except ValueError:
            continue
        return sum(entry["bytes"] for entry in files.values())
    return None


def _ratio(leaf: jax.Array) -> float:
    """Compress rows from all over an array; returns compressed bytes per byte."""
    part = leaf.addressable_shards[0].data
    while part.ndim > 1 and part.nbytes > SAMPLE_BYTES * part.shape[0]:
        part = part[part.shape[0] // 2]
    if part.ndim:
        part = part[:: max(1, part.nbytes // SAMPLE_BYTES)]
    sample = np.asarray(part).reshape(-1).view(np.uint8)
    if not sample.size:
        return 0.0
    layout = {"shape": sample.shape, "chunks": sample.shape, "dtype": "|u1", "compressor": _ZSTD}
    store = tensorstore.open({"driver": "zarr", "kvstore": "memory://", "metadata": layout}, create=True).result()
    store.write(sample).result()
    assert store.kvstore is not None
    return len(store.kvstore.read("0").result().value) / sample.size
