"""Names and options of `fpo_jax.losses`: what resolves, what each loss reads, and every error."""

import functools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from fpo_jax import losses
from fpo_jax.losses import __main__ as losses_program
from tests import tolerances
from tests.losses_cases import LOSSES, B, K, each_loss, groups

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
        ("exo", {"tie_policy": "last"}, r"tie_policy='last' is not one of: uniform, first, second"),
        ("exo", {"target": "reward"}, r"target='reward' is not one of: preference, rewards"),
        ("exo-rw", {"log_clamp": -10.0}, r"log_clamp=-10.0 contradicts 'exo-rw', which fixes log_clamp=-inf"),
        ("dpo-pref", {"epsilon": 1e-3}, r"epsilon=0.001 contradicts 'dpo-pref'.*use the name 'kl_target_policy'"),
        ("alphapo", {"score": "log_ratio"}, r"score='log_ratio' contradicts 'alphapo', which fixes score='mean_logp'"),
        ("dpo", {"score": "mean_logp"}, r"score='mean_logp' contradicts 'dpo', which fixes score='log_ratio'"),
        ("dpo", {"target": "rewards"}, r"target='rewards' contradicts 'dpo'.*use the name 'kl_target_policy'"),
        ("cdpo", {"score": "mean_logp"}, r"score='mean_logp' contradicts 'cdpo', which fixes score='log_ratio'"),
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
    alone = losses.Completions(*(x[:, :1] for x in groups()[:-1]), np.float32(0))
    assert_allclose(losses.resolve("sft").loss(alone), [3.0, 4.0], rtol=tolerances.FLOAT32)
    with pytest.raises(ValueError, match=r"K=1 completions holds nothing to compare; 'ipo' needs K >= 2"):
        losses.resolve("ipo").loss(alone)
    with pytest.raises(ValueError, match=r"completions of different shapes: .*'rewards_BK': \(2, 2\)"):
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
    for name, meaning in losses.IN_TRL.items():
        assert name in losses.PRESETS and meaning in shown, name
    for row in (*losses.DIVERGENCES.values(), *losses.OBJECTIVES.values()):
        assert row.equation in shown


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["sigmoid", "beta=0.1"],
            ["sigmoid is kl_target_policy, with no reference", "beta=0.1, gamma_beta_ratio=0.25"],
        ),
        (["sigmoid"], ["s = β (ℓ - [chosen] γ/β)", "not what TRL calls sigmoid: there DPO, with a reference"]),
        (
            ["dpo"],
            ["dpo is kl_target_policy, with a reference", "s = β_π Δ", "epsilon=0, normalize=False", "beta_pi=0.5"],
        ),
        (["hinge"], ["not what TRL calls hinge: there SLiC's hinge", "with a reference and sums"]),
        (["ipo"], ["(Δ_w - Δ_l - 1/(2τ))²", "not what TRL calls ipo: there means over tokens", "tau=0.1"]),
        (["exo-rw"], ["log_clamp=-inf", "q = max(softmax(r/β_r), exp(log_clamp))"]),
        (["cdpo", "normalize=true"], ["epsilon=0.1, normalize=True"]),
    ],
    ids=str,
)
def test_one_loss_is_printed_with_all_it_is(words, expected, capsys):
    assert losses_program.main(words) == 0
    shown = capsys.readouterr().out
    for text in expected:
        assert text in shown
    assert all(f"{key}=" in shown for key in losses.resolve(words[0]).options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sigmoi"], "unknown loss 'sigmoi'; nearest: sigmoid"),
        (["hinge", "1.0"], "1.0 is no option; write key=value"),
        (["hinge", "beta=much"], "beta='much' is not a number"),
        (["dpo", "normalize=perhaps"], "normalize='perhaps' is not a bool"),
        (["dpo", "score=mean_logp"], "contradicts 'dpo'"),
    ],
)
def test_a_loss_that_cannot_be_printed(words, message, capsys):
    assert losses_program.main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", losses.PRESETS)
def test_a_loss_describes_itself_in_json(name):
    loss = losses.resolve(name)
    record = json.loads(json.dumps(losses.described(loss), allow_nan=False))
    assert (record["name"], record["reference"]) == (loss.name, loss.needs_reference)
    assert {key: type(loss.options[key])(value) for key, value in record["options"].items()} == dict(loss.options)
    row = losses.DIVERGENCES.get(loss.name) or losses.OBJECTIVES[loss.name]
    assert record["equation"].startswith(row.equation)


def test_a_loss_is_a_static_argument():
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(loss, completions):
        traced.append(loss)
        return loss.loss(completions)

    by_two_names = losses.resolve("alphapo-rw", alpha=0.025), losses.resolve("alpha", target="rewards", alpha=0.025)
    for loss in by_two_names:
        run(loss, groups())
    assert len(traced) == 1, "the same loss by two names compiles once"
    run(losses.resolve("alphapo-rw", alpha=0.03), groups())
    assert len(traced) == 2


def test_losses_say_what_they_need():
    needs = {name: losses.resolve(name).needs_reference for name in losses.PRESETS}
    free = {name for name, reference in needs.items() if not reference}
    of_scores = {name for name in losses.PRESETS if losses.resolve(name).of_scores}
    assert of_scores == {"bradley_terry", "binary_cross_entropy"}
    free -= of_scores
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
    "basu_lambda": 0.3,
    "gradient_scale": 2.0,
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
        if key == "beta" and {"beta_pi", "tau"} & loss.options.keys():  # theirs: test_beta_is_the_beta_of_every_loss
            continue
        if key not in loss.options:
            value = next(iter(value)) if isinstance(value, dict) else value
            first = "no option" if loss.of_scores else "temperature, "
            with pytest.raises(ValueError, match=f"'{key}' is not used by '{loss.name}'.*; it uses: {first}"):
                losses.resolve(loss.name, **settings_of, **{key: value})
            continue
        assert loss.options[key] != value
        # Hard labels have nothing to normalise (an error of its own): compare two soft ones, with one chosen: between
        # two labels of ½ and of 0.35 total variation does not change where p lies between them.
        extra = {"epsilon": 0.3, "tie_policy": "second"} if key == "normalize" else {}
        changed = losses.resolve(loss.name, **{**settings_of, **extra, key: value})
        if key in ("temperature", "sft_weight"):  # applied by logps and step
            assert getattr(changed, key) == value != getattr(loss, key)
            continue
        before = losses.resolve(loss.name, **settings_of, **extra).loss(tied) if extra else base
        assert np.abs(before - changed.loss(tied)).max() > tolerances.DIFFERENT, key


# --- a recipe's options with another loss

FREE = {"alpha": 0.99, "beta": 2.5, "gamma_beta_ratio": 0.3, "tie_policy": "second"}  # of alphapo
REWARDED = {"alpha": 0.1, "beta_pi": 0.35, "beta_r": 0.1, "temperature": 0.8}  # of alphapo-rw
_SIMPO = {"beta": 2.5, "gamma_beta_ratio": 0.3, "tie_policy": "second"}


@pytest.mark.parametrize(
    ("to", "expected"),
    [
        ("alphapo", FREE),
        ("sigmoid", _SIMPO),
        ("simpo", _SIMPO),
        ("hinge", _SIMPO),
        ("alphapo_length", _SIMPO),
        ("exo", {"score": "mean_logp", **_SIMPO}),
        ("jensen_shannon", {"score": "mean_logp", **_SIMPO}),
        ("alpha", {"score": "mean_logp", **FREE}),
        *((name, {}) for name in ("dpo", "cdpo", "dpo-pref", "exo-pref", "ipo", "kto", "cpo", "r_dpo", "orpo", "rrhf")),
        *((name, {}) for name in ("slic", "sft", "bradley_terry", "f_dpo_alpha", "f_dpo_reverse_kl")),
    ],
)
def test_a_reference_free_recipe_gives_another_loss_what_means_the_same(to, expected):
    assert losses.carried_over(FREE, of="alphapo", to=to) == expected


@pytest.mark.parametrize(
    ("to", "expected"),
    [
        ("exo-rw", {"beta_pi": 0.35, "beta_r": 0.1, "temperature": 0.8}),
        ("jeffreys", {"target": "rewards", "beta_pi": 0.35, "beta_r": 0.1, "temperature": 0.8}),
        ("dpo", {"beta_pi": 0.35, "temperature": 0.8}),
        ("alphapo-pref", {"alpha": 0.1, "beta_pi": 0.35, "temperature": 0.8}),
        *((name, {}) for name in ("sigmoid", "hinge", "ipo", "kto", "r_dpo", "cpo", "sft", "f_dpo_forward_kl")),
    ],
)
def test_a_recipe_with_a_reference_gives_another_loss_what_means_the_same(to, expected):
    assert losses.carried_over(REWARDED, of="alphapo-rw", to=to) == expected


def test_what_a_name_fixes_or_defaults_otherwise_is_its_own():
    assert losses.carried_over({"epsilon": 1e-3}, of="alphapo-pref", to="exo-pref") == {"epsilon": 1e-3}
    assert losses.carried_over({"epsilon": 1e-3}, of="alphapo-pref", to="dpo") == {}, "hard labels are what DPO is"
    assert losses.carried_over({"log_clamp": -20.0}, of="alphapo-rw", to="exo-rw") == {}
    assert losses.carried_over({"weight": 0.3}, of="jensen_shannon", to="jspo-pref") == {}
    assert losses.carried_over({"beta": 3.0}, of="hinge", to="exo") == {"score": "mean_logp", "beta": 3.0}
    with pytest.raises(ValueError, match="unknown loss 'alphapo-wr'; nearest: alphapo-rw"):
        losses.carried_over(FREE, of="alphapo", to="alphapo-wr")


@pytest.mark.parametrize("of", [name for name in losses.PRESETS])
def test_every_loss_takes_what_any_other_gives_it(of):
    own = {key: value for key, value in losses.resolve(of).options.items() if key not in losses.PRESETS[of].fixed}
    for to in losses.PRESETS:
        losses.resolve(to, **losses.carried_over(own, of=of, to=to))


@each_loss
def test_beta_is_the_beta_of_every_loss_that_has_one(loss):
    settings = {key: loss.options[key] for key in ("target", "score") if key in loss.options}
    own = next((key for key in ("beta", "beta_pi", "tau") if key in loss.options), None)
    if own is None:
        with pytest.raises(ValueError, match=f"'beta' is not used by '{loss.name}'"):
            losses.resolve(loss.name, beta=0.7, **settings)
        return
    assert losses.resolve(loss.name, beta=0.7, **settings) == losses.resolve(loss.name, **{own: 0.7}, **settings)
    if own != "beta":
        with pytest.raises(ValueError, match=rf"beta=0.7 is {own} of '{loss.name}', which is given too; leave one out"):
            losses.resolve(loss.name, **{"beta": 0.7, own: 0.5}, **settings)


def test_beta_is_carried_over_under_its_own_name():
    assert losses.carried_over({"beta": 0.35}, of="exo-pref", to="alphapo-pref") == {"beta_pi": 0.35}
