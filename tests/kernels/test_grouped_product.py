"""Rows times the matrix of their group: the Triton kernels, emulated, against float64; what is chosen where."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fpo_jax.kernels.experts import grouped_product, triton
from fpo_jax.perf import flops

emulated = functools.partial(grouped_product.grouped_product, implementation="triton", interpret=True)
SIZES = {  # M, K, N and the rows of each group
    "blocks shared by groups": (300, 64, 48, [100, 0, 150, 50]),
    "one group has all": (300, 32, 16, [0, 0, 300, 0]),
    "groups within a block, and rows of none": (257, 32, 144, [1, 2, 3, 200]),
    "whole blocks": (256, 16, 256, [128, 128, 0, 0]),
    "fewer rows than a block": (5, 16, 16, [1, 1, 1, 2]),
    "no group has a row": (7, 16, 16, [0, 0, 0, 0]),
}


def operands(name, dtype, seed=0):
    rows, width, columns, sizes = SIZES[name]
    random = np.random.default_rng(seed)
    shapes = ((rows, width), (len(sizes), width, columns), (rows, columns))
    return (*(jnp.asarray(random.normal(size=shape), dtype) for shape in shapes), jnp.asarray(sizes, jnp.int32))


def by_hand(x_MK, matrices_EKN, dout_MN, sizes_E):
    """Result and gradients in float64."""
    x, matrices, dout = (np.asarray(array, np.float64) for array in (x_MK, matrices_EKN, dout_MN))
    out, dx, dmatrices = np.zeros_like(dout), np.zeros_like(x), np.zeros_like(matrices)
    begin = 0
    for group, size in enumerate(np.asarray(sizes_E)):
        own = slice(begin, begin := begin + size)
        out[own], dx[own] = x[own] @ matrices[group], dout[own] @ matrices[group].T
        dmatrices[group] = x[own].T @ dout[own]
    return out, dx, dmatrices


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SIZES)
def test_product_and_gradients_are_those_by_hand(name, dtype):
    x, matrices, dout, sizes = operands(name, dtype)
    out, pull = jax.vjp(lambda x, matrices: emulated(x, matrices, sizes), x, matrices)
    # Products are exact in float32, and the last rounding is that of the dtype.
    tolerance = 2e-6 if dtype == "float32" else 2.0**-8
    for ours, exact, like in zip((out, *pull(dout)), by_hand(x, matrices, dout, sizes), (x, x, matrices), strict=True):
        assert ours.dtype == like.dtype and ours.shape == exact.shape
        assert_allclose(np.asarray(ours, np.float64), exact, rtol=0, atol=tolerance * max(1.0, np.abs(exact).max()))
    beyond = int(sizes.sum())
    assert not np.asarray(out[beyond:], np.float32).any()


@pytest.mark.parametrize("name", ["blocks shared by groups", "groups within a block, and rows of none"])
def test_programs_may_run_in_any_order(monkeypatch, name):
    """Backwards here: a program that wrote another group's rows would win."""
    x, matrices, _, sizes = operands(name, "float32")
    expected = emulated(x, matrices, sizes)
    forwards = triton._located

    def backwards(program, pieces, across):
        return forwards(pieces * across - 1 - program, pieces, across)

    monkeypatch.setattr(triton, "_located", backwards)
    assert_array_equal(emulated(x, matrices, sizes), expected)


def test_a_nan_stays_in_its_group():
    x, matrices, dout, sizes = operands("blocks shared by groups", "float32")
    clean, broken = (
        (emulated(one, matrices, sizes), triton.grouped_gradient(one, dout, sizes, interpret=True))
        for one in (x, x.at[99].set(jnp.nan))
    )
    assert np.isnan(broken[0][99]).all() and np.isnan(broken[1][0]).any()
    assert_array_equal(np.delete(broken[0], 99, 0), np.delete(clean[0], 99, 0))
    assert_array_equal(broken[1][1:], clean[1][1:])


def test_operations_are_those_of_a_row_and_its_own_matrix():
    x, matrices, dout, sizes = operands("whole blocks", "bfloat16")
    jaxpr = jax.make_jaxpr(lambda x, matrices: jax.vjp(lambda *both: emulated(*both, sizes), x, matrices)[1](dout))
    assert flops.traced(jaxpr(x, matrices).jaxpr) == 3 * 2 * 256 * 16 * 256


def test_the_result_is_kept_where_products_are():
    x, matrices, _, sizes = operands("whole blocks", "bfloat16")
    policy = jax.checkpoint_policies.save_only_these_names(grouped_product.RESULT)

    def forwards(policy):
        apply = jax.checkpoint(lambda x, matrices: jnp.sum(jnp.sin(emulated(x, matrices, sizes))), policy=policy)
        return flops.traced(jax.make_jaxpr(jax.grad(apply, argnums=(0, 1)))(x, matrices).jaxpr)

    assert forwards(None) - forwards(policy) == 2 * 256 * 16 * 256


def test_operands_beyond_the_indices_of_the_kernel_are_refused():
    rows, matrices, sizes = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((2**20, 2048), "bfloat16"), ((8, 2048, 64), "bfloat16"), ((8,), "int32"))
    )
    with pytest.raises(ValueError, match="2147483648 elements, and the kernel counts to 2.31; use smaller micro"):
        jax.eval_shape(emulated, rows, matrices, sizes)


@pytest.mark.parametrize(
    ("platform", "capability", "shape", "dtype", "chosen"),
    [
        ("cpu", "", (64, 32), "bfloat16", "xla"),
        ("tpu", "", (64, 32), "bfloat16", "xla"),
        ("gpu", "9.0", (64, 32), "bfloat16", "triton"),
        ("cuda", "8.0", (64, 32), "float32", "triton"),
        ("gpu", "7.5", (64, 32), "bfloat16", "xla"),
        ("gpu", "9.0", (64, 40), "bfloat16", "xla"),
        ("gpu", "9.0", (24, 32), "bfloat16", "xla"),
        ("gpu", "9.0", (64, 32), "float64", "xla"),
    ],
)
def test_the_kernel_is_chosen_on_every_gpu_that_runs_it(platform, capability, shape, dtype, chosen):
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    mesh = SimpleNamespace(devices=np.array([device], object))
    rows, matrices = jax.ShapeDtypeStruct((10, shape[0]), dtype), jax.ShapeDtypeStruct((4, *shape), dtype)
    assert grouped_product.select(rows, matrices, mesh) == chosen
