"""WORKDIR/run.log: every log line of a program, with its time, at most KEPT_BYTES of them and as many of before.

A later start appends. Control characters are escaped as on a terminal (`terminal.shown`).
"""

import contextlib
import datetime
import logging
import logging.handlers
from collections.abc import Iterator
from pathlib import Path

from fpo_jax.io import terminal

FILE = "run.log"
KEPT_BYTES = 2**24  # of a file; it then becomes FILE.1, in the place of the one before
_COLLECTED = 10_000  # lines that are kept until there is a file


class _Formatter(terminal.Formatter):
    """Time in UTC, what kind of line it is where it is no plain one, whose it is, and the line."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        kind = "" if record.levelno == logging.INFO else f"{record.levelname} "
        return f"{time} {kind}{record.name}: {super().format(record)}"


class Collector(logging.Handler):
    """Keeps the lines from before there is a file."""

    def __init__(self) -> None:
        """Begin without a line."""
        super().__init__()
        self.setFormatter(_Formatter())
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        if len(self.lines) < _COLLECTED:
            self.lines.append(self.format(record))

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Take every line of this process."""
        with _taking(self):
            yield


class RunLog(logging.handlers.RotatingFileHandler):
    """The file. It can stand in the place of the standard error: what libraries write there is appended as it comes."""

    def __init__(self, path: Path):
        """Open the file behind what it holds.

        Raises:
            OSError: it cannot be written.
        """
        super().__init__(path, maxBytes=KEPT_BYTES, backupCount=1, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(_Formatter())
        self._failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Say once that lines are lost: a full disk ends a run at its checkpoints, not here."""
        if not self._failed:
            self._failed = True
            terminal.refuse(FILE, f"{self.baseFilename} cannot be written; its lines are lost from here on.")

    def close(self) -> None:
        """Close the file, whatever its disk takes."""
        try:
            super().close()
        except OSError:
            self.handleError(logging.makeLogRecord({}))

    def write(self, text: str) -> int:
        """Append a text."""
        try:
            if self.stream is not None:
                self.stream.write(terminal.shown(text))
                self.stream.flush()
        except OSError:
            self.handleError(logging.makeLogRecord({}))
        return len(text)

    def isatty(self) -> bool:
        """Return False: no bar is drawn here."""
        return False

    def fileno(self) -> int:
        """Return the number of the open file."""
        assert self.stream is not None
        return self.stream.fileno()


@contextlib.contextmanager
def written(path: Path, before: Collector) -> Iterator[None]:
    """Write every log line of this process into a file, after those of `before`; an error is its last line."""
    with contextlib.closing(RunLog(path)) as file:
        file.write("".join(f"{line}\n" for line in before.lines))
        before.lines.clear()
        with _taking(file):
            try:
                yield
            except BaseException as error:
                ended = f"ended by {type(error).__name__}: {terminal.sentence(error)}"
                file.handle(
                    logging.makeLogRecord({"name": "fpo_jax", "levelno": 40, "levelname": "ERROR", "msg": ended})
                )
                raise


@contextlib.contextmanager
def _taking(handler: logging.Handler) -> Iterator[None]:
    """Give every record to a handler; warnings still reach the terminal of a program that has set up no logging."""
    root, last = logging.getLogger(), logging.lastResort
    added = [handler] if root.handlers or last is None else [handler, last]
    for one in added:
        root.addHandler(one)
    try:
        yield
    finally:
        for one in added:
            root.removeHandler(one)
