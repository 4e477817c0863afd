"""The objectives of `fpo_jax.losses` against their published formulas in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fpo_jax import losses
from tests import losses_oracle as oracle
from tests import tolerances
from tests.losses_cases import LOSSES, B, K, groups, in_float64, value_and_grad


def published(name, o, w, lo, z):
    """The published loss of one pair; w and lo are (logp, reference logp, length)."""
    (lw, rw, nw), (ll, rl, nl) = w, lo
    delta_w, delta_l, mean_w, mean_l = lw - rw, ll - rl, lw / nw, ll / nl

    def smooth(margin):
        ls = o.get("label_smoothing", 0.0)
        return -(1 - ls) * oracle.log_sigmoid(margin) - ls * oracle.log_sigmoid(-margin)

    def odds(mean):
        return np.log(np.exp(mean) / (1 - np.exp(mean)))

    def bregman(ratio, power):
        """The paper's formula, and its constant that keeps λ = 0 finite."""
        if not power:
            return ratio + np.log(ratio)
        return ratio ** (power + 1) / (power + 1) - ratio**-power / power + 1 / power

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
        "sft": lambda: -lw,
        "bradley_terry": lambda: smooth(lw - ll),
        "ipo": lambda: (delta_w - delta_l - 1 / (2 * o["tau"])) ** 2,
        "slic": lambda: max(0, o["delta"] - lw + ll) - o["chosen_nll_weight"] * lw,
        "hinge": lambda: max(0, 1 - o["beta"] * (mean_w - mean_l - o["gamma_beta_ratio"])),
        "rrhf": lambda: max(0, mean_l - mean_w) - o["chosen_nll_weight"] * lw,
        "cpo": lambda: smooth(o["beta"] * (lw - ll)) - o["chosen_nll_weight"] * lw,
        "orpo": lambda: -mean_w - o["odds_weight"] * oracle.log_sigmoid(odds(mean_w) - odds(mean_l)),
        "bpo": lambda: bregman(np.exp(-o["beta_pi"] * (delta_w - delta_l)), o["basu_lambda"]) / o["gradient_scale"],
        "r_dpo": lambda: smooth(o["beta_pi"] * (delta_w - delta_l) + o["length_penalty"] * (nw - nl)),
    }[name]()


def published_group(name, o, completions):
    """[B]: the chosen completion against each other one, averaged; a reward model's, every better against worse."""
    rows = np.stack(completions[:3], axis=-1).astype(np.float64)
    out = []
    for row_K3, rewards_K in zip(rows, completions.rewards_BK, strict=True):
        best = int(np.argmax(rewards_K))
        others = [i for i in range(len(rewards_K)) if i != best]
        if name == "binary_cross_entropy":
            score, label = row_K3[best][0], rewards_K[best]
            out.append(-label * oracle.log_sigmoid(score) - (1 - label) * oracle.log_sigmoid(-score))
            continue
        pairs = [(best, i) for i in others]
        if name == "bradley_terry":
            pairs = [(i, j) for i, j in np.ndindex(len(rewards_K), len(rewards_K)) if rewards_K[i] > rewards_K[j]]
        drift = float(completions.batch_kl)
        out.append(np.mean([published(name, o, row_K3[win], row_K3[lose], drift) for win, lose in pairs]))
    return np.array(out)


OBJECTIVE_CASES = [
    *((name, {}) for name in losses.OBJECTIVES),
    *((name, {"label_smoothing": 0.2}) for name, row in losses.OBJECTIVES.items() if "label_smoothing" in row.options),
    ("bpo", {"basu_lambda": 0.0}),
    ("bpo", {"basu_lambda": -0.5, "gradient_scale": 2.0}),
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
    pair = losses.Completions(*(x[:, :2] for x in groups()[:-1]), groups().batch_kl)
    chosen = {str(case): losses.resolve(case[0], **case[1]) for case in OBJECTIVE_CASES}
    chosen["dpo"] = losses.resolve("dpo", beta_pi=0.1)
    results = jax.jit(lambda c: {key: loss.loss(c) for key, loss in chosen.items()})(pair)
    for key, loss in chosen.items():
        name = "f_dpo_reverse_kl" if key == "dpo" else loss.name
        expected = published_group(name, loss.options, pair)
        assert_allclose(results[key], expected, rtol=tolerances.LOSS_FLOAT32, err_msg=key)


def test_dpo_side_losses_against_their_published_formulas():
    pair = losses.Completions(*(x[:, :2] for x in groups(np.float64)[:-1]), np.array(0.0))
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
    halves = [losses.Completions(*(x[b : b + 1] for x in group[:-1]), group.batch_kl) for b in range(B)]
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


def test_bpo_starts_with_the_slope_of_dpo_whatever_its_lambda_and_is_symmetric_in_it():
    at_start = losses.Completions(
        *(np.array([[-3.0, -7.0]]) for _ in range(2)), np.array([[4.0, 5.0]]), np.eye(2)[:1], 0.0
    )
    slopes = {
        power: in_float64(value_and_grad, losses.resolve("bpo", basu_lambda=power), at_start)[1]
        for power in (-0.75, -0.25, 0.0, 1.0, 2.0)
    }
    (_, dpo) = in_float64(value_and_grad, losses.resolve("dpo", beta_pi=0.1), at_start)
    for power, slope in slopes.items():
        assert_allclose(slope, dpo, rtol=1e-9, err_msg=str(power))
    away = groups(np.float64)
    one, other = (in_float64(value_and_grad, losses.resolve("bpo", basu_lambda=x), away)[1] for x in (-0.75, -0.25))
    assert_allclose(one, other, rtol=1e-9)


def matched_ratios(h, h_prime, completions, beta):
    """BPO's objective h'(R) R - h(R) - h'(1/R), R = exp(-β(Δ_w - Δ_l)), which is D_h(R_data ‖ R) but for a constant."""
    delta_BK = completions.logps_BK - completions.reference_logps_BK
    rows_B, chosen_B = jnp.arange(len(delta_BK)), jnp.argmax(completions.rewards_BK, axis=1)
    ratio_B = jnp.exp(-beta * (delta_BK[rows_B, chosen_B] - delta_BK[rows_B, 1 - chosen_B]))
    return h_prime(ratio_B) * ratio_B - h(ratio_B) - h_prime(1 / ratio_B)


@pytest.mark.parametrize(
    ("name", "options", "h", "h_prime"),
    [
        # h of logistic regression is DPO; Basu's h over s (λ + 1), which is what the scaling of SBA is, is `bpo`
        (
            "dpo",
            {},
            lambda r: (r * jnp.log(r) - (1 + r) * jnp.log1p(r)) / 2,
            lambda r: (jnp.log(r) - jnp.log1p(r)) / 2,
        ),
        (
            "bpo",
            {"basu_lambda": 1.5},
            lambda r: (r**2.5 - r) / (1.5 * 2.5 * 4.0),
            lambda r: (2.5 * r**1.5 - 1) / (1.5 * 2.5 * 4.0),
        ),
    ],
)
def test_dpo_and_bpo_are_one_ratio_matching_objective_with_two_h(name, options, h, h_prime):
    """The reduction of arXiv 2505.19601: values up to a constant, gradients exactly."""
    pairs = groups(np.float64)
    pairs = pairs._replace(**{field: getattr(pairs, field)[:, :2] for field in pairs._fields if field != "batch_kl"})
    loss = losses.resolve(name, beta_pi=0.3, **options)

    def objective(completions):
        return matched_ratios(h, h_prime, completions, 0.3)

    def both(of):
        return of(pairs), jax.grad(lambda x: jnp.sum(of(pairs._replace(logps_BK=x))))(jnp.asarray(pairs.logps_BK))

    values, slopes = in_float64(both, loss.loss)
    expected, expected_slopes = in_float64(both, objective)
    assert_allclose(values - values[0], expected - expected[0], rtol=1e-9, atol=1e-12)
    assert_allclose(slopes, expected_slopes, rtol=1e-9)
