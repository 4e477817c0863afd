"""A K-armed bandit, K covering the support: every divergence learns π_ref exp(r/(β_r β_π)), the optimum of RLHF."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from fpo_jax import losses
from tests import tolerances

REWARDS_K = np.array([0.9, -0.4, 0.3, -1.0, 0.5], np.float32)
REFERENCE_K = np.log(np.array([0.1, 0.3, 0.15, 0.25, 0.2], np.float32))
BETA_R, BETA_PI = 0.5, 0.8
STEPS = 1500
CASES = {
    **{name: (name, {}) for name in losses.DIVERGENCES if name != "alpha"},
    **{f"alpha={alpha}": ("alpha", {"alpha": alpha}) for alpha in (-0.5, 0.0, 0.025, 0.1, 0.5, 0.99, 1.0, 1.5)},
    "jensen_shannon=0.2": ("jensen_shannon", {"weight": 0.2}),
}


def optimum():
    weights = np.exp(REFERENCE_K.astype(np.float64) + REWARDS_K / (BETA_R * BETA_PI))
    return weights / weights.sum()


@pytest.fixture(scope="module")
def learnt():
    """{case: π [K]} after gradient descent on the logits from the reference, all cases in one program."""
    shared = {"target": "rewards", "beta_r": BETA_R, "beta_pi": BETA_PI, "log_clamp": -np.inf}
    chosen = {key: losses.resolve(name, **shared, **options) for key, (name, options) in CASES.items()}

    def total(logits):
        def one(loss, logits_K):
            logps_BK = jax.nn.log_softmax(logits_K)[None]
            fixed = (REFERENCE_K[None], jnp.ones_like(logps_BK), REWARDS_K[None], jnp.float32(0))
            return loss.loss(losses.Completions(logps_BK, *fixed))[0]

        return sum(one(loss, logits[key]) for key, loss in chosen.items())

    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, STEPS))

    def update(carry, _):
        logits, state = carry
        updates, state = optimizer.update(jax.grad(total)(logits), state)
        return (optax.apply_updates(logits, updates), state), None

    @jax.jit
    def train(logits):
        return jax.lax.scan(update, (logits, optimizer.init(logits)), length=STEPS)[0][0]

    return jax.tree.map(jax.nn.softmax, train({key: jnp.asarray(REFERENCE_K) for key in chosen}))


@pytest.mark.parametrize("case", CASES)
def test_every_divergence_learns_the_rlhf_optimum(learnt, case):
    assert np.abs(np.exp(REFERENCE_K) - optimum()).max() > 0.3, "the reference must be far from the optimum"
    assert_allclose(learnt[case], optimum(), rtol=0, atol=tolerances.BANDIT)
