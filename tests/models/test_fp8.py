"""Products in 8-bit floating point: rounded by another library, by their scales, in a model, in a run."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import fpo_jax
from fpo_jax import models
from fpo_jax.io import jsonl
from fpo_jax.models import fp8, params
from fpo_jax.perf import flops
from tests import tiny

CONFIG = models.ModelConfig(
    family="llama", vocab_size=37, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48, max_positions=64
)
TOKENS_NT = jnp.asarray(np.random.default_rng(0).integers(0, 37, (3, 24)))


def rounded(x, dtype):
    """Round as the module says it does, in float64 and by ml_dtypes."""
    x = np.asarray(x, np.float64)
    scale = 2.0 ** np.ceil(np.log2(np.abs(x).max() / float(ml_dtypes.finfo(dtype).max)))
    return (x / scale).astype(np.float32).astype(dtype).astype(np.float64) * scale


def operands(seed=0):
    random = np.random.default_rng(seed)
    spread = np.exp(random.normal(0, 3, (2, 7, 16)))  # magnitudes from 1e-4 to 1e4
    x_NTD = (random.normal(size=(2, 7, 16)) * spread).astype(np.float32)
    weight_DHC = (0.02 * random.normal(size=(16, 4, 8))).astype(np.float32)
    gradient_NTHC = (1e-6 * random.normal(size=(2, 7, 4, 8))).astype(np.float32)
    return x_NTD, weight_DHC, gradient_NTHC


def test_products_are_those_of_the_rounded_operands_forward_and_backward():
    x, weight, gradient = operands()
    out, back = jax.vjp(lambda x, w: fp8.einsum("NTD,DHC->NTHC", x, w), x, weight)
    of_x, of_weight = back(jnp.asarray(gradient))
    x8, weight8 = rounded(x, ml_dtypes.float8_e4m3fn), rounded(weight, ml_dtypes.float8_e4m3fn)
    gradient8 = rounded(gradient, ml_dtypes.float8_e5m2)
    exact = np.einsum("NTD,DHC->NTHC", x8, weight8)
    assert_allclose(out, exact, rtol=1e-5, atol=1e-6 * np.abs(exact).max())
    exact = np.einsum("NTHC,DHC->NTD", gradient8, weight8)
    assert_allclose(of_x, exact, rtol=1e-5, atol=1e-6 * np.abs(exact).max())
    exact = np.einsum("NTD,NTHC->DHC", x8, gradient8)
    assert_allclose(of_weight, exact, rtol=1e-5, atol=1e-6 * np.abs(exact).max())
    assert not np.allclose(out, np.einsum("NTD,DHC->NTHC", x, weight), rtol=1e-3)


def test_gradients_have_the_dtypes_of_their_operands():
    x, weight, _ = operands()
    out, back = jax.vjp(lambda x, w: fp8.einsum("NTD,DHC->NTHC", x, w), jnp.asarray(x, jnp.bfloat16), weight)
    assert [out.dtype, *(grad.dtype for grad in back(out))] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]


def test_a_scale_changes_no_rounding():
    """Other texts in the batch change the scale; entries within the format's range are rounded as without them."""
    x, weight, _ = operands()
    x = np.clip(np.abs(x), 1e-2, 1.0) * np.sign(x)
    alone = fp8.einsum("NTD,DHC->NTHC", x, weight)
    beside = fp8.einsum("NTD,DHC->NTHC", np.concatenate([x, 50 * x]), weight)
    assert_allclose(beside[:2], alone, rtol=1e-6, atol=1e-6)
    assert_array_equal(fp8.einsum("NTD,DHC->NTHC", 2.0**9 * x, weight), 2.0**9 * alone)


def test_powers_of_two():
    given = np.array([1, 1.5, 2, 3, 0.25, 2**-100, 1.1 * 2**-100, 0, np.inf, np.nan], np.float32)
    expected = np.array([1, 2, 2, 4, 0.25, 2.0**-100, 2.0**-99, 1, np.nan, np.nan], np.float32)
    assert_array_equal(fp8.power_of_two(jnp.asarray(given)), expected)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_seen(bad):
    x, weight, _ = operands()
    x[0, 0, 0] = bad
    assert np.isnan(fp8.einsum("NTD,DHC->NTHC", x, weight)).all()


def test_zeros_stay_zeros():
    x, weight, _ = operands()
    out, back = jax.vjp(lambda x, w: fp8.einsum("NTD,DHC->NTHC", x, w), np.zeros_like(x), weight)
    assert not out.any() and all(not grad.any() for grad in back(jnp.zeros_like(out)))


def hidden_states(weights, **options):
    options = {"compute_dtype": "float32", "config": CONFIG} | options
    return models.hidden_states(weights, TOKENS_NT, jnp.ones(TOKENS_NT.shape, bool), **options)


def test_a_model_is_near_itself_in_float32():
    weights = params.init(CONFIG, jax.random.key(0), "float32")

    def total(weights, fp8):
        return jnp.sum(jnp.sin(hidden_states(weights, fp8=fp8)))

    exact, near = (jax.grad(total)(weights, fp8) for fp8 in (False, True))
    for path, grad in params.flatten(exact).items():
        other = params.flatten(near)[path]
        assert np.linalg.norm(other - grad) <= 0.2 * np.linalg.norm(grad), path
        if path.endswith(("query", "down")):
            assert np.linalg.norm(other - grad) > 1e-4 * np.linalg.norm(grad), path  # they are rounded


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_every_product_with_a_weight_of_the_layers_is_of_8_bits_and_kept_as_before(remat):
    weights = params.abstract(CONFIG, "float32")

    def programs(fp8):
        gradient = jax.grad(lambda weights: jnp.sum(hidden_states(weights, remat=remat, fp8=fp8)))
        return jax.make_jaxpr(gradient)(weights).jaxpr

    assert flops.traced(programs(fp8=True)) == flops.traced(programs(fp8=False))
    assert flops.traced(programs(fp8=False), fp8=True) == 0
    found = flops.traced(programs(fp8=True), fp8=True)
    once = 2 * flops.layer_weights(CONFIG) * TOKENS_NT.size
    assert found == 3 * once if remat != "full" else 3 * once < found <= 4 * once


def test_a_run_learns_as_it_does_in_float32(inputs, tmp_path):
    losses = {}
    for dtype in ("compute_dtype", "fp8"):
        config = tiny.config(inputs / "model", inputs / "pairs.jsonl", model__matmul_dtype=dtype)
        config.train.epochs, config.optim.learning_rate = 4, 3e-3
        config.mesh.data = config.mesh.fsdp = 1
        fpo_jax.Trainer(config, tmp_path / dtype, devices=jax.devices()[:1]).train()
        losses[dtype] = [row["loss"] for row in jsonl.read(tmp_path / dtype / "metrics.jsonl") if "loss" in row]
    assert losses["fp8"] != losses["compute_dtype"]
    exact, near = (np.array(losses[dtype]) for dtype in ("compute_dtype", "fp8"))
    assert_allclose(near, exact, rtol=0.15, atol=0.02)
    assert near[-1] < 0.1 < 2 < near[0]
