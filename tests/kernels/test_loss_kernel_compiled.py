"""The loss inside the kernels, compiled for TPUs and GPUs that are not here: every loss, memory, registers, VMEM."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fpo_jax import logprobs, losses
from fpo_jax.kernels.lm_head import head_loss
from fpo_jax.kernels.lm_head.spec import HeadSpec, Placement
from fpo_jax.perf import hardware
from tests import compiling

pytestmark = pytest.mark.deviceless

TPUS, GPUS = ["v5e-4", "v5p-8", "v6e-4", "v7x-4"], ["h100:1"]
N, D, V = 8192, 4096, 128256  # Llama-3's head
MIB = 2**20
WORKSPACE = HeadSpec().workspace_bytes
FORWARD_BYTES = 20 * MIB  # the limits; measured 0.2 to 3.5
BACKWARD_BYTES = 352 * MIB  # measured 160 to 288


@pytest.fixture(autouse=True)
def compiler(request):
    target = request.node.callspec.params["target"] if hasattr(request.node, "callspec") else TPUS[0]
    module = "libtpu" if "-" in target else "jax_cuda13_plugin"
    pytest.importorskip(module, reason=f"the compiler for {target} is not installed (make test-deviceless)")


def place(target, devices):
    """Mesh, placement of a head that is cut over its width, and engine."""
    mesh = Mesh(hardware.mesh(target, devices=devices).devices.reshape(1, devices, 1), ("data", "fsdp", "tensor"))
    placement = Placement(mesh, ("data", "fsdp"), "tensor", ("fsdp",)) if devices > 1 else None
    return mesh, placement, logprobs.ENGINES["pallas_tpu" if "-" in target else "pallas_gpu"]


def compiled(
    target,
    loss,
    *,
    K=4,
    G=2,
    tokens=N,
    width=D,
    rows=V,
    backward=False,
    devices=1,
    head="bfloat16",
    options=None,
    **spec,
):
    """The program of the summed losses of G groups a device, or of its value and gradients."""
    mesh, placement, engine = place(target, devices)
    spec, groups = HeadSpec(placement=placement, **spec), (G * devices, K)

    def total(hidden_ND, head_VD, targets_N, loss_mask_N, operands):
        args = (hidden_ND, head_VD, targets_N, loss_mask_N, operands)
        out = head_loss.fused_head_loss(*args, group_loss=loss.of_logps, groups=groups, spec=spec, engine=engine)
        return jnp.sum(out.losses_B)

    def array(shape, dtype, *names):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*names)))

    per_token = [
        array((tokens * devices, *more), dtype, "fsdp") for more, dtype in (((width,), "bfloat16"), ((), "int32"))
    ]
    operands = losses.Completions(*[array(groups, "float32", "fsdp")] * 4, array((), "float32"))
    hidden, targets, scored = *per_token, array((tokens * devices,), "bool", "fsdp")
    function = jax.value_and_grad(total, (0, 1)) if backward else total
    args = (hidden, array((rows, width), head, None, "fsdp"), targets, scored, operands)
    return hardware.compile_for(function, *args, **(options or {}))


def temporaries(program, target):
    return hardware.temporaries_of(program, hardware.mesh(target, devices=1).devices.flat[0])


@pytest.mark.parametrize("target", TPUS + GPUS)
def test_forward_needs_no_memory_and_backward_a_workspace(target):
    loss = losses.resolve("alphapo-rw")
    forward = compiled(target, loss)
    assert "group_loss" in forward.as_text() and temporaries(forward, target) <= FORWARD_BYTES
    assert WORKSPACE / 2 <= temporaries(compiled(target, loss, backward=True), target) <= BACKWARD_BYTES


KINDS = [{**score, **of} for score in ({}, {"score": "mean_logp"}) for of in ({}, {"target": "rewards"})]
LOSSES = [(name, kind) for name in losses.DIVERGENCES for kind in KINDS]
LOSSES += [(name, {}) for name in losses.OBJECTIVES]


@pytest.mark.parametrize("target", ["v6e-4", "h100:1"])
@pytest.mark.parametrize(("name", "options"), LOSSES, ids=str)
def test_every_loss_compiles_into_the_kernel(name, options, target):
    loss = losses.resolve(name, **options, **({"alpha": 0.3} if name == "alpha" else {}))
    for K in (2, 5):
        compiled(target, loss, K=K, tokens=K * 200, width=256, rows=1280)


@pytest.mark.parametrize("head", ["bfloat16", "float32"])
@pytest.mark.parametrize(("target", "devices"), [("v5p-8", 1), ("v5p-8", 4), ("h100:1", 1), ("h100:8", 8)])
def test_kept_logits_take_what_is_planned(target, devices, head):
    keeping = {"kept_bytes": 2**40, "compute_dtype": "bfloat16"}
    program = compiled(target, losses.resolve("simpo"), backward=True, devices=devices, head=head, **keeping)
    _, placement, engine = place(target, devices)
    dtypes = jnp.dtype(head), jnp.dtype("bfloat16")
    plan = engine.kept_tiles(N, V, D, *dtypes, spec=HeadSpec(placement=placement, **keeping))
    assert temporaries(program, target) == pytest.approx(plan.workspace_bytes, rel=0.02)


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize(("K", "G"), [(2, 1), (8, 1), (4, 16)])
def test_the_kernel_of_a_gpu_spills_nothing(target, K, G, tmp_path):
    """A group of a row, as padded, and sixteen, as packed."""
    loss, options = losses.resolve("jensen_shannon"), {"compiler_options": compiling.dumping_to(tmp_path)}
    compiled(target, loss, K=K, G=G, tokens=K * G * 100, width=256, rows=1280, options=options)
    found = compiling.resources(tmp_path, "group_loss")
    assert found.spilled_bytes == 0 and found.shared_bytes <= 48 * 1024, found[:3]


@pytest.mark.parametrize("target", TPUS)
def test_a_row_of_many_tokens_fits_in_vmem(target):
    """Eight completions of 4,096 tokens; the compiler refuses what does not fit."""
    compiled(target, losses.resolve("jensen_shannon"), K=8, G=1, tokens=8 * 4096, width=256, rows=1280)
