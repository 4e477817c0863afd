import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fpo_jax.optimizer import adamw
from tests import tolerances


def rates(kind, **options):
    rate = jax.jit(adamw.schedule(kind=kind, peak=2.0, **options))
    return np.array([rate(jnp.int32(i)) for i in range(10)])


def test_cosine_with_warmup_is_that_of_the_original_trainers():
    # step i uses the rate at i: 0, half, then the cosine over the eight that remain
    expected = [0.0, 1.0] + [1.0 + np.cos(np.pi * t / 8) for t in range(8)]
    np.testing.assert_allclose(rates("cosine", warmup=2, total_steps=10), expected, atol=tolerances.SCHEDULE)


def test_linear_reaches_zero_and_constant_stays():
    np.testing.assert_allclose(
        rates("linear", warmup=0, total_steps=5), [2.0, 1.6, 1.2, 0.8, 0.4, 0, 0, 0, 0, 0], atol=tolerances.SCHEDULE
    )
    np.testing.assert_allclose(
        rates("constant", warmup=4, total_steps=5)[:6], [0, 0.5, 1, 1.5, 2, 2], atol=tolerances.SCHEDULE
    )


def test_warmup_steps_round_up_as_the_original():
    assert adamw.warmup_steps(fraction=0.1, steps=None, total_steps=477) == 48
    assert adamw.warmup_steps(fraction=0.1, steps=None, total_steps=467) == 47
    assert adamw.warmup_steps(fraction=0.0, steps=7, total_steps=477) == 7


def chain(**changed):
    options = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.5, "clip_norm": 1.0} | changed
    mask = {"kernel": True, "norm": False}
    return adamw.optimizer(
        adamw.schedule(kind="constant", peak=0.1, warmup=0, total_steps=1), decay_mask=mask, **options
    )


def updated(optimizer, grads):
    weights = {"kernel": jnp.full(3, 2.0), "norm": jnp.full(2, 2.0)}
    updates, _ = optimizer.update(grads, optimizer.init(weights), weights)
    return optax.apply_updates(weights, updates)


def test_decay_spares_norms_and_clip_bounds_the_gradient():
    zero = {"kernel": jnp.zeros(3), "norm": jnp.zeros(2)}
    new = updated(chain(), zero)
    np.testing.assert_allclose(new["kernel"], 2.0 - 0.1 * 0.5 * 2.0, rtol=tolerances.FLOAT32)
    np.testing.assert_array_equal(new["norm"], 2.0)


@pytest.mark.parametrize("field", ["b1", "b2", "eps", "weight_decay", "clip_norm"])
def test_every_knob_changes_the_second_update(field):
    value = {"b1": 0.5, "b2": 0.5, "eps": 1.0, "weight_decay": 0.0, "clip_norm": 0.0}[field]

    def after_two(optimizer):
        weights = {"kernel": jnp.full(3, 2.0), "norm": jnp.full(2, 2.0)}
        state = optimizer.init(weights)
        for scale in (3.0, -0.1):
            grads = {"kernel": jnp.arange(3.0) * scale, "norm": jnp.ones(2) * scale}
            updates, state = optimizer.update(grads, state, weights)
            weights = optax.apply_updates(weights, updates)
        return np.concatenate(jax.tree.leaves(weights))

    assert np.abs(after_two(chain()) - after_two(chain(**{field: value}))).max() > tolerances.DIFFERENT


def test_stochastic_rounding_keeps_the_mean_and_picks_neighbours():
    x = jnp.float32(1.0 + 2**-9)  # a quarter of the way from 1 to its bfloat16 neighbour 1 + 2^-7
    rounded = np.asarray(adamw.stochastic_round(jnp.full(40_000, x), jax.random.key(0)), np.float32)
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    share = np.mean(rounded > 1.0)
    assert abs(share - 0.25) < 5 * np.sqrt(0.25 * 0.75 / rounded.size), share
    np.testing.assert_array_equal(adamw.stochastic_round(-jnp.full(9, jnp.float32(0.5)), jax.random.key(1)), -0.5)


def test_stochastic_rounding_keeps_what_is_not_finite():
    nan = np.array([0x7F800001], np.uint32).view(np.float32)[0]  # infinity, but for the last bit
    x = np.tile(np.array([nan, np.inf, -np.inf, 0.0], np.float32), (50, 1))
    np.testing.assert_array_equal(np.asarray(adamw.stochastic_round(jnp.asarray(x), jax.random.key(0)), np.float32), x)


def test_stochastic_rounding_keeps_every_bfloat16_number():
    """So a step that is not applied leaves moments in bfloat16 as they were."""
    every = np.arange(2**16, dtype=np.uint32) << 16
    every = every[~np.isnan(every.view(np.float32))]
    rounded = adamw.stochastic_round(jnp.asarray(every.view(np.float32)), jax.random.key(0))
    np.testing.assert_array_equal(np.asarray(rounded, np.float32).view(np.uint32), every)


def test_small_updates_are_not_lost_in_bfloat16_weights():
    weights = {"kernel": jnp.full(1000, 1.0, jnp.bfloat16)}
    updates = {"kernel": jnp.full(1000, -(2.0**-14))}  # far below half the distance to the neighbour, 2^-9

    def step(weights, number):
        return adamw.apply_updates(weights, updates, jax.random.fold_in(jax.random.key(0), number)), None

    weights, _ = jax.jit(lambda w: jax.lax.scan(step, w, jnp.arange(256)))(weights)
    assert weights["kernel"].dtype == jnp.bfloat16
    assert abs(float(jnp.mean(weights["kernel"].astype(jnp.float32))) - (1.0 - 256 * 2.0**-14)) < 1e-3


def test_moments_in_bfloat16_follow_those_in_float32():
    """The second moment moves by 1 in 1,000 a step, which rounding to nearest would lose."""
    grads = {"kernel": jnp.full(2000, 0.1), "norm": jnp.ones(2)}
    weights = {"kernel": jnp.zeros(2000), "norm": jnp.ones(2)}
    means = {}
    for dtype in ("float32", "bfloat16"):
        optimizer = chain(b2=0.999, clip_norm=0.0, state_dtype=dtype)

        def step(state, _, optimizer=optimizer):
            return optimizer.update(grads, state, weights)[1], None

        state, _ = jax.jit(lambda s, step=step: jax.lax.scan(step, s, length=1500))(optimizer.init(weights))
        (_, moments), *_ = optax.tree_utils.tree_get_all_with_path(state, "nu")
        assert moments["kernel"].dtype == dtype
        means[dtype] = float(jnp.mean(moments["kernel"].astype(jnp.float32)))
    assert abs(means["bfloat16"] / means["float32"] - 1) < 0.01, means
