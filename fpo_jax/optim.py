"""The learning-rate schedule and the optax chain: clip by global norm, then AdamW.

The schedule is that of the trainers whose recipes we run (Hugging Face's): update i (from 0) uses the rate at i, so
that the first update of a warm-up has rate 0.
"""

import math

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from fpo_jax import shapes


def warmup_steps(*, fraction: float, steps: int | None, horizon: int) -> int:
    """Return the number of warm-up updates: `steps`, or ceil(fraction * horizon).

    >>> warmup_steps(fraction=0.1, steps=None, horizon=477)
    48
    """
    return steps if steps is not None else math.ceil(fraction * horizon)


def schedule(*, kind: str, peak: float, warmup: int, horizon: int):
    """Return step -> learning rate.

    With progress t = (step - warmup) / (horizon - warmup) in [0, 1]:
    cosine: peak * (1 + cos(pi t)) / 2; linear: peak * (1 - t); constant: peak. Below warmup: peak * step / warmup.

    Args:
        kind: cosine, linear or constant.
        peak: highest rate.
        warmup: updates of the linear rise from 0.
        horizon: update at which cosine and linear reach 0; the rate stays 0 from there on.
    """
    decay = {
        "cosine": lambda t: 0.5 * (1.0 + jnp.cos(jnp.pi * t)),
        "linear": lambda t: 1.0 - t,
        "constant": jnp.ones_like,
    }[kind]

    def rate(step: Int[Array, ""] | int) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warmup) / max(1, horizon - warmup), 0.0, 1.0)
        return peak * jnp.where(step < warmup, step / max(1, warmup), decay(progress))

    return rate


def optimizer(
    rate, *, b1: float, b2: float, eps: float, weight_decay: float, clip_norm: float, decay_mask: shapes.PyTree
) -> optax.GradientTransformation:
    """Return clip_by_global_norm (off when clip_norm is 0) followed by AdamW with decoupled weight decay.

    Args:
        rate: step -> learning rate, from `schedule`.
        b1: decay of the first moment, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: applied where decay_mask is True.
        clip_norm: largest global gradient norm.
        decay_mask: tree of bool like the parameters (params.decay_mask).
    """
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    return optax.chain(clip, optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay, mask=decay_mask))
