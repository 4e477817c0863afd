"""Which keys a query sees, as two intervals of the row, and which blocks a block sees: what a kernel can skip.

    rows of texts -> bounds_N4P -> for each block of queries the blocks of keys to visit, and the other way round

A segment's tokens are neighbours whose positions grow by one, so a query sees, of its own segment, one interval that
ends at itself, and one interval of the segment that it follows.

Letters beyond `types.py`: X blocks to work on, Y blocks to visit, P positions of padded rows.
"""

import jax
import jax.numpy as jnp

from fpo_jax import types
from fpo_jax.kernels.attention.mosaic_kernels import Visits


def bounds(segments: types.Segments | None, *, rows: int, positions: int, padded: int, window: int | None) -> jax.Array:
    """Return, of every query, i, own, first and end [N, 4, P], int32: i is its place in the row, and it sees j if

        own <= j <= i  or  first <= j < end

    Positions that padding adds see themselves and nothing else, and nothing sees them.

    Args:
        segments: of packed rows; None = a row is one text.
        rows: N.
        positions: T.
        padded: P, at least T.
        window: positions a query sees, itself included; None = all before it.

    >>> ids_NT = jnp.array([[7, 7, 1, 2, 2]])  # a prompt of two tokens with two completions
    >>> places_NT, parents_NT = jnp.array([[0, 1, 2, 2, 3]]), jnp.array([[7, 7, 7, 7, 7]])
    >>> bounds(types.Segments(ids_NT, places_NT, parents_NT), rows=1, positions=5, padded=6, window=3).tolist()
    [[[0, 1, 2, 3, 4, 5], [0, 0, 2, 3, 3, 5], [0, 0, 0, 0, 1, 0], [0, 0, 2, 2, 2, 0]]]
    """
    places_NT = jnp.broadcast_to(jnp.arange(positions, dtype=jnp.int32), (rows, positions))
    own_NT, first_NT, end_NT = jnp.zeros_like(places_NT), jnp.zeros_like(places_NT), jnp.zeros_like(places_NT)
    if segments is not None:
        ids_NT = jnp.asarray(segments.ids_NT)
        begins_NT = jnp.pad(ids_NT[:, 1:] != ids_NT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        own_NT = jax.lax.cummax(jnp.where(begins_NT, places_NT, 0), axis=1)
    if segments is not None and segments.parents_NT is not None:
        followed_NTT = segments.parents_NT[:, :, None] == ids_NT[:, None, :]
        first_NT = jnp.min(jnp.where(followed_NTT, places_NT[:, None, :], positions), axis=-1)
        end_NT = jnp.minimum(first_NT + jnp.sum(followed_NTT, axis=-1, dtype=jnp.int32), places_NT)
        if window is not None:
            its_NT = jnp.take_along_axis(segments.positions_NT, jnp.minimum(first_NT, positions - 1), axis=1)
            first_NT += jnp.maximum(segments.positions_NT - its_NT - (window - 1), 0)
        follows_NT = (segments.parents_NT != ids_NT) & (first_NT < end_NT)
        first_NT, end_NT = jnp.where(follows_NT, first_NT, 0), jnp.where(follows_NT, end_NT, 0)
    if window is not None:
        own_NT = jnp.maximum(own_NT, places_NT - (window - 1))
    bounds_N4T = jnp.stack([places_NT, own_NT, first_NT, end_NT], axis=1)
    added_4A = jnp.zeros((4, padded - positions), jnp.int32).at[:2].set(jnp.arange(positions, padded))
    return jnp.concatenate([bounds_N4T, jnp.broadcast_to(added_4A, (rows, *added_4A.shape))], axis=-1)


def visits(bounds_N4P: jax.Array, *, queries: int, keys: int) -> tuple[Visits, Visits]:
    """Return the blocks of keys that each block of queries visits, and the blocks of queries that visit each of keys.

    Args:
        bounds_N4P: from `bounds`.
        queries: positions of a block of queries; divides P.
        keys: positions of a block of keys; divides P.
    """
    N, _, P = bounds_N4P.shape
    places_NP1, own_NP1, first_NP1, end_NP1 = (bounds_N4P[:, part, :, None] for part in range(4))
    start_Y = jnp.arange(0, P, keys, dtype=jnp.int32)

    def within(first, end):
        return jnp.maximum(jnp.minimum(end, start_Y + keys) - jnp.maximum(first, start_Y), 0)

    seen_NPY = within(own_NP1, places_NP1 + 1) + within(first_NP1, end_NP1)
    seen_NXQY = seen_NPY.reshape(N, P // queries, queries, P // keys)
    some_NXY, all_NXY = jnp.max(seen_NXQY, axis=2) > 0, jnp.min(seen_NXQY, axis=2) == keys
    return _ordered(some_NXY, all_NXY), _ordered(some_NXY.swapaxes(1, 2), all_NXY.swapaxes(1, 2))


def _ordered(some_NXY: jax.Array, all_NXY: jax.Array) -> Visits:
    rank_NXY = jnp.where(all_NXY, 0, jnp.where(some_NXY, 1, 2))
    order_NXY = jnp.argsort(rank_NXY, axis=-1, stable=True).astype(jnp.int32)
    counts_NX2 = jnp.stack([jnp.sum(x_NXY, axis=-1, dtype=jnp.int32) for x_NXY in (all_NXY, some_NXY)], axis=-1)
    return Visits(order_NXY, counts_NX2)
