"""Log-probs under the frozen reference: computed once before the first step, kept on disk, verified at every start.

The file is named by a fingerprint of everything that matters (weights, tokens, masks, temperature, dtype), so that
neither another data set nor another model can be taken for it, and a resumed run never uses its own weights as the
reference. The reference is not in memory while training. All processes compute and verify; process 0 alone touches the
files, and the others get their content from it.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
import safetensors
import safetensors.numpy

from fpo_jax import config as configuration
from fpo_jax import data, distributed, types
from fpo_jax.distributed import preemption, progress
from fpo_jax.io import atomic_io, json_digest
from fpo_jax.perf import profiler
from fpo_jax.trainer import adapters, run_inputs, run_schedule, steps

log = logging.getLogger("fpo_jax")

KEEP_EVERY_S = 60.0  # a crash costs a minute of the reference pass
# Allowed relative difference of a recomputed reference log-prob: rounding of another batch shape or device, no more.
REFERENCE_RTOL = {"float32": 1e-4, "bfloat16": 2e-2}


class ReferencePass:
    """Reference log-probs of one run's data, from its cache or from the model."""

    def __init__(
        self,
        config: configuration.Config,
        workdir: Path,
        inputs: run_inputs.Inputs,
        plan: run_schedule.RunSchedule,
        compiled: steps.Steps,
        stop: preemption.StopRequest,
        meter: profiler.Meter,
    ):
        """Take the parts of the run; nothing is read or computed yet."""
        self._config, self._inputs, self._steps, self._stop = config, inputs, compiled, stop
        self._passes, self._meter = plan.references, meter
        self._folder = Path(config.reference.cache_dir or workdir / "reference")

    def __call__(
        self, weights: types.PyTree, *, fingerprints: dict[str, str]
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Return the log-probs of the train and eval groups [groups, K]; None where the run needs none.

        Args:
            weights: of the run's starting model, with or without the adapter that it starts from; another one is read
                where the configuration names it.
            fingerprints: of the files of both, and of the data, from `run_workdir.fingerprints`.

        Raises:
            ValueError: a file is damaged or belongs to another model; a log-prob is not finite.
            preemption.Stopped: a signal asked to stop.
        """
        if not any(self._passes):
            return None, None
        fingerprint, other = fingerprints["model"], self._inputs.reference
        if adapters.in_reference(self._config):
            fingerprint = json_digest.of([fingerprint, fingerprints["adapter"]])
        if other is not None:
            weights, fingerprint = self._steps.state.load_reference(other.source), fingerprints["reference"]
        train, evaluation = self._passes
        return (
            None if train is None else self._of("train", train, weights, fingerprint, fingerprints["train data"]),
            None
            if evaluation is None
            else self._of("eval", evaluation, weights, fingerprint, fingerprints["eval data"]),
        )

    def _of(
        self, name: str, batches: data.Schedule, weights: types.PyTree, weights_fingerprint: str, data_fingerprint: str
    ) -> np.ndarray:
        config, prepared, program = self._config, batches.prepared, self._steps.logprobs
        parts = {
            "weights": weights_fingerprint,
            "data": data_fingerprint,
            "temperature": self._inputs.loss.temperature,
            "param_dtype": config.model.param_dtype,
            "compute_dtype": config.model.compute_dtype,
        }
        if config.model.matmul_dtype != "compute_dtype":  # keeps the name of the files of before
            parts["matmul_dtype"] = config.model.matmul_dtype
        if config.lora.base_dtype and self._inputs.reference is None:
            parts["base_dtype"] = config.lora.base_dtype
        path = self._folder / f"{name}-{fingerprint(parts)[:16]}.safetensors"
        positions = self._steps.batches.positions(batches.parts)

        def scored(numbers: Iterable[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for number in numbers:
                self._stop.check("the reference log-probs so far are kept; the same command goes on.")
                placed = self._steps.batches.place(data.batch_at(batches, number, positions), stacked=False)
                yield data.group_ids(batches, number), jax.device_get(program(weights, placed))

        if not any(distributed.share("there" if distributed.is_main_process() and path.exists() else "")):
            self._compute(name, path, parts, batches, scored)
        with distributed.together():
            mine = load(path) if distributed.is_main_process() else np.zeros(prepared.rewards_BK.shape, np.float32)
        stored = distributed.from_first(mine)
        again = scored(verification_steps(batches.steps_per_epoch))
        coarse = config.model.compute_dtype if config.model.matmul_dtype == "compute_dtype" else "bfloat16"
        off = verify(stored, again, rtol=REFERENCE_RTOL[coarse], path=path)
        log.info("reference log-probs of %s: %s, verified to %.2g nats", name, path.name, off)
        return stored

    def _compute(
        self, name: str, path: Path, parts: dict[str, object], batches: data.Schedule, scored: Callable
    ) -> None:
        """Score what an earlier start has not, keeping what there is every KEEP_EVERY_S seconds and at the end."""
        prepared = batches.prepared
        known = np.full(prepared.rewards_BK.shape, np.nan, np.float32)
        found = load_part(path) if distributed.is_main_process() else None
        known = np.array(distributed.from_first(known if found is None or found.shape != known.shape else found))
        missing_B = np.asarray(np.isnan(known).any(axis=1))
        ids = [data.group_ids(batches, number) for number in range(batches.steps_per_epoch)]
        numbers = [number for number, ids_B in enumerate(ids) if missing_B[ids_B[ids_B >= 0]].any()]
        if not missing_B.all():
            log.info("reference log-probs of %s: %d of %d groups are there", name, (~missing_B).sum(), prepared.groups)
        started = kept = time.perf_counter()

        def kept_on_the_way() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            nonlocal kept
            for batch in scored(numbers):
                yield batch
                if time.perf_counter() - kept > KEEP_EVERY_S:
                    kept = time.perf_counter()
                    keep()
                    done = int((~np.isnan(known).any(axis=1)).sum())
                    log.info("reference log-probs of %s: %d of %d groups", name, done, prepared.groups)

        def keep() -> None:
            if distributed.is_main_process():
                save_part(path, known, parts)

        bar = progress.bar(kept_on_the_way(), f"reference {name}", total=len(numbers), unit="batch")
        try:
            computed = compute(iter(bar), groups=prepared.groups, known=known)
        except preemption.Stopped:
            keep()
            raise
        if distributed.is_main_process():
            save(path, computed, parts)
        seconds = time.perf_counter() - started
        rates = self._meter.reference((data.row_sizes(batches, number) for number in numbers), seconds=seconds)
        log.info(
            "reference log-probs of %s: %d groups in %.1f s, compilation included; %s",
            name,
            missing_B.sum(),
            seconds,
            profiler.shown(rates),
        )


def fingerprint(parts: Mapping[str, object]) -> str:
    """Return a sha256 over the named parts; equal parts in any order give the same text."""
    return json_digest.of(dict(parts))


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
    for left in (part_of(path), atomic_io.temporary(part_of(path))):
        left.unlink(missing_ok=True)


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
    metadata = {"parts": json.dumps(dict(parts), sort_keys=True), "sha256": _digest(logps)}
    with atomic_io.writing(path) as temporary:
        safetensors.numpy.save_file({"reference_logps": logps}, temporary, metadata=metadata)


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
