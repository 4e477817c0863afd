"""Mosaic attention compiled by ptxas for an H100 that is not here: registers, spills and shared memory."""

import re

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import NamedSharding, PartitionSpec

from fpo_jax import types
from fpo_jax.attention import mosaic
from fpo_jax.perf import hardware

pytestmark = pytest.mark.deviceless

if not hasattr(plgpu, "InterpretGPUParams"):
    pytest.skip(f"jax {jax.__version__} has no such kernels; 0.11 is the first", allow_module_level=True)

SHARED_BYTES = 232448  # of a thread block on sm_90
KERNELS = ("mosaic_attention_dkv", "mosaic_attention_dq", "mosaic_attention_fwd")


def _numbers(pattern, text):
    """The numbers that a pattern captures; at least one."""
    found = [int(number) for number in re.findall(pattern, text)]
    assert found, (pattern, text)
    return found


# Every case is another program, as a kernel that the process has compiled before is not dumped again.
@pytest.mark.parametrize(
    ("C", "dtype", "segments", "window"),
    [
        (128, "bfloat16", True, None),
        (128, "float16", True, 512),
        (64, "bfloat16", True, None),
        (64, "float16", False, 512),
    ],
)
def test_kernels_fit_in_registers_and_shared_memory(C, dtype, segments, window, tmp_path, monkeypatch):
    pytest.importorskip("jax_cuda13_plugin", reason="the CUDA compiler is not installed (pip install 'jax[cuda13]')")
    for what in ("PTX", "PTXAS", "RESOURCES"):
        monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{what}", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    here = NamedSharding(hardware.mesh("h100:1"), PartitionSpec())
    N, T, H, G = 2, 4096, 32, 8

    def both(q, k, v, do, ids_NT):
        packed = types.Segments(ids_NT, ids_NT, ids_NT) if segments else None
        options = {"scale": C**-0.5, "window": window, "soft_cap": None}
        out, pull_back = jax.vjp(lambda *qkv: mosaic.attend(*qkv, packed, **options), q, k, v)
        return out, pull_back(do)

    arrays = [jax.ShapeDtypeStruct((N, T, heads, C), dtype, sharding=here) for heads in (H, G, G, H)]
    program = hardware.compile_for(both, *arrays, jax.ShapeDtypeStruct((N, T), "int32", sharding=here))
    ptxas = [path.read_text() for path in sorted(tmp_path.glob("*.ptxas"))]
    resources = [path.read_text() for path in sorted(tmp_path.glob("*.resources.txt"))]
    assert len(ptxas) == len(resources) == len(KERNELS)
    for name, registers, memory in zip(KERNELS, ptxas, resources, strict=True):
        assert name in registers
        assert set(_numbers(r"(\d+) bytes spill", registers)) == {0}, registers
        assert max(_numbers(r"Used (\d+) registers", registers)) <= 168, registers
        assert "serialized" not in registers, registers  # what ptxas says when it cannot keep a WGMMA in flight
        assert max(_numbers(r"smem_scratch_bytes=(\d+)", memory)) + 1024 <= SHARED_BYTES, memory
    # Beside the results: the statistics of the queries, and who sees whom.
    assert program.memory_analysis().temp_size_in_bytes < 4 * N * H * T * 4
