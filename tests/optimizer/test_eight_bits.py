"""Moments in eight bits: the code against the paper's table, what it must never lose, AdamW and runs with it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import fpo_jax
from fpo_jax.io import jsonl
from fpo_jax.optimizer import adamw, eight_bits
from tests import resuming, tiny


def table(signed):
    """Every value of the paper's code, the largest being 1."""
    bits = 7 if signed else 8
    values = [0.0]
    for exponent in range(bits):
        edges = np.linspace(0.1, 1.0, 2**exponent + 1)
        values += list(10.0 ** (exponent + 1 - bits) * (edges[:-1] + edges[1:]) / 2)
    values = np.array(values) / max(values)
    return np.sort(np.concatenate([-values[1:], values])) if signed else np.sort(values)


def drawn(signed, shape=(5, 3, 700)):
    random = np.random.default_rng(0)
    x = random.normal(size=shape) * np.exp(random.normal(0, 3, shape))
    return (x if signed else x * x).astype(np.float32)


def there_and_back(x, signed):
    return np.asarray(eight_bits.decode(eight_bits.encode(jnp.asarray(x), signed=signed), signed=signed))


@pytest.mark.parametrize("signed", [True, False])
def test_values_are_the_nearest_of_the_papers_table(signed):
    x = drawn(signed)
    found = there_and_back(x, signed)
    values = table(signed)
    for start in range(0, x.shape[-1], eight_bits.BLOCK):
        block, stored = x[..., start : start + eight_bits.BLOCK], found[..., start : start + eight_bits.BLOCK]
        relative, stored = (a / np.abs(block).max(-1, keepdims=True) for a in (block, stored))
        distance = np.abs(stored[..., None] - values)
        assert distance.min(-1).max() < 1e-6  # it is one of them
        nearest = np.abs(relative[..., None] - values).min(-1)
        excess, large = np.abs(stored - relative) - nearest, np.abs(relative) > 1e-2
        assert np.mean(excess[large] > 1e-6) < 0.1  # beside a decade's edge, where the next bin is a tenth as wide
        assert (excess[large] < 1e-6 + 0.15 * np.abs(relative[large])).all()
        counted = np.abs(relative) > (2e-6 if signed else 2e-7)
        ratio = stored[counted] / relative[counted]
        assert (0.55 <= ratio).all() and (ratio <= 5.5).all()  # of the lowest decade one bin


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_is_kept(signed):
    values = np.repeat(table(signed)[None], 2, 0).astype(np.float32) * np.float32(3.7)
    assert_allclose(there_and_back(values, signed), values, rtol=1e-6)


def test_the_largest_of_a_block_and_zeros_are_exact():
    x = drawn(signed=True)
    x[0, 0] = 0.0
    found = there_and_back(x, signed=True)
    blocks = np.split(np.abs(x), [256, 512], axis=-1), np.split(np.abs(found), [256, 512], axis=-1)
    for exact, stored in zip(*blocks, strict=True):
        assert_allclose(stored.max(-1), exact.max(-1), rtol=1e-6)
    assert_array_equal(found[0, 0], 0.0)


def test_a_square_that_is_not_zero_stays_above_zero():
    x = np.float32([1.0, 1e-12, 1e-30, 0.0])
    assert (there_and_back(x, signed=False) > 0).tolist() == [True, True, True, False]


def test_no_update_explodes_where_gradients_fade():
    """An entry far below the largest of its block, whose gradient then vanishes: its square must not be lost first."""
    size = eight_bits.SMALLEST
    weights = {"kernel": jnp.zeros(size)}
    optimizer = chain(state_dtype="int8")
    state = optimizer.init(weights)
    for step in range(60):
        fading = 1e-5 * 0.5**step
        grads = {"kernel": jnp.full(size, fading).at[0].set(1.0)}
        updates, state = optimizer.update(grads, state, weights)
        assert np.abs(updates["kernel"]).max() < 2e-3, step  # the rate is 1e-3


def chain(**changed):
    rate = adamw.schedule(kind="constant", peak=1e-3, warmup=0, total_steps=9)
    options = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "clip_norm": 0.0}
    return adamw.optimizer(rate, decay_mask={"kernel": True}, **(options | changed))


def test_a_noisy_descent_goes_where_that_in_float32_goes():
    size, target = 2 * eight_bits.SMALLEST, jnp.linspace(-1.0, 1.0, 2 * eight_bits.SMALLEST)
    curvature = jnp.asarray(np.exp(np.random.default_rng(0).normal(0, 1, size)), jnp.float32)
    ends = {}
    for dtype in ("float32", "int8"):
        optimizer = chain(state_dtype=dtype)

        def step(carry, key, optimizer=optimizer):
            weights, state = carry
            noise = 0.3 * jax.random.normal(key, (size,))
            grads = {"kernel": curvature * (weights["kernel"] - target + noise)}
            updates, state = optimizer.update(grads, state, weights)
            return (optax.apply_updates(weights, updates), state), None

        begun = {"kernel": jnp.zeros(size)}
        keys = jax.random.split(jax.random.key(0), 2000)
        (weights, _), _ = jax.jit(lambda carry, keys, step=step: jax.lax.scan(step, carry, keys))(
            (begun, optimizer.init(begun)), keys
        )
        ends[dtype] = float(jnp.sqrt(jnp.mean((weights["kernel"] - target) ** 2)))
    begun = float(jnp.sqrt(jnp.mean(target**2)))
    assert ends["float32"] < 0.1 * begun
    assert ends["int8"] < 1.05 * ends["float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("eight_bits")
    tiny.write_model(root / "model", layers=2, width=64, ffn=512)
    tiny.write_pairs(root / "pairs.jsonl", count=24)
    return root


def configured(folder):
    config = tiny.config(folder / "model", folder / "pairs.jsonl", optim__state_dtype="int8")
    config.train.epochs, config.data.eval = 2, ""
    return config


def run(folder, workdir, devices):
    config = configured(folder)
    config.mesh.fsdp, config.mesh.data = (1, 1) if devices == 1 else (4, 2)
    trainer = fpo_jax.Trainer(config, workdir, devices=jax.devices()[:devices])
    trainer.train()
    return trainer, [row["loss"] for row in jsonl.read(workdir / "metrics.jsonl") if "loss" in row]


def test_a_run_on_a_mesh_is_that_of_one_device_and_holds_two_bytes_a_weight(folder, tmp_path):
    trainer, one = run(folder, tmp_path / "one", 1)
    other, many = run(folder, tmp_path / "many", 8)
    assert_allclose(many, one, rtol=2e-3)
    state = trainer._run.steps.state.abstract()
    moments = [
        leaf for leaf in jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, eight_bits.EightBits))
        if isinstance(leaf, eight_bits.EightBits)
    ]  # fmt: skip
    weights = [leaf for leaf in jax.tree.leaves(state.params) if leaf.size >= eight_bits.SMALLEST]
    assert len(moments) == 2 * len(weights) > 0
    assert all(moment.codes.dtype == np.uint8 for moment in moments)
    codes = sum(moment.codes.size for moment in moments)
    scales = sum(4 * moment.scales.size for moment in moments)
    assert codes == 2 * sum(leaf.size for leaf in weights) and scales <= 0.51 * codes  # blocks of 8 here
    cut = [leaf for leaf in jax.tree.leaves(other._run.steps.state.abstract().opt_state) if leaf.dtype == np.uint8]
    assert any(not leaf.sharding.is_fully_replicated for leaf in cut)


def test_a_run_resumes_with_its_codes(folder, tmp_path, monkeypatch):
    resuming.compile_once(monkeypatch)
    config = configured(folder)
    resuming.stopped(config, tmp_path / "stopped", monkeypatch, after=3)
    resuming.whole(config, tmp_path / "whole")
    assert resuming.outcome(tmp_path / "stopped") == resuming.outcome(tmp_path / "whole")
