"""What the programs of a run state about their arrays: where they live, what is donated, what the hosts keep."""

import jax
import numpy as np
import pytest

from fpo_jax import data, sharding
from fpo_jax.trainer import train_step
from tests import tiny


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("programs")
    tiny.write_model(root / "model", vocab_size=264)
    tiny.write_pairs(root / "pairs.jsonl", count=16)
    return root


def built(inputs, **changed):
    options = {"mesh__data": 1, "mesh__fsdp": 4, "mesh__tensor": 2, "data__eval": ""} | changed
    config = tiny.config(inputs / "model", inputs / "pairs.jsonl", **options)
    _, plan, compiled = tiny.built(config, devices=len(jax.devices()))
    return compiled, plan.schedule


def test_moments_live_where_their_parameters_do(inputs):
    state = built(inputs)[0].state.abstract()
    weights, moments = state.params, [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(weights))
    for moment, weight in zip(moments, 2 * jax.tree.leaves(weights), strict=True):
        assert (moment.shape, moment.sharding) == (weight.shape, weight.sharding)
    query = weights["layers"]["attention"]["query"]
    assert query.sharding.shard_shape(query.shape) == (2, 16 // 4, 4 // 2, 8)


@pytest.mark.parametrize(
    ("changed", "bytes_per_value"),
    [({}, 4 + 8), ({"optim__state_dtype": "bfloat16"}, 4 + 4), ({"model__param_dtype": "bfloat16"}, 2 + 8)],
)
def test_bytes_of_the_state(inputs, changed, bytes_per_value):
    compiled, _ = built(inputs, mesh__fsdp=1, mesh__tensor=1, mesh__data=8, **changed)
    state = compiled.state.abstract()
    counters = [leaf for leaf in jax.tree.leaves(state) if not leaf.ndim]
    values = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state.params))
    assert compiled.state.bytes_on_device() == bytes_per_value * values + 4 * len(counters)


def test_moments_on_the_host_take_no_device_memory(inputs):
    (plain, _), (offloaded, _) = built(inputs), built(inputs, optim__offload=True)
    moments = [leaf for leaf in jax.tree.leaves(offloaded.state.abstract().opt_state) if leaf.ndim]
    assert {leaf.sharding.memory_kind for leaf in moments} == {sharding.HOST}
    weights = sum(
        4 * int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
        for leaf in jax.tree.leaves(offloaded.state.abstract().params)
    )
    assert plain.state.bytes_on_device() - offloaded.state.bytes_on_device() == 2 * weights


@pytest.mark.slow  # compiles for eight devices
def test_the_update_writes_over_the_state_it_was_given(inputs):
    compiled, schedule = built(inputs)
    state = compiled.state.init(compiled.state.load(inputs / "model"))
    batch = train_step.stack_micro_batches(data.batch_at(schedule, 0), accumulation=2)
    new, _ = compiled.train(state, compiled.batches.place(batch, stacked=True))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    places = jax.tree.map(lambda leaf: leaf.sharding, compiled.state.abstract())
    assert jax.tree.map(lambda leaf: leaf.sharding, new) == places
