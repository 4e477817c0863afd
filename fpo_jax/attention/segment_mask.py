"""Who sees whom in rows that hold several texts, as masks and as bounds; the order within the row is not looked at."""

import jax
import jax.numpy as jnp

from fpo_jax import types


def seen(queries: types.Segments, keys: types.Segments, *, window: int | None) -> jax.Array:
    """Return [N, Q, S]: whether a query may see a key that stands before it in the row, or is it.

    A window counts positions of the conversation, which a completion goes on where its prompt ends, wherever in the row
    the two stand.

    Args:
        queries: of Q positions of the rows.
        keys: of S positions of the same rows.
        window: positions a query sees, itself included; None = all before it.
    """
    ids_N1S = keys.ids_NT[:, None, :]
    seen_NQS = queries.ids_NT[:, :, None] == ids_N1S
    if queries.parents_NT is not None:
        seen_NQS |= queries.parents_NT[:, :, None] == ids_N1S
    if window is not None:
        seen_NQS &= queries.positions_NT[:, :, None] - keys.positions_NT[:, None, :] < window
    return seen_NQS


def reach(segments: types.Segments) -> tuple[jax.Array, jax.Array]:
    """Return, for every position of the rows, the first and the last position of its group of texts [N, T], int32.

    A group is a segment that follows none and those behind it that follow it, so nothing outside is seen.

    >>> ids_NT = jnp.array([[0, 0, 1, 2, 2, -1]])  # a prompt of two tokens with two completions, or three texts
    >>> [bound.tolist() for bound in reach(types.Segments(ids_NT, ids_NT, jnp.array([[0, 0, 0, 0, 0, -1]])))]
    [[[0, 0, 0, 0, 0, 5]], [[4, 4, 4, 4, 4, 5]]]
    >>> [bound.tolist() for bound in reach(types.Segments(ids_NT, ids_NT))]
    [[[0, 0, 2, 3, 3, 5]], [[1, 1, 2, 4, 4, 5]]]
    """
    ids_NT = jnp.asarray(segments.ids_NT)
    places_T = jnp.arange(ids_NT.shape[1], dtype=jnp.int32)
    begins_NT = jnp.pad(ids_NT[:, 1:] != ids_NT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    if segments.parents_NT is not None:
        begins_NT &= segments.parents_NT == ids_NT
    first_NT = jax.lax.cummax(jnp.where(begins_NT, places_T, 0), axis=1)
    ends_NT = jnp.pad(begins_NT[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    last_NT = jax.lax.cummin(jnp.where(ends_NT, places_T, ids_NT.shape[1] - 1), axis=1, reverse=True)
    return first_NT, last_NT
