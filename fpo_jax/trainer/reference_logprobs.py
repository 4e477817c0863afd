"""The reference pass of a run: log-probs of the train and eval groups under the frozen reference, on every process.

All processes compute and verify; process 0 alone touches the files, and the others get their content from it.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
import tqdm

from fpo_jax import config as configuration
from fpo_jax import data, distributed, types
from fpo_jax.distributed import preemption
from fpo_jax.perf import profiler
from fpo_jax.trainer import reference_files, run_inputs, run_schedule, steps

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
        plan: run_schedule.Plan,
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
            weights: of the run's starting model; another one is read where the configuration names it.
            fingerprints: of the files of both, from `run_workdir.fingerprints`.

        Raises:
            ValueError: a file is damaged or belongs to another model; a log-prob is not finite.
            preemption.Stopped: a signal asked to stop.
        """
        if not any(self._passes):
            return None, None
        fingerprint, other = fingerprints["model"], self._inputs.reference
        if other is not None:
            weights, fingerprint = self._steps.state.load_reference(other.source), fingerprints["reference"]
        train, evaluation = self._passes
        return (
            None if train is None else self._of("train", train, weights, fingerprint),
            None if evaluation is None else self._of("eval", evaluation, weights, fingerprint),
        )

    def _of(self, name: str, batches: data.Schedule, weights: types.PyTree, fingerprint: str) -> np.ndarray:
        config, prepared, program = self._config, batches.prepared, self._steps.score
        parts = {
            "weights": fingerprint,
            "data": prepared.fingerprint(),
            "temperature": self._inputs.loss.temperature,
            "param_dtype": config.model.param_dtype,
            "compute_dtype": config.model.compute_dtype,
        }
        path = self._folder / f"{name}-{reference_files.fingerprint(parts)[:16]}.safetensors"
        positions = self._steps.batches.positions(batches.parts)

        def scored(numbers: Iterable[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for number in numbers:
                self._stop.check("the reference log-probs so far are kept; the same command goes on.")
                placed = self._steps.batches.place(data.batch_at(batches, number, positions), stacked=False)
                yield data.group_ids(batches, number), jax.device_get(program(weights, placed))

        if not any(distributed.share("there" if distributed.first() and path.exists() else "")):
            self._compute(name, path, parts, batches, scored)
        with distributed.together():
            mine = (
                reference_files.load(path) if distributed.first() else np.zeros(prepared.rewards_BK.shape, np.float32)
            )
        stored = distributed.from_first(mine)
        again = scored(reference_files.verification_steps(batches.steps_per_epoch))
        off = reference_files.verify(stored, again, rtol=REFERENCE_RTOL[config.model.compute_dtype], path=path)
        log.info("reference log-probs of %s: %s, verified to %.2g nats", name, path.name, off)
        return stored

    def _compute(
        self, name: str, path: Path, parts: dict[str, object], batches: data.Schedule, scored: Callable
    ) -> None:
        """Score what an earlier start has not, keeping what there is every KEEP_EVERY_S seconds and at the end."""
        prepared = batches.prepared
        known = np.full(prepared.rewards_BK.shape, np.nan, np.float32)
        found = reference_files.load_part(path) if distributed.first() else None
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
            if distributed.first():
                reference_files.save_part(path, known, parts)

        bar = tqdm.tqdm(kept_on_the_way(), f"reference {name}", len(numbers), disable=not preemption.progress_shown())
        try:
            computed = reference_files.compute(iter(bar), groups=prepared.groups, known=known)
        except preemption.Stopped:
            keep()
            raise
        if distributed.first():
            reference_files.save(path, computed, parts)
        seconds = time.perf_counter() - started
        rates = self._meter.reference((data.row_sizes(batches, number) for number in numbers), seconds=seconds)
        log.info(
            "reference log-probs of %s: %d groups in %.1f s, compilation included; %s",
            name,
            missing_B.sum(),
            seconds,
            profiler.shown(rates),
        )
