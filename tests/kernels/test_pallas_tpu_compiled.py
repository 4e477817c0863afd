"""TPU head kernels compiled for slices that are not here: they fit in VMEM and hold no logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fpo_jax.kernels.lm_head import chunked, pallas_tpu
from fpo_jax.kernels.lm_head.spec import HeadSpec, Placement
from fpo_jax.perf import hardware

pytestmark = pytest.mark.deviceless

TARGETS = ["v5e-4", "v5p-8", "v6e-4", "v7x-4"]
N = 8192
HEADS = [(4096, 32000, {}), (4096, 128256, {}), (2560, 50304, {}), (3584, 256000, {"softcap": 30.0}), (768, 50257, {})]
MIB = 2**20
FORWARD_BYTES = 20 * MIB  # the limit for forward and loss; measured 0.05 to 0.22
# Workspace of 192 MiB, dhidden of 128, a block of the head; a copy of the larger heads would be 1,002 and 1,750.
# Measured 142 to 289; with a float32 head to 352 (v7x, libtpu 0.0.52) or 481 (v7x, libtpu 0.0.50, which buffers more).
BACKWARD_BYTES = 512 * MIB


@pytest.fixture(autouse=True)
def compiler():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (pip install 'jax[tpu]')")


def arrays(target, *shapes_and_dtypes):
    here = NamedSharding(hardware.mesh(target, devices=1), PartitionSpec())
    return [jax.ShapeDtypeStruct(shape, dtype, sharding=here) for shape, dtype in shapes_and_dtypes]


def compiled(target, kernel, D, V, *, backward, head_dtype="bfloat16", tokens=N, argnums=(0, 1), **options):
    """The program of a summed log-prob, or of its value and gradients."""
    spec = HeadSpec(compute_dtype="bfloat16", **options)

    def total(hidden_ND, head_VD, targets_N):
        stats = kernel(hidden_ND, head_VD, targets_N, spec=spec)
        return jnp.sum(stats.target_logit_N - stats.lse_N)

    operands = arrays(target, ((tokens, D), "bfloat16"), ((V, D), head_dtype), ((tokens,), "int32"))
    return hardware.compile_for(jax.value_and_grad(total, argnums) if backward else total, *operands)


def temporaries(program):
    return hardware.temporaries_of(program, hardware.mesh("v5e-4").devices.flat[0])


@pytest.mark.parametrize(("D", "V", "options"), HEADS, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_forward_needs_no_memory(target, D, V, options):
    program = compiled(target, pallas_tpu.token_stats, D, V, backward=False, want_entropy=True, **options)
    assert "token_stats" in program.as_text() and temporaries(program) < FORWARD_BYTES


@pytest.mark.parametrize("head_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("D", "V", "options"), HEADS[1:], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_gradients_need_a_workspace(target, D, V, options, head_dtype):
    """Neither a copy of the head in bfloat16 nor a padded one for the odd vocabulary."""
    mixed = compiled(target, pallas_tpu.token_stats, D, V, backward=True, head_dtype=head_dtype, **options)
    assert temporaries(mixed) < BACKWARD_BYTES


@pytest.mark.parametrize("width", [5120, 8192, 16384])
@pytest.mark.parametrize("target", ["v5p-8", "v7x-4"])
def test_tiles_of_wide_models_fit_in_vmem(target, width):
    """64 MiB on these two; the compiler refuses what does not fit."""
    for dtype in ("bfloat16", "float32"):
        compiled(target, pallas_tpu.token_stats, width, 2048, tokens=1024, backward=True, head_dtype=dtype)


@pytest.mark.parametrize("kernel", [chunked.token_stats, pallas_tpu.token_stats], ids=["chunked", "pallas_tpu"])
@pytest.mark.parametrize(("axes", "limit"), [((1, 8, 1), 384), ((1, 1, 8), 230), ((2, 2, 2), 480)], ids=str)
def test_a_cut_head_is_streamed(kernel, axes, limit):
    """Per device: no whole head (1,002 MiB of it), 8,192 tokens a data shard; measured 352, 192 to 225, 448.

    dhidden is 128 MiB, and as much again where `tensor` sums it. The rest is the workspace of 192 MiB and blocks of the
    head: along fsdp one is on its way in and one on its way out while a third is computed.
    """
    devices = hardware.mesh("v5e-8").devices
    mesh = Mesh(np.reshape(devices, axes), ("data", "fsdp", "tensor"))
    placement = Placement(mesh, ("data", "fsdp"), "tensor", ("fsdp",))
    rows = N * axes[0] * axes[1]

    def put(shape, dtype, *names):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*names)))

    def total(hidden_ND, head_VD, targets_N):
        stats = kernel(hidden_ND, head_VD, targets_N, spec=HeadSpec(placement=placement))
        return jnp.sum(stats.target_logit_N - stats.lse_N)

    program = hardware.compile_for(
        jax.value_and_grad(total, (0, 1)),
        put((rows, 4096), "bfloat16", ("data", "fsdp")),
        put((128256, 4096), "bfloat16", "tensor", "fsdp"),
        put((rows,), "int32", ("data", "fsdp")),
    )
    assert temporaries(program) < limit * MIB
