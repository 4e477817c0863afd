"""Rows that are sent to the devices of their experts, however unevenly, against experts that are all on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from fpo_jax import sharding
from fpo_jax.models import dispatch, mixture
from fpo_jax.perf import flops
from fpo_jax.plan import collectives
from tests import tolerances

S, D, F, E, U = 128, 6, 10, 8, 2
EXPERTS = {  # of each token, two
    "even": lambda random: random.permuted(np.tile(np.arange(E), (S, 1)), axis=1)[:, :U],
    "one device has all": lambda random: random.permuted(np.tile([4, 5], (S, 1)), axis=1),
    "most on one": lambda random: np.where(
        np.arange(S)[:, None] % 5 == 0, random.permuted(np.tile([1, 7], (S, 1)), axis=1), [2, 3]
    ),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_rows_find_their_experts_and_their_way_back_with_gradients(name):
    random = np.random.default_rng(0)
    chosen = jnp.asarray(EXPERTS[name](random).astype(np.int32)[None])
    x, weights, gate, up, down, bias = (
        jnp.asarray(0.5 * random.normal(size=shape), jnp.float32)
        for shape in ((1, S, D), (1, S, U), (E, D, F), (E, D, F), (E, F, D), (E, D))
    )
    chosen, x, weights = (a.reshape(4, S // 4, -1) for a in (chosen, x, weights))
    layout = sharding.make_layout(preset="fsdp", data=1, fsdp=1, tensor=1, expert=4, devices=jax.devices()[:4])
    of_device = S // 4 * U
    most = max(np.bincount(np.asarray(rows).reshape(-1) // (E // 4), minlength=4).max() for rows in chosen)
    rounds = -(-most // dispatch.rows_per_round(of_device, 4))
    assert rounds == {"even": 1}.get(name, 3)

    def run(layout, x, weights, gate, up, down, bias):
        inwards = (mixture.Linear(gate), mixture.Linear(up))
        return mixture.apply_experts(
            x, chosen, weights, inwards, mixture.Linear(down, bias), activation="silu", layout=layout
        )

    def total(layout, *floats):
        out = run(layout, *floats)
        return jnp.sum(jnp.sin(out)), out

    floats = (x, weights, gate, up, down, bias)
    (found, out), (expected, alone) = (
        jax.jit(jax.grad(functools.partial(total, one), argnums=tuple(range(6)), has_aux=True))(*floats)
        for one in (layout, sharding.ONE_DEVICE)
    )
    assert_allclose(out, alone, rtol=0, atol=tolerances.SAME_MATHS * np.abs(alone).max())
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(theirs).max() > 0.01
        assert_allclose(ours, theirs, rtol=0, atol=tolerances.SAME_MATHS * np.abs(theirs).max())


def test_operations_and_transfers_are_those_of_an_even_share():
    def total(layout, x, gate, down):
        chosen, weights = (jnp.zeros((8, 16, U), dtype) for dtype in ("int32", "float32"))
        inwards = (mixture.Linear(gate), mixture.Linear(gate))
        out = mixture.apply_experts(x, chosen, weights, inwards, mixture.Linear(down), activation="silu", layout=layout)
        return jnp.sum(out)

    operands = (jnp.ones((8, 16, D)), jnp.ones((E, D, F)), jnp.ones((E, F, D)))
    layout = sharding.make_layout(preset="fsdp", data=1, fsdp=1, tensor=1, expert=4, devices=jax.devices()[:4])
    for one in (sharding.ONE_DEVICE, layout):
        program = jax.jit(jax.grad(functools.partial(total, one), argnums=(0, 1, 2))).trace(*operands)
        assert flops.traced(program.jaxpr) == 9 * 2 * 8 * 16 * U * D * F
    found = collectives.collectives(program.lower().compile().as_text(), mesh=layout.mesh)
    # rows and their experts there, and the gradients of rows there and back
    assert {row.kind: row.runs for row in found if "all-to-all" in row.kind} == {"all-to-all": 4}


def test_memory_does_not_depend_on_where_the_tokens_go():
    """A device holds the rows that it sends in a round, and never room for all rows of all devices."""
    assert dispatch.rows_per_round(4096, 8) == 768
    assert dispatch.rows_per_round(10, 4) == 8 and dispatch.rows_per_round(3, 4) == 3
