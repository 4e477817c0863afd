"""Tokenised examples in flat NumPy storage: what `tokenize` makes, and what batches are sliced from.

Letters used only here: S tokens of all sequences together; B and N count the whole set, not a batch.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Prepared(NamedTuple):
    """Token rows ready to be batched; row b*K + k is completion k of group b."""

    tokens_S: np.ndarray  # int32, the rows one after another
    starts_N: np.ndarray  # int64, where each row begins in tokens_S
    lengths_N: np.ndarray  # int32, tokens of each row
    prompt_lengths_N: np.ndarray  # int32, at least 1; the tokens after it are scored, unless scored_S says which
    rewards_BK: np.ndarray  # float32
    sources: Sequence[str]  # of each group, "file:line"
    pad_id: int  # filler beyond a row's end; masks never look at it
    scored_S: np.ndarray | None = None  # bool, of packed rows and completions of several turns: which are scored
    segments_S: np.ndarray | None = None  # int32, of packed rows: which of the row's texts a token belongs to, from 0

    @property
    def groups(self) -> int:
        """B, the number of groups."""
        return self.rewards_BK.shape[0]

    @property
    def group_size(self) -> int:
        """K, the completions per group."""
        return self.rewards_BK.shape[1]

    @property
    def loss_tokens_N(self) -> np.ndarray:
        """Scored tokens of each row."""
        if self.scored_S is None:
            return self.lengths_N - self.prompt_lengths_N
        return np.add.reduceat(self.scored_S.astype(np.int32), self.starts_N)

    def text_lengths(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of each text of some rows: of the rows themselves, unless they are packed."""
        if self.segments_S is None:
            return self.lengths_N[rows]
        ends = self.starts_N + self.lengths_N
        return np.concatenate([np.bincount(self.segments_S[self.starts_N[row] : ends[row]]) for row in rows])

    def row(self, index: int) -> tuple[np.ndarray, int]:
        """Token ids of one row and the length of its prompt."""
        start = self.starts_N[index]
        return self.tokens_S[start : start + self.lengths_N[index]], int(self.prompt_lengths_N[index])

    def loss_places(self, index: int) -> np.ndarray:
        """Return the places of one row's scored tokens in the row."""
        start, length = self.starts_N[index], self.lengths_N[index]
        if self.scored_S is None:
            return np.arange(self.prompt_lengths_N[index], length)
        return np.flatnonzero(self.scored_S[start : start + length])

    def fingerprint(self) -> str:
        """Return the sha256 (hex) of the rows and rewards: everything that log-probabilities and losses depend on.

        Where the records came from and the pad id do not enter.
        """
        digest = hashlib.sha256(b"fpo_jax prepared rows 1")
        for array, kind in (
            (self.tokens_S, "<i4"),
            (self.lengths_N, "<i4"),
            (self.prompt_lengths_N, "<i4"),
            (self.rewards_BK, "<f4"),
            *([] if self.scored_S is None else [(self.scored_S, "|b1")]),
            *([] if self.segments_S is None else [(self.segments_S, "<i4")]),
        ):
            digest.update(repr(array.shape).encode())
            digest.update(np.ascontiguousarray(array, dtype=kind).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def take(self, groups_B: np.ndarray) -> "Prepared":
        """Return some groups of rows that are not packed, in this order."""
        assert self.segments_S is None
        rows_N = (groups_B[:, None] * self.group_size + np.arange(self.group_size)).reshape(-1)
        lengths_N = self.lengths_N[rows_N]
        parts = [slice(self.starts_N[row], self.starts_N[row] + self.lengths_N[row]) for row in rows_N.tolist()]
        return self._replace(
            tokens_S=np.concatenate([self.tokens_S[part] for part in parts]),
            scored_S=None if self.scored_S is None else np.concatenate([self.scored_S[part] for part in parts]),
            starts_N=starts(lengths_N),
            lengths_N=lengths_N,
            prompt_lengths_N=self.prompt_lengths_N[rows_N],
            rewards_BK=self.rewards_BK[groups_B],
            sources=tuple(self.sources[group] for group in groups_B),
        )


def starts(lengths_N: np.ndarray) -> np.ndarray:
    """Return where each row begins, given the length of each."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths_N[:-1], dtype=np.int64)])
