"""Log-probs under the frozen reference: computed once before the first update, kept on disk, verified at every start.

The file is named by a fingerprint of everything that matters (weights, tokens, masks, temperature, dtype), so that
neither another data set nor another model can be taken for it, and a resumed run never uses its own weights as the
reference. The reference is not in memory while training.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from fpo_jax import types


def fingerprint(parts: Mapping[str, object]) -> str:
    """Return a sha256 over the named parts; equal parts in any order give the same text."""
    return hashlib.sha256(json.dumps(dict(parts), sort_keys=True).encode()).hexdigest()


def compute(
    scored: Iterable[tuple[np.ndarray, np.ndarray]], *, groups: int, known: np.ndarray | None = None
) -> np.ndarray:
    """Put the scores of all batches in the order of the data.

    Args:
        scored: of each batch, where its groups belong [B] (-1 is padding) and their summed log-probs [B, K].
        groups: number of groups in the data.
        known: what is there already [groups, K], float32, NaN where nothing is; it is filled in place.

    Returns:
        Summed log-probs [groups, K], float32.

    Raises:
        ValueError: a log-prob is not finite, naming the groups.
    """
    result = known
    for ids_B, logps_BK in scored:
        result = np.full((groups, logps_BK.shape[1]), np.nan, np.float32) if result is None else result
        result[ids_B[ids_B >= 0]] = logps_BK[ids_B >= 0]
    assert result is not None
    bad = np.flatnonzero(~np.isfinite(result).all(axis=1))
    if bad.size:
        raise ValueError(
            f"the reference gives log-probs that are not finite for {bad.size} of {groups} groups (first:"
            f" {bad[:5].tolist()}); check that the model's weights are finite and that its dtype fits."
        )
    return result


def attach(batch: types.Batch, logps: np.ndarray | None) -> types.Batch:
    """Fill the log-probs of a batch's groups in; padding groups keep zeros.

    Args:
        batch: on the host.
        logps: of all groups of the data [groups, K]; None = the loss needs none, and the batch stays as it is.
    """
    if logps is None:
        return batch
    real_B = batch.row_ids_B >= 0
    logps_BK = np.where(real_B[:, None], logps[np.where(real_B, batch.row_ids_B, 0)], np.float32(0))
    return batch._replace(reference_logps_BK=logps_BK)


def save(path: Path, logps: np.ndarray, parts: Mapping[str, object]) -> None:
    """Write the log-probs with their parts and digest; the file appears whole or not at all."""
    _write(path, logps, parts)
    part_of(path).unlink(missing_ok=True)


def part_of(path: Path) -> Path:
    """Return where an unfinished pass keeps what it has."""
    return path.with_suffix(".part")


def save_part(path: Path, logps: np.ndarray, parts: Mapping[str, object]) -> None:
    """Write what a pass has so far, NaN where nothing is; `path` is that of the whole."""
    _write(part_of(path), logps, parts)


def load_part(path: Path) -> np.ndarray | None:
    """Read what an unfinished pass left; None where that is nothing, or damaged and so worth nothing."""
    try:
        logps, digest = _read(part_of(path))
    except (FileNotFoundError, safetensors.SafetensorError):
        return None
    return logps if _digest(logps) == digest else None


def _write(path: Path, logps: np.ndarray, parts: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    metadata = {"parts": json.dumps(dict(parts), sort_keys=True), "sha256": _digest(logps)}
    safetensors.numpy.save_file({"reference_logps": logps}, temporary, metadata=metadata)
    temporary.replace(path)


def _read(path: Path) -> tuple[np.ndarray, str | None]:
    """Return the log-probs and the digest that they were written with."""
    with safetensors.safe_open(path, framework="numpy") as file:
        return file.get_tensor("reference_logps"), (file.metadata() or {}).get("sha256")


def load(path: Path) -> np.ndarray:
    """Read what `save` wrote.

    Raises:
        ValueError: the file is damaged, or holds what is not finite; the remedy is to delete it.
    """
    remedy = f"delete {path} and start again: it is computed anew."
    try:
        logps, digest = _read(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"the reference log-probs in {path} cannot be read ({error}); {remedy}") from None
    if _digest(logps) != digest:
        raise ValueError(f"the reference log-probs in {path} do not match their digest; {remedy}")
    if bad := np.flatnonzero(~np.isfinite(logps).all(axis=1)).tolist():
        raise ValueError(
            f"the reference log-probs in {path} are not finite for {len(bad)} of {len(logps)} groups (first:"
            f" {bad[:5]}); {remedy}"
        )
    return logps


def verify(stored: np.ndarray, scored: Iterable[tuple[np.ndarray, np.ndarray]], *, rtol: float, path: Path) -> float:
    """Compare the scores of a few groups with what the file holds; returns the largest absolute difference in nats.

    Args:
        stored: what the file holds, [groups, K].
        scored: as in `compute`.
        rtol: allowed difference relative to 1 + |log-prob|.
        path: named in the error.

    Raises:
        ValueError: they differ by more.
    """
    worst = 0.0
    for ids_B, logps_BK in scored:
        fresh_BK = np.asarray(logps_BK, np.float32)[ids_B >= 0]
        difference_BK = np.abs(stored[ids_B[ids_B >= 0]] - fresh_BK)
        worst = max(worst, float(difference_BK.max(initial=0.0)))
        if not (difference_BK <= rtol * (1.0 + np.abs(fresh_BK))).all():
            raise ValueError(
                f"the reference log-probs in {path} are {worst:.3g} nats off those the reference model gives now"
                f" (allowed: {rtol:g} relative); the file belongs to another model or is damaged: delete it to compute"
                " it anew."
            )
    return worst


def verification_steps(steps: int) -> list[int]:
    """Return the batches to score again: first, middle and last.

    >>> verification_steps(101), verification_steps(1)
    ([0, 50, 100], [0])
    """
    return sorted({0, (steps - 1) // 2, steps - 1})


def _digest(logps: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(logps).tobytes()).hexdigest()
