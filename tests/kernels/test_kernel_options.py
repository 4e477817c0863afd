"""Every option of the head on every implementation: it changes what it says it changes, or it is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from fpo_jax import logprobs
from fpo_jax.kernels.lm_head.spec import HeadSpec, Placement
from tests import tolerances
from tests.kernels import test_kernels

TOKENS, WIDTH, V = 24, 64, 328
needs_mosaic_gpu = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the GPU kernels need jax 0.11")
NAMES = [
    pytest.param(name, marks=[needs_mosaic_gpu] if name == "pallas_gpu" else [], id=name)
    for name in logprobs.IMPLEMENTATIONS
]
MESH = Mesh(np.array(jax.devices()[:2]), ("data",))
NUMBERS = {  # options that change what comes out
    "logit_scale": {"logit_scale": 0.5},
    "softcap": {"softcap": 2.0},
    "vocab_size": {"vocab_size": 300},
}
COSTS = {  # options that change how it is computed, and the implementations that have nothing they could change
    "workspace_bytes": ({"workspace_bytes": 2**20}, {"reference"}),
    "kept_bytes": ({"kept_bytes": 2**30}, {"reference"}),
    "vocab_block": ({"vocab_block": 128}, {"reference"}),
    "placement": ({"placement": Placement(MESH, ("data",))}, {"reference"}),  # XLA partitions it
    "interpret": (None, {"reference", "chunked"}),  # nothing to emulate
}


def spec_of(name, **options):
    return HeadSpec(interpret=name in logprobs.PLATFORMS, **options)


def inputs(dtype="bfloat16", tokens=TOKENS):
    return test_kernels.inputs(V, tokens=tokens, width=WIDTH, vocab_size=300, dtype=dtype)


def run(name, *args, spec):
    return test_kernels.run(logprobs.IMPLEMENTATIONS[name], *args, spec=spec)


def test_every_option_stands_here():
    fields = {field.name for field in dataclasses.fields(HeadSpec)}
    assert fields == {*NUMBERS, *COSTS, "compute_dtype", "want_entropy", "want_argmax"}


@pytest.mark.parametrize("option", NUMBERS)
@pytest.mark.parametrize("name", NAMES)
def test_numbers_change_and_are_right(name, option):
    args, spec = inputs(), spec_of(name, **NUMBERS[option])
    base, changed = run(name, *args, spec=spec_of(name)), run(name, *args, spec=spec)
    for before, after in ((base[0].lse_N, changed[0].lse_N), (base[1], changed[1]), (base[2], changed[2])):
        difference = np.abs(np.asarray(before, np.float32) - np.asarray(after, np.float32)).max()
        assert difference > tolerances.DIFFERENT
    test_kernels.assert_matches_oracle(
        changed,
        test_kernels.oracle(*args, spec=spec),
        values=tolerances.KERNEL_VALUE,
        gradients=tolerances.KERNEL_GRADIENT_BF16,
    )


@pytest.mark.parametrize("name", NAMES)
def test_by_products_come_when_asked_for(name):
    args = inputs()
    for entropy, argmax in ((False, False), (True, False), (False, True)):
        spec = spec_of(name, want_entropy=entropy, want_argmax=argmax)
        stats, *_ = run(name, *args, spec=spec)
        assert (stats.entropy_N is not None, stats.is_argmax_N is not None) == (entropy, argmax)
        expected, *_ = test_kernels.oracle(*args, spec=spec)
        if entropy:
            test_kernels.assert_close(stats.entropy_N, expected.entropy_N, tolerances.KERNEL_VALUE, "entropy")
        if argmax:
            np.testing.assert_array_equal(stats.is_argmax_N, expected.is_argmax_N)


@pytest.mark.parametrize("name", NAMES)
def test_compute_dtype_changes_the_product_or_is_refused(name):
    hidden_ND, head_VD, targets_N, cotangents = inputs("float32")
    rounded = run(name, hidden_ND, head_VD, targets_N, cotangents, spec=spec_of(name, compute_dtype="bfloat16"))
    if name == "pallas_gpu":
        with pytest.raises(ValueError, match="float32 operands; the GPU kernels multiply bfloat16; use the implement"):
            run(name, hidden_ND, head_VD, targets_N, cotangents, spec=spec_of(name))
    else:
        exact = run(name, hidden_ND, head_VD, targets_N, cotangents, spec=spec_of(name))
        assert np.abs(exact[0].lse_N - rounded[0].lse_N).max() > tolerances.DIFFERENT
    operands = hidden_ND.astype(jnp.bfloat16), head_VD.astype(jnp.bfloat16)
    expected = test_kernels.oracle(*operands, targets_N, cotangents, spec=HeadSpec())
    test_kernels.assert_matches_oracle(
        rounded, expected, values=tolerances.KERNEL_VALUE, gradients=tolerances.KERNEL_GRADIENT_BF16
    )


@pytest.mark.parametrize("option", COSTS)
@pytest.mark.parametrize("name", NAMES)
def test_costs_change_the_program(name, option):
    change, without_effect = COSTS[option]
    if (option, name) == ("kept_bytes", "chunked"):  # which keeps what the workspace holds, unless it is told not to
        change = {"kept_bytes": 0}
    args = inputs(tokens=4096)

    def program(spec):
        function = functools.partial(test_kernels.weighted, logprobs.IMPLEMENTATIONS[name], args[2], args[3], spec)
        return str(jax.make_jaxpr(jax.grad(function, (0, 1)))(*args[:2]))

    base = program(spec_of(name))
    if change is None:
        changed = program(HeadSpec(interpret=not spec_of(name).interpret))
    else:
        changed = program(spec_of(name, **change))
    assert (base == changed) == (name in without_effect)


@needs_mosaic_gpu
@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ({"V": 257}, {}, "257 rows of the head are not a multiple of 8.*; use the implementation 'chunked'"),
        ({"width": 24}, {}, "hidden width 24 is not a multiple of 64"),
        ({}, {"vocab_block": 100}, "vocab_block=100 is not a multiple of 8"),
    ],
    ids=str,
)
def test_gpu_kernel_refuses_what_it_cannot_do(sizes, options, message):
    args = test_kernels.inputs(**{"V": V, "width": WIDTH, "dtype": "bfloat16", **sizes})
    with pytest.raises(ValueError, match=message):
        logprobs.IMPLEMENTATIONS["pallas_gpu"](*args[:3], spec=spec_of("pallas_gpu", **options))
