"""Files dealt out to processes by size."""

import itertools

import numpy as np
import pytest

from fpo_jax import distributed


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_every_file_is_in_one_share_and_the_shares_differ_by_one_file_at_most(count):
    sizes = {f"file{n}": int(size) for n, size in enumerate(np.random.default_rng(0).integers(0, 10**9, 150))}
    shares = distributed.balanced(sizes, count=count)
    assert len(shares) == count and sorted(itertools.chain(*shares)) == sorted(sizes)
    filled = [sum(sizes[name] for name in share) for share in shares]
    assert max(filled) - min(filled) <= max(sizes.values())


def test_bytes_count_and_not_files():
    small = {f"small{n}": 10 for n in range(10)}
    assert distributed.balanced({"large": 100} | small, count=2) == [["large"], list(small)]


def test_more_processes_than_files_leave_some_without_work():
    assert distributed.balanced({"a": 1, "b": 2}, count=3) == [["b"], ["a"], []]
    assert distributed.balanced({}, count=2) == [[], []]
