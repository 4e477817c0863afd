"""Head kernels on a mesh of eight virtual devices: every placement gives what one device gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fpo_jax.kernels.lm_head import chunked, pallas_tpu, pallas_triton, reference
from fpo_jax.kernels.lm_head.spec import HeadSpec, Placement
from tests import jaxpr_tools, tolerances
from tests.kernels import test_kernels

AXES = ("data", "fsdp", "expert", "tensor")
MESHES = {
    "data": (8, 1, 1, 1),
    "fsdp": (1, 8, 1, 1),
    "tensor": (1, 1, 1, 8),
    "all": (2, 2, 1, 2),
    "fsdp and expert": (1, 2, 4, 1),
    "fsdp, expert and tensor": (1, 2, 2, 2),
}
ENGINES = {
    "chunked": chunked.token_stats,
    "pallas_tpu": pallas_tpu.token_stats,
    "pallas_triton": pallas_triton.token_stats,
}


def placed(sizes):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(sizes), AXES)
    return Placement(mesh, tokens=("data", "fsdp", "expert"), vocab="tensor", width=("fsdp", "expert"))


def put(args, placement):
    """Hidden states, head, targets and cotangents where the placement says they are."""
    hidden_ND, head_VD, targets_N, cotangents = args

    def at(x, *axes):
        return jax.device_put(x, NamedSharding(placement.mesh, P(*axes)))

    rows = placement.tokens
    head_VD = at(head_VD, placement.vocab, placement.width)
    return at(hidden_ND, rows), head_VD, at(targets_N, rows), tuple(at(g_N, rows) for g_N in cotangents)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", ENGINES)
def test_placements_equal_one_device(name, mesh):
    """Five of the 1,256 rows are on the last device of eight but padding; softcap, scale and by-products are on."""
    options = {"vocab_size": 1203, "softcap": 5.0, "logit_scale": 1.25, "want_entropy": True, "want_argmax": True}
    spec = HeadSpec(**options, vocab_block=None if mesh == "tensor" else 128, placement=placed(MESHES[mesh]))
    spec = dataclasses.replace(spec, interpret=name != "chunked")
    args = test_kernels.inputs(1256, tokens=40, width=16 if name == "pallas_triton" else 24, vocab_size=1203)
    results = test_kernels.run(ENGINES[name], *put(args, spec.placement), spec=spec)
    assert results[2].sharding.is_equivalent_to(NamedSharding(spec.placement.mesh, P("tensor", ("fsdp", "expert"))), 2)
    expected = test_kernels.oracle(*args, spec=spec)
    test_kernels.assert_matches_oracle(
        results, expected, values=tolerances.KERNEL_VALUE, gradients=tolerances.KERNEL_GRADIENT_F32
    )


def test_padding_may_fill_whole_devices():
    """300 of 1,256 rows are real: the last six devices of eight hold padding alone."""
    spec = HeadSpec(vocab_size=300, placement=placed(MESHES["tensor"]), want_entropy=True)
    args = test_kernels.inputs(1256, tokens=40, vocab_size=300)
    results = test_kernels.run(chunked.token_stats, *put(args, spec.placement), spec=spec)
    test_kernels.assert_matches_oracle(
        results,
        test_kernels.oracle(*args, spec=spec),
        values=tolerances.KERNEL_VALUE,
        gradients=tolerances.KERNEL_GRADIENT_F32,
    )


def test_bfloat16_gradients_are_summed_over_devices_in_float32():
    """Rounded once at the end, like on one device: eight devices that each round would be eight times worse."""
    spec = HeadSpec(placement=placed(MESHES["fsdp"]), vocab_block=128)
    args = test_kernels.inputs(1256, tokens=40, dtype="bfloat16")
    sharded = test_kernels.run(chunked.token_stats, *put(args, spec.placement), spec=spec)
    alone = test_kernels.run(chunked.token_stats, *args, spec=dataclasses.replace(spec, placement=None))
    different = np.mean(np.asarray(sharded[2], np.float32) != np.asarray(alone[2], np.float32))
    assert different < tolerances.FLIPPED_ROUNDINGS


def program_text(spec, argnums=(0, 1)):
    """The compiled program of one value and gradient, on the devices of the placement."""
    args = put(test_kernels.inputs(4096, tokens=64, width=32), spec.placement)
    function = functools.partial(test_kernels.weighted, chunked.token_stats, args[2], args[3], spec)
    return jax.jit(jax.value_and_grad(function, argnums)).lower(*args[:2]).compile().as_text()


def test_a_head_cut_over_its_width_is_gathered_block_by_block():
    """No device ever holds the whole head, nor its whole gradient; one device is the positive control."""
    whole = (4096, 32)
    streamed = program_text(HeadSpec(placement=placed(MESHES["fsdp"]), vocab_block=512))
    assert "all-gather" in streamed and "reduce-scatter" in streamed
    assert "f32[512,32]" in streamed and not jaxpr_tools.shapes_in_text(streamed, elements=whole[0] * whole[1])
    replicated = program_text(HeadSpec(placement=placed(MESHES["data"]), vocab_block=512))
    assert jaxpr_tools.shapes_in_text(replicated, elements=whole[0] * whole[1])


def test_a_head_cut_over_its_rows_stays_where_it_is():
    text = program_text(HeadSpec(placement=placed(MESHES["tensor"]), vocab_block=128))
    gathered = "".join(line for line in text.splitlines() if " all-gather(" in line)
    assert gathered
    assert not jaxpr_tools.shapes_in_text(gathered, elements=4 * 64 * 8 + 1)  # four numbers of a token, a device
    assert "all-reduce" in text  # dhidden
    assert not jaxpr_tools.shapes_in_text(text, elements=64 * 4096)


def test_a_frozen_head_scatters_nothing():
    spec = HeadSpec(placement=placed(MESHES["fsdp"]), vocab_block=512)
    assert "reduce-scatter" not in program_text(spec, argnums=(0,))


def test_reference_ignores_no_placement():
    """It is plain JAX: XLA partitions it, and the result is the same."""
    spec = HeadSpec(placement=placed(MESHES["all"]))
    args = test_kernels.inputs(1256, tokens=40)
    results = test_kernels.run(reference.token_stats, *put(args, spec.placement), spec=spec)
    test_kernels.assert_matches_oracle(
        results,
        test_kernels.oracle(*args, spec=spec),
        values=tolerances.KERNEL_VALUE,
        gradients=tolerances.KERNEL_GRADIENT_F32,
    )


MESH = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 1, 2), AXES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": ("rows",)}, "mesh axis 'rows' does not exist; use one of data, fsdp, expert, tensor"),
        ({"tokens": ("data",), "vocab": "data"}, "mesh axis 'data' cuts both tokens and vocabulary"),
        ({"tokens": ("data",), "width": ("data", "fsdp")}, "cut the width of the head and not all of them the tokens"),
    ],
    ids=str,
)
def test_placement_refuses_axes_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        Placement(MESH, **options)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"tokens": 38}, r"38 tokens are not divisible by the 4 devices along \('data', 'fsdp'\); use a multiple of 4"),
        ({"V": 1257}, "1257 rows of the head are not divisible by the 2 devices along 'tensor'"),
        ({"width": 25}, r"25 columns of the head are not divisible by the 2 devices along \('fsdp',\)"),
    ],
    ids=str,
)
def test_sizes_that_the_mesh_does_not_divide_are_refused(shapes, message):
    hidden_ND, head_VD, targets_N, _ = test_kernels.inputs(**{"V": 1256, "tokens": 40, "width": 24, **shapes})
    with pytest.raises(ValueError, match=message):
        chunked.token_stats(hidden_ND, head_VD, targets_N, spec=HeadSpec(placement=placed((2, 2, 1, 2))))


def test_placements_with_one_device_cut_nothing():
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), AXES)
    spec = HeadSpec(placement=Placement(mesh, ("data", "fsdp"), "tensor", ("fsdp",)), vocab_block=128)
    args = test_kernels.inputs(257)
    results = test_kernels.run(chunked.token_stats, *args, spec=spec)
    alone = test_kernels.run(chunked.token_stats, *args, spec=HeadSpec(vocab_block=128))
    for ours, theirs in zip(jax.tree.leaves(results), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(ours, jnp.asarray(theirs))
