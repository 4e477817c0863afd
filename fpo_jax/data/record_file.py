"""Records on disk, read one at a time: what keeps the texts of a large set out of memory while it is tokenised.

`Record`s are appended as they are read; a `RecordFile` gives them back by number, in any order and to any process.
"""

import array
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from fpo_jax.tokenization.messages import Completion, Message, Tool


class Record(NamedTuple):
    """One prompt with its completions."""

    prompt: str | list[Message]
    completions: Sequence[Completion]
    rewards: Sequence[float]  # one per completion; a preference pair carries [1, 0]
    source: str  # "file:line" or "name[index]", for every message about this record
    tools: Sequence[Tool] | None = None  # that the prompt offers


class RecordFile(Sequence[Record]):
    """A sequence of records in a file."""

    def __init__(
        self,
        path: Path,
        starts_N: np.ndarray,
        lengths_N: np.ndarray,
        change: Callable[[Record], Record] | None = None,
    ):
        """Name the file and where each record lies in it.

        Args:
            path: written by a `Writer`.
            starts_N: int64, the first byte of each record.
            lengths_N: int64, its bytes.
            change: what is made of a record when it is read; None = nothing.
        """
        self.path, self.starts_N, self.lengths_N, self.change = path, starts_N, lengths_N, change
        self._file: int | None = None

    def __len__(self) -> int:
        return len(self.starts_N)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "RecordFile": ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        text = os.pread(self._file, int(self.lengths_N[index]), int(self.starts_N[index]))
        record = Record(*json.loads(text.decode("utf-8", "surrogatepass")))
        return record if self.change is None else self.change(record)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None}  # every process opens the file itself

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)

    def take(self, index_N: np.ndarray) -> "RecordFile":
        """Return the records of these numbers, in this order."""
        return RecordFile(self.path, self.starts_N[index_N], self.lengths_N[index_N], self.change)

    def changed(self, change: Callable[[Record], Record]) -> "RecordFile":
        """Return the records as a function of a module changes them when they are read."""
        return RecordFile(self.path, self.starts_N, self.lengths_N, change)


class Writer:
    """Appends records to a file; several sources may follow one another in it."""

    def __init__(self, path: Path):
        """Name the file; it is made with the first record."""
        self.path, self._place = path, 0

    def write(self, records: Sequence[Record], starts: array.array) -> None:
        """Append some records, and the place of each to `starts`."""
        lines = [json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") for record in records]
        with self.path.open("ab") as file:
            file.write(b"".join(lines))
        for line in lines:
            starts.append(self._place)
            self._place += len(line)

    def records(self, starts: array.array) -> RecordFile:
        """Return the records of these places, which must be the last that were written."""
        places_N = np.asarray(starts, np.int64)
        return RecordFile(self.path, places_N, np.diff(places_N, append=self._place))


def take(rows: Sequence[Record], index_N: Sequence[int] | np.ndarray) -> Sequence[Record]:
    """Return the records of these numbers, in this order."""
    return rows.take(np.asarray(index_N, np.int64)) if isinstance(rows, RecordFile) else [rows[i] for i in index_N]


def join(parts: Sequence[Sequence[Record]]) -> Sequence[Record]:
    """Return the records of all parts, one part after another; those on disk must be in one file, and as written."""
    files = [part for part in parts if isinstance(part, RecordFile)]
    if len(files) < len(parts) or not files:
        return [record for part in parts for record in part]
    assert len({part.path for part in files}) == 1 and all(part.change is None for part in files)
    return RecordFile(
        files[0].path,
        np.concatenate([part.starts_N for part in files]),
        np.concatenate([part.lengths_N for part in files]),
    )
