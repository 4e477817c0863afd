"""The table of objectives that are not a divergence between p and q, on the same inputs, for comparison.

Each row is a score per completion, a link that turns the scores of a chosen and of another completion into a loss, and,
in some, a term on the chosen completion alone. A group of K completions has K-1 pairs, the chosen one against each
other one, and its loss is their mean; K = 2 is the published formula. A reward model (`of_scores`) learns from every
pair of a group whose rewards differ. DPO, cDPO, EXO and SimPO are rows of `f_divergences.py`.

Letters of the equations: w chosen, l other; logp = Σ_t log π; ℓ = logp/|y|; Δ = logp - logp_ref; m = score_w - score_l.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jaxtyping import Float

from fpo_jax.losses import numerics
from fpo_jax.losses.scores import SCORES, Completions, Options, mean_logps
from fpo_jax.types import Array

LETTERS = "w chosen, l other; logp sum, ℓ mean per token, Δ = logp - logp_ref"  # of the equations

# A mean log-prob above this counts as this in the odds p/(1-p): p = 1 has no finite odds. Gradient <= 1e6.
HIGHEST_MEAN_LOGP = -1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """One row. `options` are its own, with defaults; every row but those of scores also has tie_policy."""

    name: str
    source: str
    equation: str
    options: Options
    score: Callable[[Completions, Array, Options], Array]  # (completions, chosen_BK, options) -> [B, K]
    reward: Callable[[Completions, Options], Array]  # implied rewards, for metrics
    pair: Callable[[Array, Array, Options], Array] | None  # (score_w, score_l, options); None: K >= 1
    chosen_term: Callable[[Completions, Options], Array] | None = None  # [B, K], counted at the chosen completion
    needs_reference: bool = False
    needs_batch_kl: bool = False
    length_normalized: bool = False  # scores are per token
    over_tokens: bool = False  # the step's loss is the sum over its groups by their chosen tokens, not by groups
    family: str = ""  # the row of SCORES whose β and γ are its own too; "" = it shares no option with another loss
    of_scores: bool = False  # trains a reward model: `logps_BK` holds its scores, which know neither tokens nor nats


def over_pairs(
    pair: Callable[[Array, Array], Array],
    scores_BK: Float[Array, "B K"],
    chosen_BK: Float[Array, "B K"],
) -> Float[jax.Array, " B"]:
    """Return the mean of pair(score of chosen, score of other) over the K-1 pairs of each group.

    Args:
        pair: elementwise loss of a chosen and another score.
        scores_BK: one score per completion, K >= 2.
        chosen_BK: shares of the chosen label; a shared label averages over its holders.

    >>> over_pairs(lambda win, lose: win - lose, jnp.array([[5.0, 3.0, 2.0]]), jnp.array([[1.0, 0.0, 0.0]])).tolist()
    [2.5]
    """
    completions = scores_BK.shape[-1]
    losses_B = jnp.zeros(scores_BK.shape[0], scores_BK.dtype)
    for chosen in range(completions):
        is_chosen_BK = jax.lax.broadcasted_iota(jnp.int32, scores_BK.shape, 1) == chosen
        score_B1, share_B1 = (
            jnp.sum(jnp.where(is_chosen_BK, x_BK, 0.0), axis=1, keepdims=True) for x_BK in (scores_BK, chosen_BK)
        )
        weights_BK = jnp.where(is_chosen_BK, 0.0, share_B1 / (completions - 1))
        losses_B += jnp.sum(weights_BK * pair(score_B1, scores_BK), axis=1)
    return losses_B


def over_ranked_pairs(
    pair: Callable[[Array, Array], Array],
    scores_BK: Float[Array, "B K"],
    rewards_BK: Float[Array, "B K"],
) -> Float[jax.Array, " B"]:
    """Return the mean of pair(score of better, score of worse) over the pairs of each group whose rewards differ.

    Args:
        pair: elementwise loss of a better and a worse score.
        scores_BK: one score per completion, K >= 2.
        rewards_BK: what is better; a group whose rewards are all equal has no pair, and loss 0.

    >>> scores_BK, rewards_BK = jnp.array([[5.0, 3.0, 2.0]]), jnp.array([[2.0, 1.0, 1.0]])
    >>> over_ranked_pairs(lambda win, lose: win - lose, scores_BK, rewards_BK).tolist()  # (5 - 3 + 5 - 2) / 2
    [2.5]
    """
    losses_B = pairs_B = jnp.zeros(scores_BK.shape[0], scores_BK.dtype)
    for better in range(scores_BK.shape[-1]):
        is_better_BK = jax.lax.broadcasted_iota(jnp.int32, scores_BK.shape, 1) == better
        score_B1, reward_B1 = (
            jnp.sum(jnp.where(is_better_BK, x_BK, 0.0), axis=1, keepdims=True) for x_BK in (scores_BK, rewards_BK)
        )
        is_worse_BK = rewards_BK < reward_B1
        losses_B += jnp.sum(jnp.where(is_worse_BK, pair(score_B1, scores_BK), 0.0), axis=1)
        pairs_B += jnp.sum(is_worse_BK, axis=1).astype(pairs_B.dtype)
    return losses_B / jnp.maximum(pairs_B, 1.0)


def binary_cross_entropy(scores: Float[Array, "*shape"], labels: Float[Array, "*shape"]) -> Float[jax.Array, "*shape"]:
    """Return -y log σ(r) - (1 - y) log σ(-r), elementwise; labels y in [0, 1].

    >>> [round(float(x), 4) for x in binary_cross_entropy(jnp.array([0.0, 2.0]), jnp.array([1.0, 0.0]))]
    [0.6931, 2.1269]
    """
    scores, labels = numerics.as_float(scores, labels)
    return labels * jax.nn.softplus(-scores) + (1.0 - labels) * jax.nn.softplus(scores)


def log_odds(mean_logps_BK: Float[Array, "B K"]) -> Float[jax.Array, "B K"]:
    """Return log(p/(1-p)) with p = exp(ℓ) (ORPO, arXiv 2403.07691); ℓ above -1e-6 counts as -1e-6.

    >>> round(float(log_odds(jnp.log(jnp.array([[0.75]])))[0, 0]), 4)  # log 3
    1.0986
    """
    (mean_logps_BK,) = numerics.as_float(mean_logps_BK)
    capped_BK = jnp.minimum(mean_logps_BK, HIGHEST_MEAN_LOGP)
    return capped_BK - jnp.log(-numerics.expm1(capped_BK))


def log_sigmoid_link(margins: Float[Array, "*shape"], *, label_smoothing: float) -> Float[jax.Array, "*shape"]:
    """Return -(1-ls) log σ(m) - ls log σ(-m); label_smoothing ls in [0, ½) is the probability of a wrong label.

    >>> round(float(log_sigmoid_link(jnp.array(0.0), label_smoothing=0.25)), 4)  # log 2
    0.6931
    """
    return (1 - label_smoothing) * jax.nn.softplus(-margins) + label_smoothing * jax.nn.softplus(margins)


def hinge_link(margins: Float[Array, "*shape"], *, delta: float) -> Float[jax.Array, "*shape"]:
    """Return max(0, δ - m); gradient 0 at the kink.

    >>> hinge_link(jnp.array([0.25, 3.0]), delta=1.0).tolist()
    [0.75, 0.0]
    """
    return jax.nn.relu(delta - margins)


def squared_link(margins: Float[Array, "*shape"], *, tau: float) -> Float[jax.Array, "*shape"]:
    """Return (m - 1/(2τ))² (IPO).

    >>> float(squared_link(jnp.array(4.0), tau=0.25))
    4.0
    """
    return jnp.square(margins - 1 / (2 * tau))


def kto_link(
    chosen: Float[Array, "*#shape"],
    other: Float[Array, "*#shape"],
    *,
    desirable_weight: float,
    undesirable_weight: float,
) -> Float[jax.Array, "..."]:
    """Return λ_w (1 - σ(s_w)) + λ_l (1 - σ(-s_l)), scores s = βΔ - z (KTO, arXiv 2402.01306).

    SimPO's table prints +λ_l σ(z - βΔ_l) as the second term, which would raise the rejected completion; this is KTO's.

    >>> float(kto_link(jnp.array(0.0), jnp.array(0.0), desirable_weight=1.0, undesirable_weight=3.0))
    2.0
    """
    return desirable_weight * jax.nn.sigmoid(-chosen) + undesirable_weight * jax.nn.sigmoid(other)


def bregman_link(
    margins: Float[Array, "*shape"], *, basu_lambda: float, gradient_scale: float
) -> Float[jax.Array, "..."]:
    """Return (R^(λ+1)/(λ+1) - (R^-λ - 1)/λ) / s with R = exp(-m): BPO with scaled Basu's power divergence.

    Its slope at m is -(R^(λ+1) + R^-λ)/s; s = 4 gives it the slope of -log σ(m) at 0. λ and -1 - λ are the same loss;
    λ = 0 is KLIEP's R + log R. It is the ratio-matching objective h'(R) R - h(R) - h'(1/R) with Basu's
    h = (R^(λ+1) - R)/λ, over s (λ + 1); h = (R log R - (1+R) log(1+R))/2 makes the same objective DPO, which is no
    member of this one. The paper's formula lacks the constant 1/(sλ), which keeps λ = 0 finite. Powers of R
    saturate (`numerics.saturating_exp`).

    >>> round(float(bregman_link(jnp.array(0.0), basu_lambda=1.0, gradient_scale=4.0)), 4)
    0.125
    """
    shrinking = numerics.saturating_exp(-(basu_lambda + 1.0) * margins) / (basu_lambda + 1.0)
    return (shrinking - numerics.box_cox(margins, power=basu_lambda)) / gradient_scale


def _log_ratio(c):
    return c.logps_BK - c.reference_logps_BK


def _mean_logp(c):
    return mean_logps(c.logps_BK, c.lengths_BK)


def _power_reward(c, o):
    """β (1 - p̄^(-a))/a with p̄ = exp(ℓ), AlphaPO's reward; β ℓ at a = 0."""
    return o["beta"] * numerics.box_cox(_mean_logp(c), power=-o["reward_alpha"])


def _kto_score(c, chosen_BK, o):
    drift = jax.lax.stop_gradient(jnp.maximum(c.batch_kl, 0.0))
    return o["beta_pi"] * _log_ratio(c) - o["beta_pi"] * drift


def _log_sigmoid(win, lose, o):
    return log_sigmoid_link(win - lose, label_smoothing=o["label_smoothing"])


def _f_dpo(name: str, equation: str, f_prime: Callable, **options: float) -> Objective:
    """Return a row of f-DPO: f generalises the *constraint* KL(π‖π_ref), u = π/π_ref of a whole completion.

    f-PO's f generalises the matching divergence and keeps the optimum; this changes the optimum. u^a saturates above
    e^30 (`numerics.saturating_exp`): sequence-level ratios overflow, which a group's softmax never does.
    """
    return Objective(
        name=f"f_dpo_{name}",
        source="f-DPO, arXiv 2309.16240",
        equation=f"-log σ(β f'(u_w) - β f'(u_l)), u = exp(Δ), f'(u) = {equation}",
        options={"beta_pi": 0.1, **options, "label_smoothing": 0.0},
        score=lambda c, chosen_BK, o: o["beta_pi"] * f_prime(_log_ratio(c), o),
        reward=SCORES["log_ratio"].reward,
        pair=_log_sigmoid,
        needs_reference=True,
    )


_ROWS = (
    Objective(
        name="sft",
        source="maximum likelihood",
        equation="-logp_w, averaged over the tokens of the step",
        options={},
        score=lambda c, chosen_BK, o: _mean_logp(c),
        reward=lambda c, o: _mean_logp(c),
        pair=None,
        chosen_term=lambda c, o: -c.logps_BK,
        length_normalized=True,
        over_tokens=True,
    ),
    Objective(
        name="bradley_terry",
        source="reward model; Bradley and Terry 1952",
        equation="-log σ(r_w - r_l), r the score; over every pair of a group whose rewards differ",
        options={},
        score=lambda c, chosen_BK, o: c.logps_BK,
        reward=lambda c, o: c.logps_BK,
        pair=lambda win, lose, o: log_sigmoid_link(win - lose, label_smoothing=0.0),
        of_scores=True,
    ),
    Objective(
        name="binary_cross_entropy",
        source="classifier, as the oracle of EXO's IMDB track",
        equation="-y log σ(r) - (1-y) log σ(-r), r the score, y the reward in [0, 1]; of the chosen completion",
        options={},
        score=lambda c, chosen_BK, o: c.logps_BK,
        reward=lambda c, o: c.logps_BK,
        pair=None,
        chosen_term=lambda c, o: binary_cross_entropy(c.logps_BK, c.rewards_BK),
        of_scores=True,
    ),
    Objective(
        name="ipo",
        source="IPO, arXiv 2310.12036",
        equation="(Δ_w - Δ_l - 1/(2τ))²",
        options={"tau": 0.1},
        score=lambda c, chosen_BK, o: _log_ratio(c),
        reward=lambda c, o: o["tau"] * _log_ratio(c),
        pair=lambda win, lose, o: squared_link(win - lose, tau=o["tau"]),
        needs_reference=True,
    ),
    Objective(
        name="slic",
        source="SLiC-HF, arXiv 2305.10425",
        equation="max(0, δ - logp_w + logp_l) - λ logp_w",
        options={"delta": 1.0, "chosen_nll_weight": 0.1},
        score=lambda c, chosen_BK, o: c.logps_BK,
        reward=lambda c, o: c.logps_BK,
        pair=lambda win, lose, o: hinge_link(win - lose, delta=o["delta"]),
        chosen_term=lambda c, o: -o["chosen_nll_weight"] * c.logps_BK,
    ),
    Objective(
        name="hinge",
        source="SimPO's code",
        equation="max(0, 1 - β(ℓ_w - ℓ_l - γ/β))",
        options={"beta": 2.0, "gamma_beta_ratio": 0.25},
        score=SCORES["mean_logp"].score,
        reward=SCORES["mean_logp"].reward,
        pair=lambda win, lose, o: hinge_link(win - lose, delta=1.0),
        length_normalized=True,
        family="mean_logp",
    ),
    Objective(
        name="rrhf",
        source="RRHF, arXiv 2304.05302",
        equation="max(0, ℓ_l - ℓ_w) - λ logp_w",
        options={"chosen_nll_weight": 1.0},
        score=lambda c, chosen_BK, o: _mean_logp(c),
        reward=lambda c, o: _mean_logp(c),
        pair=lambda win, lose, o: hinge_link(win - lose, delta=0.0),
        chosen_term=lambda c, o: -o["chosen_nll_weight"] * c.logps_BK,
        length_normalized=True,
    ),
    Objective(
        name="cpo",
        source="CPO, arXiv 2401.08417",
        equation="-log σ(β logp_w - β logp_l) - λ logp_w",
        options={"beta": 0.1, "chosen_nll_weight": 1.0, "label_smoothing": 0.0},
        score=lambda c, chosen_BK, o: o["beta"] * c.logps_BK,
        reward=lambda c, o: o["beta"] * c.logps_BK,
        pair=_log_sigmoid,
        chosen_term=lambda c, o: -o["chosen_nll_weight"] * c.logps_BK,
    ),
    Objective(
        name="orpo",
        source="ORPO, arXiv 2403.07691",
        equation="-ℓ_w - λ log σ(log odds_w - log odds_l), odds = p/(1-p), p = exp(ℓ)",
        options={"odds_weight": 0.1},
        score=lambda c, chosen_BK, o: log_odds(_mean_logp(c)),
        reward=lambda c, o: o["odds_weight"] * _mean_logp(c),
        pair=lambda win, lose, o: o["odds_weight"] * log_sigmoid_link(win - lose, label_smoothing=0.0),
        chosen_term=lambda c, o: -_mean_logp(c),
        length_normalized=True,
    ),
    Objective(
        name="r_dpo",
        source="R-DPO, arXiv 2403.19159",
        equation="-log σ(β(Δ_w - Δ_l) + a|y_w| - a|y_l|)",
        options={"beta_pi": 0.1, "length_penalty": 0.05, "label_smoothing": 0.0},
        score=lambda c, chosen_BK, o: o["beta_pi"] * _log_ratio(c) + o["length_penalty"] * c.lengths_BK,
        reward=SCORES["log_ratio"].reward,
        pair=_log_sigmoid,
        needs_reference=True,
    ),
    Objective(
        name="kto",
        source="KTO, arXiv 2402.01306",
        equation="λ_w (1 - σ(βΔ_w - z)) + λ_l (1 - σ(z - βΔ_l)), z = β max(0, mean Δ of the step)",
        options={"beta_pi": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
        score=_kto_score,
        reward=SCORES["log_ratio"].reward,
        pair=lambda win, lose, o: kto_link(
            win, lose, desirable_weight=o["desirable_weight"], undesirable_weight=o["undesirable_weight"]
        ),
        needs_reference=True,
        needs_batch_kl=True,
    ),
    Objective(
        name="alphapo_length",
        source="AlphaPO, arXiv 2501.03884 (not the original's `alphapo`, which is the alpha-divergence)",
        equation="-log σ(β r_w - β r_l - γ), r = (1 - exp(ℓ)^(-a))/a; a = 0 is SimPO",
        options={"beta": 2.0, "gamma_beta_ratio": 0.25, "reward_alpha": 0.25, "label_smoothing": 0.0},
        score=lambda c, chosen_BK, o: _power_reward(c, o) - o["beta"] * o["gamma_beta_ratio"] * chosen_BK,
        reward=_power_reward,
        pair=_log_sigmoid,
        length_normalized=True,
        family="mean_logp",
    ),
    Objective(
        name="bpo",
        source="BPO with scaled Basu's power divergence (SBA), arXiv 2505.19601",
        equation="(R^(λ+1)/(λ+1) - (R^-λ - 1)/λ)/s, R = exp(-β(Δ_w - Δ_l))",
        options={"beta_pi": 0.1, "basu_lambda": 1.0, "gradient_scale": 4.0},
        score=lambda c, chosen_BK, o: o["beta_pi"] * _log_ratio(c),
        reward=SCORES["log_ratio"].reward,
        pair=lambda win, lose, o: bregman_link(
            win - lose, basu_lambda=o["basu_lambda"], gradient_scale=o["gradient_scale"]
        ),
        needs_reference=True,
    ),
    _f_dpo("reverse_kl", "log u + 1 (this is DPO)", lambda log_u, o: log_u),
    _f_dpo("forward_kl", "-1/u", lambda log_u, o: -numerics.saturating_exp(-log_u)),
    _f_dpo("jensen_shannon", "log(2u/(1 + u))", lambda log_u, o: jnp.log(2.0) - jax.nn.softplus(-log_u)),
    _f_dpo(
        "alpha",
        "(1 - u^(-a))/a; a = 0 is reverse_kl, 1 forward_kl; TRL's alpha is 1 - a",
        lambda log_u, o: numerics.box_cox(log_u, power=-o["constraint_alpha"]),
        constraint_alpha=0.5,
    ),
)

OBJECTIVES: Mapping[str, Objective] = MappingProxyType({row.name: row for row in _ROWS})
