"""Prepared rows -> static-shape batches, in an order that depends on the seed and the step alone.

What flows in: `Prepared`, a batch size, bucket lengths. What flows out: `shapes.Batch`, whole or the part of it that a
process feeds to its devices. The cursor is the step: batch number `step` is the same whatever ran before, on any number
of processes, so a run resumes in O(1).

Shapes: the rows of a batch are padded to the smallest bucket T that holds the longest row of the *global* batch, and
each T has one R, the most scored tokens any row of that bucket can have. So the number of compilations is known before
the first step.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from fpo_jax.data.prepared import Prepared
from fpo_jax.data.sources import check_choice
from fpo_jax.shapes import Batch

_R_MULTIPLE = 8  # R is rounded up to it: the row count of one TPU tile


class Schedule(NamedTuple):
    """Everything that fixes which groups and which shapes a step has; made by `schedule`."""

    prepared: Prepared
    buckets: tuple[int, ...]  # T, ascending
    scored: tuple[int, ...]  # R of each bucket
    longest_B: np.ndarray  # int32, longest row of each group
    scored_N: np.ndarray  # int32, scored tokens of each row
    batch_size: int  # groups of a global batch
    seed: int
    shuffle: bool
    last_batch: str

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one pass over the data."""
        return steps_per_epoch(self.prepared.groups, batch_size=self.batch_size, last_batch=self.last_batch)


def steps_per_epoch(groups: int, *, batch_size: int, last_batch: str) -> int:
    """Batches of one pass over so many groups."""
    full, rest = divmod(groups, batch_size)
    return full + (last_batch == "pad" and rest > 0)


def scored_positions(most: int, *, length: int) -> int:
    """R for rows of T = `length` positions of which at most `most` are scored."""
    return min(-(-most // _R_MULTIPLE) * _R_MULTIPLE, length)


class RowSizes(NamedTuple):
    """Tokens of the rows of a whole batch; rows that fill it up have none."""

    texts: np.ndarray  # tokens of each text: of a row, prompt and response, or of each of the texts packed into it
    scored_N: np.ndarray  # tokens of the responses in a row
    length: int  # T, to which rows are padded
    scored: int  # R


def schedule(
    prepared: Prepared,
    *,
    batch_size: int,
    buckets: Sequence[int],
    seed: int,
    shuffle: bool = True,
    last_batch: str = "drop",
) -> Schedule:
    """Fix the order and the shapes of every batch.

    Args:
        prepared: the rows.
        batch_size: groups of a batch, over all processes.
        buckets: row lengths T; the largest must hold the longest row.
        seed: of the order, 0 to 2^64 - 1.
        shuffle: a new order every epoch; False keeps the order of the data.
        last_batch: what becomes of the groups left at the end of an epoch: `drop`, or `pad` with groups of weight 0.

    Raises:
        ValueError: no positive batch size, a bucket too short, no whole batch.
    """
    check_choice("last_batch", last_batch, ["drop", "pad"])
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is not positive")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed} is outside 0 ... 2^64 - 1")
    if last_batch == "drop" and prepared.groups < batch_size:
        raise ValueError(
            f"batch_size={batch_size} is more than the {prepared.groups} groups there are, so no batch is whole; "
            f"use at most {prepared.groups}, or last_batch='pad'"
        )
    scored_N = prepared.scored_N
    bounds, scored, longest_B = _bucket_shapes(prepared, scored_N, buckets)
    return Schedule(prepared, bounds, scored, longest_B, scored_N, batch_size, seed, shuffle, last_batch)


@lru_cache(maxsize=4)
def order(count: int, *, seed: int, epoch: int) -> Int[np.ndarray, " count"]:
    """Return the permutation of 0 ... count-1 for one epoch; the same on every platform and process.

    The groups are sorted by numbers of the Philox counter generator under the key (seed, epoch). NumPy promises that
    raw stream for ever; it does not promise `Generator.permutation`.

    >>> order(5, seed=0, epoch=0).tolist(), order(5, seed=0, epoch=1).tolist()
    ([0, 2, 1, 4, 3], [3, 2, 4, 1, 0])
    """
    raw = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(count)
    permutation = np.argsort(raw, kind="stable")
    permutation.flags.writeable = False  # the cache hands out one array
    return permutation


def group_ids(plan: Schedule, step: int) -> Int[np.ndarray, " B"]:
    """Places in the prepared set of the whole batch of a step; -1 fills up a ragged last batch."""
    if step < 0:
        raise ValueError(f"step={step} is negative; steps count from 0")
    epoch, number = divmod(step, plan.steps_per_epoch)
    count = plan.prepared.groups
    arrangement = order(count, seed=plan.seed, epoch=epoch) if plan.shuffle else np.arange(count)
    ids = np.full(plan.batch_size, -1, np.int32)
    part = arrangement[number * plan.batch_size : (number + 1) * plan.batch_size]
    ids[: len(part)] = part
    return ids


def batch_at(plan: Schedule, step: int, positions: np.ndarray | None = None) -> Batch:
    """Build the batch of a step, or the part of it that one process feeds to its devices.

    Args:
        plan: from `schedule`.
        step: counted from 0 over all epochs.
        positions: which of the batch's groups to build, in this order; None = all.

    Returns:
        The rows of those groups; T and R are those of the whole batch, so that all parts fit together.
    """
    ids = group_ids(plan, step)
    length, scored = _shape(plan, ids)
    return _assemble(plan.prepared, ids if positions is None else ids[positions], length, scored)


def row_sizes(plan: Schedule, step: int) -> RowSizes:
    """Return what the rows of the whole batch of a step hold, without building them."""
    ids, prepared = group_ids(plan, step), plan.prepared
    rows_BK = np.where(ids >= 0, ids, 0)[:, None] * prepared.group_size + np.arange(prepared.group_size)
    scored_BK = np.where(ids[:, None] >= 0, plan.scored_N[rows_BK], 0)
    return RowSizes(prepared.text_lengths(rows_BK[ids >= 0].reshape(-1)), scored_BK.reshape(-1), *_shape(plan, ids))


def batch_shapes(plan: Schedule, *, steps: int, start: int = 0) -> list[tuple[int, int]]:
    """Distinct (T, R) of the steps start ... start+steps-1, ascending: one compilation each."""
    return sorted({_shape(plan, group_ids(plan, step)) for step in range(start, start + steps)})


def sequential_batches(
    prepared: Prepared,
    *,
    batch_size: int,
    buckets: Sequence[int],
) -> Iterator[Batch]:
    """Yield every group once in the order of the data, the last batch filled up with groups of weight 0."""
    plan = schedule(
        prepared,
        batch_size=batch_size,
        buckets=buckets,
        seed=0,
        shuffle=False,
        last_batch="pad",
    )
    return (batch_at(plan, step) for step in range(plan.steps_per_epoch))


def _bucket_shapes(
    prepared: Prepared, scored_N: np.ndarray, buckets: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], np.ndarray]:
    """Buckets in order, the R of each, and the longest row of each group."""
    bounds = tuple(sorted(set(buckets)))
    longest_B = prepared.lengths_N.reshape(prepared.rewards_BK.shape).max(axis=1)
    if not bounds or bounds[0] < 2 or bounds[-1] < longest_B.max():
        raise ValueError(
            f"buckets={list(buckets)} do not hold the longest row of {longest_B.max()} tokens; "
            f"add a bucket of at least {longest_B.max()}, or prepare with a smaller max_length"
        )
    scored_B = scored_N.reshape(prepared.rewards_BK.shape).max(axis=1)
    scored = []
    for bound in bounds:
        most = int(scored_B[longest_B <= bound].max(initial=1))
        scored.append(scored_positions(most, length=bound))
    return bounds, tuple(scored), longest_B


def _shape(plan: Schedule, ids_B: np.ndarray) -> tuple[int, int]:
    index = int(np.searchsorted(plan.buckets, plan.longest_B[ids_B[ids_B >= 0]].max()))
    return plan.buckets[index], plan.scored[index]


def _assemble(prepared: Prepared, ids_B: np.ndarray, length: int, scored: int) -> Batch:
    """Slice rows out of the flat storage; groups of id -1 become rows of filler that nothing counts."""
    K = prepared.group_size
    real_B = ids_B >= 0
    rows_N = (np.where(real_B, ids_B, 0)[:, None] * K + np.arange(K)).reshape(-1)
    real_N = np.repeat(real_B, K)
    lengths_N = np.where(real_N, prepared.lengths_N[rows_N], 0)
    prompts_N = np.where(real_N, prepared.prompt_lengths_N[rows_N], 0)

    positions_T, positions_R = np.arange(length), np.arange(scored)
    valid_NT = positions_T < lengths_N[:, None]
    starts_N1 = prepared.starts_N[rows_N][:, None]
    tokens_S = prepared.tokens_S
    places_NT = np.where(valid_NT, starts_N1 + positions_T, 0)  # in tokens_S
    if prepared.scored_S is None:
        counts_N, targets_NR = lengths_N - prompts_N, prompts_N[:, None] + positions_R  # position of each target
    else:
        chosen_NT = valid_NT & prepared.scored_S[places_NT]
        counts_N, targets_NR = chosen_NT.sum(axis=1), np.argsort(~chosen_NT, axis=1, kind="stable")[:, :scored]
    scored_NR = positions_R < counts_N[:, None]
    segments_NT = None
    if prepared.segments_S is not None:
        segments_NT = np.where(valid_NT, prepared.segments_S[places_NT], np.int32(-1))
    return Batch(
        tokens_NT=np.where(valid_NT, tokens_S[places_NT], np.int32(prepared.pad_id)),
        valid_NT=valid_NT,
        predictors_NR=np.where(scored_NR, targets_NR - 1, 0).astype(np.int32),
        targets_NR=np.where(scored_NR, tokens_S[np.where(scored_NR, starts_N1 + targets_NR, 0)], np.int32(0)),
        scored_NR=scored_NR,
        rewards_BK=np.where(real_B[:, None], prepared.rewards_BK[np.where(real_B, ids_B, 0)], np.float32(0)),
        reference_logps_BK=np.zeros((len(ids_B), K), np.float32),
        weight_B=real_B.astype(np.float32),
        row_ids_B=ids_B.astype(np.int32),
        segments_NT=segments_NT,
    )
