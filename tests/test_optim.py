import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fpo_jax import optim
from tests import tolerances


def rates(kind, **options):
    rate = jax.jit(optim.schedule(kind=kind, peak=2.0, **options))
    return np.array([rate(jnp.int32(i)) for i in range(10)])


def test_cosine_with_warmup_is_that_of_the_original_trainers():
    # update i uses the rate at i: 0, half, then the cosine over the eight that remain
    expected = [0.0, 1.0] + [1.0 + np.cos(np.pi * t / 8) for t in range(8)]
    np.testing.assert_allclose(rates("cosine", warmup=2, horizon=10), expected, atol=tolerances.SCHEDULE)


def test_linear_reaches_zero_and_constant_stays():
    np.testing.assert_allclose(
        rates("linear", warmup=0, horizon=5), [2.0, 1.6, 1.2, 0.8, 0.4, 0, 0, 0, 0, 0], atol=tolerances.SCHEDULE
    )
    np.testing.assert_allclose(
        rates("constant", warmup=4, horizon=5)[:6], [0, 0.5, 1, 1.5, 2, 2], atol=tolerances.SCHEDULE
    )


def test_warmup_steps_round_up_as_the_original():
    assert optim.warmup_steps(fraction=0.1, steps=None, horizon=477) == 48
    assert optim.warmup_steps(fraction=0.1, steps=None, horizon=467) == 47
    assert optim.warmup_steps(fraction=0.0, steps=7, horizon=477) == 7


def chain(**changed):
    options = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.5, "clip_norm": 1.0} | changed
    mask = {"kernel": True, "norm": False}
    return optim.optimizer(optim.schedule(kind="constant", peak=0.1, warmup=0, horizon=1), decay_mask=mask, **options)


def updated(optimizer, grads):
    weights = {"kernel": jnp.full(3, 2.0), "norm": jnp.full(2, 2.0)}
    updates, _ = optimizer.update(grads, optimizer.init(weights), weights)
    return optax.apply_updates(weights, updates)


def test_decay_spares_norms_and_clip_bounds_the_gradient():
    zero = {"kernel": jnp.zeros(3), "norm": jnp.zeros(2)}
    new = updated(chain(), zero)
    np.testing.assert_allclose(new["kernel"], 2.0 - 0.1 * 0.5 * 2.0, rtol=tolerances.FLOAT32)
    np.testing.assert_array_equal(new["norm"], 2.0)


@pytest.mark.parametrize("knob", ["b1", "b2", "eps", "weight_decay", "clip_norm"])
def test_every_knob_changes_the_second_update(knob):
    value = {"b1": 0.5, "b2": 0.5, "eps": 1.0, "weight_decay": 0.0, "clip_norm": 0.0}[knob]

    def after_two(optimizer):
        weights = {"kernel": jnp.full(3, 2.0), "norm": jnp.full(2, 2.0)}
        state = optimizer.init(weights)
        for scale in (3.0, -0.1):
            grads = {"kernel": jnp.arange(3.0) * scale, "norm": jnp.ones(2) * scale}
            updates, state = optimizer.update(grads, state, weights)
            weights = optax.apply_updates(weights, updates)
        return np.concatenate(jax.tree.leaves(weights))

    assert np.abs(after_two(chain()) - after_two(chain(**{knob: value}))).max() > tolerances.DIFFERENT
