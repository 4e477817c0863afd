"""Completion log-probs: which positions count, what masked ones may hold, and how the implementation is chosen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fpo_jax import logprobs
from fpo_jax.kernels.lm_head import reference
from fpo_jax.kernels.lm_head.spec import Placement
from tests import jaxpr_tools, tolerances

N, T, R, D, V = 3, 7, 4, 8, 11

#  row 0:  P P P a b c .      three scored: the token at 2 predicts a, 3 predicts b, 4 predicts c
#  row 1:  P a b P P c d      a turn of the user between two answers
#  row 2:  P P . . . . .      nothing scored
PREDICTORS_NR = np.array([[2, 3, 4, 0], [0, 1, 4, 5], [0, 0, 0, 0]], np.int32)
SCORED_NR = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
TARGETS_NR = np.array([[7, 0, 10, 0], [3, 3, 9, 1], [0, 0, 0, 0]], np.int32)


def inputs(dtype="float32"):
    rng = np.random.default_rng(0)
    hidden_NTD = rng.normal(size=(N, T, D)).astype(np.float32)
    head_VD = rng.normal(size=(V, D)).astype(np.float32)
    return jnp.asarray(hidden_NTD, dtype), jnp.asarray(head_VD, dtype)


def oracle(hidden_NTD, head_VD, *, temperature=1.0, softcap=None, vocab_size=V):
    """One scored position at a time in float64: (sum, count, mean raw logit) per row."""
    hidden_NTD, head_VD = np.asarray(hidden_NTD, np.float64), np.asarray(head_VD, np.float64)[:vocab_size]
    sums, means = np.zeros(N), np.zeros(N)
    for n, r in zip(*np.nonzero(SCORED_NR), strict=True):
        raw_V = head_VD @ hidden_NTD[n, PREDICTORS_NR[n, r]]
        logits_V = (softcap * np.tanh(raw_V / softcap) if softcap else raw_V) / temperature
        sums[n] += logits_V[TARGETS_NR[n, r]] - np.log(np.exp(logits_V).sum())
        means[n] += raw_V.mean() / SCORED_NR[n].sum()
    return sums, SCORED_NR.sum(1), means


jitted = jax.jit(
    logprobs.completion_logps,
    static_argnames=(
        "temperature",
        "softcap",
        "vocab_size",
        "implementation",
        "workspace_bytes",
        "placement",
        "interpret",
    ),
)


def completion_logps(hidden_NTD, head_VD, *, loss_mask_NR=SCORED_NR, **options):
    """The function under test, under jit, on the batch drawn above."""
    interpret = options.get("implementation") in logprobs.PLATFORMS
    return jitted(hidden_NTD, head_VD, PREDICTORS_NR, TARGETS_NR, loss_mask_NR, interpret=interpret, **options)


@functools.partial(jax.jit, static_argnames=("temperature", "softcap", "implementation"))
@functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
def gradients(hidden_NTD, head_VD, predictors_NR=PREDICTORS_NR, targets_NR=TARGETS_NR, **options):
    """Gradients of a weighted sum of the rows' log-probs, and the log-probs."""
    options["interpret"] = options.get("implementation") in logprobs.PLATFORMS
    result = logprobs.completion_logps(hidden_NTD, head_VD, predictors_NR, targets_NR, SCORED_NR, **options)
    return jnp.sum(result.sum_N * jnp.arange(1.0, N + 1)), result


# pallas_gpu multiplies bfloat16 alone, and pallas_triton widths of 16 and its multiples
FLOAT32 = [name for name in logprobs.IMPLEMENTATIONS if name not in ("pallas_gpu", "pallas_triton")]
OPTIONS = [{}, {"temperature": 0.8}, {"softcap": 2.0}, {"temperature": 1.7, "softcap": 1.5}]


@pytest.mark.parametrize("implementation", FLOAT32)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_drawn_batch_matches_float64(implementation, options):
    hidden_NTD, head_VD = inputs()
    result = completion_logps(hidden_NTD, head_VD, implementation=implementation, **options)
    sum_N, count_N, mean_logit_N = oracle(hidden_NTD, head_VD, **options)
    np.testing.assert_allclose(result.sum_N, sum_N, rtol=tolerances.LOGPS)
    np.testing.assert_array_equal(result.count_N, count_N)
    assert result.sum_N.dtype == result.count_N.dtype == jnp.float32
    if "softcap" in options:
        assert result.mean_logit_N is None  # the mean of capped logits is not linear in the hidden state
    else:
        np.testing.assert_allclose(result.mean_logit_N, mean_logit_N, rtol=tolerances.LOGPS, atol=tolerances.LOGPS)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_gradient_matches_finite_differences_in_float64(implementation):
    with jax.enable_x64(True):
        hidden_NTD, head_VD = inputs("float64")
        options = {"temperature": 0.8, "softcap": 2.0, "implementation": implementation}
        grads, _ = gradients(hidden_NTD, head_VD, **options)
        rng, step = np.random.default_rng(1), 1e-6
        directions = [rng.normal(size=x.shape) for x in (hidden_NTD, head_VD)]

        def value(sign):
            moved = (x + sign * step * d for x, d in zip((hidden_NTD, head_VD), directions, strict=True))
            return np.sum(oracle(*moved, temperature=0.8, softcap=2.0)[0] * np.arange(1.0, N + 1))

        slope = sum(np.sum(np.asarray(g) * d) for g, d in zip(grads, directions, strict=True))
        np.testing.assert_allclose(slope, (value(1) - value(-1)) / (2 * step), rtol=tolerances.FINITE_DIFFERENCE)


@pytest.mark.parametrize("implementation", FLOAT32)
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30], ids=str)
def test_what_is_not_scored_may_hold_anything(implementation, garbage):
    """Outside the mask, hidden states, predictors and targets change no bit of value or gradient."""
    read_NT = np.zeros((N, T), bool)
    read_NT[np.nonzero(SCORED_NR)[0], PREDICTORS_NR[SCORED_NR]] = True
    hidden_NTD, head_VD = inputs()
    dirty_NTD = jnp.where(read_NT[:, :, None], hidden_NTD, garbage)
    dirty_predictors_NR = np.where(SCORED_NR, PREDICTORS_NR, 6)  # in rows 0 and 2, a position full of garbage
    dirty_targets_NR = np.where(SCORED_NR, TARGETS_NR, -100)

    clean = gradients(hidden_NTD, head_VD, PREDICTORS_NR, TARGETS_NR, implementation=implementation)
    dirty = gradients(dirty_NTD, head_VD, dirty_predictors_NR, dirty_targets_NR, implementation=implementation)
    for ours, theirs in zip(jax.tree.leaves(dirty), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    dhidden_NTD = np.asarray(dirty[0][0])
    np.testing.assert_array_equal(dhidden_NTD[~read_NT], 0)
    assert (np.abs(dhidden_NTD)[read_NT].max(axis=1) > 0).all()


@pytest.mark.parametrize("implementation", FLOAT32)
def test_row_without_a_scored_position_is_zero(implementation):
    result = completion_logps(*inputs(), implementation=implementation)
    assert [float(x[2]) for x in result] == [0, 0, 0]
    nothing = completion_logps(*inputs(), implementation=implementation, loss_mask_NR=np.zeros((N, R), bool))
    for field in nothing:
        np.testing.assert_array_equal(field, 0)


def test_padding_changes_nothing():
    """More tokens, more scored positions and more head rows, all padding."""
    hidden_NTD, head_VD = inputs()
    expected = completion_logps(hidden_NTD, head_VD)
    pad_NR = ((0, 0), (0, 9))
    padded = jitted(
        jnp.pad(hidden_NTD, ((0, 0), (0, 6), (0, 0)), constant_values=5),
        jnp.pad(head_VD, ((0, 200), (0, 0)), constant_values=3),
        np.pad(PREDICTORS_NR, pad_NR),
        np.pad(TARGETS_NR, pad_NR),
        np.pad(SCORED_NR, pad_NR),
        vocab_size=V,
    )
    for ours, theirs in zip(padded, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerances.LOGPS, atol=tolerances.LOGPS)


def test_scored_target_or_predictor_out_of_range_is_nan():
    hidden_NTD, head_VD = inputs()
    for wrong in (
        {"targets_NR": np.where(TARGETS_NR == 9, V, TARGETS_NR)},
        {"predictors_NR": np.where(PREDICTORS_NR == 5, T, PREDICTORS_NR)},
    ):
        arrays = {"predictors_NR": PREDICTORS_NR, "targets_NR": TARGETS_NR, "loss_mask_NR": SCORED_NR, **wrong}
        sum_N = jitted(hidden_NTD, head_VD, **arrays).sum_N
        np.testing.assert_array_equal(np.isnan(sum_N), [False, True, False])


def test_kernels_get_zeros_and_legal_targets_where_not_scored(monkeypatch):
    """A kernel may index the head by the target, so what is not scored must be in range before it."""
    seen = []

    def spy(hidden_ND, head_VD, targets_N, *, spec):
        seen.append((np.asarray(hidden_ND), np.asarray(targets_N)))
        return reference.token_stats(hidden_ND, head_VD, targets_N, spec=spec)

    monkeypatch.setitem(logprobs.IMPLEMENTATIONS, "reference", spy)
    targets_NR = np.where(SCORED_NR, TARGETS_NR, -100)
    logprobs.completion_logps(*inputs(), PREDICTORS_NR, targets_NR, SCORED_NR, implementation="reference")
    ((hidden_MD, targets_M),) = seen
    np.testing.assert_array_equal(targets_M, TARGETS_NR.ravel())
    np.testing.assert_array_equal(hidden_MD[~SCORED_NR.ravel()], 0)


def test_mean_logit_carries_no_gradient():
    def mean_logit(hidden_NTD, head_VD):
        return jnp.sum(completion_logps(hidden_NTD, head_VD).mean_logit_N)

    for grad in jax.jit(jax.grad(mean_logit, (0, 1)))(*inputs()):
        np.testing.assert_array_equal(grad, 0)


def test_bfloat16_model_with_float32_master_head():
    hidden_NTD, _ = inputs("bfloat16")
    _, head_VD = inputs()
    result = completion_logps(hidden_NTD, head_VD)
    expected_N, _, _ = oracle(hidden_NTD, head_VD.astype(jnp.bfloat16))
    np.testing.assert_allclose(result.sum_N, expected_N, rtol=tolerances.LOGPS)
    assert [g.dtype for g in gradients(hidden_NTD, head_VD)[0]] == [jnp.bfloat16, jnp.float32]


def test_only_scored_positions_reach_the_head_and_no_logits_exist():
    """Neither [N, T, V] nor [N, R, V], in the traced or the compiled program; the reference is the positive control."""
    rng = np.random.default_rng(0)
    rows, tokens, scored, width, vocab = 4, 40, 20, 16, 2003  # more than a workspace of 1 MiB could keep
    hidden_NTD = jnp.asarray(rng.normal(size=(rows, tokens, width)), jnp.float32)
    head_VD = jnp.asarray(rng.normal(size=(vocab, width)), jnp.float32)
    batch = np.tile(np.arange(scored, dtype=np.int32), (rows, 1)), np.ones((rows, scored), np.int32)

    def loss(hidden_NTD, head_VD, implementation):
        mask_NR = np.ones((rows, scored), bool)
        result = logprobs.completion_logps(
            hidden_NTD, head_VD, *batch, mask_NR, implementation=implementation, workspace_bytes=2**20
        )
        return jnp.sum(result.sum_N), result.mean_logit_N

    for implementation, has_logits in (("chunked", False), ("reference", True)):
        function = functools.partial(loss, implementation=implementation)
        grad = jax.value_and_grad(function, (0, 1), has_aux=True)
        for find in (jaxpr_tools.arrays_in_jaxpr, jaxpr_tools.arrays_in_program):
            found = find(grad, hidden_NTD, head_VD, elements=rows * scored * vocab)
            assert bool(found) == has_logits, (implementation, found)
            assert not find(grad, hidden_NTD, head_VD, elements=rows * tokens * vocab)


def test_rows_sharded_over_eight_devices_equal_one():
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    hidden_NTD = jnp.asarray(rng.normal(size=(16, T, D)), jnp.float32)
    _, head_VD = inputs()
    predictors_NR = rng.integers(0, T, (16, R)).astype(np.int32)
    targets_NR = rng.integers(0, V, (16, R)).astype(np.int32)
    arrays = hidden_NTD, head_VD, predictors_NR, targets_NR, rng.random((16, R)) < 0.7

    def total(*arrays, placement):
        return jnp.sum(logprobs.completion_logps(*arrays, placement=placement).sum_N)

    def run(arrays, placement):
        return jax.jit(jax.value_and_grad(functools.partial(total, placement=placement), (0, 1)))(*arrays)

    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    sharded = [jax.device_put(x, everywhere if x is head_VD else rows) for x in arrays]
    for ours, theirs in zip(
        jax.tree.leaves(run(sharded, Placement(mesh, ("data",)))), jax.tree.leaves(run(arrays, None)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=tolerances.LOGPS, atol=tolerances.LOGPS)


SHAPES = logprobs.HeadShapes(tokens=4096, width=512, vocab=32000)
HERE = {"target": logprobs.Target("cpu"), "shapes": SHAPES, "dtype": "bfloat16", "jax_version": "0.11.2"}
TARGETS = {
    "cpu": logprobs.Target("cpu"),
    "v5e": logprobs.Target("tpu", "TPU v5 lite"),
    "v5p": logprobs.Target("tpu", "TPU v5"),
    "v4": logprobs.Target("tpu", "TPU v4"),
    "v6e": logprobs.Target("tpu", "TPU v6 lite"),
    "v7x": logprobs.Target("tpu", "TPU7x"),
    "h200": logprobs.Target("gpu", "NVIDIA H200", "9.0"),
    "a100": logprobs.Target("gpu", "NVIDIA A100-SXM4-80GB", "8.0"),
    "l40s": logprobs.Target("gpu", "NVIDIA L40S", "8.9"),
    "b200": logprobs.Target("gpu", "NVIDIA B200", "10.0"),
    "t4": logprobs.Target("gpu", "Tesla T4", "7.5"),
    "mi300": logprobs.Target("gpu", "AMD Instinct MI300X", "gfx942"),
}
has_mosaic_gpu = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the GPU kernels need jax 0.11")


@pytest.mark.parametrize(
    ("target", "change", "implementation", "reason"),
    [
        ("cpu", {}, "chunked", "auto on cpu: XLA vocabulary blocks, which run everywhere"),
        ("v5e", {}, "pallas_tpu", "auto on TPU v5 lite: Pallas kernels; loss inside"),
        ("v6e", {}, "pallas_tpu", "loss inside"),
        ("v7x", {}, "pallas_tpu", "loss inside"),
        ("v5p", {}, "pallas_tpu", "loss inside"),
        ("v4", {}, "chunked", "because TPU v4 is not one of v5e, v5p, v6e, v7x"),
        ("v5e", {"dtype": "float32"}, "pallas_tpu", "Pallas kernels"),
        ("v5e", {"dtype": "float64"}, "chunked", "float64 operands; the TPU kernels multiply bfloat16 or float32"),
        ("v5e", {"shapes": SHAPES._replace(width=131072)}, "chunked", "MiB of VMEM, 58 MiB are there"),
        ("a100", {}, "chunked", "; pallas_triton would run here, and nobody has measured which is faster"),
        pytest.param("a100", {}, "chunked", "compute capability 8.0 is not 9.0", marks=has_mosaic_gpu),
        ("h200", {"jax_version": "0.10.2"}, "chunked", "jax 0.10.2 is below 0.11, which the GPU kernels need"),
        pytest.param(
            "h200", {}, "pallas_gpu", "auto on NVIDIA H200: Pallas kernels; loss inside", marks=has_mosaic_gpu
        ),
        pytest.param("h200", {"dtype": "float32"}, "chunked", "float32 operands; the GPU", marks=has_mosaic_gpu),
        pytest.param("h200", {"shapes": SHAPES._replace(width=100)}, "chunked", "not a multiple", marks=has_mosaic_gpu),
        pytest.param("h200", {"shapes": SHAPES._replace(vocab=50257)}, "chunked", "50257 rows", marks=has_mosaic_gpu),
    ],
    ids=str,
)
def test_choice_is_pure_and_gives_its_reason(target, change, implementation, reason):
    choice = logprobs.select(**{**HERE, "target": TARGETS[target], **change})
    assert choice.implementation == implementation and reason in choice.reason, choice
    assert choice.fuse_loss == ("loss inside" in choice.reason) and not choice.interpret
    if implementation != "chunked":
        assert "loss inside" not in logprobs.select(**{**HERE, "target": TARGETS[target]}, fuse_loss="off").reason


def test_a_request_is_kept():
    assert logprobs.select(**HERE, requested="chunked") == logprobs.Selection(
        "chunked", False, False, "requested; loss apart: chunked has no kernel for it"
    )
    dense = logprobs.select(**{**HERE, "dtype": "float32"}, requested="reference")
    assert dense.reason == (
        "requested: holds 500.0 MiB of logits (4096 tokens x 32000 entries); loss apart: reference has no kernel for it"
    )
    tpu = logprobs.select(**{**HERE, "target": TARGETS["v5p"]}, requested="pallas_tpu")
    assert tpu == logprobs.Selection("pallas_tpu", True, False, "requested; loss inside")
    emulated = logprobs.select(**HERE, requested="pallas_tpu")
    assert emulated.interpret and "emulated on the CPU: for tests, very slow" in emulated.reason


@pytest.mark.parametrize("target", ["a100", "l40s", "h200", "b200"])
def test_triton_runs_where_it_is_asked_for(target):
    """Any vocabulary, in float32 too, and any jax."""
    here = {**HERE, "target": TARGETS[target], "shapes": SHAPES._replace(vocab=50257), "jax_version": "0.10.2"}
    for dtype in ("bfloat16", "float32"):
        choice = logprobs.select(**{**here, "dtype": dtype}, requested="pallas_triton")
        assert choice == logprobs.Selection("pallas_triton", True, False, "requested; loss inside")
    assert "emulated" in logprobs.select(**HERE, requested="pallas_triton").reason
    assert "logits on the chip only" in logprobs.explain(**here, requested="pallas_triton")


@pytest.mark.parametrize("target", ["t4", "mi300"])
def test_auto_does_not_name_a_kernel_that_cannot_run(target):
    choice = logprobs.select(**{**HERE, "target": TARGETS[target]})
    assert choice.implementation == "chunked" and "triton" not in choice.reason


@has_mosaic_gpu
def test_rows_on_one_device_decide():
    """32,008 rows are a multiple of 8; the half that each of two devices holds is not."""
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 2), ("data", "tensor"))
    here = {**HERE, "target": TARGETS["h200"], "shapes": SHAPES._replace(vocab=32008)}
    assert logprobs.select(**here).implementation == "pallas_gpu"
    choice = logprobs.select(**here, placement=Placement(mesh, ("data",), "tensor"))
    assert choice.implementation == "chunked" and "16004 rows of the head are not a multiple of 8" in choice.reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"requested": "chunkd"}, "'chunkd' is unknown; use one of auto, reference, chunked, .* mean 'chunked'"),
        ({"requested": "zzz"}, "'zzz' is unknown; use one of auto, reference, chunked, pallas_tpu.*triton$"),
        ({"dtype": "float16"}, "hidden states in float16 are not supported; compute the model in one of bfloat16"),
        ({"jax_version": "0.9.10"}, "jax 0.9.10 is below 0.10.2, the oldest tested; install jax>=0.10.2"),
        ({"fuse_loss": "yes"}, "fuse_loss='yes' is unknown; use one of auto, on, off"),
        ({"fuse_loss": "on"}, "fuse_loss='on' cannot be: chunked has no kernel for it; use 'auto' or 'off'"),
        ({"requested": "pallas_gpu", "jax_version": "0.10.2"}, "'pallas_gpu' cannot run: jax 0.10.2 is below 0.11"),
        ({"requested": "pallas_tpu", "target": TARGETS["h200"]}, "it runs on a TPU, and this is a GPU; use 'auto'"),
        ({"requested": "pallas_gpu", "target": TARGETS["v5e"]}, "it runs on a GPU, and this is a TPU; use 'auto'"),
        ({"requested": "pallas_tpu", "dtype": "float64"}, "cannot run: float64 operands"),
        ({"requested": "pallas_triton", "target": TARGETS["v5e"]}, "it runs on a GPU, and this is a TPU; use 'auto'"),
        ({"requested": "pallas_triton", "target": TARGETS["t4"]}, "capability 7.5 is not 8.0 or above"),
        ({"requested": "pallas_triton", "target": TARGETS["mi300"]}, "capability gfx942 is not 8.0 or above"),
        ({"requested": "pallas_triton", "dtype": "float64"}, "cannot run: float64 operands; the Triton kernels"),
        ({"requested": "pallas_triton", "shapes": SHAPES._replace(width=100)}, "width 100 is not a multiple of 16"),
    ],
    ids=str,
)
def test_choice_refuses_what_it_cannot_run(change, message):
    with pytest.raises(ValueError, match=message):
        logprobs.select(**{**HERE, **change})


@pytest.mark.parametrize("version", ["0.10.2", "0.12.0.1", "0.13.0rc1", "1.0.0.dev20990101"])
def test_newer_versions_are_accepted(version):
    assert logprobs.select(**{**HERE, "jax_version": version}).implementation == "chunked"


def test_this_device_describes_itself():
    assert logprobs.Target.of(jax.devices()[0]) == logprobs.Target("cpu", "cpu", "")


def test_explain_names_blocks_and_memory():
    here = {**HERE, "dtype": "float32"}
    text = logprobs.explain(**here)
    assert "log-probs: chunked (auto on cpu" in text
    assert "4096 tokens x 32000 vocabulary entries x 512 wide, float32 operands, float32 accumulation" in text
    blocks = "6 blocks of 5376 head rows x 1 of 4096 tokens per device, 168.0 MiB of workspace (limit 192.0 MiB)"
    assert f"forward: {blocks}\nbackward: {blocks}" in text
    assert "dense float32 logits, which are never held: 500.0 MiB per device" in text
    assert "held in full: 500.0 MiB" in logprobs.explain(**here, requested="reference")
    assert "forward: one kernel, logits on the chip only" in logprobs.explain(**{**here, "target": TARGETS["v5e"]})
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    changes = {"vocab_size": 31000, "workspace_bytes": 2**24, "placement": Placement(mesh, ("data",))}
    for option, value in changes.items():
        assert logprobs.explain(**here, **{option: value}) != text, option


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 is not > 0; use 1.0"),
        ({"temperature": float("nan")}, "temperature=nan is not > 0"),
        ({"softcap": 0.0}, "softcap=0.0"),
        ({"vocab_size": V + 1}, "vocab_size=12 is above the 11 rows of the head"),
        ({"implementation": "pallas"}, "implementation 'pallas' is unknown"),
        ({"workspace_bytes": 1}, "workspace_bytes=1 is below 1048576"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        completion_logps(*inputs(), **options)
