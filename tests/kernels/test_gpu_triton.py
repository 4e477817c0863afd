"""The Triton head kernels on a real NVIDIA GPU, of sm_80 or later: its exp, quotients and tensor cores.

`JAX_PLATFORMS=cuda pytest tests/kernels/test_gpu_triton.py`. No GPU has run this yet.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax import logprobs
from fpo_jax.kernels.lm_head import chunked, pallas_triton
from fpo_jax.kernels.lm_head.spec import HeadSpec
from tests import tolerances
from tests.kernels import test_kernels as head

pytestmark = pytest.mark.gpu

if jax.default_backend() != "gpu":
    pytest.skip("needs an NVIDIA GPU; run with JAX_PLATFORMS=cuda on one", allow_module_level=True)
CAPABILITY = logprobs.Target.of(jax.devices()[0]).compute_capability
if reason := pallas_triton.unsupported(width=64, rows=8, dtype="bfloat16", compute_capability=CAPABILITY):
    pytest.skip(reason, allow_module_level=True)

# (N, D, V, options)
CASES = [
    (1024, 512, 32000, {}),
    (1, 16, 1, {}),
    (130, 80, 101, {}),
    (333, 128, 1257, {"vocab_size": 1003, "logit_scale": 1.25}),
    (777, 192, 5000, {"softcap": 5.0}),
    (1500, 256, 12000, {"workspace_bytes": 2**22}),
    (640, 512, 50304, {"vocab_block": 8192}),
]


@pytest.mark.parametrize(
    ("dtype", "head_dtype"), [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")]
)
@pytest.mark.parametrize("want_entropy", [False, True])
@pytest.mark.parametrize(("N", "D", "V", "options"), CASES, ids=str)
def test_head_kernels_match_float64(N, D, V, options, want_entropy, dtype, head_dtype):
    spec = HeadSpec(**options, want_entropy=want_entropy, compute_dtype=dtype)
    hidden_ND, head_VD, targets_N, cotangents = head.inputs(
        V, tokens=N, width=D, vocab_size=spec.vocab_size, dtype=dtype
    )
    args = hidden_ND, head_VD.astype(head_dtype), targets_N, cotangents
    results = head.run(pallas_triton.token_stats, *args, spec=spec)
    gradients = tolerances.KERNEL_GRADIENT_F32 if dtype == "float32" else tolerances.KERNEL_GRADIENT_BF16
    expected = head.oracle(*args, spec=spec)
    head.assert_matches_oracle(results, expected, values=tolerances.KERNEL_VALUE, gradients=gradients)


def test_head_kernels_give_the_same_bits_twice():
    args = head.inputs(32000, tokens=4096, width=1024, dtype="bfloat16")
    first, second = (head.run(pallas_triton.token_stats, *args, spec=HeadSpec()) for _ in range(2))
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
        for engine in (pallas_triton, chunked)
    )
    for name in ("target_logit_N", "lse_N"):
        head.assert_close(getattr(ours[0], name), getattr(theirs[0], name), tolerances.KERNEL_VALUE, name)
    for place, name in ((1, "dhidden"), (2, "dhead")):
        head.assert_close(ours[place], theirs[place], tolerances.KERNEL_GRADIENT_BF16, name)
