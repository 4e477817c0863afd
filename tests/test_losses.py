"""The divergence table, targets, scores, objectives and names of `fpo_jax.losses`."""

import doctest
import functools
import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from fpo_jax import losses
from fpo_jax.losses import divergences, names, numerics, objectives, options, scores, targets
from fpo_jax.losses import loss as loss_module
from tests import losses_oracle as oracle
from tests import tolerances

B, K = 2, 3
ALPHAS = (-3.0, -1.0, 0.0, 1e-7, 0.1, 0.5, 0.99, 1.0, 2.0)
# Every row of the table, alpha and Jensen-Shannon with several parameters: (id, name, keywords).
DIVERGENCE_CASES = [
    *((f"alpha={a}", "alpha", {"alpha": a}) for a in ALPHAS),
    *((f"jensen_shannon={w}", "jensen_shannon", {"weight": w}) for w in (0.2, 0.5)),
    *((name, name, {}) for name in losses.DIVERGENCES if name not in ("alpha", "jensen_shannon")),
]
each_divergence = pytest.mark.parametrize(
    ("name", "parameters"), [case[1:] for case in DIVERGENCE_CASES], ids=[case[0] for case in DIVERGENCE_CASES]
)
# Two of the four settings of each divergence (between them they read every option), and every objective.
LOSSES = {
    **{f"{name}, pairs": losses.resolve(name) for name in losses.DIVERGENCES},
    **{f"{name}, rewards": losses.resolve(name, target="rewards", score="mean_logp") for name in losses.DIVERGENCES},
    **{name: losses.resolve(name) for name in losses.OBJECTIVES},
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def groups(dtype=np.float32, **replaced):
    """B=2 groups of K=3 with unequal lengths; log-probs that a small model could give."""
    fields = {
        "logps_BK": np.array([[-3.0, -7.0, -5.5], [-4.0, -2.5, -9.0]]),
        "reference_logps_BK": np.array([[-4.5, -5.0, -6.0], [-3.0, -4.0, -7.5]]),
        "lengths_BK": np.array([[2.0, 5.0, 4.0], [3.0, 2.0, 7.0]]),
        "rewards_BK": np.array([[1.0, 0.25, 0.5], [-0.5, 2.0, 0.0]]),
        "batch_kl": np.array(0.75),
    }
    return losses.Candidates(**{key: np.asarray(value, dtype) for key, value in {**fields, **replaced}.items()})


def value_and_grad(loss, candidates):
    """Losses [B] and their gradients in logps_BK, as NumPy."""
    return jax.tree.map(np.asarray, value_and_grad_traced(loss, candidates))


def value_and_grad_traced(loss, candidates):
    def total(logps_BK):
        losses_B = loss.loss(candidates._replace(logps_BK=logps_BK))
        return jnp.sum(losses_B), losses_B

    grads_BK, losses_B = jax.grad(total, has_aux=True)(jnp.asarray(candidates.logps_BK))
    return losses_B, grads_BK


def in_float64(function, *arguments, **keywords):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, function(*arguments, **keywords))


def divergence_and_slope(log_p, log_q, name, parameters):
    """D_f [B] and dD/d log p."""

    def total(log_p):
        values = losses.f_divergence(log_p, log_q, name=name, **parameters)
        return jnp.sum(values), values

    grads, values = jax.grad(total, has_aux=True)(jnp.asarray(log_p))
    return values, grads


# ---------------------------------------------------------------------------------------------- the divergence table


def test_table_is_complete():
    assert list(losses.DIVERGENCES) == list(oracle.F) == list(oracle.F_PRIME)
    aliases = {alias: row.name for row in losses.DIVERGENCES.values() for alias in row.aliases}
    assert aliases == {"exo": "kl_policy_target", "dpo": "kl_target_policy"}
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


# -------------------------------------------------------------------------------- spec 7, item 11: eleven invariances

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
        permuted = losses.Candidates(*(x[:, order] for x in base[:-1]), base.batch_kl)
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
    """Candidates -> {loss: (losses, gradients)}: every loss, group by group under vmap, in one compiled program."""

    @jax.jit
    def run(candidates):
        def one(loss, *fields):
            group = losses.Candidates(*(x[None] for x in fields), candidates.batch_kl)
            return jax.tree.map(lambda x: x[0], value_and_grad_traced(loss, group))

        return {key: jax.vmap(functools.partial(one, loss))(*candidates[:-1]) for key, loss in LOSSES.items()}

    return run


@pytest.fixture(scope="module")
def at_long_responses(compiled):
    """Log-probs of 0 to -1e4, an empty response, equal rewards, in float32."""
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
def test_j_gradients_are_finite_at_margins_of_a_hundred_and_more(at_long_responses, key):
    values, grads = at_long_responses[key]
    assert np.all(np.isfinite(values)) and np.all(np.isfinite(grads))
    if LOSSES[key].length_normalized:
        assert_array_equal(grads[:, 1], 0.0, "an empty response has no mean log-prob")


@each_divergence
def test_k_gradients_in_the_scores_sum_to_zero(name, parameters):
    for target in ("preference", "rewards"):
        loss = losses.resolve(name, target=target, **parameters)
        _, grads = in_float64(value_and_grad, loss, groups(np.float64))
        assert_allclose(grads.sum(-1), 0.0, atol=tolerances.EXACT64 * max(1.0, np.abs(grads).max()))


# ------------------------------------------------------------------------------------------------------------ targets


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
    assert_array_equal(losses.resolve("ipo").chosen(tied), [[0, 1, 0], [0, 1, 0]])
    assert_array_equal(losses.resolve("ipo", tie_policy="first").chosen(tied), [[1, 0, 0], [0, 1, 0]])
    assert_array_equal(losses.resolve("exo-rw").chosen(tied), [[0.5, 0.5, 0], [0, 1, 0]])


# ---------------------------------------------------------------------------------------------------------- objectives


def published(name, o, w, lo, z):
    """The published loss of one pair; w and lo are (logp, reference logp, length)."""
    (lw, rw, nw), (ll, rl, nl) = w, lo
    delta_w, delta_l, mean_w, mean_l = lw - rw, ll - rl, lw / nw, ll / nl

    def smooth(margin):
        ls = o.get("label_smoothing", 0.0)
        return -(1 - ls) * oracle.log_sigmoid(margin) - ls * oracle.log_sigmoid(-margin)

    def odds(mean):
        return np.log(np.exp(mean) / (1 - np.exp(mean)))

    def f_prime(delta):
        u, a = np.exp(delta), o.get("constraint_alpha")
        return {
            "f_dpo_reverse_kl": np.log(u) + 1,
            "f_dpo_forward_kl": -1 / u,
            "f_dpo_jensen_shannon": np.log(2 * u / (1 + u)),
            "f_dpo_alpha": (1 - u**-a) / a if a else np.log(u),
        }[name]

    if name.startswith("f_dpo"):
        return smooth(o["beta_pi"] * f_prime(delta_w) - o["beta_pi"] * f_prime(delta_l))
    if name == "alphapo_length":
        a = o["reward_alpha"]
        r_w, r_l = ((1 - np.exp(mean) ** -a) / a if a else mean for mean in (mean_w, mean_l))
        return smooth(o["beta"] * (r_w - r_l) - o["beta"] * o["gamma_beta_ratio"])
    if name == "kto":
        z = o["beta_pi"] * max(0.0, z)
        desirable = o["desirable_weight"] * (1 - oracle.sigmoid(o["beta_pi"] * delta_w - z))
        return desirable + o["undesirable_weight"] * (1 - oracle.sigmoid(z - o["beta_pi"] * delta_l))
    return {
        "sft": lambda: -mean_w,
        "ipo": lambda: (delta_w - delta_l - 1 / (2 * o["tau"])) ** 2,
        "slic": lambda: max(0, o["delta"] - lw + ll) - o["chosen_nll_weight"] * lw,
        "hinge": lambda: max(0, 1 - o["beta"] * (mean_w - mean_l - o["gamma_beta_ratio"])),
        "rrhf": lambda: max(0, mean_l - mean_w) - o["chosen_nll_weight"] * lw,
        "cpo": lambda: smooth(o["beta"] * (lw - ll)) - o["chosen_nll_weight"] * lw,
        "orpo": lambda: -mean_w - o["odds_weight"] * oracle.log_sigmoid(odds(mean_w) - odds(mean_l)),
        "r_dpo": lambda: smooth(o["beta_pi"] * (delta_w - delta_l) + o["length_penalty"] * (nw - nl)),
    }[name]()


def published_group(name, o, candidates):
    """[B]: the chosen candidate against each other one, averaged."""
    rows = np.stack(candidates[:3], axis=-1).astype(np.float64)
    out = []
    for row_K3, rewards_K in zip(rows, candidates.rewards_BK, strict=True):
        best = int(np.argmax(rewards_K))
        others = [i for i in range(len(rewards_K)) if i != best]
        out.append(np.mean([published(name, o, row_K3[best], row_K3[i], float(candidates.batch_kl)) for i in others]))
    return np.array(out)


OBJECTIVE_CASES = [
    *((name, {}) for name in losses.OBJECTIVES),
    *((name, {"label_smoothing": 0.2}) for name, row in losses.OBJECTIVES.items() if "label_smoothing" in row.options),
    ("f_dpo_alpha", {"constraint_alpha": 0.0}),
    ("alphapo_length", {"reward_alpha": 0.0}),
    ("alphapo_length", {"reward_alpha": -0.5}),
    ("slic", {"delta": 2.0, "chosen_nll_weight": 0.5}),
]


@pytest.mark.parametrize(("name", "chosen_options"), OBJECTIVE_CASES, ids=str)
def test_objectives_against_their_published_formulas(name, chosen_options):
    loss, group = losses.resolve(name, **chosen_options), groups(np.float64)
    slopes = np.zeros((B, K))
    for b, k in np.ndindex(B, K):
        step = np.zeros((B, K))
        step[b, k] = 1e-6
        up = published_group(name, loss.options, group._replace(logps_BK=group.logps_BK + step))
        down = published_group(name, loss.options, group._replace(logps_BK=group.logps_BK - step))
        slopes[b, k] = (up - down)[b] / 2e-6
    values, grads = in_float64(value_and_grad, loss, group)
    assert_allclose(values, published_group(name, loss.options, group), rtol=tolerances.LOSS_FLOAT64)
    assert_allclose(grads, slopes, rtol=0, atol=tolerances.NUMERIC_SLOPE * max(1.0, np.abs(slopes).max()))
    assert_allclose(loss.loss(groups()), values, rtol=tolerances.LOSS_FLOAT32)


def test_objectives_of_pairs_against_their_published_formulas():
    """K = 2, which is what is published; f-DPO with the reverse KL is DPO."""
    pair = losses.Candidates(*(x[:, :2] for x in groups()[:-1]), groups().batch_kl)
    chosen = {str(case): losses.resolve(case[0], **case[1]) for case in OBJECTIVE_CASES}
    chosen["dpo"] = losses.resolve("dpo", beta_pi=0.1)
    results = jax.jit(lambda c: {key: loss.loss(c) for key, loss in chosen.items()})(pair)
    for key, loss in chosen.items():
        name = "f_dpo_reverse_kl" if key == "dpo" else loss.name
        expected = published_group(name, loss.options, pair)
        assert_allclose(results[key], expected, rtol=tolerances.LOSS_FLOAT32, err_msg=key)


def test_dpo_side_losses_against_their_published_formulas():
    pair = losses.Candidates(*(x[:, :2] for x in groups(np.float64)[:-1]), np.array(0.0))
    lw, ll = np.array([-3.0, -2.5]), np.array([-7.0, -4.0])
    delta = lw - np.array([-4.5, -4.0]) - (ll - np.array([-5.0, -3.0]))
    mean = lw / [2, 2] - ll / [5, 3]
    value = in_float64(losses.resolve("dpo", beta_pi=0.3).loss, pair)
    assert_allclose(value, -oracle.log_sigmoid(0.3 * delta), rtol=tolerances.LOSS_FLOAT64)
    for name, chosen_options, margin in (
        ("cdpo", {"beta_pi": 0.3}, 0.3 * delta),
        ("sigmoid", {"beta": 2.5, "gamma_beta_ratio": 0.3, "normalize": True}, 2.5 * (mean - 0.3)),
    ):
        smoothed = -0.9 * oracle.log_sigmoid(margin) - 0.1 * oracle.log_sigmoid(-margin)
        value = in_float64(losses.resolve(name, epsilon=0.1, **chosen_options).loss, pair)
        assert_allclose(value, smoothed, rtol=tolerances.LOSS_FLOAT64)
    p = np.stack([oracle.sigmoid(0.3 * delta), oracle.sigmoid(-0.3 * delta)], -1)
    value = in_float64(losses.resolve("exo-pref", beta_pi=0.3, epsilon=1e-3, normalize=True).loss, pair)
    assert_allclose(value, (p * (np.log(p) - np.log([0.999, 0.001]))).sum(-1), rtol=tolerances.LOSS_FLOAT64)


def test_a_tie_is_the_mean_over_its_winners_for_pairwise_objectives():
    tied = groups(np.float64, rewards_BK=[[1.0, 1.0, 0.0], [2.0, 2.0, 0.0]])
    first, second, uniform = (
        in_float64(losses.resolve("ipo", tie_policy=policy).loss, tied) for policy in ("first", "second", "uniform")
    )
    assert_allclose(uniform, (first + second) / 2, rtol=tolerances.EXACT64)


def test_kto_reads_the_kl_of_the_whole_update():
    loss, group = losses.resolve("kto", beta_pi=0.5), groups()
    assert loss.needs_batch_kl and not losses.resolve("dpo").needs_batch_kl
    whole, _ = value_and_grad(loss, group)
    halves = [losses.Candidates(*(x[b : b + 1] for x in group[:-1]), group.batch_kl) for b in range(B)]
    assert_allclose(whole, np.concatenate([value_and_grad(loss, half)[0] for half in halves]), rtol=tolerances.FLOAT32)
    for low in (-5.0, 0.0):
        clamped = loss.loss(group._replace(batch_kl=np.float32(low)))
        assert_array_equal(clamped, loss.loss(group._replace(batch_kl=np.float32(0.0))))
    assert np.all(np.abs(whole - np.asarray(clamped)) > tolerances.DIFFERENT)
    slope = jax.grad(lambda kl: jnp.sum(loss.loss(group._replace(batch_kl=kl))))(jnp.float32(0.75))
    assert float(slope) == 0.0


def test_implied_rewards_carry_no_gradient():
    for loss in LOSSES.values():
        rewards_of = functools.partial(
            lambda loss, logps_BK: loss.implied_rewards(groups()._replace(logps_BK=logps_BK)), loss
        )
        assert np.any(np.asarray(rewards_of(groups().logps_BK)) != 0)
        assert_array_equal(jax.grad(lambda x: jnp.sum(rewards_of(x)))(jnp.asarray(groups().logps_BK)), 0)  # noqa: B023


# ------------------------------------------------------------------------------------------ every row, every transform


@pytest.mark.parametrize("key", LOSSES)
def test_every_loss_under_jit_grad_and_vmap(compiled, key):
    (values, grads), (expected_values, expected_grads) = compiled(groups())[key], value_and_grad(LOSSES[key], groups())
    assert np.any(expected_grads != 0)
    assert_allclose(values, expected_values, rtol=tolerances.LOSS_FLOAT32)
    assert_allclose(grads, expected_grads, rtol=0, atol=tolerances.LOSS_FLOAT32 * np.abs(expected_grads).max())


def test_a_loss_is_a_static_argument():
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(loss, candidates):
        traced.append(loss)
        return loss.loss(candidates)

    run(losses.resolve("alphapo-rw", alpha=0.025), groups())
    run(losses.resolve("alpha", target="rewards", alpha=0.025), groups())
    assert len(traced) == 1, "the same loss by two names compiles once"
    run(losses.resolve("alphapo-rw", alpha=0.03), groups())
    assert len(traced) == 2


def test_losses_say_what_they_need():
    needs = {name: losses.resolve(name).needs_reference for name in losses.PRESETS}
    free = {name for name, reference in needs.items() if not reference}
    assert free == {"sigmoid", "alphapo", "simpo", "sft", "slic", "hinge", "rrhf", "cpo", "orpo", "alphapo_length"}
    per_token = {name for name in losses.PRESETS if losses.resolve(name).length_normalized}
    assert per_token == free - {"slic", "cpo"}
    for loss in LOSSES.values():
        spoilt = groups(reference_logps_BK=np.full((B, K), np.nan))
        assert loss.needs_reference == bool(np.isnan(loss.loss(spoilt)).any())
        assert (loss.log_target(groups()) is None) == (loss.name in losses.OBJECTIVES)


# Another legal value per option, far enough from every default to change a loss of order one.
OTHER_VALUE = {
    "temperature": 0.8,
    "sft_weight": 0.5,
    "target": {"preference": "rewards", "rewards": "preference"},
    "score": {"log_ratio": "mean_logp", "mean_logp": "log_ratio"},
    "alpha": 0.6,
    "weight": 0.2,
    "epsilon": 0.2,
    "normalize": True,
    "tie_policy": "first",
    "beta_r": 0.21,
    "log_clamp": -1.0,
    "beta_pi": 0.9,
    "beta": 0.7,
    "gamma_beta_ratio": 0.9,
    "label_smoothing": 0.3,
    "tau": 0.4,
    "delta": 3.7,
    "chosen_nll_weight": 0.35,
    "odds_weight": 0.8,
    "length_penalty": 0.4,
    "desirable_weight": 0.3,
    "undesirable_weight": 0.3,
    "reward_alpha": 0.7,
    "constraint_alpha": 0.2,
}


@each_loss
def test_every_option_changes_the_loss_or_is_an_error(loss):
    settings_of = {key: loss.options[key] for key in ("target", "score") if key in loss.options}
    tied = groups(rewards_BK=[[1.0, 1.0, 0.5], [-0.5, 2.0, 2.0]])
    base = loss.loss(tied)
    assert set(OTHER_VALUE) == set(losses.OPTIONS)
    for key, other in OTHER_VALUE.items():
        value = other[loss.options[key]] if isinstance(other, dict) and key in loss.options else other
        if key not in loss.options:
            value = next(iter(value)) if isinstance(value, dict) else value
            with pytest.raises(ValueError, match=f"'{key}' is not used by '{loss.name}'.*; it uses: temperature, "):
                losses.resolve(loss.name, **settings_of, **{key: value})
            continue
        assert loss.options[key] != value
        # Hard labels have nothing to normalise (an error of its own): compare two soft ones.
        extra = {"epsilon": 0.3} if key == "normalize" else {}
        changed = losses.resolve(loss.name, **{**settings_of, **extra, key: value})
        if key in ("temperature", "sft_weight"):  # applied by logps.py and step.py
            assert getattr(changed, key) == value != getattr(loss, key)
            continue
        before = losses.resolve(loss.name, **settings_of, **extra).loss(tied) if extra else base
        assert np.abs(before - changed.loss(tied)).max() > tolerances.DIFFERENT, key


# --------------------------------------------------------------------------------------------------------------- names

ORIGINAL_NAMES = {
    "dpo-pref": ("kl_target_policy", {"target": "preference", "score": "log_ratio", "epsilon": 0.0}),
    "dpo-rw": ("kl_target_policy", {"target": "rewards", "score": "log_ratio", "log_clamp": -np.inf}),
    "exo-pref": ("kl_policy_target", {"target": "preference", "score": "log_ratio", "epsilon": np.exp(-10)}),
    "exo-rw": ("kl_policy_target", {"target": "rewards", "score": "log_ratio", "log_clamp": -np.inf}),
    "jspo-pref": (
        "jensen_shannon",
        {"target": "preference", "score": "log_ratio", "epsilon": np.exp(-10), "weight": 0.5},
    ),
    "jspo-rw": ("jensen_shannon", {"target": "rewards", "score": "log_ratio", "log_clamp": -10.0, "weight": 0.5}),
    "alphapo-pref": ("alpha", {"target": "preference", "score": "log_ratio", "epsilon": np.exp(-10)}),
    "alphapo-rw": ("alpha", {"target": "rewards", "score": "log_ratio", "log_clamp": -10.0}),
    "jeffpo-pref": ("jeffreys", {"target": "preference", "score": "log_ratio", "epsilon": np.exp(-10)}),
    "jeffpo-rw": ("jeffreys", {"target": "rewards", "score": "log_ratio", "log_clamp": -10.0}),
    "shpo-pref": ("squared_hellinger", {"target": "preference", "score": "log_ratio", "epsilon": np.exp(-10)}),
    "shpo-rw": ("squared_hellinger", {"target": "rewards", "score": "log_ratio", "log_clamp": -10.0}),
    "sigmoid": ("kl_target_policy", {"target": "preference", "score": "mean_logp", "epsilon": 0.0}),
    "alphapo": ("alpha", {"target": "preference", "score": "mean_logp", "epsilon": np.exp(-10)}),
    "hinge": ("hinge", {"beta": 2.0, "gamma_beta_ratio": 0.25}),
    "exo": ("kl_policy_target", {"target": "preference", "score": "log_ratio", "epsilon": np.exp(-10)}),
    "dpo": ("kl_target_policy", {"target": "preference", "score": "log_ratio", "epsilon": 0.0}),
}


@pytest.mark.parametrize("name", ORIGINAL_NAMES)
def test_every_name_of_the_original_resolves(name):
    canonical, expected = ORIGINAL_NAMES[name]
    loss = losses.resolve(name)
    assert loss.name == canonical
    assert {key: loss.options[key] for key in expected} == expected
    assert loss.temperature == 1.0 and loss.sft_weight == 0.0


def test_names_that_fix_nothing_take_options():
    loss = losses.resolve("exo", score="mean_logp", target="rewards", beta_r=1, log_clamp=-20, sft_weight=None)
    assert loss.options["beta_r"] == 1.0 and isinstance(loss.options["beta_r"], float)
    assert loss == losses.resolve("kl_policy_target", score="mean_logp", target="rewards", beta_r=1.0, log_clamp=-20.0)
    assert hash(loss) == hash(losses.resolve("exo", score="mean_logp", target="rewards", beta_r=1.0, log_clamp=-20.0))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alphapo-wr", r"unknown loss 'alphapo-wr'; nearest: alphapo-rw, .*known: .*alphapo_length.*shpo-rw"),
        ("jspo", r"unknown loss 'jspo'; nearest: jspo-rw, .*jspo-pref"),  # the original trains on raw rewards here
        ("dpo-rwx", r"unknown loss 'dpo-rwx'; nearest: dpo-rw"),
        ("qqqqqq", r"unknown loss 'qqqqqq'; known: "),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        losses.resolve(name)


@pytest.mark.parametrize(
    ("name", "given_options", "message"),
    [
        ("alpha", {"alpha": float("nan")}, r"alpha=nan is outside \(-inf, inf\) \(α of the divergence.*give a value"),
        ("alpha", {"alpha": float("inf")}, r"alpha=inf is outside"),
        ("alpha", {"alpha": "0.5"}, r"alpha='0.5' is not a number; give one in \(-inf, inf\)"),
        ("alpha", {"alpha": True}, r"alpha=True is not a number"),
        ("alpha", {"alhpa": 0.5}, r"unknown option 'alhpa'; nearest: alpha; known: temperature, "),
        ("dpo", {"beta_pi": 0.0}, r"beta_pi=0.0 is outside \(0, inf\)"),
        ("exo", {"epsilon": 0.5}, r"epsilon=0.5 is outside \[0, 0.5\)"),
        ("exo", {"epsilon": -1e-3}, r"epsilon=-0.001 is outside"),
        ("exo", {"normalize": 1}, r"normalize=1 is not a bool; give True or False"),
        ("exo", {"tie_policy": "last"}, r"tie_policy='last' is not one of: second, first, uniform"),
        ("exo", {"target": "reward"}, r"target='reward' is not one of: preference, rewards"),
        ("exo-rw", {"log_clamp": -10.0}, r"log_clamp=-10.0 contradicts 'exo-rw', which fixes log_clamp=-inf"),
        ("dpo-pref", {"epsilon": 1e-3}, r"epsilon=0.001 contradicts 'dpo-pref'.*use the name 'kl_target_policy'"),
        ("alphapo", {"score": "log_ratio"}, r"score='log_ratio' contradicts 'alphapo', which fixes score='mean_logp'"),
        ("alphapo-pref", {"beta_r": 0.5}, r"'beta_r' is not used by 'alphapo-pref' with target='preference'"),
        ("alphapo-rw", {"log_clamp": 0.5}, r"log_clamp=0.5 is outside \[-inf, 0\]"),
        ("dpo", {"label_smoothing": 0.1}, r"label smoothing ls is epsilon=ls with normalize=True"),
        ("exo", {"epsilon": 0.0}, r"epsilon=0 makes 'kl_policy_target' infinite .*; give epsilon=1e-3"),
        ("alpha", {"epsilon": 0.0, "alpha": -1.0}, r"epsilon=0 makes 'alpha' with alpha=-1.0 infinite"),
        ("dpo", {"normalize": True}, r"normalize=True changes nothing at epsilon=0"),
        (
            "ipo",
            {"target": "rewards"},
            r"'target' is not used by 'ipo'; it uses: temperature, sft_weight, tie_policy, tau",
        ),
    ],
    ids=str,
)
def test_bad_options(name, given_options, message):
    with pytest.raises(ValueError, match=message):
        losses.resolve(name, **given_options)


def test_all_problems_are_reported_at_once():
    with pytest.raises(
        ValueError, match=r"loss 'alphapo-pref', 4 problems:\n  1\. .*alpha=nan.*\n  2\. .*\n  3\. .*\n  4\. "
    ):
        losses.resolve("alphapo-pref", alpha=float("nan"), beta_pi=-1, beta_r=0.5, gama=0.1)


def test_hard_labels_are_allowed_where_the_divergence_is_finite():
    allowed = {name for name in losses.DIVERGENCES if not hard_label_error(name)}
    expected = {"kl_target_policy", "alpha", "jensen_shannon", "squared_hellinger", "total_variation", "neyman_chi2"}
    assert allowed == expected


def hard_label_error(name):
    try:
        losses.resolve(name, epsilon=0.0)
    except ValueError as error:
        return str(error)
    return ""


def test_too_few_candidates_and_unequal_shapes():
    alone = losses.Candidates(*(x[:, :1] for x in groups()[:-1]), np.float32(0))
    assert_allclose(losses.resolve("sft").loss(alone), [1.5, 4 / 3], rtol=tolerances.FLOAT32)
    with pytest.raises(ValueError, match=r"K=1 candidates holds nothing to compare; 'ipo' needs K >= 2"):
        losses.resolve("ipo").loss(alone)
    with pytest.raises(ValueError, match=r"candidates of different shapes: .*'rewards_BK': \(2, 2\)"):
        losses.resolve("dpo").loss(groups(rewards_BK=np.ones((2, 2))))


def test_options_describe_themselves():
    used = {key for name in losses.PRESETS for key in losses.resolve(name).options}
    assert used == set(losses.OPTIONS)
    for name, row in losses.OPTIONS.items():
        assert row.name == name and row.meaning and row.parse(row.default) == row.default
    for loss in LOSSES.values():
        for key, value in loss.options.items():
            assert losses.OPTIONS[key].parse(value) == value


def test_the_printed_table_names_everything():
    shown = subprocess.run([sys.executable, "-m", "fpo_jax.losses"], capture_output=True, text=True, check=True).stdout
    for name in (*losses.PRESETS, *losses.OPTIONS):
        assert name in shown, name
    for row in (*losses.DIVERGENCES.values(), *losses.OBJECTIVES.values()):
        assert row.equation in shown


# ------------------------------------------------------------------------------------------------------------ doctests

MODULES = (divergences, loss_module, names, numerics, objectives, options, scores, targets)


def documented(module):
    """Public functions, classes and methods of a module; the shape checks wrap them, so doctest alone finds none."""
    for name, value in vars(module).items():
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__ and callable(value):
            yield name, value
            if inspect.isclass(value):
                yield from ((f"{name}.{k}", v) for k, v in vars(value).items() if not k.startswith("_") and callable(v))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_doctests(module):
    runner, finder = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS), doctest.DocTestFinder(recurse=False)
    for name, value in documented(module):
        for test in finder.find(value, name, module=False, globs=dict(vars(module))):
            runner.run(test)
        if inspect.isfunction(inspect.unwrap(value)) and "." not in name:
            assert ">>>" in inspect.getdoc(value), f"{name} has no doctest"
    result = runner.summarize(verbose=False)
    assert result.failed == 0 and result.attempted > 0
