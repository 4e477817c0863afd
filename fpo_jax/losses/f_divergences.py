"""The table of divergences: f-PO's members (arXiv 2410.21662) and three more, one row each.

For every prompt, p = softmax(s) is the policy and q the target, both over the same K completions, and u = p/q:

    D_f(p‖q) = Σ_i q_i f(p_i / q_i),    f convex, f(1) = 0.

Names say direction: `kl_policy_target` is KL(p‖q), mode-seeking (EXO); `kl_target_policy` is KL(q‖p), mass-covering
(DPO). "Forward" and "reverse" are avoided: the paper's figure and most of the literature use them the other way round.

q need not sum to 1 (the authors' labels are (1, e^-10)). Each row is Σ q f(p/q) with the f printed in it, so that the
two KL rows have no Σp, Σq terms, as in the authors' code. `alpha` has them: it is `kl_policy_target` + Σq - Σp at 0
and `kl_target_policy` + Σp - Σq at 1, the same for a normalised target, and with the same gradient in s always.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jaxtyping import Float

from fpo_jax.losses import numerics
from fpo_jax.losses.numerics import difference, saturating_exp
from fpo_jax.types import Array

AUTHORS_EPSILON = math.exp(-10.0)  # the authors' label of a rejected completion; their paper is said to use 1e-3
AUTHORS_LOG_CLAMP = -10.0  # the authors' floor of log q from rewards; none in their dpo and exo branches
NO_CLAMP = -math.inf


@dataclasses.dataclass(frozen=True, eq=False)
class Divergence:
    """One row. The callables take the row's `parameters` by keyword and work elementwise."""

    name: str
    equation: str  # D_f(p‖q), sums over the K completions
    f: Callable[..., jax.Array]  # f(u)
    f_prime: Callable[..., jax.Array]  # f'(u); dD/ds_i = p_i (f'(u_i) - Σ_j p_j f'(u_j))
    log_space: Callable[..., jax.Array]  # (log p, log q) -> q f(p/q) per completion, accurate and finite
    slope_at_infinity: Callable[..., float]  # lim f(u)/u: what a label of exactly 0 costs per unit of p
    limits: str  # identities with other rows
    parameters: Mapping[str, float] = dataclasses.field(default_factory=dict)  # name -> default
    epsilon: float = AUTHORS_EPSILON  # default label of a rejected completion
    log_clamp: float = AUTHORS_LOG_CLAMP  # default floor of log q from rewards
    # What a training loss adds to D_f, a function of q alone; only the authors' dpo branches do.
    loss_offset: Callable[[jax.Array], jax.Array] = lambda log_q: jnp.zeros(log_q.shape[:-1], log_q.dtype)


def _power_log(u, power):
    """(u^power - 1)/power, which is log u at power 0."""
    return jnp.log(u) if abs(power) < numerics.TINY_POWER else numerics.expm1(power * jnp.log(u)) / power


def _alpha_f(u, *, alpha):
    if abs(alpha) < numerics.TINY_POWER:
        return u * jnp.log(u) - u + 1
    return (u - 1 - _power_log(u, 1 - alpha)) / alpha


def _alpha_log_space(log_p, log_q, *, alpha):
    # q f(u) = [(p - q) - q (u^t - 1)/t]/α with t = 1 - α, and the mirror image D_α(p‖q) = D_{1-α}(q‖p) for small α:
    # exact at both ends, and no factor 1/(α(α-1)), which at α = 0.99 costs 2.4e-4 relative in float32.
    if alpha < 0.5:
        return _alpha_terms(log_q, log_p, 1 - alpha, alpha)
    return _alpha_terms(log_p, log_q, alpha, 1 - alpha)


def _alpha_terms(log_p, log_q, alpha, t):
    log_u = log_p - log_q
    if abs(t) < numerics.TINY_POWER:
        power = jnp.exp(log_q) * log_u
    else:
        power = difference(t * log_p + alpha * log_q, log_q, t * log_u) / t
    return (difference(log_p, log_q, log_u) - power) / alpha


def _jensen_shannon_f(u, *, weight):
    mixture = 1 - weight + weight * u
    return weight * u * jnp.log(u) - mixture * jnp.log(mixture)


def _jensen_shannon_log_space(log_p, log_q, *, weight):
    log_u = log_p - log_q
    p_larger = log_u > 0
    weight_of_smaller = jnp.where(p_larger, 1 - weight, weight)
    # log m - max(log p, log q) with m = w p + (1-w) q, through log1p and expm1 because it is tiny where p ≈ q.
    log_m = jnp.log1p(weight_of_smaller * numerics.expm1(jnp.where(p_larger, -log_u, log_u)))
    log_p_over_m = jnp.where(p_larger, 0.0, log_u) - log_m
    log_q_over_m = jnp.where(p_larger, -log_u, 0.0) - log_m
    return weight * jnp.exp(log_p) * log_p_over_m + (1 - weight) * jnp.exp(log_q) * log_q_over_m


def _ratio_squared(log_a, log_b):
    """(a - b)²/b, a and b from logarithms; saturates where a²/b overflows."""
    log_ratio = log_a - log_b
    return saturating_exp(jnp.maximum(2 * log_a - log_b, log_b)) * jnp.square(numerics.expm1(-jnp.abs(log_ratio)))


def _entropy(log_q):
    log_q = jnp.maximum(log_q, numerics.LOG_ZERO)
    return -jnp.sum(jnp.exp(log_q) * log_q, axis=-1)


_ROWS = (
    Divergence(
        name="kl_policy_target",
        equation="KL(p‖q) = Σ p (log p - log q)",
        f=lambda u: u * jnp.log(u),
        f_prime=lambda u: 1 + jnp.log(u),
        log_space=lambda log_p, log_q: jnp.exp(log_p) * (log_p - log_q),
        slope_at_infinity=lambda: math.inf,
        limits="alpha -> 0 (plus Σq - Σp); mode-seeking",
        log_clamp=NO_CLAMP,
    ),
    Divergence(
        name="kl_target_policy",
        equation="KL(q‖p) = Σ q (log q - log p); the training loss is -Σ q log p, entropy of q added",
        f=lambda u: -jnp.log(u),
        f_prime=lambda u: -1 / u,
        log_space=lambda log_p, log_q: jnp.exp(log_q) * (log_q - log_p),
        slope_at_infinity=lambda: 0.0,
        limits="alpha -> 1 (plus Σp - Σq); mass-covering; q = (1, 0) is DPO, q = (1-ε, ε) is cDPO",
        epsilon=0.0,
        log_clamp=NO_CLAMP,
        loss_offset=_entropy,
    ),
    Divergence(
        name="alpha",
        equation="(Σ p^(1-α) q^α - (1-α) Σp - α Σq) / (α(α-1))",
        f=_alpha_f,
        f_prime=lambda u, *, alpha: _power_log(u, -alpha),
        log_space=_alpha_log_space,
        slope_at_infinity=lambda *, alpha: 1 / alpha if alpha > 0 else math.inf,
        limits="α=0: KL(p‖q); α=1: KL(q‖p); α=½: 2·squared_hellinger; α=-1: ½·pearson_chi2; α=2: ½·neyman_chi2; "
        "D_α(p‖q) = D_(1-α)(q‖p)",
        parameters=MappingProxyType({"alpha": 0.1}),
    ),
    Divergence(
        name="jensen_shannon",
        equation="w KL(p‖m) + (1-w) KL(q‖m), m = w p + (1-w) q",
        f=_jensen_shannon_f,
        f_prime=lambda u, *, weight: weight * (jnp.log(u) - jnp.log(1 - weight + weight * u)),
        log_space=_jensen_shannon_log_space,
        slope_at_infinity=lambda *, weight: -weight * math.log(weight),
        limits="w=½: the symmetric one, at most log 2; /w -> KL(p‖q) as w -> 0; /(1-w) -> KL(q‖p) as w -> 1",
        parameters=MappingProxyType({"weight": 0.5}),
    ),
    Divergence(
        name="jeffreys",
        equation="KL(p‖q) + KL(q‖p) = Σ (p - q)(log p - log q)",
        f=lambda u: (u - 1) * jnp.log(u),
        f_prime=lambda u: jnp.log(u) + 1 - 1 / u,
        log_space=lambda log_p, log_q: difference(log_p, log_q, log_p - log_q) * (log_p - log_q),
        slope_at_infinity=lambda: math.inf,
        limits="the sum of both KL rows; symmetric",
    ),
    Divergence(
        name="squared_hellinger",
        equation="Σ (√p - √q)²",
        f=lambda u: jnp.square(jnp.sqrt(u) - 1),
        f_prime=lambda u: 1 - 1 / jnp.sqrt(u),
        log_space=lambda log_p, log_q: jnp.square(difference(log_p / 2, log_q / 2, (log_p - log_q) / 2)),
        slope_at_infinity=lambda: 1.0,
        limits="½·(alpha at ½); symmetric; without the factor ½ of some texts",
    ),
    Divergence(
        name="total_variation",
        equation="½ Σ |p - q|",
        f=lambda u: jnp.abs(u - 1) / 2,
        f_prime=lambda u: jnp.sign(u - 1) / 2,
        log_space=lambda log_p, log_q: difference(log_p, log_q, log_p - log_q) * jnp.sign(log_p - log_q) / 2,
        slope_at_infinity=lambda: 0.5,
        limits="symmetric; not differentiable at p = q, where the gradient is taken as 0; not in the original",
    ),
    Divergence(
        name="pearson_chi2",
        equation="Σ (p - q)² / q",
        f=lambda u: jnp.square(u - 1),
        f_prime=lambda u: 2 * (u - 1),
        log_space=_ratio_squared,
        slope_at_infinity=lambda: math.inf,
        limits="2·(alpha at -1); saturates where p²/q > e^30; not in the original",
    ),
    Divergence(
        name="neyman_chi2",
        equation="Σ (p - q)² / p",
        f=lambda u: jnp.square(u - 1) / u,
        f_prime=lambda u: 1 - 1 / jnp.square(u),
        log_space=lambda log_p, log_q: _ratio_squared(log_q, log_p),
        slope_at_infinity=lambda: 1.0,
        limits="2·(alpha at 2); saturates where q²/p > e^30; not in the original",
    ),
)

DIVERGENCES: Mapping[str, Divergence] = MappingProxyType({row.name: row for row in _ROWS})


def f_divergence(
    log_p: Float[Array, "*batch K"],
    log_q: Float[Array, "*batch K"],
    *,
    name: str,
    alpha: float | None = None,
    weight: float | None = None,
) -> Float[jax.Array, "*batch"]:
    """Return D_f(p‖q) = Σ_i q_i f(p_i/q_i) over the last axis (f-PO, arXiv 2410.21662).

    Args:
        log_p: log-probs of the policy over K completions, from `log_softmax`; finite.
        log_q: log-probs of the target; need not be normalised. -inf is a hard label, exact where the row's
            slope_at_infinity is finite; elsewhere D_f is infinite, and the result is infinite or of order 1e30.
        name: a key of DIVERGENCES.
        alpha: any real number, for `alpha` only; exact at 0 and 1 and stable near them.
        weight: of p in the mixture, in (0, 1), for `jensen_shannon` only; default ½.

    Returns:
        One number per group, float32 (float64 when given float64), not averaged. Value and gradient are finite
        for any finite input; a term p^a q^b above e^30 (chi-squared, alpha outside [0, 1]) continues linearly in log p.

    Raises:
        ValueError: unknown name; a parameter that the row does not have, or lacks.

    >>> log_p, log_q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.8, 0.2]))
    >>> round(float(f_divergence(log_p, log_q, name="total_variation")), 4)  # ½(0.3 + 0.3)
    0.3
    >>> round(float(f_divergence(log_p, log_q, name="pearson_chi2")), 4)  # 0.09/0.8 + 0.09/0.2
    0.5625
    >>> round(float(f_divergence(log_p, log_q, name="alpha", alpha=-1.0)), 4)  # half of it
    0.2812
    """
    if name not in DIVERGENCES:
        raise ValueError(f"unknown divergence {name!r}; the table has: {', '.join(DIVERGENCES)}")
    row = DIVERGENCES[name]
    given = {key: value for key, value in {"alpha": alpha, "weight": weight}.items() if value is not None}
    for key, value in given.items():
        if key not in row.parameters:
            raise ValueError(f"divergence {name!r} has no parameter {key!r} (given {value}); leave it out")
        if not math.isfinite(value):
            raise ValueError(f"{key}={value} is not a finite number; give one")
    if name == "alpha" and alpha is None:
        raise ValueError("divergence 'alpha' needs alpha=...; the authors use 0.1, 0.025, 0.925 and 0.99")
    if not 0 < given.get("weight", 0.5) < 1:
        raise ValueError(f"weight={weight} is outside (0, 1), where the mixture is p or q itself; use a KL row there")
    log_p, log_q = numerics.as_float(log_p, log_q)
    terms = row.log_space(log_p, jnp.maximum(log_q, numerics.LOG_ZERO), **{**row.parameters, **given})
    return jnp.sum(terms, axis=-1)
