"""The target q over the K completions of a group: rewards in, log q out. Never a gradient.

A preference gives a two-valued label, `preference_target`; reward-model scores give softmax(r/β_r), `reward_target`.
Who is preferred, and what a tie means, is decided once, in `chosen_shares`.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from fpo_jax.losses import numerics
from fpo_jax.losses.f_divergences import AUTHORS_EPSILON, NO_CLAMP
from fpo_jax.types import Array

TIE_POLICIES = MappingProxyType(
    {
        "uniform": lambda best_BK: best_BK,  # the best share the label: nobody said that one of them is better
        "first": numerics.first_of,
        "second": numerics.last_of,  # the authors': of two equal rewards the second item wins; here the last of K
    }
)


def chosen_shares(rewards_BK: Float[Array, "B K"], *, tie_policy: str) -> Float[jax.Array, "B K"]:
    """Return how much of the "chosen" label each completion holds: 1 for the highest reward, 0 for the others.

    Args:
        rewards_BK: any unit; only their order and their ties count.
        tie_policy: "uniform" (the best share the label), "first", or "second" (the last of the best wins, as in the
            authors' code).

    Returns:
        [B, K], rows sum to 1.

    >>> chosen_shares(jnp.array([[2.0, 5.0, 5.0]]), tie_policy="second").tolist()
    [[0.0, 0.0, 1.0]]
    >>> chosen_shares(jnp.array([[2.0, 5.0, 5.0]]), tie_policy="uniform").tolist()
    [[0.0, 0.5, 0.5]]
    """
    (rewards_BK,) = numerics.as_float(rewards_BK)
    best_BK = rewards_BK == jnp.max(rewards_BK, axis=-1, keepdims=True)
    winners_BK = TIE_POLICIES[tie_policy](best_BK).astype(rewards_BK.dtype)
    return winners_BK / jnp.sum(winners_BK, axis=-1, keepdims=True)


def preference_target(
    rewards_BK: Float[Array, "B K"],
    *,
    epsilon: float = AUTHORS_EPSILON,
    normalize: bool = False,
    tie_policy: str = "uniform",
) -> Float[jax.Array, "B K"]:
    """Return log q for a preference: 1 for the chosen completion and ε for each other one.

    Normalised, the chosen has 1-ε and the others share ε, whatever K is: ε is the probability of a wrong label.
    The authors' code leaves (1, e^-10) as it is; their paper is said to use ε = 1e-3. The default is the code's.

    Args:
        rewards_BK: the highest is the chosen one; preference data carry 1 and 0.
        epsilon: label of a rejected completion, in [0, ½); 0 gives hard labels, log q = -inf.
        normalize: make q sum to 1.
        tie_policy: see `chosen_shares`.

    Returns:
        [B, K] log q.

    >>> [[round(float(x), 4) for x in row] for row in preference_target(jnp.array([[0.0, 1.0]]))]
    [[-10.0, 0.0]]
    >>> q = jnp.exp(preference_target(jnp.array([[1.0, 0.0, 0.0]]), epsilon=0.2, normalize=True))
    >>> [round(float(x), 4) for x in q[0]]
    [0.8, 0.1, 0.1]
    """
    shares_BK = chosen_shares(rewards_BK, tie_policy=tie_policy)
    chosen_BK = shares_BK > 0
    log_shares_BK = jnp.log(jnp.where(chosen_BK, shares_BK, 1.0))
    log_epsilon = math.log(epsilon) if epsilon > 0 else -math.inf
    if not normalize:
        return jnp.where(chosen_BK, log_shares_BK, log_epsilon)
    others_B1 = jnp.sum(~chosen_BK, axis=-1, keepdims=True).astype(shares_BK.dtype)
    log_chosen_B1 = jnp.where(others_B1 > 0, math.log1p(-epsilon), 0.0)  # all tied: nobody is left to hold ε
    return jnp.where(chosen_BK, log_shares_BK + log_chosen_B1, log_epsilon - jnp.log(jnp.maximum(others_B1, 1.0)))


def reward_target(
    rewards_BK: Float[Array, "B K"], *, beta_r: float, log_clamp: float = NO_CLAMP
) -> Float[jax.Array, "B K"]:
    """Return log q = max(log softmax(r/β_r), log_clamp).

    Args:
        rewards_BK: reward-model scores; a constant added to a group changes nothing.
        beta_r: temperature of the rewards, > 0; beta_r * beta_pi is the KL coefficient of the optimum.
        log_clamp: floor of log q, <= 0; -inf = none. The clamped q is not renormalised, as in the authors' code.

    Returns:
        [B, K] log q.

    >>> [round(float(x), 4) for x in reward_target(jnp.array([[20.0, 0.0]]), beta_r=1.0, log_clamp=-10.0)[0]]
    [-0.0, -10.0]
    """
    (rewards_BK,) = numerics.as_float(rewards_BK)
    return jnp.maximum(numerics.log_softmax(rewards_BK / beta_r), log_clamp)


class Target(NamedTuple):
    """A way to make log q from rewards."""

    equation: str
    options: tuple[str, ...]  # those it reads
    log_q: Callable[..., jax.Array]  # (rewards_BK, **options) -> [B, K]


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "preference": Target(
            "q = 1 of the chosen, ε of each other (normalize: 1-ε, ε)",
            ("epsilon", "normalize", "tie_policy"),
            preference_target,
        ),
        "rewards": Target("q = max(softmax(r/β_r), exp(log_clamp))", ("beta_r", "log_clamp"), reward_target),
    }
)
