"""Hopper kernels compiled by ptxas for an H100 that is not here: registers, spills and shared memory.

A spill in these kernels costs more than anything that a test on the CPU would notice, and versions of jax differ in it.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import NamedSharding, PartitionSpec

from fpo_jax.kernels.lm_head import blocks, chunked, pallas_gpu
from fpo_jax.kernels.lm_head.spec import HeadSpec
from fpo_jax.perf import hardware

pytestmark = pytest.mark.deviceless

if not hasattr(plgpu, "InterpretGPUParams"):
    pytest.skip(f"jax {jax.__version__} has no such kernels; 0.11 is the first", allow_module_level=True)

N = 8192
SHARED_BYTES = 232448  # of a thread block on sm_90
SIZES = [(4096, 32000, {}), (4096, 128256, {}), (3584, 256000, {"softcap": 30.0})]  # Mistral, Llama-3, Gemma-2


@pytest.fixture
def compile_for_h100(tmp_path, monkeypatch):
    """Compile a function of arrays with these (shape, dtype); what ptxas says goes to `tmp_path`."""
    pytest.importorskip("jax_cuda13_plugin", reason="the CUDA compiler is not installed (pip install 'jax[cuda13]')")
    for what in ("PTX", "PTXAS", "RESOURCES"):
        monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{what}", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    here = NamedSharding(hardware.mesh("h100:1"), PartitionSpec())

    def compile_(function, *arrays):
        args = [jax.ShapeDtypeStruct(shape, dtype, sharding=here) for shape, dtype in arrays]
        return hardware.compile_for(function, *args)

    return compile_


def _numbers(pattern, text):
    """The numbers that a pattern captures; at least one."""
    found = [int(number) for number in re.findall(pattern, text)]
    assert found, (pattern, text)
    return found


def assert_fits(folder):
    """No spill, as many registers as three warpgroups may have each, and shared memory left for the barriers."""
    (ptxas,), (resources,) = ([path.read_text() for path in folder.glob(f"*.{x}")] for x in ("ptxas", "resources.txt"))
    assert set(_numbers(r"(\d+) bytes spill", ptxas)) == {0}, ptxas
    assert max(_numbers(r"Used (\d+) registers", ptxas)) <= 168, ptxas
    assert "serialized" not in ptxas, ptxas  # what ptxas says when it cannot keep a WGMMA in flight
    assert max(_numbers(r"smem_scratch_bytes=(\d+)", resources)) + 1024 <= SHARED_BYTES, resources


def operands(tokens, D, V):
    return ((tokens, D), jnp.bfloat16), ((V, D), jnp.bfloat16), ((tokens,), jnp.int32)


BOUNDS = (((), jnp.int32),) * 2
GRADIENT_BYTES = 352 * 2**20  # the limit
TEMPORARY_BYTES = N * 512  # partials of 32 splits; one tile of logits for every token would be twice that


@pytest.mark.parametrize("want_entropy", [False, True])
@pytest.mark.parametrize(("D", "V", "options"), SIZES, ids=str)
def test_forward_fits_in_registers_and_holds_no_logits(D, V, options, want_entropy, compile_for_h100, tmp_path):
    kernel = functools.partial(pallas_gpu.forward_block, spec=HeadSpec(**options, want_entropy=want_entropy))
    program = compile_for_h100(kernel, *operands(N, D, V), *BOUNDS)
    assert_fits(tmp_path)
    assert program.memory_analysis().temp_size_in_bytes < TEMPORARY_BYTES


@pytest.mark.parametrize(("D", "V", "options"), SIZES, ids=str)
def test_dlogits_fit_in_registers_and_need_no_copy(D, V, options, compile_for_h100, tmp_path):
    kernel = functools.partial(pallas_gpu.dlogits_block, spec=HeadSpec(**options))
    program = compile_for_h100(kernel, *operands(N, D, V), *(((N,), jnp.float32),) * 3, *BOUNDS)
    assert_fits(tmp_path)
    assert program.memory_analysis().temp_size_in_bytes < TEMPORARY_BYTES


@pytest.mark.parametrize(("tokens", "D", "V"), [(37, 64, 40), (1, 64, 8), (150, 192, 520)])
def test_ragged_sizes_compile(tokens, D, V, compile_for_h100):
    """The interpreter takes sizes that real copies do not: those move 8 rows, or 64 columns of dlogits."""
    spec = HeadSpec()

    def both(hidden_MD, head_WD, targets_M, first, last):
        forward = blocks.joined(pallas_gpu.forward_block(hidden_MD, head_WD, targets_M, first, last, spec=spec))
        max_M, sum_M = forward.max_PM[0], forward.sum_PM[0]
        args = (hidden_MD, head_WD, targets_M, max_M, sum_M, sum_M, first, last)
        return forward, pallas_gpu.dlogits_block(*args, spec=spec)

    program = compile_for_h100(both, *operands(tokens, D, V), *BOUNDS)
    assert [x.shape for x in jax.tree.leaves(program.out_info)] == [(1, tokens)] * 4 + [(tokens, V)]


@pytest.mark.parametrize("head_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("D", "V"), [(4096, 32000), (4096, 128256)])
@pytest.mark.parametrize("kernel", [pallas_gpu.token_stats, chunked.token_stats], ids=["pallas_gpu", "chunked"])
def test_gradients_need_a_workspace(kernel, D, V, head_dtype, compile_for_h100):
    """The same for any vocabulary: no copy of the head, and no array of logits."""
    spec = HeadSpec(compute_dtype="bfloat16")

    def total(hidden_ND, head_VD, targets_N):
        stats = kernel(hidden_ND, head_VD, targets_N, spec=spec)
        return jnp.sum(stats.target_logit_N - stats.lse_N)

    hidden, (head_shape, _), targets = operands(N, D, V)
    program = compile_for_h100(jax.value_and_grad(total, (0, 1)), hidden, (head_shape, head_dtype), targets)
    assert program.memory_analysis().temp_size_in_bytes <= GRADIENT_BYTES
