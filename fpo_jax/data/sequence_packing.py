"""Short texts packed into rows: less padding, the same losses.

`Prepared` with one text a row flows in, `Prepared` with several texts a row out. The texts of a row are its segments:
they see nothing of each other, and each starts at position 0. Which texts share a row depends on their lengths alone,
so that it is the same on every process, in every epoch and after every resumption; a loss that is a mean over tokens is
the same for any packing.
"""

import bisect
from collections.abc import Sequence

import numpy as np

from fpo_jax.data.tokenize import Prepared


def pack(prepared: Prepared, *, length: int) -> Prepared:
    """Pack the texts of a set into rows of at most `length` tokens; rows come in the order of their first texts.

    Raises:
        ValueError: groups of several completions, which belong to different rows.
    """
    if prepared.group_size != 1:
        raise ValueError(f"groups of {prepared.group_size} completions cannot be packed; packing needs group_size=1")
    members = bins(prepared.lengths_N.tolist(), length=length)
    first = [member[0] for member in members]
    order = [text for member in members for text in member]
    numbers = [number for member in members for number in range(len(member))]
    texts = [prepared.row(text) for text in order]
    lengths_N = np.asarray([prepared.lengths_N[member].sum() for member in members], np.int32)
    return Prepared(
        tokens_S=np.concatenate([ids for ids, _ in texts]),
        starts_N=np.concatenate([[0], np.cumsum(lengths_N[:-1], dtype=np.int64)]),
        lengths_N=lengths_N,
        prompt_lengths_N=prepared.prompt_lengths_N[first],
        rewards_BK=prepared.rewards_BK[first],
        sources=tuple(", ".join(prepared.sources[text] for text in member) for member in members),
        pad_id=prepared.pad_id,
        scored_S=np.concatenate([_scored(prepared, text) for text in order]),
        segments_S=np.repeat(np.asarray(numbers, np.int32), prepared.lengths_N[order]),
    )


def _scored(prepared: Prepared, text: int) -> np.ndarray:
    """Return which tokens of a text are scored."""
    scored_T = np.zeros(prepared.lengths_N[text], bool)
    scored_T[prepared.loss_places(text)] = True
    return scored_T


def bins(lengths: Sequence[int], *, length: int) -> list[list[int]]:
    """Deal texts out to rows: the longest first, each to the fullest row that still has room (best fit decreasing).

    Args:
        lengths: of the texts, each at most `length`.
        length: of a row.

    Returns:
        The texts of each row, ascending; rows in the order of their first texts.

    >>> bins([3, 5, 2, 6, 2], length=8)  # 6 + 2, 5 + 3, 2
    [[0, 1], [2, 3], [4]]
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # free positions -> rows that have so many
    rooms: list[int] = []  # keys of open_rows, ascending
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        place = bisect.bisect_left(rooms, lengths[text])
        if place == len(rooms):
            room, row = length, len(rows)
            rows.append([])
        else:
            room = rooms[place]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[place]
        rows[row].append(text)
        left = room - lengths[text]
        if left not in open_rows:
            open_rows[left] = []
            bisect.insort(rooms, left)
        open_rows[left].append(row)
    return sorted(sorted(row) for row in rows)
