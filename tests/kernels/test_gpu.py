"""The head kernels and attention on a real Hopper GPU: what neither an emulator nor a compiler shows.

The hardware's exp and rsqrt, its barriers, clusters and copies. `JAX_PLATFORMS=cuda pytest tests/kernels/test_gpu.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax.kernels.lm_head import chunked, pallas_gpu
from fpo_jax.kernels.lm_head.spec import HeadSpec
from tests import attention_oracle, tolerances
from tests.attention.test_attention import assert_matches
from tests.kernels import test_kernels as head

pytestmark = pytest.mark.gpu

if jax.default_backend() != "gpu":
    pytest.skip("needs an NVIDIA GPU; run with JAX_PLATFORMS=cuda on one", allow_module_level=True)
if pallas_gpu.unsupported(width=64, rows=8, dtype="bfloat16", compute_capability=jax.devices()[0].compute_capability):
    pytest.skip("the head kernels need a Hopper GPU and jax 0.11", allow_module_level=True)

# (N, D, V, options)
CASES = [
    (1024, 512, 32000, {}),
    (1, 64, 8, {}),  # dlogits of one part of a tile
    (130, 64, 104, {}),
    (9, 128, 200, {}),
    (333, 128, 1256, {"vocab_size": 1003, "logit_scale": 1.25}),
    (777, 192, 5000, {"softcap": 5.0}),
    (1500, 256, 12000, {"workspace_bytes": 2**22}),
    (640, 512, 50304, {"vocab_block": 8192}),
]


@pytest.mark.parametrize("head_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("N", "D", "V", "options"), CASES, ids=str)
def test_head_kernels_match_float64(N, D, V, options, head_dtype):
    spec = HeadSpec(**options, want_entropy=True, compute_dtype="bfloat16")
    hidden_ND, head_VD, targets_N, cotangents = head.inputs(
        V, tokens=N, width=D, vocab_size=spec.vocab_size, dtype="bfloat16"
    )
    head_VD = head_VD.astype(head_dtype)
    results = head.run(pallas_gpu.token_stats, hidden_ND, head_VD, targets_N, cotangents, spec=spec)
    expected = head.oracle(hidden_ND, head_VD, targets_N, cotangents, spec=spec)
    assert results[2].dtype == head_dtype
    head.assert_matches_oracle(
        results, expected, values=tolerances.KERNEL_VALUE, gradients=tolerances.KERNEL_GRADIENT_BF16
    )


def test_head_kernels_give_the_same_bits_twice():
    hidden_ND, head_VD, targets_N, cotangents = head.inputs(32000, tokens=4096, width=1024, dtype="bfloat16")
    first, second = (
        head.run(pallas_gpu.token_stats, hidden_ND, head_VD, targets_N, cotangents, spec=HeadSpec()) for _ in range(2)
    )
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("D", "V"), [(4096, 32000), (4096, 128256)])
def test_head_kernels_match_the_blockwise_head_at_full_size(D, V):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden_ND = jax.random.normal(keys[0], (4096, D), jnp.bfloat16)
    head_VD = jax.random.normal(keys[1], (V, D), jnp.bfloat16) * (3 / D**0.5)
    targets_N = jax.random.randint(keys[2], (4096,), 0, V)
    cotangents = tuple(jax.random.normal(keys[3], (2, 4096)))
    ours, theirs = (
        head.run(engine.token_stats, hidden_ND, head_VD, targets_N, cotangents, spec=HeadSpec())
        for engine in (pallas_gpu, chunked)
    )
    for name in ("target_logit_N", "lse_N"):
        head.assert_close(getattr(ours[0], name), getattr(theirs[0], name), tolerances.KERNEL_VALUE, name)
    for place, name in ((1, "dhidden"), (2, "dhead")):
        head.assert_close(ours[place], theirs[place], tolerances.KERNEL_GRADIENT_BF16, name)


ATTENTION = [
    {"T": 300, "H": 4, "G": 2, "C": 64, "shared": True},
    {"T": 1003, "H": 4, "G": 1, "C": 128, "shared": True},
    {"T": 1003, "H": 2, "G": 2, "C": 80, "shared": True, "window": 20},
    {"T": 520, "H": 2, "G": 1, "C": 128, "segments": True},
    {"T": 520, "H": 2, "G": 1, "C": 64, "window": 130},
    {"T": 1, "H": 2, "G": 1, "C": 64},
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("sizes", ATTENTION, ids=str)
def test_attention_kernels_match_float64_and_give_the_same_bits_twice(sizes, dtype):
    case = attention_oracle.Case(**sizes, scale=sizes["C"] ** -0.5, lengths=(sizes["T"], sizes["T"] // 2, 0))
    arrays = case.inputs(dtype)
    first, second = (attention_oracle.run(case, arrays, implementation="mosaic") for _ in range(2))
    assert_matches(first, case.oracle(*arrays), dtype=dtype, bounds=tolerances.ATTENTION_LONG)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
