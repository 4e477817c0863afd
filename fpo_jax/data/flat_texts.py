"""Many short texts in flat NumPy storage, which can be mapped from disk: a million places of records are no objects."""

from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np


class FlatTexts(Sequence[str]):
    """A sequence of texts that are decoded when they are asked for; equal to any sequence of the same texts."""

    def __init__(self, bytes_S: np.ndarray, ends_P: np.ndarray, index_N: np.ndarray):
        """Take the storage.

        Args:
            bytes_S: uint8, the UTF-8 of all texts one after another.
            ends_P: int64, where each of them ends.
            index_N: int32, which of them stands at each place of the sequence.
        """
        self.bytes_S, self.ends_P, self.index_N = bytes_S, ends_P, index_N

    def __len__(self) -> int:
        return len(self.index_N)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return tuple(self._text(place) for place in self.index_N[index].tolist())
        return self._text(int(self.index_N[index]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Show the first of them."""
        return f"FlatTexts({', '.join(map(repr, self[:3]))}{', ...' * (len(self) > 3)})"

    def _text(self, place: int) -> str:
        begin = int(self.ends_P[place - 1]) if place else 0
        return self.bytes_S[begin : int(self.ends_P[place])].tobytes().decode("utf-8", "surrogatepass")


class Pool:
    """Stores every text once, for several sequences of them."""

    def __init__(self) -> None:
        """Begin with none."""
        self._numbers: dict[str, int] = {}

    def index(self, texts: Iterable[str]) -> np.ndarray:
        """Return the numbers of some texts, new ones among them: the index of a `FlatTexts`."""
        return np.asarray([self._numbers.setdefault(text, len(self._numbers)) for text in texts], np.int32)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the bytes and the ends of all texts so far."""
        encoded = [text.encode("utf-8", "surrogatepass") for text in self._numbers]
        ends_P = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        return np.frombuffer(b"".join(encoded), np.uint8), ends_P
