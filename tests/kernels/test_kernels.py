"""Head kernels against float64 NumPy: values, gradients, memory, sharding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fpo_jax import logprobs
from fpo_jax.kernels.lm_head import chunked, reference, tiling
from fpo_jax.kernels.lm_head import spec as specs
from fpo_jax.kernels.lm_head.spec import HeadSpec
from tests import jaxpr_tools, tolerances

IMPLEMENTATIONS = {"reference": reference.token_stats, "chunked": chunked.token_stats}
N, D = 37, 24
needs_mosaic_gpu = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the GPU kernels need jax 0.11")


def inputs(V, *, tokens=N, width=D, vocab_size=None, dtype="float32", seed=0):
    """Random hidden states, head with logits of standard deviation 3, targets, and cotangents of both outputs."""
    rng = np.random.default_rng(seed)
    hidden_ND = rng.normal(size=(tokens, width)).astype(np.float32)
    head_VD = (rng.normal(size=(V, width)) * 3 / np.sqrt(width)).astype(np.float32)
    targets_N = rng.integers(0, vocab_size or V, tokens).astype(np.int32)
    cotangents = tuple(rng.normal(size=(2, tokens)).astype("float64" if dtype == "float64" else "float32"))
    return jnp.asarray(hidden_ND, dtype), jnp.asarray(head_VD, dtype), jnp.asarray(targets_N), cotangents


def oracle(hidden_ND, head_VD, targets_N, cotangents, *, spec):
    """Statistics and gradients in float64, written out by hand: (TokenStats, dhidden, dhead)."""
    hidden_ND, head_VD = np.asarray(hidden_ND, np.float64), np.asarray(head_VD, np.float64)
    rows, vocab_size = np.arange(len(hidden_ND)), spec.vocab_size or len(head_VD)
    head_VD, padding = head_VD[:vocab_size], len(head_VD) - vocab_size
    raw_NV = hidden_ND @ head_VD.T
    slope_NV = np.full_like(raw_NV, spec.logit_scale)
    logits_NV = spec.logit_scale * raw_NV
    if spec.softcap:
        logits_NV = spec.logit_scale * spec.softcap * np.tanh(raw_NV / spec.softcap)
        slope_NV = spec.logit_scale / np.cosh(raw_NV / spec.softcap) ** 2
    max_N = logits_NV.max(1)
    lse_N = max_N + np.log(np.exp(logits_NV - max_N[:, None]).sum(1))
    logps_NV = logits_NV - lse_N[:, None]
    target_logit_N = logits_NV[rows, targets_N]
    stats = specs.TokenStats(
        target_logit_N, lse_N, -(np.exp(logps_NV) * logps_NV).sum(1), (target_logit_N == max_N).astype(float)
    )
    dlogits_NV = cotangents[1][:, None] * np.exp(logps_NV)
    dlogits_NV[rows, targets_N] += cotangents[0]
    draw_NV = dlogits_NV * slope_NV
    return stats, draw_NV @ head_VD, np.pad(draw_NV.T @ hidden_ND, ((0, padding), (0, 0)))


def weighted(token_stats, targets_N, cotangents, spec, hidden_ND, head_VD):
    """A scalar whose derivatives with respect to target_logit and lse are `cotangents`."""
    stats = token_stats(hidden_ND, head_VD, targets_N, spec=spec)
    return jnp.sum(stats.target_logit_N * cotangents[0] + stats.lse_N * cotangents[1])


@functools.partial(jax.jit, static_argnames=("token_stats", "spec"))
def run(token_stats, hidden_ND, head_VD, targets_N, cotangents, *, spec):
    """Statistics and both gradients of one implementation, under jit."""
    stats, pullback = jax.vjp(lambda *args: token_stats(*args, targets_N, spec=spec), hidden_ND, head_VD)
    by_products = jax.tree.map(jnp.zeros_like, (stats.entropy_N, stats.is_argmax_N))
    return stats, *pullback(specs.TokenStats(*cotangents, *by_products))


def assert_close(ours, expected, tolerance, what):
    """Compare relative to the largest expected entry: gradients have entries near zero."""
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * np.abs(expected).max(), err_msg=what)


def assert_matches_oracle(results, expected, *, values, gradients):
    """Compare (TokenStats, dhidden, dhead); by-products where both have them."""
    for name, ours, theirs in zip(specs.TokenStats._fields, results[0], expected[0], strict=True):
        if ours is not None:
            assert_close(ours, theirs, values, name)
    assert_close(results[1], expected[1], gradients, "dhidden")
    assert_close(results[2], expected[2], gradients, "dhead")


CASES = [
    (1024, {}),
    (1257, {}),
    (257, {"softcap": 5.0, "vocab_block": 128}),
    (1000, {"logit_scale": 1.25, "vocab_block": 256}),
    (1024, {"vocab_size": 1003, "vocab_block": 256}),
    (1257, {"logit_scale": 0.7, "softcap": 4.0, "vocab_size": 1024, "vocab_block": 300}),
    (1257, {"vocab_size": 1}),
    (1257, {"logit_scale": 0.7, "softcap": 4.0, "vocab_size": 1003}),
]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("V", "options"), CASES, ids=str)
@pytest.mark.parametrize(("name", "dtype"), [("reference", "float32"), ("chunked", "float32"), ("chunked", "bfloat16")])
def test_values_and_gradients_match_float64(name, V, options, dtype):
    spec = HeadSpec(**options, want_entropy=True, want_argmax=True)
    args = inputs(V, vocab_size=spec.vocab_size, dtype=dtype)
    results = run(IMPLEMENTATIONS[name], *args, spec=spec)
    assert all(x.dtype == jnp.float32 for x in results[0])
    assert results[1].dtype == results[2].dtype == dtype
    gradients = tolerances.KERNEL_GRADIENT_F32 if dtype == "float32" else tolerances.KERNEL_GRADIENT_BF16
    assert_matches_oracle(results, oracle(*args, spec=spec), values=tolerances.KERNEL_VALUE, gradients=gradients)


@pytest.mark.parametrize("vocab_block", [128, 256, "V", "above V"])
def test_every_vocab_block_is_exact_in_float64(vocab_block):
    V = 257
    block = {"V": V, "above V": V + 43}.get(vocab_block, vocab_block)
    with jax.enable_x64(True):
        args = inputs(V, dtype="float64")
        spec = HeadSpec(vocab_block=block, softcap=6.0, want_entropy=True, want_argmax=True)
        results = run(chunked.token_stats, *args, spec=spec)
        assert results[0].lse_N.dtype == results[2].dtype == jnp.float64
        expected = oracle(*args, spec=spec)
        assert_matches_oracle(results, expected, values=tolerances.KERNEL_FLOAT64, gradients=tolerances.KERNEL_FLOAT64)


def test_targets_in_the_overlap_of_the_last_block_count_once():
    """V=300 in blocks of 128: the last one starts at 172, and rows 172..255 belong to the block before."""
    with jax.enable_x64(True):
        hidden_ND, head_VD, _, cotangents = inputs(300, tokens=128, dtype="float64")
        cotangents = tuple(np.resize(g_N, 128) for g_N in cotangents)
        targets_N = jnp.arange(172, 300)
        spec = HeadSpec(vocab_block=128)
        results = run(chunked.token_stats, hidden_ND, head_VD, targets_N, cotangents, spec=spec)
        expected = oracle(hidden_ND, head_VD, np.asarray(targets_N), cotangents, spec=spec)
        assert_matches_oracle(results, expected, values=tolerances.KERNEL_FLOAT64, gradients=tolerances.KERNEL_FLOAT64)


def test_token_blocks_are_exact_in_float64():
    """A budget of 1 MiB cuts 1501 tokens in blocks that overlap; every token must count once."""
    with jax.enable_x64(True):
        args = inputs(300, tokens=1501, width=5, dtype="float64")
        spec = HeadSpec(workspace_bytes=2**20, want_entropy=True)
        plan = chunked.plan(1501, 300, "float64", "float64", spec=spec)
        assert (plan.token_count, plan.tokens, plan.vocab_count) == (3, 501, 3)
        results = run(chunked.token_stats, *args, spec=spec)
        assert_matches_oracle(
            results, oracle(*args, spec=spec), values=tolerances.KERNEL_FLOAT64, gradients=tolerances.KERNEL_FLOAT64
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_blocks_cover_the_plane_within_the_budget(dtype):
    rng = np.random.default_rng(0)
    for _ in range(300):
        tokens, V = int(10 ** rng.uniform(0, 6)), int(10 ** rng.uniform(0, 5.5))
        budget = int(2 ** rng.uniform(20, 30))
        block = None if rng.random() < 0.7 else int(10 ** rng.uniform(0, 4))
        spec = HeadSpec(workspace_bytes=budget, vocab_block=block)
        plan = chunked.plan(tokens, V, dtype, dtype, spec=spec)
        for size, count, total in (
            (plan.tokens, plan.token_count, tokens),
            (plan.vocab, plan.vocab_count, V),
        ):
            assert size <= total and (count - 1) * size < total <= count * size, (spec, plan)
        assert plan.workspace_bytes <= budget and plan.tokens <= tiling.MAX_TOKEN_BLOCK, (spec, plan)
        if block is None:
            assert plan.vocab == V or plan.vocab % 128 == 0, (spec, plan)
            assert V <= 128 or plan.vocab_count > 1, (spec, plan)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_by_products_carry_no_gradient_and_ties_count_as_hits(name):
    spec = HeadSpec(want_entropy=True, want_argmax=True)
    hidden_ND, head_VD = jnp.ones((3, 2)), jnp.array([[1.0, 1.0], [2.0, 0.0], [0.0, 0.0], [-1.0, 0.5]])
    targets_N = jnp.array([1, 0, 2])

    @jax.jit
    def by_products(hidden_ND, head_VD):
        stats = IMPLEMENTATIONS[name](hidden_ND, head_VD, targets_N, spec=spec)
        return jnp.sum(stats.entropy_N) + jnp.sum(stats.is_argmax_N), stats

    (_, stats), grads = jax.value_and_grad(by_products, (0, 1), has_aux=True)(hidden_ND, head_VD)
    np.testing.assert_array_equal(stats.is_argmax_N, [1, 1, 0])
    for grad in grads:
        np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_padded_head_rows_have_no_probability_and_no_gradient(name):
    """However large what they hold."""
    spec = HeadSpec(vocab_size=700, vocab_block=256)
    hidden_ND, head_VD, targets_N, cotangents = inputs(1024, vocab_size=700)
    padded = run(IMPLEMENTATIONS[name], hidden_ND, head_VD.at[700:].set(1e4), targets_N, cotangents, spec=spec)
    np.testing.assert_array_equal(padded[2][700:], 0)
    cut = HeadSpec(vocab_block=256)
    expected = run(IMPLEMENTATIONS[name], hidden_ND, head_VD[:700], targets_N, cotangents, spec=cut)
    assert_close(padded[0].lse_N, expected[0].lse_N, tolerances.KERNEL_VALUE, "lse")
    assert_close(padded[1], expected[1], tolerances.KERNEL_GRADIENT_F32, "dhidden")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_extreme_logits_stay_finite(name):
    hidden_ND, head_VD, targets_N, cotangents = inputs(300)
    spec = HeadSpec(vocab_block=128)
    args = (hidden_ND * 1e4, head_VD, targets_N, cotangents)
    results = run(IMPLEMENTATIONS[name], *args, spec=spec)
    expected = oracle(*args, spec=spec)
    assert_matches_oracle(results, expected, values=tolerances.KERNEL_VALUE, gradients=tolerances.KERNEL_GRADIENT_F32)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_target_outside_the_vocabulary_is_nan(name):
    hidden_ND, head_VD, targets_N, _ = inputs(1024, vocab_size=1000)
    targets_N = targets_N.at[:4].set(jnp.array([-1, 1000, 1023, 1024]))
    spec = HeadSpec(vocab_size=1000)
    stats = jax.jit(functools.partial(IMPLEMENTATIONS[name], spec=spec))(hidden_ND, head_VD, targets_N)
    np.testing.assert_array_equal(np.isnan(stats.target_logit_N), np.arange(N) < 4)
    assert np.isfinite(stats.lse_N).all()


@pytest.mark.parametrize("vocab_block", [128, None])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_float32_master_head_multiplied_in_bfloat16(name, vocab_block):
    """Values are those of the rounded head; the gradient of the head is float32."""
    hidden_ND, _, targets_N, cotangents = inputs(300, dtype="bfloat16")
    _, head_VD, _, _ = inputs(300)
    spec = HeadSpec(compute_dtype="bfloat16", vocab_block=vocab_block)
    results = run(IMPLEMENTATIONS[name], hidden_ND, head_VD, targets_N, cotangents, spec=spec)
    assert results[1].dtype == jnp.bfloat16 and results[2].dtype == jnp.float32
    expected = oracle(hidden_ND, head_VD.astype(jnp.bfloat16), targets_N, cotangents, spec=spec)
    assert_matches_oracle(results, expected, values=tolerances.KERNEL_VALUE, gradients=tolerances.KERNEL_GRADIENT_BF16)


@pytest.mark.parametrize(
    ("name", "V", "sequences"),
    [
        ("chunked", 8192, 4),
        ("pallas_tpu", 8192, 4),
        ("pallas_triton", 8192, 4),
        pytest.param("pallas_gpu", 4096, 1, marks=needs_mosaic_gpu),
    ],
)
def test_sequence_logp_is_exact_to_a_millinat_with_bfloat16_operands(name, V, sequences):
    """T=512 tokens, V=8192, logits of standard deviation 4. Rounding the logits to bfloat16 costs 0.56 nats."""
    T, width = 512, 64
    rng = np.random.default_rng(0)
    hidden_ND = jnp.asarray(rng.normal(size=(sequences * T, width)) * 4 / np.sqrt(width), jnp.bfloat16)
    head_VD = jnp.asarray(rng.normal(size=(V, width)), jnp.bfloat16)
    logits_NV = np.asarray(hidden_ND, np.float64) @ np.asarray(head_VD, np.float64).T
    targets_N = (logits_NV + rng.gumbel(size=logits_NV.shape)).argmax(1)  # drawn from the model

    def dense_logps(logits_NV):
        return logits_NV[np.arange(len(targets_N)), targets_N] - np.log(np.exp(logits_NV).sum(1))

    exact_S = dense_logps(logits_NV).reshape(-1, T).sum(1)

    spec = HeadSpec(interpret=name in logprobs.PLATFORMS)
    token_stats = jax.jit(functools.partial(logprobs.IMPLEMENTATIONS[name], spec=spec))
    stats = token_stats(hidden_ND, head_VD, jnp.asarray(targets_N))
    ours_S = jnp.sum((stats.target_logit_N - stats.lse_N).reshape(-1, T), axis=1)
    rounded_S = dense_logps(np.asarray(jnp.asarray(logits_NV, jnp.bfloat16), np.float64)).reshape(-1, T).sum(1)
    ours, rounded = (np.abs(np.asarray(sum_S, np.float64) - exact_S).max() for sum_S in (ours_S, rounded_S))
    assert ours < tolerances.SEQUENCE_LOGP_NATS
    assert rounded > 50 * tolerances.SEQUENCE_LOGP_NATS


SIZES = {"V": 1257, "tokens": 151, "width": 16}  # N*V is above V*D and N*D, so a size names its array
SMALL = 2**20  # bytes of a workspace that a plane of SIZES does not fit


@pytest.mark.parametrize(
    ("workspace", "backward"),
    [(HeadSpec().workspace_bytes, False), (SMALL, False), (SMALL, True)],
    ids=["forward", "forward, small workspace", "forward and backward, small workspace"],
)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "want_entropy": True, "want_argmax": True}], ids=str)
def test_no_array_of_logits(options, workspace, backward):
    """In the traced program or in the compiled one; the dense reference is the positive control."""
    spec = HeadSpec(**options, workspace_bytes=workspace)
    hidden_ND, head_VD, targets_N, cotangents = inputs(**SIZES)
    elements = SIZES["tokens"] * SIZES["V"]
    for token_stats, has_logits in ((chunked.token_stats, False), (reference.token_stats, True)):
        function = functools.partial(weighted, token_stats, targets_N, cotangents, spec)
        function = jax.value_and_grad(function, (0, 1)) if backward else function
        for find in (jaxpr_tools.arrays_in_jaxpr, jaxpr_tools.arrays_in_program):
            found = find(function, hidden_ND, head_VD, elements=elements)
            assert bool(found) == has_logits, (token_stats.__module__, find.__name__, found)


def test_residuals_are_the_inputs_and_lse():
    hidden_ND, head_VD, targets_N, _ = inputs(**SIZES)
    spec = HeadSpec(softcap=3.0, workspace_bytes=SMALL)
    stats_of = functools.partial(chunked.token_stats, targets_N=targets_N, spec=spec)
    _, pullback = jax.vjp(lambda hidden_ND, head_VD: stats_of(hidden_ND, head_VD)[:2], hidden_ND, head_VD)
    shapes = [x.shape for x in jax.tree.leaves(pullback)]
    matrices = [shape for shape in shapes if len(shape) == 2]
    assert sorted(matrices) == sorted([hidden_ND.shape, head_VD.shape]), shapes
    assert set(shapes) - set(matrices) <= {(), targets_N.shape}, shapes


@pytest.mark.parametrize(("spec", "both"), [(HeadSpec(workspace_bytes=SMALL), 4), (HeadSpec(), 3)], ids=["", "kept"])
def test_what_is_frozen_needs_fewer_products(spec, both):
    """Four with both gradients: logits twice, unless kept, dhidden, dhead. A frozen head needs two: logits, dhidden."""
    hidden_ND, head_VD, targets_N, cotangents = inputs(**SIZES)
    function = functools.partial(weighted, chunked.token_stats, targets_N, cotangents, spec)
    counts = {
        argnums: jaxpr_tools.matrix_products(jax.value_and_grad(function, argnums), hidden_ND, head_VD)
        for argnums in ((0, 1), (0,), (1,))
    }
    assert counts == {(0, 1): both, (0,): 2, (1,): both - 1}
    assert jaxpr_tools.matrix_products(function, hidden_ND, head_VD) == 1


def test_micro_batch_scan_with_float32_accumulators():
    """Three micro-batches scanned give the sum of three separate calls."""
    parts = [inputs(300, seed=seed) for seed in range(3)]
    head_VD, spec = parts[0][1], HeadSpec(vocab_block=128)
    hidden_AND, targets_AN = (jnp.stack([part[i] for part in parts]) for i in (0, 2))
    cotangents_A2N = jnp.stack([jnp.stack(part[3]) for part in parts])

    @jax.jit
    def accumulate(head_VD):
        def micro_step(total_VD, xs):
            hidden_ND, targets_N, cotangents_2N = xs
            scalar = functools.partial(weighted, chunked.token_stats, targets_N, cotangents_2N, spec, hidden_ND)
            return total_VD + jax.grad(scalar)(head_VD), None

        zeros_VD = jnp.zeros(head_VD.shape, jnp.float32)
        return jax.lax.scan(micro_step, zeros_VD, (hidden_AND, targets_AN, cotangents_A2N))[0]

    expected_VD = sum(oracle(h_ND, head_VD, t_N, c, spec=spec)[2] for h_ND, _, t_N, c in parts)
    assert_close(accumulate(head_VD), expected_VD, tolerances.KERNEL_GRADIENT_F32, "dhead")


@pytest.mark.parametrize(
    "head_axes", [(None, None), ("tensor", None), (None, "tensor"), (("data", "tensor"), None)], ids=str
)
def test_partitioned_by_xla_equals_unsharded(head_axes):
    """Without a placement: rows over data; head replicated, or sharded over its vocabulary or its width."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    spec = HeadSpec(vocab_block=256, vocab_size=1200)
    hidden_ND, head_VD, targets_N, cotangents = inputs(1256, tokens=38, vocab_size=1200)

    def put(x, *axes):
        return jax.device_put(x, NamedSharding(mesh, P(*axes)))

    sharded = put(hidden_ND, "data", None), put(head_VD, *head_axes), put(targets_N, "data")
    results = run(chunked.token_stats, *sharded, cotangents, spec=spec)
    expected = oracle(hidden_ND, head_VD, targets_N, cotangents, spec=spec)
    assert_matches_oracle(results, expected, values=tolerances.KERNEL_VALUE, gradients=tolerances.KERNEL_GRADIENT_F32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_scale": 0.0}, "logit_scale=0.0 is not a finite number > 0"),
        ({"logit_scale": float("nan")}, "logit_scale=nan"),
        ({"softcap": -30.0}, "softcap=-30.0 is not a finite number > 0; use None"),
        ({"compute_dtype": "float16"}, "compute_dtype='float16' is not supported; use one of bfloat16, float32"),
        ({"workspace_bytes": 4096}, "workspace_bytes=4096 is below 1048576"),
        ({"vocab_block": 0}, "vocab_block=0 is below 1"),
        ({"vocab_size": 0}, "vocab_size=0 is below 1"),
    ],
    ids=str,
)
def test_spec_refuses_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        HeadSpec(**options)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("hidden", "head", "targets", "options", "message"),
    [
        ((5, 8), (8, 11), (5,), {}, r"hidden \(5, 8\) and head \(8, 11\) are not \[N, D\] and \[V, D\]"),
        ((2, 5, 8), (11, 8), (5,), {}, "flatten the tokens"),
        ((5, 8), (11, 8), (4,), {}, r"targets are int32\[4\], not 5 integers"),
        ((0, 8), (11, 8), (0,), {}, "empty axis"),
        ((5, 8), (11, 8), (5,), {"vocab_size": 12}, "vocab_size=12 is above the 11 rows of the head"),
    ],
    ids=str,
)
def test_inputs_that_do_not_fit_are_refused(name, hidden, head, targets, options, message):
    with pytest.raises(ValueError, match=message):
        IMPLEMENTATIONS[name](jnp.ones(hidden), jnp.ones(head), jnp.zeros(targets, jnp.int32), spec=HeadSpec(**options))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_dtypes_that_do_not_fit_are_refused(name):
    token_stats, targets_N = IMPLEMENTATIONS[name], jnp.zeros(5, jnp.int32)
    with pytest.raises(ValueError, match=r"hidden is bfloat16 and head is float32; set HeadSpec\.compute_dtype"):
        token_stats(jnp.ones((5, 8), jnp.bfloat16), jnp.ones((11, 8)), targets_N, spec=HeadSpec())
    with pytest.raises(ValueError, match="float16 operands are not supported; cast hidden and head"):
        token_stats(jnp.ones((5, 8), jnp.float16), jnp.ones((11, 8), jnp.float16), targets_N, spec=HeadSpec())
    with pytest.raises(ValueError, match="targets are float32"):
        token_stats(jnp.ones((5, 8)), jnp.ones((11, 8)), jnp.zeros(5), spec=HeadSpec())
