"""Stops a run on SIGTERM or SIGINT once its state is saved: the same step in every process."""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from fpo_jax.distributed import consensus, process, watchdog
from fpo_jax.io import terminal

log = logging.getLogger("fpo_jax")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(process.CollectiveError):
    """SIGTERM or SIGINT arrived; what is saved is saved, and the same command goes on from there."""


class StopRequest:
    """Turns SIGTERM and SIGINT into a flag that the loop reads between steps; a second signal ends the process.

    Before anything has begun, the first one raises Stopped wherever the main thread is. A signal to one process of
    several stops all of them, after the same step.
    """

    def __init__(self, *, begun: bool = True) -> None:
        """Start without a request; signals are caught inside `with`."""
        self._begun = begun
        self._requested = 0  # the signal's number
        self._previous: dict[int, object] = {}
        self._ends: tuple[socket.socket, socket.socket] | None = None
        self._previous_end = -1
        self._vote: consensus.Vote | None = None
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
        if not self._begun and process.process_count() == 1:
            raise Stopped(
                f"{signal.Signals(number).name}: nothing was under way that could be lost; the same command goes on."
            )

    def _watch(self, end: socket.socket) -> None:
        """Act on a second signal, as no handler can while the main thread compiles."""
        seen = False
        with end:
            while described := end.recv(1):
                name = signal.Signals(described[0]).name
                if described[0] in _SIGNALS and seen:
                    words = f"{name}, the second signal: ended at once. {self.resumption()}\n"
                    os.write(sys.stderr.fileno(), terminal.shown(words).encode())
                    os._exit(128 + described[0])
                if described[0] in _SIGNALS:
                    seen = True
                    log.warning("%s: stops as soon as it has saved; a second signal ends it without saving.", name)

    def begin(self, resumption: Callable[[], str]) -> None:
        """From here on finish what is under way before stopping; `resumption` tells what a second signal leaves."""
        self._begun, self.resumption = True, resumption

    def connect(self, mesh: Mesh) -> None:
        """Let the processes that share a mesh decide together from here on."""
        if process.process_count() > 1:
            self._vote = consensus.Vote(mesh)

    def agreed(self) -> str | None:
        """Return the name of the signal to stop for, or None: the same in every process.

        Every process calls it at the same points. Of several processes it tells what they knew at the previous call,
        so that nobody waits for a device that is still busy.
        """
        watchdog.moved()
        number = self._requested
        if self._vote is not None:
            number, self._cast = 0 if self._cast is None else int(self._cast), self._vote.cast(number)
        return signal.Signals(number).name if number else None

    def check(self, words: str) -> None:
        """Raise Stopped with these words where a signal has arrived; called at the same points as `agreed`."""
        if name := self.agreed():
            raise Stopped(f"{name}: {words}")
