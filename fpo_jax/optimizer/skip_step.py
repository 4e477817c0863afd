"""Which steps are applied: loss and gradient norm in, a verdict out, all of it on the devices.

Not applied is what is not finite; what comes after so many of those that the run must stop, so that the last applied
step's state is still there when the host reads of it; and, where asked for, a spike. A step that is not applied
changes neither weights nor moments, and the learning rate's schedule, which counts applied steps, waits for the next.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from fpo_jax import types
from fpo_jax.optimizer import adamw


class Watched(NamedTuple):
    """An optimiser's state and what spikes are told by."""

    inner: types.PyTree
    recent_2W: types.Array  # loss and gradient norm of the last W applied steps; step i stands at i modulo W


@dataclasses.dataclass(frozen=True)
class SkipRule:
    """What is not applied, besides what is not finite."""

    most: int  # steps not applied in a row: nothing is applied any more, until the host has stopped the run
    weight: int = 1  # that one step which is not finite counts for: `most` where the first of them stops the run
    # a spike's loss or gradient norm lies so many standard deviations above the mean; 0 = no spikes
    sigmas: float = 0.0
    window: int = 1  # W, the applied steps that mean and deviation are taken over

    def watching(self, optimizer: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
        """Let the optimiser's state hold the window, so that a checkpoint does; it is as it was where no spike is."""
        return _watching(optimizer, self.window) if self.sigmas else optimizer

    def spike(self, opt_state: types.PyTree, value: Float[Array, ""], grad_norm: Float[Array, ""]) -> Bool[Array, ""]:
        """Return whether max over (loss, gradient norm) of (x - mean) / deviation > sigmas; never before W steps."""
        recent_2W = opt_state.recent_2W
        observed_2 = jnp.stack([value, grad_norm])
        limit_2 = jnp.mean(recent_2W, axis=1) + self.sigmas * jnp.std(recent_2W, axis=1)
        return (adamw.steps_applied(opt_state) >= self.window) & jnp.any(observed_2 > limit_2)

    def in_a_row(self, before: Int[Array, ""], *, applied: Bool[Array, ""], finite: Bool[Array, ""]) -> Int[Array, ""]:
        """Count the steps that were not applied since the last one that was."""
        return jnp.where(applied, 0, jnp.minimum(before + jnp.where(finite, 1, self.weight), self.most))


def _watching(inner: optax.GradientTransformationExtraArgs, window: int) -> optax.GradientTransformationExtraArgs:
    def init(params):
        return Watched(inner.init(params), jnp.zeros((2, window), jnp.float32))

    def update(grads, state, params=None, *, value, grad_norm, keep: adamw.Keep = True, **_):
        updates, fresh = inner.update(grads, state.inner, params, keep=keep)
        place = adamw.steps_applied(state.inner) % window
        recent_2W = state.recent_2W.at[:, place].set(jnp.stack([value, grad_norm]))
        return updates, Watched(fresh, adamw.kept(recent_2W, state.recent_2W, keep))

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
