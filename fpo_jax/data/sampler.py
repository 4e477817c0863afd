"""Prepared rows -> static-shape batches, in an order that depends on the seed and the step alone.

What flows in: `Prepared`, a batch size, bucket lengths. What flows out: `types.Batch`, whole or the part of it that a
process feeds to its devices. The cursor is the step: batch number `step` is the same whatever ran before, on any number
of processes, so a run resumes in O(1).

Shapes: the rows of a batch are padded to the smallest bucket T that holds the longest row of the *global* batch, and
each T has one R, the most scored tokens any row of that bucket can have. So the number of compilations is known before
the first step. Groups that share rows (`group_packing`) have one T, one R and one number of rows.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from fpo_jax.config import choices
from fpo_jax.data import group_packing
from fpo_jax.data.tokenize import Prepared
from fpo_jax.types import Batch, Segments

_SAMPLES = 8  # batches on which shapes of packed rows are tried
_CHUNK = 256  # groups of a set that are packed together for a pass over it


class Rows(NamedTuple):
    """Rows that hold whole groups, of all batches."""

    packing: group_packing.Packing  # their shape
    count: int  # of a batch; those that its groups do not fill are padding
    groups: list[list[list[int]]]  # of every row of every step
    one_pass: bool = False  # the steps are one pass over the set


class Schedule(NamedTuple):
    """Everything that fixes which groups and which shapes a step has; made by `schedule` and its siblings."""

    prepared: Prepared
    buckets: tuple[int, ...]  # T, ascending
    scored: tuple[int, ...]  # R of each bucket
    longest_B: np.ndarray  # int32, longest row of each group
    loss_tokens_N: np.ndarray  # int32, scored tokens of each row
    batch_size: int  # groups of a global batch; of `sequence` rows
    seed: int
    shuffle: bool
    last_batch: str
    rows: Rows | None = None  # that hold groups; None = a row holds one completion

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one pass over the data."""
        if self.rows is not None and self.rows.one_pass:
            return len(self.rows.groups)
        return steps_per_epoch(self.prepared.groups, batch_size=self.batch_size, last_batch=self.last_batch)

    @property
    def parts(self) -> int:
        """What a batch can be cut into: groups, or rows that hold groups."""
        return self.batch_size if self.rows is None else self.rows.count

    @property
    def sizes(self) -> group_packing.Sizes | None:
        """What the groups of the set take of a row that they share; None where they share none."""
        return None if self.rows is None else self.rows.packing.sizes


def steps_per_epoch(groups: int, *, batch_size: int, last_batch: str) -> int:
    """Batches of one pass over so many groups."""
    full, rest = divmod(groups, batch_size)
    return full + (last_batch == "pad" and rest > 0)


class RowSizes(NamedTuple):
    """What a whole batch holds and what it takes."""

    texts: np.ndarray  # tokens of each text, of its own: without the prompt that it shares
    contexts: np.ndarray  # tokens of the prompt that each text shares, 0 where it shares none
    sequence_tokens: int  # tokens of all completions, each with its prompt
    completion_tokens: int  # loss tokens
    rows: int
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
    choices.check("last_batch", last_batch, ["drop", "pad"])
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is not positive")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed} is outside 0 ... 2^64 - 1")
    if last_batch == "drop" and prepared.groups < batch_size:
        raise ValueError(
            f"batch_size={batch_size} is more than the {prepared.groups} groups there are, so no batch is whole; "
            f"use at most {prepared.groups}, or last_batch='pad'"
        )
    loss_tokens_N = prepared.loss_tokens_N
    bounds, scored, longest_B = _bucket_shapes(prepared, loss_tokens_N, buckets)
    return Schedule(prepared, bounds, scored, longest_B, loss_tokens_N, batch_size, seed, shuffle, last_batch)


def packed(
    prepared: Prepared,
    *,
    layout: str,
    batch_size: int,
    multiple: int,
    longest: int,
    head_cost: float,
    length: int | None = None,
    sizes: group_packing.Sizes | None = None,
    seed: int,
    shuffle: bool = True,
    last_batch: str = "drop",
    steps: int,
) -> Schedule:
    """Fix the order of every batch as `schedule` does, and the rows into which its groups are packed.

    Args:
        prepared: the rows.
        layout: `packed` or `shared`.
        batch_size: groups of a batch, over all processes.
        multiple: rows that every batch must have a whole number of.
        longest: bound on the row length where it is chosen here.
        head_cost: of a scored position, relative to that of a token (`group_packing.packing`).
        length: of a row; None = the one that costs least.
        sizes: of the set's groups in that layout, where they are known.
        seed: of the order.
        shuffle: as for `schedule`.
        last_batch: as for `schedule`.
        steps: batches of the run.

    Raises:
        ValueError: as `schedule`; a group longer than `length`.
    """
    plain = schedule(
        prepared,
        batch_size=batch_size,
        buckets=(int(prepared.lengths_N.max()),),
        seed=seed,
        shuffle=shuffle,
        last_batch=last_batch,
    )
    drawn = [[group for group in group_ids(plain, step).tolist() if group >= 0] for step in range(steps)]
    options = {"multiple": multiple, "longest": longest, "head_cost": head_cost, "length": length}
    shape = _row_shape(prepared, drawn, sizes, layout=layout, **options)
    return _with_rows(plain, shape, [group_packing.pack_groups(groups, shape) for groups in drawn])


def sequence(
    prepared: Prepared,
    *,
    layout: str,
    rows: int,
    longest: int,
    head_cost: float,
    length: int | None = None,
    sizes: group_packing.Sizes | None = None,
) -> Schedule:
    """Pack a whole set for one pass over it, for evaluations and reference passes: batches of `rows` rows.

    Args:
        prepared: the rows.
        layout: as for `packed`.
        rows: of a batch.
        longest: as for `packed`.
        head_cost: as for `packed`.
        length: as for `packed`.
        sizes: of the set's groups in that layout, where they are known (`Schedule.sizes`).

    Raises:
        ValueError: a group longer than `length`.
    """
    chunks = [
        range(start, min(start + _CHUNK, prepared.groups)) for start in range(0, prepared.groups, _CHUNK)
    ]  # of neighbours, for the time that packing takes
    options = {"multiple": 1, "longest": longest, "head_cost": head_cost, "length": length}
    shape = _row_shape(prepared, chunks, sizes, layout=layout, **options)
    packed = [row for chunk in chunks for row in group_packing.pack_groups(chunk, shape)]
    empty = np.zeros(0, np.int32)
    plain = Schedule(prepared, (), (), empty, empty, rows, 0, False, "pad")
    batches = [packed[start : start + rows] for start in range(0, len(packed), rows)]
    return _with_rows(plain, shape._replace(multiple=rows), batches, one_pass=True)


def _row_shape(
    prepared: Prepared,
    batches: Sequence[Sequence[int]],
    sizes: group_packing.Sizes | None = None,
    *,
    layout: str,
    **options,
) -> group_packing.Packing:
    """Choose the shape of rows on some of the batches; `options` are those of `group_packing.packing`."""
    shared = layout == "shared"
    samples = batches[:: -(-len(batches) // _SAMPLES)]
    found = group_packing.sizes(prepared, shared=shared) if sizes is None else sizes
    return group_packing.packing(found, samples, shared=shared, **options)


def _with_rows(
    plan: Schedule, shape: group_packing.Packing, packed: list[list[list[int]]], *, one_pass: bool = False
) -> Schedule:
    shape = shape._replace(places=max(len(row) for rows in packed for row in rows))
    rows = Rows(shape, group_packing.blocks(max(map(len, packed)), shape), packed, one_pass)
    return plan._replace(buckets=(shape.length,), scored=(shape.scored,), rows=rows)


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
    """Places in the prepared set of the whole batch of a step, in its order; -1 where a batch or a row is filled up."""
    if step < 0:
        raise ValueError(f"step={step} is negative; steps count from 0")
    if plan.rows is not None:
        ids_NS = np.full((plan.rows.count, plan.rows.packing.places), -1, np.int32)
        for row, groups in enumerate(plan.rows.groups[step]):
            ids_NS[row, : len(groups)] = groups
        return ids_NS.reshape(-1)
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
        positions: which parts of the batch (`Schedule.parts`) to build, in this order; None = all.

    Returns:
        Those parts; T and R are those of the whole batch, so that all parts fit together.
    """
    if plan.rows is not None:
        rows = plan.rows.groups[step]
        rows = rows + [[]] * (plan.rows.count - len(rows))
        chosen = rows if positions is None else [rows[place] for place in positions]
        return group_packing.assemble(plan.prepared, plan.rows.packing, chosen)
    ids = group_ids(plan, step)
    length, scored = _shape(plan, ids)
    return _assemble(plan.prepared, ids if positions is None else ids[positions], length, scored)


def row_sizes(plan: Schedule, step: int) -> RowSizes:
    """Return what the whole batch of a step holds, without building it."""
    ids, prepared = group_ids(plan, step), plan.prepared
    groups = ids[ids >= 0]
    K = prepared.group_size
    rows_N = (groups[:, None] * K + np.arange(K)).reshape(-1)
    lengths_N = prepared.text_lengths(rows_N)
    sequence_tokens = int(lengths_N.sum())
    if plan.rows is None:
        scored = int(plan.loss_tokens_N[rows_N].sum())
        return RowSizes(lengths_N, np.zeros_like(lengths_N), sequence_tokens, scored, len(ids) * K, *_shape(plan, ids))
    packing = plan.rows.packing
    texts, contexts = group_packing.texts(packing.sizes, groups, lengths_N, group_size=K)
    return RowSizes(
        texts=texts,
        contexts=contexts,
        sequence_tokens=sequence_tokens,
        completion_tokens=int(packing.sizes.scored_B[groups].sum()),
        rows=group_packing.blocks(len(plan.rows.groups[step]), packing),  # a micro-batch without groups is passed over
        length=packing.length,
        scored=packing.scored,
    )


def tokens_once(plan: Schedule, step: int) -> int:
    """Count the tokens of a step's groups with every prompt once: what they would take in `shared` rows."""
    ids, prepared = group_ids(plan, step), plan.prepared
    groups = ids[ids >= 0]
    shape_BK = prepared.rewards_BK.shape
    prompts_B = prepared.prompt_lengths_N.reshape(shape_BK).min(axis=1)[groups]
    return int(prepared.lengths_N.reshape(shape_BK)[groups].sum() - (prepared.group_size - 1) * prompts_B.sum())


def batch_shapes(plan: Schedule, *, steps: int, start: int = 0) -> list[tuple[int, int]]:
    """Distinct (T, R) of the steps start ... start+steps-1, ascending: one compilation each."""
    if plan.rows is not None:
        return [(plan.rows.packing.length, plan.rows.packing.scored)]
    return sorted({_shape(plan, group_ids(plan, step)) for step in range(start, start + steps)})


def _bucket_shapes(
    prepared: Prepared, loss_tokens_N: np.ndarray, buckets: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], np.ndarray]:
    """Buckets in order, the R of each, and the longest row of each group."""
    bounds = tuple(sorted(set(buckets)))
    longest_B = prepared.lengths_N.reshape(prepared.rewards_BK.shape).max(axis=1)
    if not bounds or bounds[0] < 2 or bounds[-1] < longest_B.max():
        raise ValueError(
            f"buckets={list(buckets)} do not hold the longest row of {longest_B.max()} tokens; "
            f"add a bucket of at least {longest_B.max()}, or prepare with a smaller max_length"
        )
    scored_B = loss_tokens_N.reshape(prepared.rewards_BK.shape).max(axis=1)
    scored = []
    for bound in bounds:
        most = int(scored_B[longest_B <= bound].max(initial=1))
        scored.append(group_packing.scored_positions(most, length=bound))
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
    loss_mask_NR = positions_R < counts_N[:, None]
    segments = None
    if prepared.segments_S is not None:
        ids_NT = np.where(valid_NT, prepared.segments_S[places_NT], np.int32(-1))
        segments = Segments(ids_NT, _restarted(ids_NT))
    return Batch(
        tokens_NT=np.where(valid_NT, tokens_S[places_NT], np.int32(prepared.pad_id)),
        valid_NT=valid_NT,
        predictors_NR=np.where(loss_mask_NR, targets_NR - 1, 0).astype(np.int32),
        targets_NR=np.where(loss_mask_NR, tokens_S[np.where(loss_mask_NR, starts_N1 + targets_NR, 0)], np.int32(0)),
        loss_mask_NR=loss_mask_NR,
        rewards_BK=np.where(real_B[:, None], prepared.rewards_BK[np.where(real_B, ids_B, 0)], np.float32(0)),
        reference_logps_BK=np.zeros((len(ids_B), K), np.float32),
        weight_B=real_B.astype(np.float32),
        row_ids_B=ids_B.astype(np.int32),
        segments=segments,
    )


def _restarted(ids_NT: np.ndarray) -> np.ndarray:
    """Positions of tokens in their own segments."""
    places_NT = np.broadcast_to(np.arange(ids_NT.shape[1], dtype=np.int32), ids_NT.shape)
    begins_NT = np.pad(ids_NT[:, 1:] != ids_NT[:, :-1], ((0, 0), (1, 0)))
    return places_NT - np.maximum.accumulate(np.where(begins_NT, places_NT, 0), axis=1)
