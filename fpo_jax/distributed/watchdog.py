"""Ends a run in which nothing moves although every process lives: one of them never comes to a collective, say.

The run says `moved` wherever it asks for a stop request: between steps, batches of evaluations and saves. A thread
counts how long nothing did; at the limit it shows where every thread of this process is, has the other processes do the
same, and ends with the exit code after which the same command goes on. What has no measure (compiling, loading,
callbacks of a user) is left alone with `unhurried`.
"""

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from fpo_jax.distributed import exit_reporter, failure, process

FACTOR = 20  # slowest steps
FLOOR_S = 600.0
SAVE_S = 3600.0  # what a shared disk may take for a checkpoint
TICK_S = 1.0


class _Watch:
    """What is known of the run that is being watched; one at a time."""

    def __init__(self, timeout_s: int | None, checkpoints: Path):
        self.timeout_s, self.checkpoints = timeout_s, checkpoints
        self.slowest_s = 0.0  # of the steps so far
        self.still_s: float | None = None  # since something moved; None = nothing is expected to
        self.floors: list[float] = []
        self.over = threading.Event()

    def limit_s(self) -> float:
        """Return how long nothing may move now."""
        if math.inf in self.floors:
            return math.inf
        if self.timeout_s is not None:
            return self.timeout_s
        return max(FLOOR_S, FACTOR * self.slowest_s, *self.floors)

    def run(self) -> None:
        """Count, in the time of this thread: a process that was stopped and goes on again has not hung."""
        before = time.monotonic()
        while not self.over.wait(TICK_S):
            now = time.monotonic()
            before, passed = now, min(now - before, 2 * TICK_S)
            if self.still_s is not None:
                self.still_s += passed
                if self.still_s > self.limit_s():
                    self.end()

    def end(self) -> None:
        """Show where everything is, and leave."""
        fact = f"nothing moved for {self.still_s:.0f} s, so the run counts as hanging (train.hang_timeout)"
        me = f"process {process.process_index()} of {process.process_count()}"
        failure.show_stacks(f"{me}: {fact}; its threads are at:")
        words = f"{me}: {fact}. {exit_reporter.resumption(self.checkpoints)}"
        failure.leave(failure.LOST, words, tell=fact + ".", stacks=True)


_watch: _Watch | None = None


@contextlib.contextmanager
def watching(timeout_s: int | None, checkpoints: Path) -> Iterator[None]:
    """Watch from the first `moved` inside `with` on.

    Args:
        timeout_s: seconds in which something must move; 0 = do not watch; None = FACTOR times the slowest step, at
            least FLOOR_S.
        checkpoints: folder, of which the last words tell what is saved.
    """
    global _watch
    if timeout_s == 0:
        yield
        return
    before, _watch = _watch, _Watch(timeout_s, checkpoints)
    mine = _watch
    threading.Thread(target=mine.run, name="fpo_jax.watchdog", daemon=True).start()
    try:
        yield
    finally:
        mine.over.set()
        _watch = before


def moved() -> None:
    """Say that the run goes on."""
    if _watch is not None:
        _watch.still_s = 0.0


def measured(seconds: float) -> None:
    """Say how long a step took."""
    if _watch is not None:
        _watch.slowest_s = max(_watch.slowest_s, seconds)


@contextlib.contextmanager
def unhurried(at_least_s: float = math.inf) -> Iterator[None]:
    """Let what is inside take its time, or so many seconds where train.hang_timeout is not set."""
    watch = _watch
    if watch is None:
        yield
        return
    watch.floors.append(at_least_s)
    try:
        yield
    finally:
        watch.floors.remove(at_least_s)
        if watch.still_s is not None:
            watch.still_s = 0.0


def in_words(timeout_s: int | None) -> str:
    """Say what a run does about hanging."""
    if timeout_s == 0:
        return "watchdog: off (train.hang_timeout=0); a run that hangs while all processes live hangs for ever"
    limit = f"{FACTOR} times its slowest step, at least {FLOOR_S:.0f} s" if timeout_s is None else f"{timeout_s} s"
    return f"watchdog: a run in which nothing moves for {limit} shows its stacks and ends with exit code {failure.LOST}"
