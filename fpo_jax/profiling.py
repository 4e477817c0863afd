"""Where the time of a run goes: the split of every update, the utilisation of the devices, traces of chosen updates.

The loop runs one update ahead of the numbers it reads, so that data and bookkeeping of one update hide behind the
devices' work on the one before: only what is left over costs time.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import jax

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


def utilisation(operations: float, *, seconds: float, devices: int, peak: float | None) -> float | None:
    """Return the model FLOP/s utilisation (MFU): operations / (seconds * devices * peak).

    Args:
        operations: what the mathematics needs (`flops`), over all devices; recomputation does not count.
        seconds: wall time.
        devices: how many share the work.
        peak: FLOP/s of one of them in the compute dtype; None = unknown.

    Returns:
        A share of 1; None where the peak is unknown.

    >>> utilisation(4e12, seconds=2.0, devices=2, peak=4e12)
    0.25
    """
    return None if peak is None else operations / (seconds * devices * peak)


class Trace:
    """Traces some updates of a run: one folder for all processes, for xprof, TensorBoard or Perfetto."""

    def __init__(self, updates: range, workdir: Path):
        """Trace the updates with these numbers into `workdir/profile`; an empty range traces nothing."""
        self.updates, self._folder, self._running = updates, workdir / FOLDER, False

    def begins(self, number: int) -> bool:
        """Whether this update is the first to be traced; the devices must be idle then."""
        return not self._running and number in self.updates

    def start(self) -> None:
        """Start."""
        jax.profiler.start_trace(self._folder)
        self._running = True

    def ends(self, number: int) -> bool:
        """Whether this update is the last to be traced; its results must be there before `stop`."""
        return self._running and number == self.updates[-1]

    def stop(self) -> None:
        """Write what was traced; nothing where no trace runs."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            log.info("trace of updates %d to %d: %s", self.updates[0], self.updates[-1], self._folder)
