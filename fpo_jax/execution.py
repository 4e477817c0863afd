"""Two things every run needs around its pure functions: ahead-of-time compilation per batch shape, and stopping."""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from fpo_jax import hosts, shapes

log = logging.getLogger("fpo_jax")

_REMEDY = "Lower train.micro_batch_per_device, set model.remat=full, or use more devices; train.py --plan tries them."


_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(hosts.Everywhere):
    """SIGTERM or SIGINT arrived; what is saved is saved, and the same command goes on from there."""


def keep_compiled(folder: str) -> None:
    """Read compiled programs from a folder and leave new ones there; "" changes nothing."""
    if folder:
        compilation_cache.reset_cache()  # jax looks for its folder once, at the first compilation
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).absolute()))


class Program:
    """A jitted `f(first, batch)`, compiled ahead of its first call once per batch shape."""

    def __init__(self, name: str, jitted: Callable):
        """Take the jitted function; `name` is for the log."""
        self.name, self.jitted = name, jitted
        self._compiled: dict[tuple, jax.stages.Compiled] = {}

    def __call__(self, first: shapes.PyTree, batch: shapes.Batch):
        """Run on the batch, compiling when its shape is new.

        Raises:
            ValueError: the program needs more memory than a device has.
        """
        key = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if key not in self._compiled:
            start = time.perf_counter()
            compiled = self._compile(first, batch)
            seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
            size = ""
            if memory is not None:
                self._check_memory(memory.argument_size_in_bytes + memory.temp_size_in_bytes)
                size = f"; {mib(memory.argument_size_in_bytes)} arguments, {mib(memory.temp_size_in_bytes)} temporaries"
            log.info(
                "compiled %s for rows of %d tokens (%d scored) in %.1f s%s",
                self.name,
                batch.tokens_NT.shape[-1],
                batch.targets_NR.shape[-1],
                seconds,
                size,
            )
            self._compiled[key] = compiled
        return self._compiled[key](first, batch)

    def _compile(self, first: shapes.PyTree, batch: shapes.Batch) -> jax.stages.Compiled:
        lowered = self.jitted.lower(first, batch)
        try:
            return lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            fact = next(line for line in str(error).splitlines() if "RESOURCE_EXHAUSTED" in line)
            raise ValueError(f"{self.name} does not fit: {fact}. {_REMEDY}") from error

    def _check_memory(self, needed: int) -> None:
        """Refuse here what would run out of memory later; a CPU does not say what it has."""
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        if limit and needed > limit:
            raise ValueError(
                f"{self.name} needs {mib(needed)} on every device, and a device lends {mib(limit)} (a GPU lends 75 % of"
                f" its memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says more). {_REMEDY}"
            )

    @property
    def temporaries(self) -> int | None:
        """Most bytes beside its arguments that any shape needs on a device; None where the compiler does not say."""
        found = [compiled.memory_analysis() for compiled in self._compiled.values()]
        return max((memory.temp_size_in_bytes for memory in found if memory is not None), default=None)

    @property
    def compilations(self) -> int:
        """Number of batch shapes compiled so far."""
        return len(self._compiled)


class StopRequest:
    """Turns SIGTERM and SIGINT into a flag that the loop reads between updates; a second signal ends the process.

    Before anything has begun, the first one raises Stopped wherever the main thread is. A signal to one process of
    several stops all of them, after the same update.
    """

    def __init__(self, *, begun: bool = True) -> None:
        """Start without a request; signals are caught inside `with`."""
        self._begun = begun
        self._requested = 0  # the signal's number
        self._previous: dict[int, object] = {}
        self._ends: tuple[socket.socket, socket.socket] | None = None
        self._previous_end = -1
        self._vote: hosts.Vote | None = None
        self._cast: jax.Array | None = None  # the last vote, which is counted while this process goes on
        self.resumption: Callable[[], str] = lambda: "What was saved before is kept; the same command goes on."

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # elsewhere the caller's handlers stay
            self._ends = socket.socketpair()
            self._ends[1].setblocking(False)
            self._previous_end = signal.set_wakeup_fd(self._ends[1].fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=self._ends[:1], name="fpo_jax.signals", daemon=True).start()
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ends is not None:
            for number, handler in self._previous.items():
                signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
            signal.set_wakeup_fd(self._previous_end)
            self._ends[1].close()

    def _request(self, number: int, _frame: object) -> None:
        self._requested = number
        if not self._begun and hosts.count() == 1:
            raise Stopped(
                f"{signal.Signals(number).name}: nothing was under way that could be lost; the same command goes on."
            )

    def _watch(self, end: socket.socket) -> None:
        """Act on a second signal, as no handler can while the main thread compiles."""
        seen = False
        with end:
            while told := end.recv(1):
                name = signal.Signals(told[0]).name
                if told[0] in _SIGNALS and seen:
                    words = f"{name}, the second signal: ended at once. {self.resumption()}\n"
                    os.write(sys.stderr.fileno(), words.encode())
                    os._exit(128 + told[0])
                if told[0] in _SIGNALS:
                    seen = True
                    log.warning("%s: stops as soon as it has saved; a second signal ends it without saving.", name)

    def begin(self, resumption: Callable[[], str]) -> None:
        """From here on finish what is under way before stopping; `resumption` tells what a second signal leaves."""
        self._begun, self.resumption = True, resumption

    def connect(self, mesh: Mesh) -> None:
        """Let the processes that share a mesh decide together from here on."""
        if hosts.count() > 1:
            self._vote = hosts.Vote(mesh)

    def agreed(self) -> str | None:
        """Return the name of the signal to stop for, or None: the same in every process.

        Every process calls it at the same points. Of several processes it tells what they knew at the previous call,
        so that nobody waits for a device that is still busy.
        """
        number = self._requested
        if self._vote is not None:
            number, self._cast = 0 if self._cast is None else int(self._cast), self._vote.cast(number)
        return signal.Signals(number).name if number else None

    def check(self, words: str) -> None:
        """Raise Stopped with these words where a signal has arrived; called at the same points as `agreed`."""
        if name := self.agreed():
            raise Stopped(f"{name}: {words}")


def progress_shown() -> bool:
    """Return whether this process has a terminal to draw a progress bar on."""
    return hosts.first() and sys.stderr.isatty()


def mib(count: float) -> str:
    """Bytes as text, in MiB below 10 GiB and in GiB from there on.

    >>> mib(3 * 2**20), mib(20 * 2**30)
    ('3.0 MiB', '20.0 GiB')
    """
    return f"{count / 2**20:.1f} MiB" if count < 10 * 2**30 else f"{count / 2**30:.1f} GiB"
