"""The group loss from hidden states, composed and as one TPU kernel, against the dense float64 reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fpo_jax import losses
from fpo_jax.kernels.lm_head import chunked, head_loss, pallas_tpu, reference
from fpo_jax.kernels.lm_head.spec import HeadSpec, Placement
from tests import jaxpr_tools, tolerances
from tests.kernels import test_kernels, test_pallas_tpu
from tests.mixed_loss import MixedLoss

B, R, V, WIDTH = 3, 50, 257, 24
FEW = 12  # tokens of a completion whose log-prob, -80, float32 rounds to 4e-6
FUSED = functools.partial(head_loss.fused_head_loss, engine=pallas_tpu.ENGINE)
COMPOSED = functools.partial(head_loss.fpo_head_loss, token_stats=chunked.token_stats)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles of tokens and of the head, none of which ends where a completion does."""
    monkeypatch.setattr(pallas_tpu, "TILES", ((128, 128),))


def inputs(K, *, seed=0, copies=1, R=R):
    """What `copies` times B groups are made of; of each B, one completion has no scored token and one group ties."""
    rng, groups = np.random.default_rng(seed), B * copies
    hidden_ND, head_VD, targets_N, _ = test_kernels.inputs(V, tokens=groups * K * R, width=WIDTH, seed=seed)
    loss_mask_NR = rng.random((groups * K, R)) < 0.7
    loss_mask_NR[1 :: B * K] = False
    operands = losses.Completions(
        logps_BK=np.zeros((groups, K), np.float32),
        reference_logps_BK=(rng.normal(size=(groups, K)) * 5 - 6.4 * R).astype(np.float32),
        lengths_BK=loss_mask_NR.sum(1).reshape(groups, K).astype(np.float32),
        rewards_BK=rng.normal(size=(groups, K)).astype(np.float32),
        batch_kl=np.float32(0.3),
    )
    operands.rewards_BK[2::B] = 1.0  # a tie
    return hidden_ND, head_VD, targets_N, jnp.asarray(loss_mask_NR.reshape(-1)), operands


@functools.partial(jax.jit, static_argnames=("head_loss_of", "loss", "spec"))
def run(head_loss_of, hidden_ND, head_VD, targets_N, loss_mask_N, operands, *, loss, spec):
    """HeadLoss, and the gradients for cotangents of both losses and log-probs."""
    groups = jax.tree.leaves(operands)[0].shape

    def weighted(hidden_ND, head_VD):
        args = (hidden_ND, head_VD, targets_N, loss_mask_N, operands)
        out = head_loss_of(*args, group_loss=loss.of_logps, groups=groups, spec=spec)
        weights_B, weights_BK = 1.0 + jnp.arange(groups[0]) % B, jnp.cos(jnp.arange(float(groups[0] * groups[1])))
        return jnp.sum(out.losses_B * weights_B) + jnp.sum(out.logps_BK.reshape(-1) * weights_BK), out

    (_, out), grads = jax.value_and_grad(weighted, (0, 1), has_aux=True)(hidden_ND, head_VD)
    return out, grads


def expected(args, *, loss, spec):
    """The same through dense float64 logits and ordinary autodiff."""
    dense = functools.partial(head_loss.fpo_head_loss, token_stats=reference.token_stats)
    spec = dataclasses.replace(spec, interpret=False, compute_dtype=None, placement=None)
    with jax.enable_x64(True):
        exact = [jnp.asarray(x, "float64") for x in args[:2]]
        operands = jax.tree.map(lambda x: jnp.asarray(x, "float64"), args[4])
        return jax.tree.map(np.asarray, run(dense, *exact, *args[2:4], operands, loss=loss, spec=spec))


def assert_equal_losses(ours, theirs, *, gradients=tolerances.HEAD_LOSS_GRADIENT):
    out, grads = ours
    test_kernels.assert_close(out.losses_B, theirs[0].losses_B, tolerances.HEAD_LOSS, "losses")
    test_kernels.assert_close(out.logps_BK, theirs[0].logps_BK, tolerances.KERNEL_VALUE, "logps")
    test_kernels.assert_close(grads[0], theirs[1][0], gradients, "dhidden")
    test_kernels.assert_close(grads[1], theirs[1][1], gradients, "dhead")


def assert_entries_match_float64(entries: dict[str, losses.Loss], K):
    """Compare every loss on its own, and the losses once more with float64 at the log-probs that the kernel has found.

    Those tell what the loss kernel rounds; a steep loss also shows how the log-probs were rounded.
    """
    mixed, spec = MixedLoss(tuple(entries.values())), HeadSpec(interpret=True)
    args = inputs(K, copies=len(entries), R=FEW)
    logps_BK = run(COMPOSED, *args, loss=losses.resolve("dpo"), spec=HeadSpec())[0].logps_BK
    args = (*args[:4], mixed.operands(args[4], logps_BK, of_group=np.repeat(np.arange(len(entries)), B)))
    (out, grads), (exact, exact_grads) = run(FUSED, *args, loss=mixed, spec=spec), expected(args, loss=mixed, spec=spec)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), "float64"), (out.logps_BK, args[4]))
        of_same_logps_B = np.asarray(mixed.of_logps(*wide))
    for index, name in enumerate(entries):
        groups, tokens = slice(index * B, (index + 1) * B), slice(index * B * K * FEW, (index + 1) * B * K * FEW)
        own, same = out.losses_B[groups], of_same_logps_B[groups]
        tolerance = tolerances.LOSS_OF_LOGPS_STEEP if name.startswith("neyman_chi2") else tolerances.LOSS_KERNEL
        test_kernels.assert_close(own, same, tolerance, f"{name}: losses of the same log-probs")
        theirs = exact.losses_B[groups]
        rounded = 2 * np.spacing(np.abs(out.logps_BK).max())  # of a log-prob, and of a loss whose slope is at most 1
        limit = tolerances.HEAD_LOSS * np.abs(theirs).max() + rounded
        np.testing.assert_allclose(own, theirs, rtol=0, atol=limit, err_msg=f"{name}: losses")
        theirs = exact_grads[0][tokens]
        test_kernels.assert_close(grads[0][tokens], theirs, tolerances.HEAD_LOSS_GRADIENT, f"{name}: dhidden")
    test_kernels.assert_close(out.logps_BK, exact.logps_BK, tolerances.KERNEL_VALUE, "logps")
    test_kernels.assert_close(grads[1], exact_grads[1], tolerances.HEAD_LOSS_GRADIENT, "dhead")


@pytest.mark.sampled(6)
@pytest.mark.parametrize("score", ["log_ratio", "mean_logp"])
@pytest.mark.parametrize("target", ["preference", "rewards"])
def test_every_divergence_in_the_kernel_matches_float64(score, target):
    own = {"alpha": {"alpha": 0.3}}  # what has no default
    kind = {"score": score, "target": target}
    entries = {name: losses.resolve(name, **own.get(name, {}), **kind) for name in losses.DIVERGENCES}
    assert_entries_match_float64(entries, K=3)


def test_every_objective_in_the_kernel_matches_float64():
    assert_entries_match_float64({name: losses.resolve(name) for name in losses.OBJECTIVES}, K=2)


OPTIONS = [
    {"softcap": 5.0, "logit_scale": 1.25},
    {"vocab_size": 203},
    {"compute_dtype": "float32", "workspace_bytes": 2**20},
    {"vocab_block": 128},
]


@pytest.mark.sampled(10)
@pytest.mark.parametrize("K", [2, 5, 8])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("head_loss_of", [FUSED, COMPOSED], ids=["fused", "composed"])
def test_options_and_group_sizes(head_loss_of, options, K):
    spec = HeadSpec(**options, interpret=head_loss_of is FUSED, want_entropy=True, want_argmax=True)
    args = inputs(K)
    args = (*args[:2], args[2] % (spec.vocab_size or V), *args[3:])
    loss = losses.resolve("jensen_shannon")
    ours, theirs = run(head_loss_of, *args, loss=loss, spec=spec), expected(args, loss=loss, spec=spec)
    assert_equal_losses(ours, theirs)
    test_kernels.assert_close(ours[0].entropy_N, theirs[0].entropy_N, tolerances.KERNEL_VALUE, "entropy")
    np.testing.assert_array_equal(ours[0].is_argmax_N, theirs[0].is_argmax_N)


def test_bfloat16_operands_and_float32_master_head():
    args = inputs(2)
    args = (args[0].astype(jnp.bfloat16), *args[1:])
    spec, loss = HeadSpec(interpret=True, compute_dtype="bfloat16"), losses.resolve("dpo")
    ours = run(FUSED, *args, loss=loss, spec=spec)
    assert [x.dtype for x in ours[1]] == [jnp.bfloat16, jnp.float32]
    rounded = (args[0], args[1].astype(jnp.bfloat16), *args[2:])
    theirs = expected(rounded, loss=loss, spec=spec)
    assert_equal_losses(ours, theirs, gradients=tolerances.KERNEL_GRADIENT_BF16)


def test_a_candidate_without_scored_tokens_has_logp_zero_and_no_gradient():
    out, grads = run(FUSED, *inputs(2), loss=losses.resolve("alphapo"), spec=HeadSpec(interpret=True))
    assert out.logps_BK[0, 1] == 0
    np.testing.assert_array_equal(grads[0].reshape(-1, R, WIDTH)[1], 0)
    assert np.isfinite(out.losses_B).all()


@pytest.mark.parametrize("head_loss_of", [FUSED, COMPOSED], ids=["fused", "composed"])
def test_a_scored_target_outside_the_vocabulary_is_nan_in_its_group_alone(head_loss_of):
    hidden_ND, head_VD, targets_N, loss_mask_N, operands = inputs(2)
    first = int(np.flatnonzero(loss_mask_N)[0])
    args = (hidden_ND, head_VD, targets_N.at[first].set(V), loss_mask_N, operands)
    out, _ = run(head_loss_of, *args, loss=losses.resolve("dpo"), spec=HeadSpec(interpret=head_loss_of is FUSED))
    np.testing.assert_array_equal(np.isnan(out.losses_B), [True, False, False])


def test_it_is_two_kernels_and_holds_no_logits():
    """Tiles and loss; nothing else multiplies, and nothing is of the size of the plane."""
    args, loss = inputs(2), losses.resolve("jeffreys")
    function = functools.partial(FUSED, group_loss=loss.of_logps, groups=(B, 2), spec=HeadSpec(interpret=True))
    text = str(jax.make_jaxpr(function)(*args))
    assert text.count("pallas_call[") == 2 and text.count("dot_general[") == 1
    assert not jaxpr_tools.arrays_in_jaxpr(function, *args, elements=V * len(args[0]))


def test_no_race_in_the_kernel():
    args, loss = inputs(2), losses.resolve("jeffreys")
    found, out = test_pallas_tpu.raced(lambda: run(FUSED, *args, loss=loss, spec=HeadSpec(want_entropy=True)))
    assert not found
    assert_equal_losses(out, expected(args, loss=loss, spec=HeadSpec()))


@pytest.mark.parametrize("head_loss_of", [FUSED, COMPOSED], ids=["fused", "composed"])
def test_groups_spread_over_devices_equal_one_device(head_loss_of):
    mesh = Mesh(np.array(jax.devices()[:3]), ("data",))
    spec = HeadSpec(interpret=head_loss_of is FUSED, placement=Placement(mesh, ("data",)))
    loss, args = losses.resolve("alpha", alpha=0.3), inputs(2)
    rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    places = (rows, everywhere, rows, rows, jax.tree.map(lambda x: rows if np.ndim(x) else everywhere, args[4]))
    ours = run(head_loss_of, *jax.device_put(args, places), loss=loss, spec=spec)
    assert_equal_losses(ours, expected(args, loss=loss, spec=spec))


def refused(head_loss_of=FUSED, groups=(B, 2), placement=None, rows=1, slots_N=None, **changed):
    """Call with something changed."""
    names = ("hidden_ND", "head_VD", "targets_N", "loss_mask_N", "operands")
    args = {**dict(zip(names, inputs(2), strict=True)), **changed}
    spec = HeadSpec(interpret=True, placement=placement)
    options = {"groups": groups, "spec": spec, "rows": rows, "slots_N": slots_N}
    return head_loss_of(*args.values(), group_loss=losses.resolve("dpo").of_logps, **options)


MESH = Mesh(np.array(jax.devices()[:2]), ("fsdp",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": (7, 2)}, r"300 tokens do not divide into B\*K = 7\*2 completions; pad them to R each"),
        ({"loss_mask_N": jnp.ones(300)}, r"loss_mask_N is float32\[300\], not 300 bools"),
        ({"operands": np.ones(5)}, r"an operand has shape \(5,\); use \[B, K\] = \[3, 2\] or a scalar"),
        ({"placement": Placement(MESH, ("fsdp",))}, "3 rows of whole groups are not divisible by the 2 devices"),
        ({"slots_N": np.zeros(300, int), "rows": 2}, "300 tokens and 3 groups do not divide into 2 rows"),
    ],
    ids=lambda x: x if isinstance(x, str) else ", ".join(x),
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        refused(**change)


def test_an_engine_without_a_kernel_for_the_loss_is_refused():
    with pytest.raises(ValueError, match="has no kernel for the loss; use fpo_head_loss"):
        refused(functools.partial(head_loss.fused_head_loss, engine=chunked.ENGINE))
