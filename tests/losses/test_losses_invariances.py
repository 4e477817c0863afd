"""The eleven invariances of spec 7, item 11, and every loss under jit, grad and vmap."""

import functools

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fpo_jax import losses
from tests import losses_oracle as oracle
from tests import tolerances
from tests.losses_cases import (
    ALPHAS,
    LOSSES,
    B,
    K,
    divergence_and_slope,
    each_divergence,
    each_loss,
    groups,
    in_float64,
    value_and_grad,
    value_and_grad_traced,
)

POLICY, TARGET = np.array([[0.5, -1.0, 2.0], [3.0, 0.0, -0.5]]), np.array([[1.0, 0.25, -2.0], [-1.0, 0.5, 0.0]])


@each_divergence
def test_a_constants_added_to_rewards_or_scores_change_nothing(name, parameters):
    loss = losses.resolve(name, target="rewards", **parameters)
    base = groups(np.float64)
    moved = base._replace(logps_BK=base.logps_BK + 17.0, rewards_BK=base.rewards_BK - 3.0)
    for after, before in zip(
        in_float64(value_and_grad, loss, moved), in_float64(value_and_grad, loss, base), strict=True
    ):
        assert_allclose(after, before, rtol=tolerances.EXACT64, atol=tolerances.EXACT64)


@each_divergence
def test_b_permuting_candidates_changes_nothing(name, parameters):
    order = [2, 0, 1]
    for target in ("preference", "rewards"):
        loss = losses.resolve(name, target=target, **parameters)
        base = groups(np.float64)
        permuted = losses.Completions(*(x[:, order] for x in base[:-1]), base.batch_kl)
        values, grads = in_float64(value_and_grad, loss, base)
        permuted_values, permuted_grads = in_float64(value_and_grad, loss, permuted)
        assert_allclose(permuted_values, values, rtol=tolerances.EXACT64)
        assert_allclose(permuted_grads, grads[:, order], rtol=tolerances.EXACT64, atol=tolerances.EXACT64)


def divergence64(name, policy=POLICY, target=TARGET, shift=0.0, **parameters):
    """Value and slope in log p, in float64; `shift` unnormalises q."""
    arguments = oracle.log_softmax(policy), oracle.log_softmax(target) + shift, name, parameters
    return in_float64(divergence_and_slope, *arguments)


@pytest.mark.parametrize(
    ("alpha", "name", "factor"),
    [(0.5, "squared_hellinger", 2.0), (-1.0, "pearson_chi2", 0.5), (2.0, "neyman_chi2", 0.5)],
)
def test_c_alpha_meets_its_named_members(alpha, name, factor):
    for shift in (0.0, -0.25):
        value, slope = divergence64("alpha", alpha=alpha, shift=shift)
        named_value, named_slope = divergence64(name, shift=shift)
        assert_allclose(value, factor * named_value, rtol=tolerances.EXACT64)
        assert_allclose(slope, factor * named_slope, rtol=tolerances.EXACT64, atol=tolerances.EXACT64)


@pytest.mark.parametrize("shift", [0.0, -0.25])
@pytest.mark.parametrize(("end", "name"), [(0.0, "kl_policy_target"), (1.0, "kl_target_policy")])
def test_d_alpha_limits(end, name, shift):
    """Exactly at 0 and 1, and continuous towards them from both sides, generalised terms included."""
    value, slope = divergence64("alpha", alpha=end, shift=shift)
    mass = np.exp(shift) - 1  # Σq - Σp
    kl, kl_slope = divergence64(name, shift=shift)
    p = np.exp(oracle.log_softmax(POLICY))
    sign = 1 if end == 0 else -1
    assert_allclose(value, kl + sign * mass, rtol=tolerances.EXACT64)
    assert_allclose(slope, kl_slope - sign * p, rtol=0, atol=tolerances.EXACT64)
    for step in (1e-3, 1e-6, 1e-9, 1e-13):
        for alpha in (end - step, end + step):
            near, near_slope = divergence64("alpha", alpha=alpha, shift=shift)
            assert_allclose(near, value, rtol=tolerances.ALPHA_RATE * step + tolerances.EXACT64)
            assert_allclose(near_slope, slope, rtol=0, atol=tolerances.ALPHA_RATE * step + tolerances.EXACT64)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_e_duality(alpha):
    """D_α(p‖q) = D_(1-α)(q‖p)."""
    value, _ = divergence64("alpha", alpha=alpha)
    swapped, _ = divergence64("alpha", policy=TARGET, target=POLICY, alpha=1 - alpha)
    assert_allclose(value, swapped, rtol=tolerances.EXACT64)


@each_divergence
def test_f_gradient_is_zero_at_the_target(name, parameters):
    loss = losses.resolve(name, target="rewards", score="log_ratio", beta_r=0.5, beta_pi=0.25, **parameters)
    base = groups(np.float64)
    optimum = base._replace(logps_BK=base.reference_logps_BK + base.rewards_BK / (0.5 * 0.25))
    values, grads = in_float64(value_and_grad, loss, optimum)
    entropy = loss.name == "kl_target_policy"  # its training loss keeps the entropy of q
    assert_allclose(grads, 0.0, atol=tolerances.EXACT64)
    assert entropy or np.all(np.abs(values) < tolerances.EXACT64)


@each_divergence
def test_g_a_preference_is_learnt_at_a_margin_of_ten(name, parameters):
    """q = (1, e^-10): dL/dm is negative below m = 10, zero there, positive above (flat, for total variation)."""
    loss = losses.resolve(name, beta_pi=1.0, epsilon=np.exp(-10.0), **parameters)

    def slopes(*margins):
        scores_BK = np.array([(margin, 0.0, 0.0) for margin in margins])
        group = groups(np.float64, logps_BK=scores_BK, reference_logps_BK=0 * scores_BK, rewards_BK=scores_BK)
        return in_float64(value_and_grad, loss, group)[1][:, 0]

    (below, above), (at, _) = slopes(9.0, 11.0), slopes(10.0, 11.0)
    assert below < -tolerances.EXACT64
    if name == "total_variation":
        assert abs(above) < tolerances.EXACT64
    else:
        assert abs(at) < tolerances.EXACT64 < above


@pytest.mark.parametrize("name", ["alphapo", "alphapo-pref", "orpo", "kto"])
def test_h_padding_changes_nothing(name):
    """From token log-probs and a mask to the loss: a wider row with junk in its padding is the same group."""
    loss, rng = losses.resolve(name), np.random.default_rng(0)
    tokens_BKT, lengths_BK = -rng.uniform(0.1, 2.0, (B, K, 5)), np.array([[5, 3, 1], [2, 4, 5]])

    def at(width):
        padded_BKT = np.concatenate([tokens_BKT, rng.normal(0, 100, (B, K, width - 5))], axis=-1)
        scored_BKT = np.arange(width) < lengths_BK[..., None]
        logps_BK = np.where(scored_BKT, padded_BKT, 0).sum(-1)
        return value_and_grad(loss, groups(logps_BK=logps_BK, lengths_BK=scored_BKT.sum(-1)))

    assert_array_equal(at(5)[0], at(9)[0])
    assert_array_equal(at(5)[1], at(9)[1])


def test_i_gamma_enters_once_before_beta_on_the_chosen_only():
    base = groups(np.float64)
    chosen_BK = np.array([[1.0, 0, 0], [0, 1.0, 0]])
    without = in_float64(
        losses.mean_logp_scores, base.logps_BK, base.lengths_BK, chosen_BK, beta=2.5, gamma_beta_ratio=0.0
    )
    with_gamma = in_float64(
        losses.mean_logp_scores, base.logps_BK, base.lengths_BK, chosen_BK, beta=2.5, gamma_beta_ratio=0.3
    )
    assert_allclose(without - with_gamma, 2.5 * 0.3 * chosen_BK, atol=tolerances.EXACT64)
    for name in ("alphapo", "simpo", "hinge", "alphapo_length"):
        loss = losses.resolve(name, beta=2.5, gamma_beta_ratio=0.3)
        rewards = in_float64(loss.implied_rewards, base)
        assert_allclose(rewards - in_float64(loss.scores, base), 2.5 * 0.3 * chosen_BK, atol=tolerances.EXACT64)


@pytest.fixture(scope="module")
def compiled():
    """Completions -> {loss: (losses, gradients)}: every loss, group by group under vmap, in one compiled program."""

    @jax.jit
    def run(completions):
        def one(loss, *fields):
            group = losses.Completions(*(x[None] for x in fields), completions.batch_kl)
            return jax.tree.map(lambda x: x[0], value_and_grad_traced(loss, group))

        return {key: jax.vmap(functools.partial(one, loss))(*completions[:-1]) for key, loss in LOSSES.items()}

    return run


@pytest.fixture(scope="module")
def at_long_completions(compiled):
    """Log-probs of 0 to -1e4, an empty completion, equal rewards, in float32."""
    results = []
    for m in (100.0, 1e4):
        for low in ([[0, -m, -m / 2], [-m, 0, -1]], [[0, 0, 0], [-m, -m, -m]]):
            lengths, rewards = [[3, 0, 2]] * B, [[1, 0, 1]] * B
            group = groups(
                logps_BK=low, reference_logps_BK=low[::-1], lengths_BK=lengths, rewards_BK=rewards, batch_kl=1e4
            )
            results.append(compiled(group))
    return {key: jax.tree.map(lambda *x: np.concatenate(x), *(each[key] for each in results)) for key in LOSSES}


@pytest.mark.parametrize("key", LOSSES)
def test_j_gradients_are_finite_at_margins_of_a_hundred_and_more(at_long_completions, key):
    values, grads = at_long_completions[key]
    assert np.all(np.isfinite(values)) and np.all(np.isfinite(grads))
    if LOSSES[key].length_normalized:
        assert_array_equal(grads[:, 1], 0.0, "an empty completion has no mean log-prob")


@each_divergence
def test_k_gradients_in_the_scores_sum_to_zero(name, parameters):
    for target in ("preference", "rewards"):
        loss = losses.resolve(name, target=target, **parameters)
        _, grads = in_float64(value_and_grad, loss, groups(np.float64))
        assert_allclose(grads.sum(-1), 0.0, atol=tolerances.EXACT64 * max(1.0, np.abs(grads).max()))


@pytest.mark.parametrize("key", LOSSES)
def test_every_loss_under_jit_grad_and_vmap(compiled, key):
    (values, grads), (expected_values, expected_grads) = compiled(groups())[key], value_and_grad(LOSSES[key], groups())
    assert np.any(expected_grads != 0)
    assert_allclose(values, expected_values, rtol=tolerances.LOSS_FLOAT32)
    assert_allclose(grads, expected_grads, rtol=0, atol=tolerances.LOSS_FLOAT32 * np.abs(expected_grads).max())


@each_loss
def test_equal_rewards_push_towards_neither(loss):
    """By default a loss of a tied pair is even in the two, so that there is no gradient between equal ones."""
    tied = groups(np.float64, rewards_BK=np.ones((B, K)))
    pair = losses.Completions(*(x_BK[:, :2] for x_BK in tied[:-1]), tied.batch_kl)
    swapped = losses.Completions(*(x_BK[:, ::-1] for x_BK in pair[:-1]), tied.batch_kl)
    assert_allclose(
        in_float64(loss.loss, pair), in_float64(loss.loss, swapped), rtol=tolerances.EXACT64, atol=tolerances.EXACT64
    )
    alike = losses.Completions(*(np.repeat(x_BK[:, :1], 2, axis=1) for x_BK in pair[:-1]), tied.batch_kl)
    _, slopes_BK = in_float64(value_and_grad, loss, alike)
    assert_allclose(slopes_BK[:, 0], slopes_BK[:, 1], rtol=tolerances.EXACT64, atol=tolerances.EXACT64)


def test_a_tied_pair_costs_dpo_log_2():
    pair = groups(np.float64, rewards_BK=np.ones((B, K)))
    pair = losses.Completions(*(np.repeat(x_BK[:, :1], 2, axis=1) for x_BK in pair[:-1]), pair.batch_kl)
    assert_allclose(in_float64(losses.resolve("dpo").loss, pair), np.log(2), rtol=tolerances.EXACT64)
