"""Where the time of a run goes: the split of every step, the utilisation of the devices, traces of chosen steps.

The loop runs one step ahead of the numbers it reads, so that data and bookkeeping of one step hide behind the
devices' work on the one before: only what is left over costs time.
"""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax

from fpo_jax import data, models
from fpo_jax.perf import flops

log = logging.getLogger("fpo_jax")

FOLDER = "profile"


class Split:
    """The wall time between two laps, in named parts; what no part claims is the host's."""

    def __init__(self, *parts: str):
        """Name the parts and start the first lap."""
        self._names = parts
        self.restart()

    def restart(self) -> None:
        """Begin a lap now and forget the one that was running."""
        self._start, self._parts = time.perf_counter(), dict.fromkeys(self._names, 0.0)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside to a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._parts[name] += time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        """End the lap and begin the next: `seconds`, and `<part>_seconds` with `host_seconds`, which sum up to it."""
        seconds = time.perf_counter() - self._start
        parts = {f"{name}_seconds": value for name, value in self._parts.items()}
        host = seconds - sum(parts.values())
        self.restart()
        return {"seconds": seconds, **parts, "host_seconds": host}


class Meter:
    """Tokens per second and utilisation of a run, on valid and on padded tokens.

    The model FLOP/s utilisation (MFU) is operations / (seconds * devices * peak), where the operations are those that
    the mathematics needs (`flops`): recomputation does not count, nor, on valid tokens, does padding. Valid tokens are
    those of all completions with their prompts, whatever the layout; one that is shared is computed, and counts among
    the operations, once.
    """

    def __init__(
        self,
        config: models.ModelConfig,
        *,
        devices: int,
        peak: float | None,
        extra_forward: bool = False,
        adapter: models.Adapter | None = None,
    ):
        """Start with nothing done.

        Args:
            config: the architecture.
            devices: how many share the work.
            peak: FLOP/s of one of them in the compute dtype; None = unknown, and there is no MFU.
            extra_forward: steps run one more forward pass (`flops.train_step`).
            adapter: what is trained instead of the model's own weights.
        """
        self._config, self._peak = config, None if peak is None else devices * peak
        self._of_step = functools.partial(flops.train_step, extra_forward=extra_forward, adapter=adapter)
        self._operations, self._seconds = {"valid": 0, "padded": 0}, 0.0

    def step(self, rows: data.RowSizes, *, seconds: float) -> dict[str, float]:
        """Count a step and return its rates."""
        return self._count([rows], self._of_step, seconds)

    def reference(self, batches: Iterable[data.RowSizes], *, seconds: float) -> dict[str, float]:
        """Count a reference pass over these batches and return its rates."""
        return self._count(batches, flops.forward, seconds)

    def overall(self) -> dict[str, float]:
        """Return the seconds counted so far and their MFU, the reference pass included."""
        return {"run_seconds": self._seconds, **self._utilisation(self._operations, self._seconds, "run_")}

    def _count(self, batches: Iterable[data.RowSizes], operations_of: Callable, seconds: float) -> dict[str, float]:
        tokens, operations, window = {"valid": 0, "padded": 0}, {"valid": 0, "padded": 0}, self._config.windows
        held = 0
        for rows in batches:
            work = {
                "valid": flops.work(rows.texts, rows.completion_tokens, contexts=rows.contexts, sliding_window=window),
                "padded": flops.work([rows.length] * rows.rows, rows.rows * rows.scored, sliding_window=window),
            }
            for name, done in work.items():
                operations[name] += operations_of(self._config, done)
            tokens["valid"] += rows.sequence_tokens
            tokens["padded"] += work["padded"].tokens
            held += work["valid"].tokens
        self._seconds += seconds
        self._operations = {name: total + operations[name] for name, total in self._operations.items()}
        rates = {f"{name}_tokens_per_s": count / seconds for name, count in tokens.items()}
        rates["padding_share"] = 1.0 - held / tokens["padded"]
        return rates | self._utilisation(operations, seconds, "")

    def _utilisation(self, operations: dict[str, int], seconds: float, prefix: str) -> dict[str, float]:
        if self._peak is None or not seconds:
            return {}
        return {f"{prefix}mfu_{name}": total / (seconds * self._peak) for name, total in operations.items()}


def shown(rates: dict[str, float]) -> str:
    """Rates as one line of text.

    >>> shown({"run_seconds": 12.34, "mfu_valid": 0.4321})
    'run_seconds 12.34  mfu_valid 0.4321'
    """
    return "  ".join(f"{name} {value:.4g}" for name, value in rates.items())


class Trace:
    """Traces some steps of a run: one folder for all processes, for xprof, TensorBoard or Perfetto."""

    def __init__(self, steps: range, workdir: Path, *, last: int):
        """Trace the steps with these numbers into `workdir/profile`; an empty range traces nothing.

        Raises:
            ValueError: the run has no such step; `last` is its last.
        """
        if steps and not (1 <= steps[0] and steps[-1] <= last):
            raise ValueError(
                f"--profile={steps.start}:{steps.stop} traces steps {steps[0]} to {steps[-1]}, the run has 1"
                f" to {last}; choose first:last within 1:{last + 1}."
            )
        self.steps, self._folder, self._running = steps, workdir / FOLDER, False

    def begins(self, number: int) -> bool:
        """Whether this step is the first to be traced; the devices must be idle then."""
        return not self._running and number in self.steps

    def before(self, number: int) -> None:
        """Start the trace before its first step."""
        if self.begins(number):
            jax.profiler.start_trace(self._folder)
            self._running = True

    def ends(self, number: int) -> bool:
        """Whether this step is the last to be traced; its results must be there before `close`."""
        return self._running and number == self.steps[-1]

    def close(self) -> None:
        """Write what was traced; nothing where no trace runs."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            log.info("trace of steps %d to %d: %s", self.steps[0], self.steps[-1], self._folder)
