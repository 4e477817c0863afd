"""Damage to files: seeded trials, each of which one command replays."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def trials(count: int) -> Iterator[tuple[int, np.random.Generator]]:
    """Yield seeds and their generators; FPO_FLIP_SEED and FPO_FLIP_TRIALS select others."""
    first = int(os.environ.get("FPO_FLIP_SEED", 0))
    for seed in range(first, first + int(os.environ.get("FPO_FLIP_TRIALS", count))):
        yield seed, np.random.default_rng(seed)


def replay(seed: int) -> str:
    """Return the command that repeats the trial of this seed in the running test."""
    node = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
    return f"FPO_FLIP_SEED={seed} FPO_FLIP_TRIALS=1 python -m pytest -m '' '{node}'"


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def files(folder: Path) -> list[Path]:
    """Return every file under a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip_somewhere(folder: Path, random: np.random.Generator) -> Path:
    """Flip a bit of a folder's files, every bit as likely as any other; returns the file."""
    found = files(folder)
    sizes = np.array([path.stat().st_size for path in found])
    bit = int(random.integers(8 * sizes.sum()))
    index = int(np.searchsorted(np.cumsum(8 * sizes), bit, side="right"))
    flip(found[index], bit - int(8 * sizes[:index].sum()))
    return found[index]
