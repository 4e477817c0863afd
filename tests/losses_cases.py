"""What the tests of the losses share: cases, a small batch of groups, values with gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax import losses

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
    return losses.Completions(**{key: np.asarray(value, dtype) for key, value in {**fields, **replaced}.items()})


def value_and_grad(loss, completions):
    """Losses [B] and their gradients in logps_BK, as NumPy."""
    return jax.tree.map(np.asarray, value_and_grad_traced(loss, completions))


def value_and_grad_traced(loss, completions):
    def total(logps_BK):
        losses_B = loss.loss(completions._replace(logps_BK=logps_BK))
        return jnp.sum(losses_B), losses_B

    grads_BK, losses_B = jax.grad(total, has_aux=True)(jnp.asarray(completions.logps_BK))
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
