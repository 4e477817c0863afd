"""Triton kernels compiled for GPUs that are not here: tensor cores, registers, spills, shared memory, temporaries.

Triton chooses all of these, and versions of it differ; on a CPU nothing else would notice.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fpo_jax.kernels.lm_head import blocks, pallas_triton
from fpo_jax.kernels.lm_head.spec import HeadSpec
from fpo_jax.perf import hardware
from tests import compiling

pytestmark = pytest.mark.deviceless

N = 8192
SIZES = [  # Mistral, Llama-3, Gemma-2, GPT-NeoX
    (4096, 32000, {}),
    (4096, 128256, {}),
    (3584, 256000, {"softcap": 30.0}),
    (2560, 50304, {}),
]
TENSOR_CORES = {"a100": "mma.sync", "h100": "wgmma.mma_async"}  # how a kernel of theirs multiplies
SPILLED_BYTES = 8  # of dlogits, once per tile, for which a thread reads 12 KiB
GRADIENT_BYTES = 352 * 2**20  # as for pallas_gpu
PARTIALS_BYTES = N * 512  # partials of 32 splits; one tile of logits for every token would be twice that
PER_TOKEN_BYTES = N * 8  # of dlogits: targets, and little else
WINDOW = (((), jnp.int32),) * 2


@pytest.fixture
def compile_for(tmp_path):
    """Compile a function for a GPU, of arrays with these (shape, dtype); what its kernels take goes to `tmp_path`."""
    pytest.importorskip("jax_cuda13_plugin", reason="the CUDA compiler is not installed (pip install 'jax[cuda13]')")

    def compile_(gpu, function, *arrays):
        here = NamedSharding(hardware.mesh(f"{gpu}:1"), PartitionSpec())
        args = [jax.ShapeDtypeStruct(shape, dtype, sharding=here) for shape, dtype in arrays]
        return hardware.compile_for(function, *args, compiler_options=compiling.dumping_to(tmp_path))

    return compile_


def operands(tokens, D, V, dtype="bfloat16"):
    return ((tokens, D), dtype), ((V, D), dtype), ((tokens,), jnp.int32)


def assert_fits(kernel, folder, gpu, *, spilled_bytes=0):
    """Registers and shared memory as the GPU has them, and products on tensor cores."""
    found = compiling.resources(folder, kernel)
    assert found.spilled_bytes <= spilled_bytes, found[:3]
    assert found.shared_bytes <= hardware.GPUS[gpu].shared_per_block, found[:3]
    assert TENSOR_CORES[gpu] in found.ptx
    assert "cp.async" in found.ptx  # copies run while the tensor cores do


@pytest.mark.parametrize("want_entropy", [False, True])
@pytest.mark.parametrize(("D", "V", "options"), SIZES, ids=str)
@pytest.mark.parametrize("gpu", TENSOR_CORES)
def test_forward_fits_in_registers_and_holds_no_logits(gpu, D, V, options, want_entropy, compile_for, tmp_path):
    kernel = functools.partial(pallas_triton.forward_block, spec=HeadSpec(**options, want_entropy=want_entropy))
    program = compile_for(gpu, kernel, *operands(N, D, V), *WINDOW)
    assert_fits("partial_softmax", tmp_path, gpu)
    assert program.memory_analysis().temp_size_in_bytes < PARTIALS_BYTES


@pytest.mark.parametrize(("D", "V", "options"), SIZES, ids=str)
@pytest.mark.parametrize("gpu", TENSOR_CORES)
def test_dlogits_fit_in_registers_and_need_no_copy(gpu, D, V, options, compile_for, tmp_path):
    spec = HeadSpec(**options)
    kernel = functools.partial(pallas_triton.dlogits_block, spec=spec)
    block = pallas_triton.ENGINE.backward_tiles(N, V, "bfloat16", "bfloat16", spec=spec)
    program = compile_for(gpu, kernel, *operands(N, D, block.vocab), *(((N,), jnp.float32),) * 3, *WINDOW)
    assert_fits("dlogits", tmp_path, gpu, spilled_bytes=SPILLED_BYTES)
    assert program.memory_analysis().temp_size_in_bytes < PER_TOKEN_BYTES


@pytest.mark.parametrize("gpu", TENSOR_CORES)
def test_float32_is_not_rounded_for_the_tensor_cores(gpu, compile_for, tmp_path):
    """They would take it as TF32, with 10 bits."""
    kernel = functools.partial(pallas_triton.forward_block, spec=HeadSpec())
    compile_for(gpu, kernel, *operands(N, 4096, 32000, "float32"), *WINDOW)
    found = compiling.resources(tmp_path, "partial_softmax")
    assert "mma" not in found.ptx and "tf32" not in found.ptx and "fma.rn.f32" in found.ptx
    assert found.spilled_bytes == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("gpu", TENSOR_CORES)
@pytest.mark.parametrize(("tokens", "D", "V"), [(37, 64, 43), (1, 16, 1), (150, 80, 521)])
def test_ragged_sizes_compile(tokens, D, V, gpu, dtype, compile_for):
    spec = HeadSpec(softcap=30.0)

    def both(hidden_MD, head_WD, targets_M, first, last):
        forward = blocks.joined(pallas_triton.forward_block(hidden_MD, head_WD, targets_M, first, last, spec=spec))
        max_M, sum_M = forward.max_PM[0], forward.sum_PM[0]
        args = (hidden_MD, head_WD, targets_M, max_M, sum_M, sum_M, first, last)
        return forward, pallas_triton.dlogits_block(*args, spec=spec)

    program = compile_for(gpu, both, *operands(tokens, D, V, dtype), *WINDOW)
    assert [x.shape for x in jax.tree.leaves(program.out_info)] == [(1, tokens)] * 4 + [(tokens, V)]


@pytest.mark.parametrize("head_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("D", "V"), [(4096, 32000), (4096, 128256)])
@pytest.mark.parametrize("gpu", TENSOR_CORES)
def test_gradients_need_a_workspace(gpu, D, V, head_dtype, compile_for):
    """The same for any vocabulary: no copy of the head, and no array of logits."""
    spec = HeadSpec(compute_dtype="bfloat16")

    def total(hidden_ND, head_VD, targets_N):
        stats = pallas_triton.token_stats(hidden_ND, head_VD, targets_N, spec=spec)
        return jnp.sum(stats.target_logit_N - stats.lse_N)

    hidden, (head_shape, _), targets = operands(N, D, V)
    program = compile_for(gpu, jax.value_and_grad(total, (0, 1)), hidden, (head_shape, head_dtype), targets)
    assert program.memory_analysis().temp_size_in_bytes <= GRADIENT_BYTES
