"""A JSON Lines file that a long job fills: one line per item, resumed where it was, refused for another job.

While the job runs, lines are appended to `NAME.part` in the order in which they are done; at the end they are sorted by
their index and become NAME at once. `NAME.job.json` says which job it is. A last line that a killed process left half
written is cut off and done again.
"""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from fpo_jax import config as configuration
from fpo_jax.distributed import workdir_lock
from fpo_jax.io import atomic_io, jsonl


class JobFile:
    """One output file; `done` holds the indices of its lines, which need not be done again."""

    def __init__(self, path: Path, job: dict[str, Any], *, count: int):
        """Open what an earlier start left.

        Args:
            path: of the finished file.
            job: everything that the lines depend on, as JSON values.
            count: lines of the finished file.

        Raises:
            ValueError: the file belongs to another job, is damaged elsewhere than at its end, or was finished and has
                lost lines.
        """
        self.path, self._part = path, path.with_name(path.name + ".part")
        self._job_path = path.with_name(path.name + ".job.json")
        self.repaired = ""  # what was cut off, for the log
        job = json.loads(json.dumps(job))
        begun = path.exists() or (self._part.exists() and self._part.stat().st_size > 0)
        if self._job_path.exists() and begun:  # one that was refused before its first line keeps nobody out
            changed = configuration.difference(atomic_io.read_json(self._job_path), job)
            if changed:
                raise ValueError(
                    f"{path} belongs to another job:\n  "
                    + "\n  ".join(changed)
                    + "\ngive another file, or delete it with its .job.json to start over."
                )
        elif begun:
            raise ValueError(f"{path} exists and has no {self._job_path.name}; give another file, or delete it.")
        atomic_io.write(self._job_path, json.dumps(job, indent=2) + "\n")
        self.finished = path.exists()
        if not self.finished:
            self._repair()
        self.done = {line["index"] for line in self.lines()}
        if self.finished and len(self.done) != count:
            raise ValueError(
                f"{path} holds {len(self.done)} of the {count} lines it had when it was finished; put it back, or"
                " delete it to start over."
            )
        if self.finished:
            self._part.unlink(missing_ok=True)  # of a start that was killed as it finished
        self._file = None

    def __enter__(self) -> "JobFile":
        if not self.finished:
            self._file = self._part.open("ab")
        return self

    def __exit__(self, _type: type | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, line: dict[str, Any]) -> None:
        """Write the line of one item, which has its `index`, to the disk."""
        assert self._file is not None
        workdir_lock.verify()
        jsonl.append(self._file, line)
        self.done.add(line["index"])

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines there are.

        Raises:
            ValueError: one is no line of this job; names it.
        """
        path = self.path if self.finished else self._part
        found = jsonl.read(path) if self.finished else jsonl.read_appended(path).rows
        for number, line in enumerate(found, 1):
            if type(line.get("index")) is not int:
                raise ValueError(
                    f"{path}:{number}: not a line of this job; put it right, or delete the file to start over."
                )
        return found

    def finish(self) -> None:
        """Make the finished file of all lines, in the order of their index."""
        assert self._file is not None
        self._file.close()
        workdir_lock.verify()
        jsonl.write(self.path, sorted(self.lines(), key=lambda line: line["index"]))
        self._part.unlink()
        self.finished = True

    def _repair(self) -> None:
        """Cut off a last line that is not whole."""
        found = jsonl.read_appended(self._part)
        if found.cut:
            self.repaired = f"{self._part.name}: a half-written last line ({found.cut} bytes) is done again"
            with self._part.open("r+b") as file:
                file.truncate(found.whole)
