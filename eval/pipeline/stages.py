"""Stages of a program whose results are kept: a finished one is skipped while its inputs and outputs are unchanged.

`workdir/stages.json` holds, per stage, the inputs (settings, and the sha256 of every file read), the sha256 of what it
wrote, its time, and its one-line result. A stage that was interrupted has no entry and runs again. `digests.json`
remembers the sha256 of each file with its size and time of change, so that unchanged weights are hashed once. Log lines
go to `run.log`; on a terminal, progress bars stand below the line of the stage.
"""

import contextlib
import hashlib
import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

from fpo_jax.distributed import progress, workdir_lock
from fpo_jax.io import atomic_io, json_digest, run_log, terminal

RECORD_FILE = "stages.json"
DIGESTS_FILE = "digests.json"


class StageError(Exception):
    """A stage failed; the message names it and says why."""


class Stages:
    """Runs stages in order and announces each in one line."""

    def __init__(self, workdir: Path, *, total: int, program: str):
        """Open the record of `workdir`; `total` stages will be announced in the name of `program`."""
        self._workdir, self._total, self._number, self._program = workdir, total, 0, program
        self._log = workdir / run_log.FILE
        self._record: dict[str, dict[str, Any]] = _read(workdir / RECORD_FILE)
        self._known: dict[str, list] = _read(workdir / DIGESTS_FILE)

    def __getitem__(self, name: str) -> dict[str, Any]:
        """Return what is recorded of a finished stage: inputs, outputs, seconds, result, peak_rss_bytes, compiled."""
        return self._record[name]

    def key(self, inputs: Mapping[str, Any]) -> str:
        """Return ten hex digits that stand for all of `inputs`, files by their content: what to name a folder by."""
        return json_digest.of(self._described(inputs))[:10]

    def run(
        self, name: str, title: str, work: Callable[[], str], *, inputs: Mapping[str, Any], outputs: Sequence[Path]
    ) -> None:
        """Do the work unless it is done.

        Args:
            name: key in the record.
            title: what is announced.
            work: writes `outputs`, returns its result in a few words; it may find what an interrupted try left.
            inputs: everything the work depends on: settings as JSON values, and Paths of what it reads.
            outputs: files and folders the work writes.

        Raises:
            StageError: the work failed, or the record is of other inputs or of outputs that were changed since.
        """
        described = self._described(inputs)
        self._announce(title)
        done = self._record.get(name)
        if done is not None and all(path.exists() for path in outputs):
            self._check_unchanged(name, done, described, outputs)
            terminal.say(f"done before: {done['result']}")
            return
        entry = self._timed(name, work)
        self._record[name] = {"inputs": described, "outputs": self._digests(outputs), **entry}
        self._save()
        terminal.say(f"{entry['seconds']:.1f} s: {entry['result']}")

    def always(self, name: str, title: str, work: Callable[[], str]) -> None:
        """Do the work, whatever the record says."""
        self._announce(title)
        entry = self._timed(name, work)
        terminal.say(f"{entry['seconds']:.1f} s: {entry['result']}")

    def names(self) -> list[str]:
        """Return the finished stages in the order they were finished."""
        return list(self._record)

    def _described(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        found = {key: self._digest(value) if isinstance(value, Path) else value for key, value in inputs.items()}
        return json.loads(json.dumps(found))

    def _announce(self, title: str) -> None:
        self._number += 1
        print(terminal.shown(f"[{self._number}/{self._total}] {title} ... "), end="\n" * progress.shown(), flush=True)

    def _timed(self, name: str, work: Callable[[], str]) -> dict[str, Any]:
        started = time.perf_counter()
        try:
            with _logged(self._log) as compiled:
                result = work()
        except (ValueError, OSError) as error:
            print("failed", flush=True)
            raise StageError(f"stage {name!r} failed: {terminal.sentence(error)}\n(details: {self._log})") from error
        except BaseException as error:
            print("failed", flush=True)
            error.add_note(f"in stage {name!r} of {self._program}; details: {self._log}")
            raise
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes there, KiB elsewhere
        return {
            "seconds": time.perf_counter() - started,
            "result": result,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
            "compiled": compiled,
        }

    def _check_unchanged(self, name: str, done: dict[str, Any], described: dict[str, Any], outputs) -> None:
        old, new = done["inputs"], described
        changed = [
            f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in sorted(old | new) if old.get(key) != new.get(key)
        ]
        if changed:
            print("refused", flush=True)
            raise StageError(
                f"{self._workdir} holds stage {name!r} made from other inputs:\n  "
                + "\n  ".join(changed)
                + "\nuse another --workdir, or delete this one to start over."
            )
        now = self._digests(outputs)
        changed = [key for key, digest in now.items() if digest != done["outputs"].get(key)]
        if changed:
            print("refused", flush=True)
            raise StageError(
                f"{', '.join(changed)} in {self._workdir} changed since stage {name!r} wrote it; put it back, or delete"
                " it and what was made from it."
            )

    def _digests(self, paths: Sequence[Path]) -> dict[str, str]:
        return {path.relative_to(self._workdir).as_posix(): self._digest(path) for path in paths}

    def _digest(self, path: Path) -> str:
        """Sha256 of a file, or of names and contents of all files below a folder."""
        if not path.exists():
            raise StageError(f"{path} is missing; delete {self._workdir} to start over.")
        files = sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]
        total = hashlib.sha256()
        for file in files:
            name = file.relative_to(path).as_posix()
            total.update(f"{name} {self._file_digest(file)}\n".encode())
        return total.hexdigest()

    def _file_digest(self, file: Path) -> str:
        status, name = file.stat(), str(file.resolve())
        seen = [status.st_size, status.st_mtime_ns]
        if self._known.get(name, [])[:2] != seen:
            with file.open("rb") as stream:
                self._known[name] = [*seen, hashlib.file_digest(stream, "sha256").hexdigest()]
        return self._known[name][2]

    def _save(self) -> None:
        workdir_lock.verify()
        _write(self._workdir / RECORD_FILE, self._record)
        _write(self._workdir / DIGESTS_FILE, self._known)


def _read(path: Path) -> dict[str, Any]:
    return atomic_io.read_json(path) if path.exists() else {}


def _write(path: Path, value: dict[str, Any]) -> None:
    atomic_io.write(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[list[str]]:
    """Send all log lines to a file, not to the terminal, which keeps the bars; yields the lines about compilation."""
    compiled: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "compil" in record.getMessage():
                compiled.append(record.getMessage())

    root, logger = logging.getLogger(), logging.getLogger("fpo_jax")
    handlers, level = root.handlers, logger.level
    file = run_log.RunLog(path)
    with contextlib.closing(file), progress.drawn_on(sys.stderr), contextlib.redirect_stderr(cast("TextIO", file)):
        root.handlers = [file, Collect()]
        logger.setLevel(logging.INFO)
        try:
            yield compiled
        finally:
            root.handlers = handlers
            logger.setLevel(level)
