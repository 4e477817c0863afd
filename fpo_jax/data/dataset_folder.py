"""Tokenised data in a folder: written once, mapped from then on by every process that needs them, verified when read.

    tokens.npy lengths.npy prompt_lengths.npy rewards.npy                                              the rows
    scored.npy segments.npy      of packed rows; the first also where completions have several turns
    places.npy place_ends.npy sources.npy reasons.npy      where records came from; which were dropped or noted
    dataset.json      what the rows were made from, their fingerprint, the audit, one decoded row; its own digest

Whoever reads a folder reads the bytes of all rows once, to compare their fingerprint, and holds none of them: they are
the page cache's, and of several processes on a host the same.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fpo_jax.data import audit as audits
from fpo_jax.data import tokenized
from fpo_jax.data.audit import Audit
from fpo_jax.data.flat_texts import FlatTexts, Pool
from fpo_jax.data.tokenized import Prepared
from fpo_jax.io import atomic_io, json_digest

MANIFEST = "dataset.json"
TOKENS = "tokens.npy"
_SMALL = 2**16  # bytes of a file that is read and not mapped
_ROWS = {  # of `Prepared`; where a row starts follows from the lengths
    "tokens": "tokens_S",
    "lengths": "lengths_N",
    "prompt_lengths": "prompt_lengths_N",
    "rewards": "rewards_BK",
    "scored": "scored_S",
    "segments": "segments_S",
}


class Dataset(NamedTuple):
    """Token rows, what was found while making them, and one decoded row with its scored part marked."""

    prepared: Prepared
    audit: Audit
    sample: str
    digest: str = ""  # fingerprint of the rows where it was compared a moment ago; a million pairs take seconds

    def fingerprint(self) -> str:
        """Return the fingerprint of the rows."""
        return self.digest or self.prepared.fingerprint()


class Damaged(ValueError):
    """A folder that does not hold what was written."""


def write(folder: Path, dataset: Dataset, parts: Mapping[str, Any]) -> None:
    """Write a data set into a new folder; its tokens may be there already, as `tokens.npy`.

    Args:
        folder: that nobody reads yet.
        dataset: what is written.
        parts: what it was made from, as JSON.
    """
    prepared, audit = dataset.prepared, dataset.audit
    arrays = {name: array for name, field in _ROWS.items() if (array := getattr(prepared, field)) is not None}
    pool = Pool()
    sources = pool.index(prepared.sources)
    reasons = [
        (kind, reason, pool.index(places))
        for kind, found in (("dropped", audit.dropped), ("noted", audit.noted))
        for reason, places in found.items()
    ]
    bytes_S, ends_P = pool.arrays()
    index = np.concatenate([np.zeros(0, np.int32), *(numbers for _, _, numbers in reasons)])
    places = {"places": bytes_S, "place_ends": ends_P, "sources": sources, "reasons": index}
    for name, array in (arrays | places).items():
        path = folder / f"{name}.npy"
        if not (isinstance(array, np.memmap) and Path(str(array.filename)) == path):
            np.save(path, array)
    content = {
        "parts": dict(parts),
        "rows": list(arrays),
        "fingerprint": prepared.fingerprint(),
        "places": _digest(places.values()),
        "pad_id": prepared.pad_id,
        "audit": audit._replace(dropped={}, noted={}).as_dict(),
        "reasons": [[kind, reason, len(numbers)] for kind, reason, numbers in reasons],
        "example": audit.example,
        "sample": dataset.sample,
    }
    atomic_io.write_json(folder / MANIFEST, {"content": content, "sha256": json_digest.of(content)})


def read(folder: Path, parts: Mapping[str, Any]) -> Dataset:
    """Map what `write` wrote, and compare all of it with its digests.

    Raises:
        Damaged: a file is missing, cut or changed, or was made from something else; says which.
    """
    content = _content(folder)
    if content["parts"] != json.loads(json.dumps(dict(parts))):
        raise Damaged(f"{folder} was made from something else")
    rows = {_ROWS[name]: _array(folder / f"{name}.npy") for name in content["rows"]}
    places = {name: _array(folder / f"{name}.npy") for name in ("places", "place_ends", "sources", "reasons")}
    prepared = Prepared(
        **rows,
        starts_N=tokenized.starts(rows["lengths_N"]),
        sources=FlatTexts(places["places"], places["place_ends"], places["sources"]),
        pad_id=content["pad_id"],
    )
    if prepared.fingerprint() != content["fingerprint"]:
        raise Damaged(f"the rows in {folder} do not match their digest")
    if _digest(places.values()) != content["places"]:
        raise Damaged(f"the places in {folder} do not match their digest")
    found: dict[str, dict[str, FlatTexts]] = {"dropped": {}, "noted": {}}
    begin = 0
    for kind, reason, count in content["reasons"]:
        numbers = places["reasons"][begin : begin + count]
        found[kind][reason] = FlatTexts(places["places"], places["place_ends"], numbers)
        begin += count
    audit = audits.from_dict(content["audit"])._replace(**found, example=content["example"])
    return Dataset(prepared, audit, content["sample"], content["fingerprint"])


def _content(folder: Path) -> dict[str, Any]:
    try:
        manifest = atomic_io.read_json(folder / MANIFEST)
        content, digest = manifest["content"], manifest["sha256"]
    except (ValueError, KeyError) as error:
        raise Damaged(f"{folder / MANIFEST} is missing or damaged ({error})") from None
    if json_digest.of(content) != digest:
        raise Damaged(f"{folder / MANIFEST} does not match its digest")
    return content


def _array(path: Path) -> np.ndarray:
    try:
        mapped = "r" if path.stat().st_size > _SMALL else None
        return np.asarray(np.load(path, mmap_mode=mapped, allow_pickle=False))
    except (FileNotFoundError, ValueError, EOFError) as error:
        raise Damaged(f"{path} is missing or cut ({error})") from None


def _digest(arrays: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()
