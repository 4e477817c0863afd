"""Win rates with intervals, and what they would be at equal length."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

RESAMPLES = 10_000
REFITS = 1_000


def bootstrap(
    outcomes_P: Float[np.ndarray, " P"], clusters_P: Int[np.ndarray, " P"], *, seed: int = 0
) -> tuple[float, float, float]:
    """Return (mean, low, high): the 95 % percentile interval over resampled clusters.

    Args:
        outcomes_P: 1 win, 0.5 tie, 0 loss of every comparison.
        clusters_P: which prompt each belongs to: answers to one prompt are not independent, and are drawn together.
        seed: of the resampling.

    Raises:
        ValueError: no outcomes.
    """
    if not len(outcomes_P):
        raise ValueError("no comparison has a verdict; there is no rate.")
    sums_C, sizes_C = _by_cluster(outcomes_P, clusters_P)
    random = np.random.default_rng(seed)
    rates = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        drawn = random.integers(0, len(sums_C), len(sums_C))
        rates[index] = sums_C[drawn].sum() / sizes_C[drawn].sum()
    low, high = np.quantile(rates, [0.025, 0.975])
    return float(outcomes_P.mean()), float(low), float(high)


def length_controlled(
    outcomes_P: Float[np.ndarray, " P"],
    lengths_P2: Float[np.ndarray, "P 2"],
    clusters_P: Int[np.ndarray, " P"],
    *,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return (rate, low, high): the win rate at equal length, by a logistic regression on the difference of lengths.

        P(win) = σ(a + b z),   z = (length - baseline's length) / their standard deviation,   rate = σ(a)

    where a, b minimise the cross-entropy of the outcomes, a tie being one half, plus b²/2: a standard normal prior
    keeps b finite where length alone would explain everything. The interval is that of `bootstrap` over 1,000 refits.
    This is the idea of length-controlled AlpacaEval (arXiv 2404.04475) without its difficulty of every instruction,
    which only `fpo alpaca_eval` has.

    Args:
        outcomes_P: as for bootstrap.
        lengths_P2: of the candidate's and the baseline's answer.
        clusters_P: as for bootstrap.
        seed: of the resampling.
    """
    differences_P = lengths_P2[:, 0] - lengths_P2[:, 1]
    spread = differences_P.std()
    if spread == 0:
        return bootstrap(outcomes_P, clusters_P, seed=seed)
    z_P = differences_P / spread
    rate = _at_zero(outcomes_P, z_P, np.ones_like(z_P))
    random, (names, places_P) = np.random.default_rng(seed), np.unique(clusters_P, return_inverse=True)
    rates = np.empty(REFITS)
    for index in range(REFITS):
        drawn = np.bincount(random.integers(0, len(names), len(names)), minlength=len(names))
        rates[index] = _at_zero(outcomes_P, z_P, drawn[places_P].astype(float))
    low, high = np.quantile(rates, [0.025, 0.975])
    return rate, float(low), float(high)


def both(
    outcomes_P: Float[np.ndarray, " P"],
    lengths_P2: Float[np.ndarray, "P 2"],
    clusters_P: Int[np.ndarray, " P"],
    *,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Return `win_rate` and `length_controlled_win_rate`, each with mean, low and high; arguments as for the latter."""
    found = {
        "win_rate": bootstrap(outcomes_P, clusters_P, seed=seed),
        "length_controlled_win_rate": length_controlled(outcomes_P, lengths_P2, clusters_P, seed=seed),
    }
    return {name: dict(zip(("mean", "low", "high"), one, strict=True)) for name, one in found.items()}


def shown(found: Mapping[str, Any], name: str) -> str:
    """Return one of the rates of `both` in percent with its interval, "" where there is none.

    >>> shown({"win_rate": {"mean": 0.5, "low": 0.25, "high": 0.75}}, "win_rate")
    '50.0% (25.0%, 75.0%)'
    """
    return "{mean:.1%} ({low:.1%}, {high:.1%})".format(**found[name]) if name in found else ""


def _by_cluster(values_P: np.ndarray, clusters_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    _, places_P = np.unique(clusters_P, return_inverse=True)
    return np.bincount(places_P, weights=values_P), np.bincount(places_P).astype(float)


def _at_zero(outcomes_P: np.ndarray, z_P: np.ndarray, weights_P: np.ndarray) -> float:
    """Return σ(a) of the fit, by Newton's method; all won or all lost has no finite a, and is itself the rate."""
    mean = float((weights_P * outcomes_P).sum() / weights_P.sum())
    if mean in (0.0, 1.0):
        return mean
    inputs_P2 = np.stack([np.ones_like(z_P), z_P], axis=1)
    prior_2 = np.array([0.0, 1.0])
    fit_2 = np.array([np.log(mean / (1 - mean)), 0.0])
    for _ in range(100):
        chance_P = 1 / (1 + np.exp(-inputs_P2 @ fit_2))
        slope_2 = inputs_P2.T @ (weights_P * (chance_P - outcomes_P)) + prior_2 * fit_2
        curve_P = weights_P * chance_P * (1 - chance_P)
        step_2 = np.linalg.solve((inputs_P2.T * curve_P) @ inputs_P2 + np.diag(prior_2) + 1e-12 * np.eye(2), slope_2)
        fit_2 = fit_2 - step_2 / max(1.0, np.abs(step_2).max())  # no step is longer than 1
        if np.abs(step_2).max() < 1e-12:
            break
    return float(1 / (1 + np.exp(-fit_2[0])))
