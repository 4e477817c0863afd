"""The scores s of the K completions, p = softmax(s): log-probs in, one number per completion out.

Log-probs come in already summed over the tokens of a completion and already at the sampling temperature: logits are
divided by it before their log-softmax, in `logprobs`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from fpo_jax.losses import numerics
from fpo_jax.types import Array

Options = Mapping[str, Any]


class Completions(NamedTuple):
    """B groups of K completions: all that any loss reads."""

    logps_BK: Array  # Σ_t log π over the completion, nats
    reference_logps_BK: Array  # the same under the reference; read only by losses with needs_reference
    lengths_BK: Array  # float32, scored tokens; 0 for an empty completion
    rewards_BK: Array  # reward-model scores, or 1 and 0
    batch_kl: Array  # scalar, mean of log π - log π_ref over the whole step; read only with needs_batch_kl


def log_ratio_scores(
    logps_BK: Float[Array, "B K"], reference_logps_BK: Float[Array, "B K"], *, beta_pi: float
) -> Float[jax.Array, "B K"]:
    """Return s = β_π Σ_t (log π - log π_ref) (f-PO, EXO, DPO).

    Args:
        logps_BK: summed log-probs, nats.
        reference_logps_BK: the same under the reference.
        beta_pi: > 0; DPO's β.

    Returns:
        [B, K], float32 (float64 when given float64).

    >>> log_ratio_scores(jnp.array([[-4.0, -9.0]]), jnp.array([[-6.0, -8.0]]), beta_pi=0.5).tolist()
    [[1.0, -0.5]]
    """
    logps_BK, reference_logps_BK = numerics.as_float(logps_BK, reference_logps_BK)
    return beta_pi * (logps_BK - reference_logps_BK)


def mean_logps(logps_BK: Float[Array, "B K"], lengths_BK: Float[Array, "B K"]) -> Float[jax.Array, "B K"]:
    """Return the mean log-prob per token, ℓ = logp/|y|; 0, with gradient 0, for an empty completion.

    >>> mean_logps(jnp.array([[-6.0, 0.0]]), jnp.array([[3.0, 0.0]])).tolist()
    [[-2.0, 0.0]]
    """
    logps_BK, lengths_BK = numerics.as_float(logps_BK, lengths_BK)
    filled_BK = lengths_BK > 0
    return jnp.where(filled_BK, logps_BK / jnp.where(filled_BK, lengths_BK, 1.0), 0.0)


def mean_logp_scores(
    logps_BK: Float[Array, "B K"],
    lengths_BK: Float[Array, "B K"],
    chosen_BK: Float[Array, "B K"],
    *,
    beta: float,
    gamma_beta_ratio: float,
) -> Float[jax.Array, "B K"]:
    """Return s = β (ℓ - [chosen] γ/β), ℓ the mean log-prob per token: no reference (SimPO, arXiv 2405.14734).

    Args:
        logps_BK: summed log-probs, nats.
        lengths_BK: tokens.
        chosen_BK: shares from `targets.chosen_shares`; the margin is taken off the chosen one, before β.
        beta: > 0.
        gamma_beta_ratio: γ/β >= 0, in nats per token.

    Returns:
        [B, K], float32 (float64 when given float64).

    >>> logps_BK, lengths_BK, chosen_BK = jnp.array([[-4.0, -9.0]]), jnp.array([[2.0, 3.0]]), jnp.array([[1.0, 0.0]])
    >>> mean_logp_scores(logps_BK, lengths_BK, chosen_BK, beta=2.0, gamma_beta_ratio=0.5).tolist()
    [[-5.0, -6.0]]
    """
    return beta * (mean_logps(logps_BK, lengths_BK) - gamma_beta_ratio * chosen_BK)


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """A way to score completions for p = softmax(s); `Objective` rows have the same fields."""

    equation: str
    options: tuple[str, ...]  # those it reads
    score: Callable[[Completions, Array, Options], Array]  # (completions, chosen_BK, options) -> [B, K]
    reward: Callable[[Completions, Options], Array]  # implied rewards, for metrics
    needs_reference: bool
    length_normalized: bool  # per token


SCORES: Mapping[str, Score] = MappingProxyType(
    {
        "log_ratio": Score(
            equation="s = β_π Δ, Δ = Σ_t (log π - log π_ref)",
            options=("beta_pi",),
            score=lambda c, chosen_BK, o: log_ratio_scores(c.logps_BK, c.reference_logps_BK, beta_pi=o["beta_pi"]),
            reward=lambda c, o: log_ratio_scores(c.logps_BK, c.reference_logps_BK, beta_pi=o["beta_pi"]),
            needs_reference=True,
            length_normalized=False,
        ),
        "mean_logp": Score(
            equation="s = β (ℓ - [chosen] γ/β), ℓ = logp/|y| the mean per token",
            options=("beta", "gamma_beta_ratio", "tie_policy"),
            score=lambda c, chosen_BK, o: mean_logp_scores(
                c.logps_BK, c.lengths_BK, chosen_BK, beta=o["beta"], gamma_beta_ratio=o["gamma_beta_ratio"]
            ),
            reward=lambda c, o: o["beta"] * mean_logps(c.logps_BK, c.lengths_BK),
            needs_reference=False,
            length_normalized=True,
        ),
    }
)
