"""Files dealt out to the processes of a run, so that each reads about as many bytes."""

import heapq
from collections.abc import Mapping

from fpo_jax.distributed import process


def balanced(sizes: Mapping[str, int], *, count: int | None = None) -> list[list[str]]:
    """Divide names into shares of about the same size, the largest first and each to the smallest share so far.

    Args:
        sizes: bytes of each name; the same in every process, in the same order.
        count: number of shares; None = that of the processes.

    Returns:
        The names of each share; every name is in one.

    >>> balanced({"a": 5, "b": 3, "c": 3, "d": 1}, count=2)
    [['a', 'd'], ['b', 'c']]
    """
    shares: list[list[str]] = [[] for _ in range(process.process_count() if count is None else count)]
    smallest = [(0, index) for index in range(len(shares))]
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        filled, index = smallest[0]
        shares[index].append(name)
        heapq.heapreplace(smallest, (filled + sizes[name], index))
    return shares
