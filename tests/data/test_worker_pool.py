"""Work in several processes: results in the order of the tasks, errors as one process would raise them, no orphans."""

import math
import operator
import os
import time
from pathlib import Path

import pytest

from fpo_jax.data import worker_pool


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_tasks(workers):
    tasks = list(range(40))
    assert list(worker_pool.in_order(operator.sub, 100, tasks, workers=workers)) == [100 - task for task in tasks]


def test_the_first_error_is_raised_after_what_came_before_it():
    found = worker_pool.in_order(math.comb, 5, [1, 2, -1, -2, 3], workers=2)
    assert [next(found), next(found)] == [5, 10]
    with pytest.raises(ValueError, match="k must be a non-negative integer"):
        next(found)


def test_a_worker_that_ends_by_itself_is_told():
    """`os.kill(0, 9)` ends a worker alone, which has a process group of its own."""
    assert worker_pool.cpus() >= 1
    with pytest.raises(RuntimeError, match="a process that prepares data ended by itself; .* fewer processors"):
        list(worker_pool.in_order(os.kill, 0, [9, 9], workers=2))


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_nobody_is_left_when_the_results_are_not_wanted():
    before = children()
    found = worker_pool.in_order(math.comb, 5, list(range(100)), workers=2)
    next(found)
    workers = children() - before
    assert len(workers) == 2
    found.close()
    time.sleep(0.1)
    assert not [number for number in workers if Path(f"/proc/{number}").exists()]
