"""Digests of an exported directory: sha256 of every file and of every tensor, with its dtype and shape.

    write ──► digests.json ──► check        (`python -m fpo_jax.hf DIRECTORY`)

safetensors has no checksums, and a flipped bit in it loads without a word. Readers of models ignore the file.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fpo_jax.checkpoint import integrity

_ALGORITHM = "sha256"
_READ_BYTES = 2**20


class Written(NamedTuple):
    """A weights file, and what is in it."""

    file: dict[str, Any]
    tensors: dict[str, dict[str, Any]]


class Writer:
    """Writes blocks to a weights file and digests them on their way, one block in memory at a time."""

    def __init__(self, path: Path):
        """Name the file; it is opened inside `with`."""
        self._path, self._whole, self._bytes = path, hashlib.sha256(), 0
        self._digests: list[bytes] = []

    def __enter__(self) -> "Writer":
        self._file = self._path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def header(self, block: bytes) -> None:
        """Write what is no tensor's."""
        self._put(block)

    def tensor(self, blocks: Iterable[memoryview]) -> None:
        """Write the next tensor."""
        own = hashlib.sha256()
        for block in blocks:
            own.update(block)
            self._put(block)
        self._digests.append(own.digest())

    def written(self, tensors: Iterable[tuple[str, str, Iterable[int]]]) -> Written:
        """Return the digests, once the file is closed, so that nothing but they is held while tensors are.

        Args:
            tensors: name, dtype as safetensors spells it, and shape of each, in the order of writing.
        """
        entries = {
            name: _entry(self._path.name, dtype, shape, own.hex())
            for (name, dtype, shape), own in zip(tensors, self._digests, strict=True)
        }
        return Written({"bytes": self._bytes, _ALGORITHM: self._whole.hexdigest()}, entries)

    def _put(self, block: bytes | memoryview) -> None:
        self._whole.update(block)
        self._bytes += self._file.write(block)


def write(directory: Path, written: dict[str, Written] | None = None) -> None:
    """Write the digests of a directory, as its last file.

    Args:
        directory: complete but for this.
        written: weights files by name that were digested on their way to the disk; the others are read.
    """
    known = written or {}
    files = {name: one.file for name, one in known.items()}
    tensors = {name: entry for one in known.values() for name, entry in one.tensors.items()}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = str(path.relative_to(directory))
        if name not in known:
            files[name] = integrity.digest(path, _ALGORITHM)
            if path.suffix == ".safetensors":
                tensors |= dict(_read(path))
    integrity.write(directory, {"files": dict(sorted(files.items())), "tensors": dict(sorted(tensors.items()))})


def check(directory: Path) -> list[str]:
    """Return everything that differs from what was written: files, and tensors in them; nothing where all is well."""
    try:
        content = integrity.parse(directory / integrity.MANIFEST)
    except ValueError as error:
        return [str(error)]
    found = []
    for name, fault in integrity.compare(directory, content["files"]).items():
        expected = {tensor: entry for tensor, entry in content["tensors"].items() if entry["file"] == name}
        found.append(f"{name} {fault}{_differing(directory / name, expected)}")
    added = {path.name for path in directory.glob("*.safetensors")} - set(content["files"])
    return found + [f"{name} was not there: readers may take it for the weights" for name in sorted(added)]


def _differing(path: Path, expected: dict[str, dict[str, Any]]) -> str:
    """Name the tensors that are not what was written, where the file can still be read as one of tensors."""
    if not expected:
        return ""
    try:
        found = dict(_read(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ", and its header or its end is damaged"
    names = [name for name, entry in expected.items() if found.get(name) != entry]
    return f" (tensor {', '.join(names)})" if names else " (no tensor's values: its header)"


def _read(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the entry of every tensor of a safetensors file."""
    with path.open("rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
        if length > size:
            raise ValueError(f"{path} has {size} bytes, its header says {length} of itself.")
        for name, tensor in json.loads(file.read(length)).items():
            if name == "__metadata__":
                continue
            start, end = tensor["data_offsets"]
            if end > size:
                raise ValueError(f"{path} has {size} bytes, its header says {end} of {name}.")
            own = hashlib.sha256()
            for place in range(start, end, _READ_BYTES):
                file.seek(8 + length + place)
                own.update(file.read(min(_READ_BYTES, end - place)))
            yield name, _entry(path.name, tensor["dtype"], tensor["shape"], own.hexdigest())


def _entry(file: str, dtype: str, shape: Iterable[int], own: str) -> dict[str, Any]:
    return {"file": file, "dtype": dtype, "shape": list(shape), _ALGORITHM: own}
