"""Numbers appended one piece after another, in memory or to a .npy file that is mapped at the end."""

from pathlib import Path

import numpy as np


class GrowingArray:
    """A one-dimensional int32 array of unknown length."""

    def __init__(self, path: Path | None):
        """Begin with nothing; None = in memory."""
        self._path, self._parts, self._count = path, [np.zeros(0, np.int32)], 0
        self._file = None if path is None else path.open("wb")
        self._write_header()

    def append(self, part_S: np.ndarray) -> None:
        """Put a piece behind the others."""
        assert part_S.dtype == np.int32
        self._count += len(part_S)
        if self._file is None:
            self._parts.append(part_S)
        else:
            self._file.write(part_S.astype("<i4", copy=False).data)

    def finish(self) -> np.ndarray:
        """Return the whole; nothing can be appended afterwards."""
        if self._file is None:
            return np.concatenate(self._parts)
        self._file.seek(0)
        self._write_header()
        self._file.close()
        assert self._path is not None
        return np.load(self._path, mmap_mode="r", allow_pickle=False)

    def _write_header(self) -> None:
        if self._file is not None:  # NumPy leaves room in a header for its first axis to grow
            header = {"descr": "<i4", "fortran_order": False, "shape": (self._count,)}
            np.lib.format.write_array_header_1_0(self._file, header)
