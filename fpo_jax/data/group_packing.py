"""Whole groups packed into rows: a prompt stands once and its K completions follow it, or each completion stands alone.

`Prepared` and a list of rows, each a list of groups, flow in; a batch flows out in which every completion has the
log-probs that it has in a row of its own. Which groups share a row depends on their sizes alone, so that it is the same
on every process and after every resumption, and no group is ever split.

    padded   one completion a row                        K (P + R) tokens for a group
    packed   groups packed, every completion whole       K (P + R)
    shared   groups packed, the prompt only once        P + K R

Letter used only here: S places for groups in a row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fpo_jax.data.tokenize import Prepared
from fpo_jax.types import Batch, Segments

LENGTH_UNIT = 128  # rows are a multiple of it: whole tiles of every attention kernel
_TOGETHER = 256  # groups whose prompts are compared at a time: what that takes stays in the caches
_SCORED_UNIT = 8  # R is rounded up to it: the row count of one TPU tile
_LENGTHS = 8  # row lengths that are tried
_SLACKS = (1.0, 1.1, 1.2, 1.35, 1.6, 2.0)  # scored positions of a row over their mean share; 1: all groups alike


class Sizes(NamedTuple):
    """What the groups of a set take of a row, whatever stands beside them."""

    shared_B: (
        np.ndarray
    )  # tokens at the start that all completions have in common, none of them scored; 0 if not shared
    tokens_B: np.ndarray  # of the whole group
    scored_B: np.ndarray


class Packing(NamedTuple):
    """Sizes of the groups and the shape of rows."""

    shared: bool  # prompts stand once
    sizes: Sizes
    length: int  # T
    scored: int  # R
    places: int  # S
    multiple: int  # rows come in blocks of so many: those of one micro-batch over all devices


def scored_positions(most: int, *, length: int) -> int:
    """R for rows of T = `length` positions of which at most `most` are scored."""
    return min(-(-most // _SCORED_UNIT) * _SCORED_UNIT, length)


def sizes(prepared: Prepared, *, shared: bool) -> Sizes:
    """Measure the groups of a set. What completions share is found in their tokens, within their prompts."""
    B, K = prepared.groups, prepared.group_size
    lengths_BK, prompts_BK = prepared.lengths_N.reshape(B, K), prepared.prompt_lengths_N.reshape(B, K)
    scored_B = prepared.loss_tokens_N.reshape(B, K).sum(axis=1)
    shared_B = np.zeros(B, np.int64)
    if shared:
        limits_B, starts_BK = prompts_BK.min(axis=1).astype(np.int64), prepared.starts_N.reshape(B, K)
        for start in range(0, B, _TOGETHER):
            part = slice(start, start + _TOGETHER)
            shared_B[part] = _common(prepared.tokens_S, starts_BK[part], limits_B[part])
    tokens_B = lengths_BK.sum(axis=1, dtype=np.int64) - (K - 1) * shared_B
    return Sizes(shared_B, tokens_B, scored_B)


def _common(tokens_S: np.ndarray, starts_BK: np.ndarray, limits_B: np.ndarray) -> np.ndarray:
    """Return how many tokens the completions of each group begin with alike, at most `limits_B`, at least 1 each."""
    begins_B = np.concatenate([[0], np.cumsum(limits_B[:-1])])
    within_P = np.arange(limits_B.sum()) - np.repeat(begins_B, limits_B)
    places_PK = np.repeat(starts_BK, limits_B, axis=0) + within_P[:, None]
    tokens_PK = tokens_S[places_PK]
    equal_P = (tokens_PK == tokens_PK[:, :1]).all(axis=1)
    ends_P = np.where(equal_P, np.repeat(limits_B, limits_B), within_P)  # the first that differs ends it
    return np.minimum.reduceat(ends_P, begins_B)


def texts(found: Sizes, groups: np.ndarray, lengths_N: np.ndarray, *, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of each text of some groups and of the prompt that it shares: prompts first, then completions.

    Args:
        found: from `sizes`.
        groups: which ones.
        lengths_N: tokens of their completions, each with its prompt.
        group_size: K.
    """
    shared_B = found.shared_B[groups]
    shared_N = np.repeat(shared_B, group_size)
    return np.concatenate([shared_B, lengths_N - shared_N]), np.concatenate([np.zeros_like(shared_B), shared_N])


def packing(
    found: Sizes,
    samples: Sequence[Sequence[int]],
    *,
    shared: bool,
    multiple: int,
    longest: int,
    head_cost: float,
    length: int | None = None,
) -> Packing:
    """Fix the shape of rows: of those that are allowed, the one whose batches cost least.

        cost = rows * (T + head_cost * R)

    Args:
        found: from `sizes`.
        samples: groups of some batches.
        shared: whether prompts stand once.
        multiple: rows come in blocks of so many.
        longest: bound on T where it is chosen here; the longest group may need more.
        head_cost: of a scored position in the head, relative to that of a token in the layers.
        length: T; None = chosen here.

    Returns:
        Packing with no place yet.

    Raises:
        ValueError: a group does not fit into `length`.
    """
    most, most_scored = int(found.tokens_B.max()), int(found.scored_B.max())
    if length is not None and length < most:
        raise ValueError(
            f"data.row_length={length} is shorter than the longest group of {most} tokens, and no group is split; "
            f"use at least {most}, or leave it unset"
        )
    least = -(-most // LENGTH_UNIT) * LENGTH_UNIT
    step = max(1, (longest - least) // (LENGTH_UNIT * _LENGTHS)) * LENGTH_UNIT
    share = found.scored_B.sum() / found.tokens_B.sum()
    shapes = {
        (T, scored_positions(max(most_scored, int(slack * share * T)), length=T))
        for T in ([length] if length else range(least, max(least, longest) + 1, step))
        for slack in _SLACKS
    }
    tried = [Packing(shared, found, T, R, places=0, multiple=multiple) for T, R in sorted(shapes)]

    def cost(shape: Packing) -> float:
        rows = sum(blocks(len(pack_groups(groups, shape)), shape) for groups in samples)
        return rows * (shape.length + head_cost * shape.scored)

    return min(tried, key=cost)


def pack_groups(groups: Sequence[int], shape: Packing) -> list[list[int]]:
    """Deal groups out to rows, the largest first, each to the fullest row with room for it (best fit decreasing).

    A group's size, and a row's room, is the sum of its share of T and its share of R.

    Returns:
        The groups of each row in their order; rows in the order of their first groups.

    >>> found = Sizes(np.zeros(4), np.array([6, 3, 5, 2]), np.array([1, 3, 1, 1]))
    >>> shape = Packing(True, found, length=8, scored=8, places=0, multiple=1)
    >>> pack_groups([0, 1, 2, 3], shape), pack_groups([0, 1, 2, 3], shape._replace(scored=3))
    ([[0, 3], [1, 2]], [[0, 3], [1], [2]])
    """
    index, T, R = np.asarray(groups, np.int64), shape.length, shape.scored
    tokens, scored = shape.sizes.tokens_B[index].tolist(), shape.sizes.scored_B[index].tolist()
    sizes_ = [tokens[place] / T + scored[place] / R for place in range(len(groups))]
    rows: list[tuple[int, int, list[int]]] = []  # free tokens, free scored tokens, places
    for place in sorted(range(len(groups)), key=lambda place: -sizes_[place]):
        need, need_scored, best, least = tokens[place], scored[place], -1, 3.0
        for row, (free, free_scored, _) in enumerate(rows):
            if free >= need and free_scored >= need_scored and free / T + free_scored / R < least:
                best, least = row, free / T + free_scored / R
        if best < 0:
            best = len(rows)
            rows.append((T, R, []))
        free, free_scored, members = rows[best]
        rows[best] = (free - need, free_scored - need_scored, [*members, place])
    return [[groups[place] for place in row] for row in sorted(sorted(members) for _, _, members in rows)]


def blocks(rows: int, shape: Packing) -> int:
    """So many rows, filled up to whole blocks."""
    return -(-rows // shape.multiple) * shape.multiple


def assemble(prepared: Prepared, packing: Packing, rows: Sequence[Sequence[int]]) -> Batch:
    """Build the batch of these rows; a row without groups is all padding."""
    N, T, R, S, K = len(rows), packing.length, packing.scored, packing.places, prepared.group_size
    tokens_NT = np.full((N, T), prepared.pad_id, np.int32)
    ids_NT, parents_NT = np.full((N, T), -1, np.int32), np.full((N, T), -1, np.int32)
    positions_NT = np.zeros((N, T), np.int32)
    predictors_NR, targets_NR = np.zeros((N, R), np.int32), np.zeros((N, R), np.int32)
    slots_NR, loss_mask_NR = np.zeros((N, R), np.int32), np.zeros((N, R), bool)
    ends_NP = np.zeros((N, S * K), np.int32)
    group_NS = np.full((N, S), -1, np.int32)
    for n, groups in enumerate(rows):
        at = scored_at = segment = 0
        group_NS[n, : len(groups)] = groups
        for place, group in enumerate(groups):
            shared = int(packing.sizes.shared_B[group])
            trunk, trunk_at = segment, at
            if shared:
                ids, _ = prepared.row(group * K)
                part = slice(at, at + shared)
                tokens_NT[n, part], positions_NT[n, part] = ids[:shared], np.arange(shared)
                ids_NT[n, part] = parents_NT[n, part] = trunk
                at, segment = at + shared, segment + 1
            for k in range(K):
                ids, _ = prepared.row(group * K + k)
                own, begin = len(ids) - shared, at - shared  # token i of the completion stands at begin + i
                part = slice(at, at + own)
                tokens_NT[n, part], positions_NT[n, part] = ids[shared:], np.arange(shared, len(ids))
                ids_NT[n, part], parents_NT[n, part] = segment, trunk if shared else segment
                places = prepared.loss_places(group * K + k)
                to = slice(scored_at, scored_at + len(places))
                predictors_NR[n, to] = begin + places - 1
                if places[0] == shared:  # the prompt's last token, which stands before all its completions
                    predictors_NR[n, scored_at] = trunk_at + shared - 1
                targets_NR[n, to], loss_mask_NR[n, to], slots_NR[n, to] = ids[places], True, place * K + k
                ends_NP[n, place * K + k] = at + own - 1
                at, scored_at, segment = at + own, scored_at + len(places), segment + 1
    group_B = group_NS.reshape(-1)
    real_B = group_B >= 0
    return Batch(
        tokens_NT=tokens_NT,
        valid_NT=ids_NT >= 0,
        predictors_NR=predictors_NR,
        targets_NR=targets_NR,
        loss_mask_NR=loss_mask_NR,
        rewards_BK=np.where(real_B[:, None], prepared.rewards_BK[np.where(real_B, group_B, 0)], np.float32(0)),
        reference_logps_BK=np.zeros((len(group_B), K), np.float32),
        weight_B=real_B.astype(np.float32),
        row_ids_B=group_B,
        segments=Segments(ids_NT, positions_NT, parents_NT if packing.shared else None),
        slots_NR=slots_NR,
        ends_NP=ends_NP,
    )
