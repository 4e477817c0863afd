"""The loss inside the kernels wherever a head lives and however completions lie in rows, against dense float64."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fpo_jax import logprobs, losses
from fpo_jax.kernels.lm_head import head_loss, pallas_tpu, reference, unrolled
from fpo_jax.kernels.lm_head.spec import HeadSpec, Placement
from tests import tolerances
from tests.kernels import test_kernels, test_pallas_tpu
from tests.mixed_loss import MixedLoss

ROWS, T, K, V, WIDTH = 8, 15, 3, 264, 32  # tokens and a vocabulary that no tile divides
LOSSES = [("alpha", {"alpha": 0.3}), ("kl_policy_target", {}), ("jensen_shannon", {}), ("dpo", {}), ("simpo", {})]
MESHES = {  # name -> devices along data, fsdp, tensor
    "one device": None,
    "data": (4, 1, 1),
    "fsdp": (1, 4, 1),
    "tensor": (1, 1, 2),
    "fsdp and tensor": (1, 2, 2),
    "data, fsdp and tensor": (2, 2, 2),
}
LAYOUTS = {"padded": 1, "two groups a row": 2}  # name -> groups of a row
KERNELS = [name for name in logprobs.PLATFORMS if name != "pallas_gpu"]  # its interpreter needs jax 0.11


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "TILES", ((128, 128),))


def placement_of(name: str) -> Placement | None:
    sizes = MESHES[name]
    if sizes is None:
        return None
    mesh = Mesh(np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes), ("data", "fsdp", "tensor"))
    return Placement(mesh, ("data", "fsdp"), "tensor", ("fsdp",))


def inputs(groups_of_row: int, *, seed=0):
    """Hidden states, head, targets, mask, operands, and the slots of rows that hold several groups."""
    rng, groups = np.random.default_rng(seed), ROWS * groups_of_row
    hidden_ND, head_VD, targets_N, _ = test_kernels.inputs(V, tokens=ROWS * T, width=WIDTH, seed=seed)
    loss_mask_N, slots_N = rng.random(ROWS * T) < 0.8, None
    if groups_of_row == 1:
        candidates_N = np.arange(ROWS * T) // (T // K)
    else:  # completions of any length, one after the other; the last of a row has none
        slots_N = np.sort(rng.integers(0, groups_of_row * K - 1, (ROWS, T), np.int32), axis=1).reshape(-1)
        candidates_N = np.repeat(np.arange(ROWS), T) * groups_of_row * K + slots_N
    logits_NV = np.asarray(hidden_ND, np.float64) @ np.asarray(head_VD, np.float64).T
    logps_N = logits_NV[np.arange(ROWS * T), targets_N] - np.log(np.exp(logits_NV).sum(1))
    logps = np.bincount(candidates_N, loss_mask_N * logps_N, minlength=groups * K).reshape(groups, K)
    lengths = np.bincount(candidates_N, loss_mask_N, minlength=groups * K).reshape(groups, K)
    operands = losses.Completions(
        logps_BK=np.zeros((groups, K), np.float32),
        reference_logps_BK=(logps + 2 * rng.normal(size=(groups, K))).astype(np.float32),
        lengths_BK=lengths.astype(np.float32),
        rewards_BK=rng.normal(size=(groups, K)).astype(np.float32),
        batch_kl=np.float32(0.3),
    )
    return (hidden_ND, head_VD, targets_N, jnp.asarray(loss_mask_N), operands), slots_N


@functools.partial(jax.jit, static_argnames=("implementation", "loss", "spec", "frozen"))
def run(args, slots_N, *, loss, spec, implementation=None, frozen=False):
    """Losses and log-probs, and the gradients for cotangents of both; of a frozen head that of the hidden states."""
    hidden_ND, head_VD, *rest = args
    groups = jax.tree.leaves(args[4])[0].shape
    options = {"group_loss": loss.of_logps, "groups": groups, "spec": spec, "slots_N": slots_N, "rows": ROWS}

    def weighted(hidden_ND, head_VD):
        if implementation is None:
            out = head_loss.fpo_head_loss(hidden_ND, head_VD, *rest, **options, token_stats=reference.token_stats)
        else:
            engine = logprobs.ENGINES[implementation]
            out = head_loss.fused_head_loss(hidden_ND, head_VD, *rest, **options, engine=engine)
        weights_B, weights_BK = jnp.arange(1.0, groups[0] + 1), jnp.cos(jnp.arange(float(groups[0] * K)))
        total = jnp.sum(out.losses_B * weights_B) + 1e-3 * jnp.sum(out.logps_BK.reshape(-1) * weights_BK)
        return total, (out.losses_B, out.logps_BK)

    wanted = (0,) if frozen else (0, 1)
    (_, out), grads = jax.value_and_grad(weighted, wanted, has_aux=True)(hidden_ND, head_VD)
    return out, grads


def expected(args, slots_N, *, loss, spec, frozen=False):
    spec = dataclasses.replace(spec, interpret=False, placement=None, kept_bytes=None)
    with jax.enable_x64(True):
        wide = tuple(jnp.asarray(x, "float64") for x in args[:2])
        operands = jax.tree.map(lambda x: jnp.asarray(x, "float64"), args[4])
        results = run((*wide, *args[2:4], operands), slots_N, loss=loss, spec=spec, frozen=frozen)
        return jax.tree.map(np.asarray, results)


def placed(args, slots_N, placement: Placement | None):
    """The arrays where a run has them."""
    if placement is None:
        return args, slots_N
    rows = NamedSharding(placement.mesh, PartitionSpec(placement.tokens))
    head = NamedSharding(placement.mesh, PartitionSpec(placement.vocab, placement.width))
    everywhere = NamedSharding(placement.mesh, PartitionSpec())
    operands = jax.tree.map(lambda x: rows if np.ndim(x) else everywhere, args[4])
    slots_N = None if slots_N is None else jax.device_put(slots_N, rows)
    return jax.device_put(args, (rows, head, rows, rows, operands)), slots_N


def assert_close(ours, theirs):
    for name, a, b in zip(("losses", "logps"), ours[0], theirs[0], strict=True):
        test_kernels.assert_close(a, b, tolerances.LOSS_KERNEL, name)
    for name, a, b in zip(("dhidden", "dhead"), ours[1], theirs[1], strict=False):
        test_kernels.assert_close(a, b, tolerances.LOSS_KERNEL_GRADIENT, name)


CASES = list(itertools.product(MESHES, LAYOUTS))


@pytest.mark.sampled(6)
@pytest.mark.parametrize(("mesh", "layout"), CASES)
@pytest.mark.parametrize("implementation", KERNELS)
def test_every_mesh_and_layout_matches_float64(implementation, mesh, layout):
    args, slots_N = inputs(LAYOUTS[layout])
    entries = LOSSES if implementation == "pallas_tpu" else LOSSES[:1]  # the kernel of the loss is the same
    loss = MixedLoss(tuple(losses.resolve(name, **options) for name, options in entries))
    logps_BK, groups = args[4].reference_logps_BK, len(args[4].rewards_BK)
    args = (*args[:4], loss.operands(args[4], logps_BK, of_group=np.arange(groups) % len(entries)))
    spec = HeadSpec(placement=placement_of(mesh), interpret=True, workspace_bytes=2**20, vocab_block=128)
    there = placed(args, slots_N, spec.placement)
    ours = run(*there, loss=loss, spec=spec, implementation=implementation)
    assert_close(ours, expected(args, slots_N, loss=loss, spec=spec))
    again = run(*there, loss=loss, spec=spec, implementation=implementation)
    jax.tree.map(np.testing.assert_array_equal, ours, again)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("mesh", ["one device", "fsdp", "fsdp and tensor"])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "logit_scale": 1.25, "vocab_size": 250}], ids=str)
def test_a_plane_that_is_kept_gives_the_same(mesh, options):
    args, slots_N = inputs(2)
    args = (*args[:2], args[2] % 250, *args[3:])
    loss = losses.resolve("alpha", alpha=0.3)
    spec = HeadSpec(**options, placement=placement_of(mesh), interpret=True, kept_bytes=2**30)
    ours = run(*placed(args, slots_N, spec.placement), loss=loss, spec=spec, implementation="pallas_tpu")
    assert_close(ours, expected(args, slots_N, loss=loss, spec=spec))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "logit_scale": 1.25, "vocab_size": 250}], ids=str)
def test_a_frozen_head_gives_the_same(mesh, options):
    """Its products are summed in the forward pass: the gradient has no matrix product with the vocabulary."""
    args, slots_N = inputs(2)
    args = (*args[:2], args[2] % 250, *args[3:])
    loss = losses.resolve("alpha", alpha=0.3)
    spec = HeadSpec(**options, placement=placement_of(mesh), interpret=True, vocab_block=128)
    there = placed(args, slots_N, spec.placement)
    ours = run(*there, loss=loss, spec=spec, implementation="pallas_tpu", frozen=True)
    assert_close(ours, expected(args, slots_N, loss=loss, spec=spec, frozen=True))
    program = functools.partial(run, loss=loss, spec=spec, implementation="pallas_tpu", frozen=True)
    products = 2  # logits, and their softmax with the head
    if spec.placement and spec.placement.mesh.shape["fsdp"] > 1:
        products *= 2  # the last block stands behind the loop that fetches each block while the one before is computed
    assert str(jax.make_jaxpr(program)(*there)).count("dot_general[") == products


def test_what_is_missing_stays_in_its_group():
    """A NaN in the hidden state of one token that counts: its row's other group and all other rows are as they were."""
    args, slots_N = inputs(2)
    first = int(np.flatnonzero(np.asarray(args[3]) & (slots_N < K))[0])
    broken = (args[0].at[first].set(jnp.nan), *args[1:])
    loss, spec = losses.resolve("jensen_shannon"), HeadSpec(interpret=True)
    (losses_B, _), _ = run(broken, slots_N, loss=loss, spec=spec, implementation="pallas_tpu")
    (sound_B, _), _ = run(args, slots_N, loss=loss, spec=spec, implementation="pallas_tpu")
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(losses_B)), [first // T * 2])
    np.testing.assert_array_equal(np.delete(losses_B, first // T * 2), np.delete(sound_B, first // T * 2))


def test_no_race_where_rows_hold_groups():
    args, slots_N = inputs(2)
    loss, spec = losses.resolve("jeffreys"), HeadSpec(want_entropy=True, want_argmax=True)
    found, out = test_pallas_tpu.raced(lambda: run(args, slots_N, loss=loss, spec=spec, implementation="pallas_tpu"))
    assert not found
    assert_close(out, expected(args, slots_N, loss=loss, spec=spec))


def test_what_a_kernel_cannot_multiply_is_refused():
    args, slots_N = inputs(2)
    args = (args[0][:, :24], args[1][:, :24], *args[2:])
    with pytest.raises(ValueError, match="hidden width 24 is not a multiple of 16; use the implementation 'chunked'"):
        run(args, slots_N, loss=losses.resolve("dpo"), spec=HeadSpec(interpret=True), implementation="pallas_triton")


def test_a_loss_that_cannot_run_in_a_kernel_is_refused():
    with pytest.raises(ValueError, match="the group loss uses 'sort', which cannot run in the loss kernel"):
        unrolled.trace(lambda x: jnp.sort(x), jax.ShapeDtypeStruct((1, 3), "float32"))
