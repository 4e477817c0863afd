"""One block of logits for the head kernels of GPUs: inputs, what comes of them in float64, and how close is close."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fpo_jax.kernels.lm_head import blocks
from fpo_jax.kernels.lm_head.spec import HeadSpec
from tests import tolerances


class Block(NamedTuple):
    """Sizes of a block and the columns that count."""

    M: int
    W: int
    D: int
    first: int
    last: int


class Inputs(NamedTuple):
    """What both kernels read; logits of standard deviation 3, some targets outside the block."""

    hidden_MD: jax.Array
    head_WD: jax.Array
    targets_M: jax.Array
    dtarget_M: jax.Array
    dlse_M: jax.Array


def inputs(block: Block, *, seed=0, dtype="bfloat16") -> Inputs:
    rng = np.random.default_rng(seed)
    targets_M = rng.integers(0, block.W, block.M).astype(np.int32)
    targets_M[:4] = [-1, block.W, -(2**31), 2**31 - 1][: block.M]
    return Inputs(
        jnp.asarray(rng.normal(size=(block.M, block.D)), dtype),
        jnp.asarray(rng.normal(size=(block.W, block.D)) * 3 / np.sqrt(block.D), dtype),
        jnp.asarray(targets_M),
        *(jnp.asarray(rng.normal(size=block.M), jnp.float32) for _ in range(2)),
    )


def oracle(x: Inputs, first: int, last: int, *, spec: HeadSpec):
    """(max, sum, target logit, centred sum), lse and dlogits in float64, written out by hand."""
    raw_MW = np.asarray(x.hidden_MD, np.float64) @ np.asarray(x.head_WD, np.float64).T
    logits_MW, slope_MW = spec.logit_scale * raw_MW, np.full_like(raw_MW, spec.logit_scale)
    if spec.softcap:
        logits_MW = spec.logit_scale * spec.softcap * np.tanh(raw_MW / spec.softcap)
        slope_MW = spec.logit_scale / np.cosh(raw_MW / spec.softcap) ** 2
    counts_W = np.arange(raw_MW.shape[1])[first:last]
    z_MW = logits_MW[:, counts_W]
    max_M = z_MW.max(1)
    exp_MW = np.exp(z_MW - max_M[:, None])
    sum_M, lse_M = exp_MW.sum(1), max_M + np.log(exp_MW.sum(1))
    is_target_MW = np.asarray(x.targets_M)[:, None] == counts_W
    target_logit_M = (is_target_MW * z_MW).sum(1)
    centred_M = (exp_MW * (z_MW - max_M[:, None])).sum(1)

    dlogits_MW = np.zeros_like(raw_MW)
    dz_MW = np.asarray(x.dlse_M, np.float64)[:, None] * np.exp(z_MW - lse_M[:, None])
    dz_MW += is_target_MW * np.asarray(x.dtarget_M, np.float64)[:, None]
    dlogits_MW[:, counts_W] = dz_MW * slope_MW[:, counts_W]
    return blocks.Partials(max_M, sum_M, target_logit_M, centred_M), lse_M, dlogits_MW


def assert_partials_close(ours, expected):
    """Relative to the largest entry."""
    for name, a, b in zip(expected._fields, ours, expected, strict=True):
        assert a.dtype == np.float32 and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerances.GPU_PARTIALS * np.abs(b).max(), err_msg=name)


def assert_rounded_once(ours_MW, expected_MW, *, magnitude=None):
    """Every entry on its own: small ones too are good to one rounding. `magnitude`: of the largest summand."""
    assert ours_MW.dtype == jnp.bfloat16
    atol = tolerances.GPU_DLOGITS_FLOAT32 * (magnitude or np.abs(expected_MW).max())
    np.testing.assert_allclose(ours_MW.astype(np.float64), expected_MW, rtol=tolerances.GPU_DLOGITS_RTOL, atol=atol)
