"""The divergence table and the targets of `fpo_jax.losses`, and that each function has an example."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from fpo_jax import losses
from fpo_jax.losses import f_divergences, numerics, options, preference_losses, registry, scores, targets
from fpo_jax.losses import loss as loss_module
from tests import losses_oracle as oracle
from tests import tolerances
from tests.losses_cases import DIVERGENCE_CASES, B, K, divergence_and_slope, each_divergence, groups, in_float64


def test_table_is_complete():
    assert list(losses.DIVERGENCES) == list(oracle.F) == list(oracle.F_PRIME)
    for name, row in losses.DIVERGENCES.items():
        assert row.name == name and row.equation and row.limits


@each_divergence
@settings(max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate])
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(1e-3, 2), mass=st.floats(-0.5, 0.5))
def test_f_and_f_prime_and_log_space_agree(name, parameters, seed, spread, mass):
    """Σ q f(u) and p f'(u): of the row, of the textbook and of the log-space form; q is unnormalised."""
    policy, target = spread * np.random.default_rng(seed).uniform(-1, 1, size=(2, B, K))
    log_p, log_q = oracle.log_softmax(policy), oracle.log_softmax(target) + mass
    p, q, row = np.exp(log_p), np.exp(log_q), losses.DIVERGENCES[name]
    value, slope = in_float64(divergence_and_slope, log_p, log_q, name, parameters)
    # The textbook form of alpha divides a rounding error of its largest term by alpha (alpha - 1).
    divisor = min([1.0, *(abs(x) for a in parameters.values() for x in (a, 1 - a) if x)])
    largest = np.max(p + q + p ** (1 - parameters.get("alpha", 0)) * q ** parameters.get("alpha", 0), axis=-1)
    rounding = tolerances.TEXTBOOK64 * largest / divisor
    for f, f_prime in ((row.f, row.f_prime), (oracle.F[name], oracle.F_PRIME[name])):
        terms = q * in_float64(f, p / q, **parameters) if f is row.f else q * f(p / q, *parameters.values())
        slopes = (
            p * in_float64(f_prime, p / q, **parameters) if f is row.f else p * f_prime(p / q, *parameters.values())
        )
        bound = tolerances.LOSS_FLOAT64 * np.abs(terms).sum(-1) + rounding
        assert np.all(np.abs(value - terms.sum(-1)) <= bound)
        assert np.all(np.abs(slope - slopes) <= tolerances.LOSS_FLOAT64 * np.abs(slopes) + rounding[:, None])


@each_divergence
def test_value_and_slope_at_the_target(name, parameters):
    """At p = q the value is 0 and the slope p f'(1): no branch of the log-space form leaves half a slope there."""
    log_p = np.log(np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]))
    value, slope = in_float64(divergence_and_slope, log_p, log_p, name, parameters)
    assert_array_equal(value, [0.0, 0.0])
    assert_allclose(slope, np.exp(log_p) * oracle.F_PRIME[name](1.0, *parameters.values()), atol=tolerances.EXACT64)


@each_divergence
def test_f_is_convex_with_its_zero_at_one(name, parameters):
    row, u = losses.DIVERGENCES[name], np.array([0.125, 0.5, 1.0, 3.0, 20.0])
    f = functools.partial(row.f, **parameters)
    assert float(f(jnp.array(1.0))) == 0.0
    middles = (u[1:] + u[:-1]) / 2
    assert np.all(in_float64(f, middles) <= (in_float64(f, u[1:]) + in_float64(f, u[:-1])) / 2 + tolerances.EXACT64)
    slopes = in_float64(jax.grad(lambda u: jnp.sum(f(u))), u)[u != 1]
    expected = in_float64(functools.partial(row.f_prime, **parameters), u)[u != 1]
    assert_allclose(slopes, expected, rtol=tolerances.PRINTED_F, atol=tolerances.EXACT64)


def extreme_inputs():
    """[B, 2] log p and log q: margins up to ±1e4 against labels down to exp(-1e4), and hard ones."""
    margins = (-1e4, -100.0, -1.0, 0.0, 5.0, 100.0, 1e4)
    labels = ((0.0, -10.0), (0.0, 0.0), (-1e4, 0.0), (0.0, -1e4), (-5e3, -1e4), (0.0, -np.inf))
    logits = np.array([(m, 0.0) for m in margins for _ in labels], np.float32)
    return np.asarray(losses.log_softmax(logits)), np.array([q for _ in margins for q in labels], np.float32)


@pytest.fixture(scope="module")
def at_extremes():
    """Float32 values and slopes of every case, from one compiled program."""
    log_p, log_q = extreme_inputs()
    run = jax.jit(lambda p: {key: divergence_and_slope(p, log_q, name, each) for key, name, each in DIVERGENCE_CASES})
    return run(log_p)


@pytest.mark.parametrize("case", DIVERGENCE_CASES, ids=lambda case: case[0])
def test_value_and_gradient_are_finite_at_extreme_inputs(at_extremes, case):
    key, name, parameters = case
    values, slopes = at_extremes[key]
    assert values.dtype == slopes.dtype == jnp.float32
    finite_labels = np.isfinite(extreme_inputs()[1]).all(-1)
    if np.isfinite(losses.DIVERGENCES[name].slope_at_infinity(**parameters)):
        finite_labels[:] = True
    assert np.all(np.isfinite(values[finite_labels]))
    assert np.all(np.isfinite(np.square(slopes[finite_labels]))), "the squared gradient norm must fit float32"


@pytest.mark.parametrize("name", ["pearson_chi2", "neyman_chi2"])
def test_chi_squared_saturates_linearly_above_e30(name):
    """(a - b)²/b = exp(log a²/b) where a >> b: exact below an exponent of 30, its tangent above."""
    exponents = np.array([29.0, 30.0, 40.0, 1e4])
    large, small = np.zeros((4, 1)), -exponents[:, None]
    log_p, log_q = (large, small) if name == "pearson_chi2" else (small, large)
    values = in_float64(losses.f_divergence, log_p, log_q, name=name)
    assert_allclose(values[:2], np.exp([29.0, 30.0]), rtol=tolerances.EXACT64)
    assert_allclose(values[2:], np.exp(30.0) * np.array([11.0, 1e4 - 29]), rtol=tolerances.EXACT64)
    assert_allclose(
        in_float64(losses.f_divergence, log_p, log_q, name="alpha", alpha=-1.0 if name == "pearson_chi2" else 2.0),
        values / 2,
        rtol=tolerances.EXACT64,
    )


@each_divergence
def test_a_hard_label_costs_its_slope_at_infinity(name, parameters):
    row = losses.DIVERGENCES[name]
    slope = row.slope_at_infinity(**parameters)
    log_p = oracle.log_softmax([0.5, -1.0, 0.25])
    hard = np.array([0.0, -np.inf, -np.inf])
    value, grads = in_float64(divergence_and_slope, np.stack([log_p] * B), np.stack([hard] * B), name, parameters)
    if not np.isfinite(slope):
        assert value[0] > 1e25
        return
    p = np.exp(log_p)
    expected = in_float64(row.f, p[0], **parameters) + slope * (p[1] + p[2])
    assert_allclose(value[0], expected, rtol=tolerances.LOSS_FLOAT64)
    assert_allclose(grads[0, 1:], slope * p[1:], rtol=tolerances.LOSS_FLOAT64, atol=tolerances.EXACT64)


def test_jensen_shannon_is_bounded_and_symmetric():
    log_p, log_q = np.array([[0.0, -1e4]]), np.array([[-1e4, 0.0]])
    assert_allclose(losses.f_divergence(log_p, log_q, name="jensen_shannon"), [np.log(2)], rtol=tolerances.FLOAT32)


def test_f_divergence_rejects_bad_calls():
    p = np.log(np.full((B, K), 1 / K, np.float32))
    with pytest.raises(ValueError, match=r"unknown divergence 'hellinger'; the table has: kl_policy_target, .*neyman"):
        losses.f_divergence(p, p, name="hellinger")
    with pytest.raises(ValueError, match=r"'jeffreys' has no parameter 'alpha' \(given 0.5\); leave it out"):
        losses.f_divergence(p, p, name="jeffreys", alpha=0.5)
    with pytest.raises(ValueError, match=r"needs alpha="):
        losses.f_divergence(p, p, name="alpha")
    with pytest.raises(ValueError, match=r"alpha=nan is not a finite number"):
        losses.f_divergence(p, p, name="alpha", alpha=float("nan"))
    with pytest.raises(ValueError, match=r"weight=1.0 is outside \(0, 1\)"):
        losses.f_divergence(p, p, name="jensen_shannon", weight=1.0)


def test_dtypes():
    p = np.log(np.full((B, K), 1 / K))
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        low = jnp.asarray(p, dtype)
        assert losses.f_divergence(low, low, name="alpha", alpha=0.99).dtype == jnp.float32
        assert losses.resolve("alphapo-pref").loss(groups(dtype)).dtype == jnp.float32
    assert in_float64(losses.f_divergence, p, p, name="jeffreys").dtype == np.float64
    assert in_float64(losses.resolve("kto").loss, groups(np.float64)).dtype == np.float64


def test_log_softmax_keeps_the_digits_of_a_confident_winner():
    logits = np.array([[12.0, 0.0, -3.0], [0.0, 80.0, 1.0], [2.0, 2.0, -1.0]])
    others = [np.exp(-12.0) + np.exp(-15.0), np.exp(-80.0) + np.exp(-79.0), 1 + np.exp(-3.0)]
    values = losses.log_softmax(np.asarray(logits, np.float32))
    assert_allclose(np.max(values, axis=-1), -np.log1p(others), rtol=tolerances.FLOAT32)
    slopes = jax.vmap(jax.grad(lambda s: jnp.max(losses.log_softmax(s))))(jnp.asarray(logits[:2], jnp.float32))
    assert_allclose(
        [slopes[0, 0], slopes[1, 1]],
        [others[0] / (1 + others[0]), others[1] / (1 + others[1])],
        rtol=tolerances.LOSS_FLOAT32,
    )


def test_preference_targets_for_three_candidates():
    rewards = np.array([[0.0, 2.0, 1.0]], np.float32)
    assert_allclose(losses.preference_target(rewards), [[-10.0, 0.0, -10.0]], rtol=tolerances.FLOAT32)
    q = np.exp(losses.preference_target(rewards, epsilon=0.06, normalize=True))
    assert_allclose(q, [[0.03, 0.94, 0.03]], rtol=tolerances.FLOAT32)
    assert_array_equal(losses.preference_target(rewards, epsilon=0.0), [[-np.inf, 0.0, -np.inf]])


@pytest.mark.parametrize(
    ("tie_policy", "tied_pair", "tied_best"),
    [("second", [0, 1], [0, 0, 1]), ("first", [1, 0], [1, 0, 0]), ("uniform", [0.5, 0.5], [0.5, 0, 0.5])],
)
def test_ties(tie_policy, tied_pair, tied_best):
    assert_array_equal(losses.chosen_shares(np.array([[1.0, 1.0]]), tie_policy=tie_policy), [tied_pair])
    rewards = np.array([[2.0, 1.0, 2.0], [0.0, 3.0, 1.0]])
    assert_array_equal(losses.chosen_shares(rewards, tie_policy=tie_policy), [tied_best, [0, 1, 0]])
    q = np.exp(losses.preference_target(rewards, tie_policy=tie_policy))
    assert_allclose(q[0], np.maximum(tied_best, np.exp(-10.0)), rtol=tolerances.FLOAT32)
    q = np.exp(losses.preference_target(rewards, epsilon=0.2, normalize=True, tie_policy=tie_policy))
    assert_allclose(q.sum(-1), 1.0, rtol=tolerances.FLOAT32)
    all_tied = np.exp(losses.preference_target(np.ones((1, K)), epsilon=0.2, normalize=True, tie_policy="uniform"))
    assert_allclose(all_tied, np.full((1, K), 1 / K), rtol=tolerances.FLOAT32)


def test_reward_target_is_clamped_and_not_renormalised():
    rewards = np.array([[30.0, 0.0, 16.0]], np.float32)
    assert_allclose(
        losses.reward_target(rewards, beta_r=2.0), oracle.log_softmax(rewards / 2.0), rtol=tolerances.FLOAT32
    )
    clamped = losses.reward_target(rewards, beta_r=2.0, log_clamp=-10.0)
    assert_allclose(clamped, np.maximum(oracle.log_softmax(rewards / 2.0), -10.0), rtol=tolerances.FLOAT32)
    assert np.exp(clamped).sum() > 1


def test_losses_show_who_was_chosen():
    tied = groups(rewards_BK=[[1.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    assert_array_equal(losses.resolve("ipo").chosen(tied), [[0.5, 0.5, 0], [0, 1, 0]])
    assert_array_equal(losses.resolve("ipo", tie_policy="second").chosen(tied), [[0, 1, 0], [0, 1, 0]])
    assert_array_equal(losses.resolve("ipo", tie_policy="first").chosen(tied), [[1, 0, 0], [0, 1, 0]])
    assert_array_equal(losses.resolve("exo-rw").chosen(tied), [[0.5, 0.5, 0], [0, 1, 0]])


MODULES = (f_divergences, loss_module, registry, numerics, preference_losses, options, scores, targets)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_public_function_has_an_example(module):
    """`test_doctests.py` runs them."""
    for name, value in vars(module).items():
        own = getattr(value, "__module__", None) == module.__name__ and inspect.isfunction(inspect.unwrap(value))
        if own and not name.startswith("_"):
            assert ">>>" in inspect.getdoc(value), f"{name} has no example"
