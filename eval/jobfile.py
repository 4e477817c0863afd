"""A JSON Lines file that a long job fills: one line per item, resumed where it was, refused for another job.

While the job runs, lines are appended to `NAME.part` in the order in which they are done; at the end they are sorted by
their index and become NAME at once. `NAME.job.json` says which job it is. A last line that a killed process left half
written is cut off and done again.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from fpo_jax import config as configuration


class JobFile:
    """One output file; `done` holds the indices that need not be done again."""

    def __init__(self, path: Path, job: dict[str, Any]):
        """Open what an earlier start left.

        Args:
            path: of the finished file.
            job: everything that the lines depend on, as JSON values.

        Raises:
            ValueError: the file belongs to another job, or is damaged elsewhere than at its end.
        """
        self.path, self._part = path, path.with_name(path.name + ".part")
        self._job_path = path.with_name(path.name + ".job.json")
        self.repaired = ""  # what was cut off, for the log
        job = json.loads(json.dumps(job))
        if self._job_path.exists():
            changed = configuration.difference(json.loads(self._job_path.read_text()), job)
            if changed:
                raise ValueError(
                    f"{path} belongs to another job:\n  "
                    + "\n  ".join(changed)
                    + "\ngive another file, or delete it with its .job.json to start over."
                )
        elif path.exists() or self._part.exists():
            raise ValueError(f"{path} exists and has no {self._job_path.name}; give another file, or delete it.")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._job_path.with_suffix(".tmp")
        temporary.write_text(json.dumps(job, indent=2) + "\n")
        temporary.replace(self._job_path)
        self.finished = path.exists()
        self.done = set() if self.finished else {line["index"] for line in self._repair()}
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
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.done.add(line["index"])

    def finish(self) -> None:
        """Make the finished file of all lines, in the order of their index."""
        assert self._file is not None
        self._file.close()
        lines = sorted(self._part.read_bytes().splitlines(keepends=True), key=lambda line: json.loads(line)["index"])
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_bytes(b"".join(lines))
        temporary.replace(self.path)
        self._part.unlink()
        self.finished = True

    def _repair(self) -> Iterable[dict[str, Any]]:
        """Return the whole lines of the unfinished file, and cut off what follows them."""
        if not self._part.exists():
            return []
        found, end = [], 0
        content = self._part.read_bytes()
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                one = json.loads(line)
                whole = line.endswith(b"\n") and isinstance(one["index"], int)
            except (ValueError, KeyError, TypeError):
                whole = False
            if not whole and number < len(lines):
                raise ValueError(f"{self._part}:{number}: not a line of this job; delete the file to start over.")
            if whole:
                found.append(one)
                end += len(line)
        if end < len(content):
            self.repaired = f"{self._part.name}: a half-written last line ({len(content) - end} bytes) is done again"
            with self._part.open("r+b") as file:
                file.truncate(end)
        return found


def read(path: Path) -> list[dict[str, Any]]:
    """Read JSON Lines of objects.

    Raises:
        ValueError: the file is missing, or a line is no object; names the line.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing.")
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            one = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: broken JSON ({error}).") from error
        if not isinstance(one, dict):
            raise ValueError(f"{path}:{number}: a line must be a JSON object.")
        found.append(one)
    return found
