"""Textbook float64 NumPy forms of the divergences and objectives: the formulas as printed, stable or not."""

import numpy as np


def log_softmax(scores):
    scores = np.asarray(scores, np.float64)
    return (
        scores
        - np.log(np.sum(np.exp(scores - scores.max(-1, keepdims=True)), -1, keepdims=True))
        - scores.max(-1, keepdims=True)
    )


def alpha_f(u, alpha):
    if alpha == 0:
        return u * np.log(u) - u + 1
    if alpha == 1:
        return u - 1 - np.log(u)
    return (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1))


def alpha_f_prime(u, alpha):
    return np.log(u) if alpha == 0 else (1 - u**-alpha) / alpha


def mixed_f(u, w):
    return w * u * np.log(u) - (1 - w + w * u) * np.log(1 - w + w * u)


F = {
    "kl_policy_target": lambda u: u * np.log(u),
    "kl_target_policy": lambda u: -np.log(u),
    "alpha": alpha_f,
    "jensen_shannon": mixed_f,
    "jeffreys": lambda u: (u - 1) * np.log(u),
    "squared_hellinger": lambda u: (np.sqrt(u) - 1) ** 2,
    "total_variation": lambda u: np.abs(u - 1) / 2,
    "pearson_chi2": lambda u: (u - 1) ** 2,
    "neyman_chi2": lambda u: (u - 1) ** 2 / u,
}
F_PRIME = {
    "kl_policy_target": lambda u: 1 + np.log(u),
    "kl_target_policy": lambda u: -1 / u,
    "alpha": alpha_f_prime,
    "jensen_shannon": lambda u, w: w * np.log(u / (1 - w + w * u)),
    "jeffreys": lambda u: np.log(u) + 1 - 1 / u,
    "squared_hellinger": lambda u: 1 - u**-0.5,
    "total_variation": lambda u: np.sign(u - 1) / 2,
    "pearson_chi2": lambda u: 2 * (u - 1),
    "neyman_chi2": lambda u: 1 - u**-2.0,
}


def divergence(scores, log_q, name, *parameters):
    """Σ q f(p/q), p = softmax(scores)."""
    u = np.exp(log_softmax(scores) - log_q)
    return np.sum(np.exp(log_q) * F[name](u, *parameters), axis=-1)


def divergence_gradient(scores, log_q, name, *parameters):
    """dD/ds_i = p_i (f'(u_i) - Σ_j p_j f'(u_j)), spec 1.1."""
    p = np.exp(log_softmax(scores))
    slope = F_PRIME[name](p / np.exp(log_q), *parameters)
    return p * (slope - np.sum(p * slope, axis=-1, keepdims=True))


def log_sigmoid(x):
    return -np.logaddexp(0.0, -np.asarray(x, np.float64))


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))
