"""TPU head kernels, interpreted on the CPU, against float64 NumPy; tiles are made small so that edges are met."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fpo_jax.kernels.lm_head import pallas_tpu
from fpo_jax.kernels.lm_head.spec import HeadSpec
from tests import jaxpr_tools, tolerances
from tests.kernels import test_kernels

CASES = [
    (1000, {}),
    (1024, {}),
    (1257, {"softcap": 5.0}),
    (1000, {"logit_scale": 1.25, "vocab_size": 903}),
    (1257, {"logit_scale": 0.7, "softcap": 4.0, "vocab_size": 1024, "vocab_block": 300}),
    (50257, {}),
]


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "TILES", ((128, 128),))


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("V", "options"), CASES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_match_float64(V, options, dtype, small_tiles):
    """300 tokens in tiles of 128: two whole ones and one that ends inside."""
    spec = HeadSpec(**options, want_entropy=True, want_argmax=True, interpret=True)
    args = test_kernels.inputs(V, tokens=300 if V < 2000 else 130, vocab_size=spec.vocab_size, dtype=dtype)
    results = test_kernels.run(pallas_tpu.token_stats, *args, spec=spec)
    assert all(x.dtype == jnp.float32 for x in results[0])
    assert results[1].dtype == results[2].dtype == dtype
    gradients = tolerances.KERNEL_GRADIENT_F32 if dtype == "float32" else tolerances.KERNEL_GRADIENT_BF16
    test_kernels.assert_matches_oracle(
        results, test_kernels.oracle(*args, spec=spec), values=tolerances.KERNEL_VALUE, gradients=gradients
    )


def test_float32_master_head_is_cast_tile_by_tile(small_tiles):
    hidden_ND, _, targets_N, cotangents = test_kernels.inputs(300, dtype="bfloat16")
    _, head_VD, _, _ = test_kernels.inputs(300)
    spec = HeadSpec(compute_dtype="bfloat16", interpret=True)
    results = test_kernels.run(pallas_tpu.token_stats, hidden_ND, head_VD, targets_N, cotangents, spec=spec)
    assert results[1].dtype == jnp.bfloat16 and results[2].dtype == jnp.float32
    expected = test_kernels.oracle(hidden_ND, head_VD.astype(jnp.bfloat16), targets_N, cotangents, spec=spec)
    test_kernels.assert_matches_oracle(
        results, expected, values=tolerances.KERNEL_VALUE, gradients=tolerances.KERNEL_GRADIENT_BF16
    )


def raced(function):
    """Whether the TPU interpreter, with two simulated cores and NaN in fresh memory, sees a race in `function()`."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # the result has no public name

    params = pltpu.InterpretParams(
        detect_races=True, num_cores_or_threads=2, uninitialized_memory="nan", out_of_bounds_reads="raise"
    )
    jax.clear_caches()
    try:
        with pltpu.force_tpu_interpret_mode(params):
            result = jax.block_until_ready(function())
        return interpret_pallas_call.races.races_found, result
    except jax.errors.JaxRuntimeError as error:  # 0.12 raises
        assert "race" in str(error).lower(), error
        return True, None
    finally:
        pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "vocab_size": 333}], ids=str)
def test_no_race_between_two_cores(options, small_tiles):
    spec = HeadSpec(**options, want_entropy=True)
    args = test_kernels.inputs(384, tokens=256, width=128, vocab_size=spec.vocab_size)
    found, results = raced(lambda: test_kernels.run(pallas_tpu.token_stats, *args, spec=spec))
    assert not found
    test_kernels.assert_matches_oracle(
        results,
        test_kernels.oracle(*args, spec=spec),
        values=tolerances.KERNEL_VALUE,
        gradients=tolerances.KERNEL_GRADIENT_F32,
    )


def test_the_race_detector_sees_a_race():
    """Positive control: two cores add to one output."""

    def add(x, out):
        out[...] += x[...]

    def racy():
        return pl.pallas_call(
            add,
            grid=(4,),
            in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
            out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
            out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        )(jnp.ones((32, 128), jnp.float32))

    assert raced(racy)[0]


def test_no_array_of_logits(small_tiles):
    """A tile of 128 by 128 is the largest thing with a vocabulary in it, forward and backward."""
    spec = HeadSpec(interpret=True, vocab_size=1203, want_entropy=True)
    hidden_ND, head_VD, targets_N, cotangents = test_kernels.inputs(**test_kernels.SIZES, vocab_size=1203)
    function = functools.partial(test_kernels.weighted, pallas_tpu.token_stats, targets_N, cotangents, spec)
    elements = test_kernels.SIZES["tokens"] * test_kernels.SIZES["V"]
    for function_ in (function, jax.value_and_grad(function, (0, 1))):
        assert not jaxpr_tools.arrays_in_jaxpr(function_, hidden_ND, head_VD, elements=elements)


def test_what_does_not_fit_is_refused():
    assert pallas_tpu.unsupported(width=4096, head_dtype="float32", dtype="bfloat16") == ""
    wide = pallas_tpu.unsupported(width=65536, head_dtype="bfloat16", dtype="bfloat16")
    assert wide == "D=65536: the smallest tile of the forward kernel takes 64 MiB of VMEM, 58 MiB are there"
    with jax.enable_x64(True), pytest.raises(ValueError, match="float64 operands; the TPU kernels .* use the impl"):
        args = test_kernels.inputs(300, dtype="float64")
        pallas_tpu.token_stats(*args[:3], spec=HeadSpec(interpret=True))
