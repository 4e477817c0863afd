"""The gradient through a head that is not trained, prepared by the forward pass: 4NDV operations instead of 6NDV.

As in attention, the products with the softmax are summed while the softmax runs:

    pulled[n] = sum over v != target[n] of softmax(z[n])[v] * z'(x[n, v]) * head[v]
    dhidden[n] = g_lse * pulled[n] + (g_target + g_lse * p[target]) * z'(x[n, target]) * head[target]

The target is left out of the sum and its share is added in float32, so that nothing cancels: for a log-prob
g_target + g_lse * p = g (1 - p), which is small where p is rounded most. Only dhidden is there: with a head that is
trained, its gradient needs the logits once more.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fpo_jax.kernels.lm_head import spec as specs


class Pulled(NamedTuple):
    """What the forward pass leaves behind, per token; float32 (float64 when given float64)."""

    pulled_ND: jax.Array
    target_logit_N: jax.Array


def finish(pulled_PND: jax.Array, own, partials, lse_N: jax.Array, *, spec: specs.HeadSpec) -> Pulled:
    """Divide by the whole vocabulary's sum, and add what other devices' rows of the head contribute.

    Args:
        pulled_PND: sums relative to the maximum of `own`, P = 1.
        own: `blocks.Partials` of this device's part of the vocabulary.
        partials: of all parts.
        lse_N: over the whole vocabulary.
        spec: `placement` is read.
    """
    axes = specs.axes(spec)
    pulled_ND = pulled_PND[0] * jnp.exp(own.max_PM[0] - lse_N)[:, None]
    pulled_ND = lax.psum(pulled_ND, axes.vocab) if axes.vocab else pulled_ND
    return Pulled(pulled_ND, jnp.sum(partials.target_logit_PM, axis=0))


def pull_back(head_VD, targets_N, pulled: Pulled, lse_N, dtarget_N, dlse_N, *, spec: specs.HeadSpec, dtype):
    """Return dhidden on one device, in the dtype of sums; `dtype` is that of the operands."""
    slope_N = jnp.full_like(lse_N, spec.logit_scale)
    if spec.softcap is not None:
        tanh_N = pulled.target_logit_N / (spec.logit_scale * spec.softcap)
        slope_N *= 1 - tanh_N * tanh_N
    share_N = dtarget_N + dlse_N + dlse_N * jnp.expm1(pulled.target_logit_N - lse_N)
    rows_ND = _target_rows(head_VD, targets_N, spec, dtype).astype(lse_N.dtype)
    return dlse_N[:, None] * pulled.pulled_ND + (share_N * slope_N)[:, None] * rows_ND


def _target_rows(head_VD, targets_N, spec: specs.HeadSpec, dtype) -> jax.Array:
    """The head's row of every target, from whichever devices hold it."""
    axes = specs.axes(spec)
    if axes.width:  # every device reads its columns for the tokens of all, and sends each what is its own
        targets_N = lax.all_gather(targets_N, axes.width, tiled=True)
    first = lax.axis_index(axes.vocab) * head_VD.shape[0] if axes.vocab else 0
    here_N = (targets_N >= first) & (targets_N < first + head_VD.shape[0])
    rows_ND = jnp.where(here_N[:, None], head_VD[jnp.where(here_N, targets_N - first, 0)], 0).astype(dtype)
    if axes.vocab:
        rows_ND = lax.psum(rows_ND, axes.vocab)
    return lax.all_to_all(rows_ND, axes.width, split_axis=0, concat_axis=1, tiled=True) if axes.width else rows_ND
