"""Order, cursor, shapes: every batch is a function of the seed and the step alone, on any number of processes."""

import subprocess
import sys

import numpy as np
import pytest

from fpo_jax import data
from fpo_jax.data import Prepared, sampler
from tests import real_tokenizers
from tests.paths import REPO, shared_data


def random_set(groups=23, completions=3, longest=40, seed=0):
    """Rows of random lengths whose token ids tell the row and the position: row * 1000 + position + 1."""
    random = np.random.default_rng(seed)
    lengths = random.integers(3, longest + 1, groups * completions).astype(np.int32)
    prompts = np.array([random.integers(1, length) for length in lengths], np.int32)
    tokens = [row * 1000 + 1 + np.arange(length) for row, length in enumerate(lengths)]
    return Prepared(
        tokens_S=np.concatenate(tokens).astype(np.int32),
        starts_N=np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64),
        lengths_N=lengths,
        prompt_lengths_N=prompts,
        rewards_BK=random.normal(size=(groups, completions)).astype(np.float32),
        sources=tuple(f"f:{group}" for group in range(groups)),
        pad_id=7,
    )


def plan(prepared, **options):
    return data.schedule(prepared, **(dict(batch_size=4, buckets=(16, 32, 40), seed=5) | options))


def assert_equal(first, second):
    for name, one, other in zip(first._fields, first, second, strict=True):
        if one is None:
            assert other is None, name
            continue
        assert one.dtype == other.dtype, name
        np.testing.assert_array_equal(one, other, err_msg=name)


def philox(counter, *key):
    """Four 64-bit numbers of Philox 4x64-10 (Salmon et al., SC 2011) in plain integers."""
    mask = 2**64 - 1
    words, key = [counter, 0, 0, 0], list(key)
    for _ in range(10):
        high_0, low_0 = divmod(0xD2E7470EE14C6C93 * words[0], 2**64)
        high_1, low_1 = divmod(0xCA5A826395121157 * words[2], 2**64)
        words = [high_1 ^ words[1] ^ key[0], low_1, high_0 ^ words[3] ^ key[1], low_0]
        key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
    return words


class TestOrder:
    def test_is_a_permutation_that_depends_on_seed_and_epoch(self):
        seen = [tuple(data.order(101, seed=seed, epoch=epoch)) for seed in (0, 1, 2**64 - 1) for epoch in (0, 1)]
        assert len(set(seen)) == 6 and all(sorted(one) == list(range(101)) for one in seen)

    def test_equals_philox_written_out(self):
        for count, seed, epoch in ((11, 42, 0), (6, 2**64 - 1, 3)):
            raw = [number for block in range(-(-count // 4)) for number in philox(block + 1, seed, epoch)][:count]
            expected = sorted(range(count), key=raw.__getitem__)
            assert data.order(count, seed=seed, epoch=epoch).tolist() == expected

    def test_same_in_another_process(self):
        code = "from fpo_jax import data; print(data.order(1000, seed=9, epoch=2).tolist())"
        environment = {"PYTHONHASHSEED": "12345", "PATH": "/usr/bin"}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=REPO, env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == str(data.order(1000, seed=9, epoch=2).tolist())

    def test_every_place_is_equally_likely(self):
        firsts = np.bincount([data.order(5, seed=seed, epoch=0)[0] for seed in range(2000)], minlength=5)
        assert abs(firsts - 400).max() < 4.5 * np.sqrt(2000 * 0.2 * 0.8)

    def test_cached_array_cannot_be_changed(self):
        with pytest.raises(ValueError, match=r"read-only"):
            data.order(11, seed=0, epoch=0)[0] = 1


class TestEpochs:
    def test_each_epoch_has_every_group_once(self):
        schedule = plan(random_set(24))
        assert schedule.steps_per_epoch == 6
        for epoch in range(3):
            ids = np.concatenate([data.group_ids(schedule, epoch * 6 + step) for step in range(6)])
            assert sorted(ids) == list(range(24)) and list(ids) != list(range(24))

    def test_drop_and_pad(self):
        prepared = random_set(23)
        dropping, padding = plan(prepared), plan(prepared, last_batch="pad")
        assert (dropping.steps_per_epoch, padding.steps_per_epoch) == (5, 6)
        for step in range(5):
            np.testing.assert_array_equal(data.group_ids(dropping, step), data.group_ids(padding, step))
        last = data.group_ids(padding, 5)
        assert (last >= 0).tolist() == [True, True, True, False]
        every = np.concatenate([data.group_ids(padding, step) for step in range(6)])
        assert sorted(every) == [-1, *range(23)]
        assert -1 not in data.group_ids(padding, 6)  # the next epoch begins with a whole batch

    def test_whole_epochs_are_never_padded(self):
        assert plan(random_set(24), last_batch="pad").steps_per_epoch == 6

    def test_without_shuffle(self):
        schedule = plan(random_set(24), shuffle=False)
        assert data.group_ids(schedule, 1).tolist() == data.group_ids(schedule, 7).tolist() == [4, 5, 6, 7]


class TestCursor:
    def test_a_batch_does_not_depend_on_what_came_before(self):
        prepared = random_set()
        steps = list(range(14))
        forward = [data.batch_at(plan(prepared), step) for step in steps]
        sampler.order.cache_clear()
        backward = {step: data.batch_at(plan(prepared), step) for step in reversed(steps)}
        for step in steps:
            assert_equal(forward[step], backward[step])

    def test_a_far_step_costs_one_permutation(self):
        sampler.order.cache_clear()
        data.batch_at(plan(random_set()), 10**12)
        assert sampler.order.cache_info().misses == 1

    def test_negative_step(self):
        with pytest.raises(ValueError, match=r"step=-1 is negative; steps count from 0"):
            data.batch_at(plan(random_set()), -1)


class TestProcesses:
    @pytest.mark.parametrize("last_batch", ["drop", "pad"])
    def test_parts_are_the_rows_of_the_whole(self, last_batch):
        """In any number, in any order, overlapping or not: T, R and every row are those of the whole batch."""
        schedule = plan(random_set(groups=61), batch_size=8, last_batch=last_batch)
        for step in range(2 * schedule.steps_per_epoch):
            whole = data.batch_at(schedule, step)
            for positions in ([0, 1], [7, 2, 3], [5], [0, 1, 4, 5]):
                part = data.batch_at(schedule, step, np.array(positions))
                rows = (np.array(positions)[:, None] * 3 + np.arange(3)).reshape(-1)
                picked = [leaf[rows] if len(leaf) == 24 else leaf[positions] for leaf in whole[:9]]
                assert_equal(type(whole)(*picked), part)

    def test_row_sizes_are_those_of_the_whole_batch(self):
        schedule = plan(random_set(groups=61), batch_size=8, last_batch="pad")
        for step in range(schedule.steps_per_epoch):
            whole = data.batch_at(schedule, step)
            sizes = data.row_sizes(schedule, step)
            real_N = np.repeat(whole.row_ids_B >= 0, 3)
            np.testing.assert_array_equal(sizes.texts, whole.valid_NT.sum(axis=1)[real_N])
            assert (sizes.completion_tokens, sizes.rows) == (whole.loss_mask_NR.sum(), len(whole.tokens_NT))
            assert (sizes.length, sizes.scored) == (whole.tokens_NT.shape[1], whole.targets_NR.shape[1])


class TestBatch:
    def test_drawn(self):
        prepared = Prepared(
            tokens_S=np.array([11, 12, 13, 21, 22, 23, 24, 31, 32, 41, 42, 43], np.int32),
            starts_N=np.array([0, 3, 7, 9]),
            lengths_N=np.array([3, 4, 2, 3], np.int32),
            prompt_lengths_N=np.array([2, 1, 1, 2], np.int32),
            rewards_BK=np.array([[1, 0], [0.25, 0.75]], np.float32),
            sources=("f:1", "f:2"),
            pad_id=9,
        )
        schedule = data.schedule(prepared, batch_size=3, buckets=(5,), seed=0, shuffle=False, last_batch="pad")
        batch = data.batch_at(schedule, 0)
        T, F = True, False
        np.testing.assert_array_equal(
            batch.tokens_NT,
            [[11, 12, 13, 9, 9], [21, 22, 23, 24, 9], [31, 32, 9, 9, 9], [41, 42, 43, 9, 9], [9] * 5, [9] * 5],
        )
        np.testing.assert_array_equal(
            batch.valid_NT, [[T, T, T, F, F], [T, T, T, T, F], [T, T, F, F, F], [T, T, T, F, F], [F] * 5, [F] * 5]
        )
        # R is rounded up to 8 and cut to T; each predictor stands one before its target
        np.testing.assert_array_equal(
            batch.predictors_NR[:, :3], [[1, 0, 0], [0, 1, 2], [0, 0, 0], [1, 0, 0], [0] * 3, [0] * 3]
        )
        np.testing.assert_array_equal(
            batch.targets_NR[:, :3], [[13, 0, 0], [22, 23, 24], [32, 0, 0], [43, 0, 0], [0] * 3, [0] * 3]
        )
        np.testing.assert_array_equal(
            batch.loss_mask_NR[:, :3], [[T, F, F], [T, T, T], [T, F, F], [T, F, F], [F] * 3, [F] * 3]
        )
        assert batch.loss_mask_NR.shape == (6, 5) and not batch.loss_mask_NR[:, 3:].any()
        np.testing.assert_array_equal(batch.rewards_BK, [[1, 0], [0.25, 0.75], [0, 0]])
        np.testing.assert_array_equal(batch.weight_B, [1, 1, 0])
        np.testing.assert_array_equal(batch.row_ids_B, [0, 1, -1])
        np.testing.assert_array_equal(batch.reference_logps_BK, np.zeros((3, 2)))
        kinds = ["int32", "bool", "int32", "int32", "bool", "float32", "float32", "float32", "int32"]
        assert [str(array.dtype) for array in batch[:9]] == kinds and batch[9:] == (None, None, None)

    def test_every_token_is_where_it_belongs(self):
        prepared = random_set()
        schedule = plan(prepared, last_batch="pad")
        for step in range(schedule.steps_per_epoch):
            batch = data.batch_at(schedule, step)
            for group, row_id in enumerate(batch.row_ids_B):
                for completion in range(3):
                    n = group * 3 + completion
                    valid, scored = batch.valid_NT[n], batch.loss_mask_NR[n]
                    if row_id < 0:
                        assert not valid.any() and not scored.any() and batch.weight_B[group] == 0
                        continue
                    ids, prompt_length = prepared.row(int(row_id) * 3 + completion)
                    np.testing.assert_array_equal(batch.tokens_NT[n][valid], ids)
                    np.testing.assert_array_equal(batch.targets_NR[n][scored], ids[prompt_length:])
                    before = batch.tokens_NT[n][batch.predictors_NR[n]]
                    np.testing.assert_array_equal(before[scored] + 1, batch.targets_NR[n][scored])
                    assert valid[: len(ids)].all() and batch.weight_B[group] == 1

    def test_sequential_covers_everything_once_in_order(self):
        prepared = random_set(groups=10)
        schedule = plan(prepared, batch_size=4, buckets=(16, 40), shuffle=False, last_batch="pad")
        got = [data.batch_at(schedule, number) for number in range(schedule.steps_per_epoch)]
        assert np.concatenate([batch.row_ids_B for batch in got]).tolist() == [*range(10), -1, -1]
        assert sum(batch.weight_B.sum() for batch in got) == 10


class TestShapes:
    def test_known_before_the_first_step(self):
        prepared = random_set(groups=200, completions=2)
        schedule = plan(prepared, batch_size=2, buckets=(8, 16, 24, 32, 40))
        shapes = data.batch_shapes(schedule, steps=250)
        seen = set()
        for step in range(250):
            batch = data.batch_at(schedule, step)
            seen.add((batch.tokens_NT.shape[1], batch.loss_mask_NR.shape[1]))
        assert sorted(seen) == shapes and len(shapes) >= 4
        assert {length for length, _ in shapes} <= {8, 16, 24, 32, 40}
        assert data.batch_shapes(schedule, start=100, steps=1) == [
            data.batch_at(schedule, 100).tokens_NT.shape[1:] + data.batch_at(schedule, 100).loss_mask_NR.shape[1:]
        ]

    def test_smallest_bucket_of_the_global_batch(self):
        prepared = random_set(groups=64, completions=2)
        schedule = plan(prepared, batch_size=4, buckets=(10, 20, 30, 40))
        longest = prepared.lengths_N.reshape(64, 2).max(axis=1)
        for step in range(16):
            need = longest[data.group_ids(schedule, step)].max()
            assert data.batch_at(schedule, step).tokens_NT.shape[1] == -(-need // 10) * 10

    def test_scored_positions_of_a_bucket(self):
        lengths = np.array([10, 10, 20, 20, 40, 40], np.int32)
        prompts = np.array([7, 1, 19, 10, 1, 30], np.int32)  # scored: 3 9 | 1 10 | 39 10
        prepared = random_set(groups=3, completions=2)._replace(
            tokens_S=np.zeros(140, np.int32),
            starts_N=np.cumsum(lengths) - lengths,
            lengths_N=lengths,
            prompt_lengths_N=prompts,
        )
        schedule = plan(prepared, batch_size=1, buckets=(40, 10, 20, 5))
        assert schedule.buckets == (5, 10, 20, 40)
        assert schedule.scored == (5, 10, 16, 40)  # rounded up to eights, never beyond T; 5 holds no group

    @pytest.mark.parametrize(
        "options, message",
        [
            (dict(buckets=()), r"buckets=\[\] do not hold the longest row of 40 tokens; add a bucket of at least 40"),
            (dict(buckets=(8, 39)), r"buckets=\[8, 39\] do not hold the longest row of 40 tokens"),
            (dict(buckets=(1, 40)), r"buckets=\[1, 40\]"),
            (dict(batch_size=0), r"batch_size=0 is not positive"),
            (dict(batch_size=24), r"batch_size=24 is more than the 23 groups .* use at most 23, or last_batch='pad'"),
            (dict(last_batch="keep"), r"last_batch='keep' is not one of drop, pad"),
            (dict(seed=-1), r"seed=-1 is outside 0 \.\.\. 2\^64 - 1"),
        ],
    )  # fmt: skip
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            plan(random_set(), **options)

    def test_fewer_groups_than_a_batch(self):
        batch = data.batch_at(plan(random_set(groups=3), batch_size=8, last_batch="pad"), 5)
        assert batch.weight_B.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


def test_real_rows_end_to_end():
    encoder = real_tokenizers.encoder("stories")
    records = data.read(shared_data("hh_rlhf", "harmless-base.1800.jsonl.gz"), format="hh", stop=64)
    prepared, audit = data.prepare(records, encoder, max_length=256, max_completion_length=96, vocab_size=512)
    assert audit.double_bos == 0 and audit.no_bos == 0 and audit.groups == 64
    schedule = data.schedule(prepared, batch_size=16, buckets=(64, 128, 256), seed=1)
    scored = sum(int(data.batch_at(schedule, step).loss_mask_NR.sum()) for step in range(4))
    assert scored == audit.scored_tokens
    for step in range(4):
        batch = data.batch_at(schedule, step)
        first = batch.tokens_NT[:, 0]
        assert (first == encoder.bos_id).all() and (batch.tokens_NT[:, 1:] != encoder.bos_id).all()
        ends = batch.tokens_NT[np.arange(32), batch.valid_NT.sum(axis=1) - 1]
        assert set(ends[batch.loss_mask_NR.sum(axis=1) < 96]) == {encoder.eos_id}
