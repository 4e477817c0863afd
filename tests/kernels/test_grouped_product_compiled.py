"""Grouped products compiled for GPUs that are not here: tensor cores, no spills, and no [E, M, K] array."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fpo_jax.kernels.experts import grouped_product
from fpo_jax.perf import hardware
from tests import compiling

pytestmark = pytest.mark.deviceless

TENSOR_CORES = {"a100": "mma.sync", "h100": "wgmma.mma_async", "b200": "tcgen05.mma"}
SIZES = {  # M, K, N, E: eight of 128 and two of eight experts, gpt-oss, and what divides little
    "Qwen3-30B-A3B": (65536, 2048, 768, 128),
    "Mixtral 8x7B": (16384, 4096, 14336, 8),
    "gpt-oss-20b": (32768, 2880, 5760, 32),
    "odd": (150, 80, 48, 3),
}
TEMPORARY_BYTES = 2**20  # where a piece of a group is; a copy of the rows for every expert is gigabytes


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("gpu", TENSOR_CORES)
def test_product_and_gradients_fit_and_copy_nothing(gpu, name, tmp_path):
    pytest.importorskip("jax_cuda13_plugin", reason="the CUDA compiler is not installed (pip install 'jax[cuda13]')")
    rows, width, columns, groups = SIZES[name]
    here = NamedSharding(hardware.mesh(f"{gpu}:1"), PartitionSpec())
    shapes = ((rows, width), (groups, width, columns), (rows, columns))
    x, matrices, dout = (jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=here) for shape in shapes)
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32, sharding=here)

    def both_ways(x, matrices, dout, sizes):
        implementation = grouped_product.select(x, matrices, here.mesh)
        assert implementation == "triton"
        apply = lambda *both: grouped_product.grouped_product(*both, sizes, implementation=implementation)  # noqa: E731
        out, pull = jax.vjp(apply, x, matrices)
        return out, pull(dout)

    program = hardware.compile_for(both_ways, x, matrices, dout, sizes, compiler_options=compiling.dumping_to(tmp_path))
    for kernel in ("grouped_rows", "grouped_rows__1", "grouped_gradient"):
        found = compiling.resources(tmp_path, kernel)
        assert found.spilled_bytes == 0, (kernel, found[:3])
        assert found.shared_bytes <= hardware.GPUS[gpu].shared_per_block, (kernel, found[:3])
        if name != "odd":
            assert TENSOR_CORES[gpu] in found.ptx and "cp.async" in found.ptx, kernel
    assert program.memory_analysis().temp_size_in_bytes < TEMPORARY_BYTES


def test_xla_makes_a_copy_of_the_rows_for_every_expert():
    """The reason for the kernel; where this fails, XLA has one of its own."""
    pytest.importorskip("jax_cuda13_plugin", reason="the CUDA compiler is not installed (pip install 'jax[cuda13]')")
    here = NamedSharding(hardware.mesh("h100:1"), PartitionSpec())
    x, matrices = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=here) for shape in ((4096, 2048), (128, 2048, 768))
    )
    sizes = jax.ShapeDtypeStruct((128,), jnp.int32, sharding=here)
    program = hardware.compile_for(jax.lax.ragged_dot, x, matrices, sizes)
    assert program.memory_analysis().temp_size_in_bytes >= 128 * 4096 * 2048 * 2
