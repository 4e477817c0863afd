"""The rows of a mixture of experts go to the devices of their experts and come back: no row is dropped.

    rows of this device ─► by device of their expert ─► all-to-all ─► expert by expert ─► products
                                                                                             │
    weighted sum over each token's experts ◄─ where they stood ◄─ all-to-all ◄───────────────┘

Shapes are fixed, so a device sends each of the X along `expert` the same number of rows, R, with room for ROOM times an
even share. What has no room in the first round goes in a further one, of which there are as many as the fullest device
needs: none where tokens are spread about evenly, X / ROOM at most. The further rounds keep nothing for the backward
pass, which computes them again; memory does not depend on where the tokens go.

Letters: S tokens of this device, U experts of a token, M = S U rows, X devices along `expert`, R rows for each of them,
Q = X R.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from fpo_jax import types

ROOM = 1.5  # times an even share of the rows
_MULTIPLE = 8  # of the rows that are sent

Products = Callable[[types.PyTree, jax.Array, jax.Array, jax.Array], jax.Array]


class Order(NamedTuple):
    """Where rows stand once they are sorted by their experts."""

    rows_M: jax.Array  # which row stands in a place
    places_M: jax.Array  # in which place a row stands
    experts_M: jax.Array  # of the sorted rows
    sizes_E: jax.Array  # rows of each expert, int32


class Places(NamedTuple):
    """Where each of some rows comes from."""

    index: jax.Array  # of another row
    exists: jax.Array | None = None  # False: from nowhere, and it is zero; None = all come from somewhere


def order(experts_M: Int[jax.Array, " M"], count: int) -> Order:
    """Sort rows by their experts; one of number `count` is no expert, and its rows come last."""
    rows_M = jnp.argsort(experts_M)
    sizes_E = jnp.bincount(experts_M, length=count).astype(jnp.int32)
    return Order(rows_M, jnp.argsort(rows_M), experts_M[rows_M], sizes_E)


def moved(copies: int, rows_PD: Float[jax.Array, "P D"], there: Places, back: Places) -> Float[jax.Array, "Q D"]:
    """Return rows in other places; its gradient moves them back, where differentiating a gather would scatter and add.

    Args:
        copies: of each row, that go to places of their own.
        rows_PD: what is moved; copy u of row p has the number copies * p + u.
        there: for each place the number that comes to it.
        back: for each number the place that it comes to.
    """
    return _moved(copies, rows_PD, there, back)


def _from(places: Places, rows_PD: jax.Array, copies: int) -> jax.Array:
    index = places.index // copies if copies > 1 else places.index
    found_QD = rows_PD.at[index].get(mode="promise_in_bounds")
    return found_QD if places.exists is None else jnp.where(places.exists[:, None], found_QD, 0)


def _move(copies: int, rows_PD: jax.Array, there: Places, back: Places) -> jax.Array:
    del back
    return _from(there, rows_PD, copies)


def _moved_forward(copies, rows_PD, there, back):
    return _from(there, rows_PD, copies), back


def _moved_backward(copies, back, gradient_QD):
    rows_MD = _from(back, gradient_QD, 1)
    if copies > 1:
        rows_MUD = rows_MD.reshape(-1, copies, rows_MD.shape[-1])
        rows_MD = jnp.sum(rows_MUD, axis=1, dtype=jnp.float32).astype(gradient_QD.dtype)
    return rows_MD, None, None


_moved = jax.custom_vjp(_move, nondiff_argnums=(0,))
_moved.defvjp(_moved_forward, _moved_backward)


def local(
    products: Products, x_SD: Float[jax.Array, "S D"], chosen_SU: jax.Array, weights_SU: jax.Array, matrices, count: int
) -> Float[jax.Array, "S D"]:
    """Return the weighted sums, float32, where this device has every expert.

    Args:
        products: (matrices, rows_MD, experts_M, sizes_E) -> [M, D]: what experts make of sorted rows.
        x_SD: tokens.
        chosen_SU: their experts, in [0, count).
        weights_SU: of these, float32.
        matrices: of the experts, as `products` takes them.
        count: experts.
    """
    used = chosen_SU.shape[-1]
    found = order(chosen_SU.reshape(-1), count)
    rows, places = Places(found.rows_M), Places(found.places_M)
    out_MD = products(matrices, moved(used, x_SD, rows, places), found.experts_M, found.sizes_E)
    out_SUD = moved(1, out_MD, places, rows).reshape(*chosen_SU.shape, -1)
    return jnp.sum(out_SUD.astype(jnp.float32) * weights_SU[..., None], axis=-2)


def rows_per_round(rows: int, devices: int) -> int:
    """Return R, the rows that a device sends to each of the devices in a round."""
    return min(rows, math.ceil(ROOM * rows / devices / _MULTIPLE) * _MULTIPLE)


def exchanged(
    products: Products,
    x_SD: Float[jax.Array, "S D"],
    chosen_SU: jax.Array,
    weights_SU: jax.Array,
    matrices,
    count: int,
    *,
    axis: str,
    agree: tuple[str, ...],
) -> Float[jax.Array, "S D"]:
    """Return the same inside a `shard_map` over `axis`, along which devices have equally many experts each.

    Args:
        products: as for `local`; it may be given rows of no expert after those of `sizes_E`, of expert count / X.
        x_SD: tokens of this device.
        chosen_SU: their experts, in [0, count).
        weights_SU: of these, float32.
        matrices: of this device's experts.
        count: experts of all devices.
        axis: of the mesh.
        agree: axes of the mesh whose devices go through as many rounds as each other.
    """
    devices = lax.axis_size(axis)
    sent = rows_per_round(chosen_SU.size, devices)
    found = order(chosen_SU.reshape(-1), count)
    counts_X = jnp.sum(found.sizes_E.reshape(devices, -1), axis=-1)
    one_round = jax.jit(functools.partial(_round, products, axis=axis, sent=sent))
    integers, floats = (found, counts_X, chosen_SU), (x_SD, weights_SU, matrices)
    out_SD = one_round(jnp.int32(0), integers, floats)
    rounds = lax.pmax(-(-jnp.max(counts_X) // sent), agree)
    return out_SD + further_rounds(one_round, rounds, integers, floats)


def _round(products: Products, number: jax.Array, integers: Any, floats: Any, *, axis: str, sent: int) -> jax.Array:
    """Send each device the rows of one round, and sum up what comes back of them."""
    found, counts_X, chosen_SU = integers
    x_SD, weights_SU, matrices = floats
    devices, used = len(counts_X), chosen_SU.shape[-1]
    here = len(found.sizes_E) // devices  # experts of a device
    starts_X = jnp.cumsum(counts_X) - counts_X
    rank_XR = number * sent + jnp.broadcast_to(jnp.arange(sent), (devices, sent))
    exists_XR = rank_XR < counts_X[:, None]
    place_XR = jnp.where(exists_XR, starts_X[:, None] + rank_XR, 0)
    device_M = chosen_SU.reshape(-1) // here
    rank_M = found.places_M - starts_X[device_M] - number * sent
    exists_M = (rank_M >= 0) & (rank_M < sent)
    outbox = Places(found.rows_M[place_XR].reshape(-1), exists_XR.reshape(-1))
    inbox = Places(jnp.where(exists_M, device_M * sent + rank_M, 0), exists_M)

    exchange = functools.partial(lax.all_to_all, axis_name=axis, split_axis=0, concat_axis=0, tiled=True)
    arrived_QD = exchange(moved(used, x_SD, outbox, inbox))
    experts_XR = exchange(jnp.where(exists_XR, found.experts_M[place_XR] % here, here))

    theirs = order(experts_XR.reshape(-1), here)
    rows, places = Places(theirs.rows_M), Places(theirs.places_M)
    out_QD = products(
        matrices, moved(1, arrived_QD, rows, places), jnp.minimum(theirs.experts_M, here - 1), theirs.sizes_E
    )
    back_QD = exchange(moved(1, out_QD, places, rows))
    out_SUD = moved(1, back_QD, inbox, outbox).reshape(*chosen_SU.shape, -1)
    return jnp.sum(out_SUD.astype(jnp.float32) * weights_SU[..., None], axis=-2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def further_rounds(one_round, rounds: jax.Array, integers: types.PyTree, floats: types.PyTree) -> jax.Array:
    """Return the sum of the rounds after the first; `one_round` is (number, integers, floats) -> array."""

    def body(state):
        number, total = state
        return number + 1, total + one_round(number, integers, floats)

    total = jax.eval_shape(one_round, rounds, integers, floats)
    start = (jnp.int32(1), jnp.zeros(total.shape, total.dtype))
    return lax.while_loop(lambda state: state[0] < rounds, body, start)[1]


def _forward(one_round, rounds, integers, floats):
    return further_rounds(one_round, rounds, integers, floats), (rounds, integers, floats)


@functools.partial(jax.jit, static_argnums=0)
def further_gradients(one_round, rounds, integers, floats, gradient):
    """Return the gradients with respect to `floats` of `further_rounds`, each round computed again."""

    def body(state):
        number, totals = state
        _, pull = jax.vjp(lambda floats: one_round(number, integers, floats), floats)
        return number + 1, jax.tree.map(jnp.add, totals, pull(gradient)[0])

    start = (jnp.int32(1), jax.tree.map(jnp.zeros_like, floats))
    return lax.while_loop(lambda state: state[0] < rounds, body, start)[1]


def _backward(one_round, saved, gradient):
    return None, None, further_gradients(one_round, *saved, gradient)


further_rounds.defvjp(_forward, _backward)
# Names in the traced program: of a round, and of what runs where one device's experts have far more than their share.
ROUND, SELDOM = "_round", ("further_rounds", "further_gradients")
