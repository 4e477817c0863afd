"""Triton head kernels, emulated on the CPU, against float64 NumPy.

The emulation runs one program after the other and knows no shared memory, registers or approximate exp: see
`test_pallas_triton_compiled.py`, and the accuracy tests on a GPU.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax.kernels.lm_head import blocks, pallas_triton
from fpo_jax.kernels.lm_head.spec import HeadSpec
from tests import tolerances
from tests.head_block import Block, Inputs, assert_partials_close, assert_rounded_once, inputs, oracle
from tests.kernels import test_kernels

EMULATED = HeadSpec(interpret=True)
GPUS = {"NVIDIA L40S": 4, "NVIDIA A100-SXM4-80GB": 108}  # kind -> processors; of few, each has many tiles to fold


@pytest.fixture
def compile_as_for(monkeypatch):
    """Give the kernels the tile and the splits that they have on a named GPU."""

    def as_for(kind):
        device = types.SimpleNamespace(device_kind=kind, num_cores=GPUS[kind])
        monkeypatch.setattr(pallas_triton, "_device", lambda: device)

    return as_for


def run_forward(x: Inputs, first, last, *, spec):
    """The splits of the kernel, joined."""
    kernel = jax.jit(lambda *args: blocks.joined(pallas_triton.forward_block(*args, spec=spec)))
    return jax.tree.map(lambda x_PM: np.asarray(x_PM[0]), kernel(x.hidden_MD, x.head_WD, x.targets_M, first, last))


def run_dlogits(x: Inputs, lse_M, first, last, *, spec):
    kernel = jax.jit(functools.partial(pallas_triton.dlogits_block, spec=spec))
    lse_M = jnp.asarray(lse_M, jnp.float32)
    return np.asarray(kernel(x.hidden_MD, x.head_WD, x.targets_M, lse_M, x.dtarget_M, x.dlse_M, first, last))


CASES = [
    (Block(M=256, W=512, D=320, first=0, last=512), {}),  # whole tiles of either width
    (Block(M=150, W=521, D=80, first=0, last=521), {"logit_scale": 1.25}),  # ragged all ways
    (Block(M=150, W=521, D=48, first=7, last=515), {"softcap": 5.0, "logit_scale": 0.7}),
    (Block(M=37, W=43, D=64, first=0, last=33), {"softcap": 4.0}),  # less than a tile
    (Block(M=300, W=1030, D=64, first=300, last=1000), {}),  # tiles without columns that count
    (Block(M=1, W=1544, D=16, first=1290, last=1291), {}),  # one column
    (Block(M=1200, W=300, D=16, first=0, last=300), {}),  # the last group of pieces is smaller
]


@pytest.mark.sampled(6)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(("block", "options"), CASES, ids=str)
def test_values_and_dlogits_match_float64(block, options, gpu, dtype, compile_as_for):
    compile_as_for(gpu)
    x = inputs(block, dtype=dtype)
    for want_entropy in (False, True):  # which decides how wide a tile is
        spec = HeadSpec(**options, interpret=True, want_entropy=want_entropy)
        partials, lse_M, dlogits_MW = oracle(x, block.first, block.last, spec=spec)
        ours = run_forward(x, block.first, block.last, spec=spec)
        if not want_entropy:  # anything, then
            ours = ours._replace(centred_PM=partials.centred_PM.astype(np.float32))
        assert_partials_close(ours, partials)
        # What makes is_argmax exact: the maximum and the target logit are one number where they are one entry.
        is_argmax_M = partials.target_logit_PM == partials.max_PM
        np.testing.assert_array_equal((ours.target_logit_PM >= ours.max_PM)[is_argmax_M], True)

    ours_MW = run_dlogits(x, lse_M, block.first, block.last, spec=spec)
    if dtype == "bfloat16":
        assert_rounded_once(ours_MW, dlogits_MW)
    else:
        test_kernels.assert_close(ours_MW, dlogits_MW, tolerances.GPU_DLOGITS_FLOAT32, "dlogits")
    np.testing.assert_array_equal(ours_MW[:, : block.first], 0)
    np.testing.assert_array_equal(ours_MW[:, block.last :], 0)


def test_splits_are_of_the_columns_that_count(compile_as_for):
    """Each row of the statistics is the softmax of its own columns; together they are all of them."""
    compile_as_for("NVIDIA A100-SXM4-80GB")
    x = inputs(Block(M=5, W=1030, D=16, first=0, last=1030))
    split = functools.partial(pallas_triton.forward_block, spec=HeadSpec(interpret=True, want_entropy=True))
    ours = jax.tree.map(np.asarray, jax.jit(split)(x.hidden_MD, x.head_WD, x.targets_M, 130, 700))
    assert ours.max_PM.shape == (9, 5)  # of nine tiles of 128, one has nothing that counts before, three after
    for index, (first, last) in enumerate([(130, 256), (256, 384), (384, 512), (512, 640), (640, 700)]):
        part = jax.tree.map(lambda x_SM, index=index: x_SM[index], ours)
        assert_partials_close(part, oracle(x, first, last, spec=HeadSpec())[0])
    np.testing.assert_array_equal(ours.max_PM[5:], np.float32(blocks.MASKED_LOGIT))
    np.testing.assert_array_equal(np.stack(ours[1:])[:, 5:], 0)


def test_one_hot_is_folded_before_rounding():
    """A target with probability close to 1: 1 - p would be lost if p were rounded first."""
    x = inputs(Block(M=64, W=264, D=64, first=0, last=264))
    targets_M, target_logit_M = np.arange(64) * 4, np.linspace(8, 18, 64)
    row_MD = np.asarray(x.head_WD, np.float32)[targets_M]
    hidden_MD = row_MD * (target_logit_M / (row_MD**2).sum(1))[:, None]
    ones_M = jnp.ones(64)
    x = Inputs(jnp.asarray(hidden_MD, jnp.bfloat16), x.head_WD, jnp.asarray(targets_M, jnp.int32), ones_M, -ones_M)
    _, lse_M, dlogits_MW = oracle(x, 0, 264, spec=EMULATED)
    at_target_M = dlogits_MW[np.arange(64), targets_M]
    assert at_target_M.min() < 1e-3 < 0.1 < at_target_M.max()
    assert_rounded_once(run_dlogits(x, lse_M, 0, 264, spec=EMULATED), dlogits_MW, magnitude=1.0)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_extreme_logits_and_padding_rows_stay_finite(softcap):
    """Logits up to 1e5, or a cap on them; rows of the head outside the window hold values whose exp overflows."""
    spec = HeadSpec(interpret=True, want_entropy=True, softcap=softcap)
    x = inputs(Block(M=40, W=304, D=64, first=8, last=290))
    huge_WD = x.head_WD.at[290:].set(1e4).at[:8].set(-1e4)
    x = x._replace(hidden_MD=x.hidden_MD * 1e4, head_WD=huge_WD)
    with np.errstate(over="ignore"):  # cosh of 1e4
        partials, lse_M, _ = oracle(x, 8, 290, spec=spec)
    ours = run_forward(x, 8, 290, spec=spec)
    assert all(np.isfinite(statistic_M).all() for statistic_M in ours)
    ours_lse_M = ours.max_PM + np.log(ours.sum_PM)
    test_kernels.assert_close(ours.target_logit_PM, partials.target_logit_PM, tolerances.GPU_PARTIALS, "target logit")
    test_kernels.assert_close(ours_lse_M, lse_M, tolerances.GPU_PARTIALS, "lse")
    ours_MW = run_dlogits(x, ours_lse_M, 8, 290, spec=spec)
    assert np.isfinite(ours_MW.astype(np.float32)).all()
    np.testing.assert_array_equal(ours_MW[:, :8], 0)
    np.testing.assert_array_equal(ours_MW[:, 290:], 0)


@pytest.mark.parametrize(("first", "last"), [(5, 5), (9, 3), (50, 60), (-9, 0)])
def test_empty_windows_weigh_nothing(first, last):
    spec = HeadSpec(interpret=True, want_entropy=True)
    x = inputs(Block(M=9, W=40, D=64, first=first, last=last))
    ours = run_forward(x, first, last, spec=spec)
    np.testing.assert_array_equal(ours.max_PM, np.float32(blocks.MASKED_LOGIT))
    np.testing.assert_array_equal(np.stack(ours[1:]), 0)
    np.testing.assert_array_equal(run_dlogits(x, np.zeros(9), first, last, spec=spec), 0)


def test_windows_may_be_traced_inside_a_scan():
    """As the driver calls it: blocks of the head in a scan."""
    x = inputs(Block(M=40, W=86, D=64, first=0, last=86))

    @jax.jit
    def scanned(head_BWD):
        def of_block(_, part):
            index, head_WD = part
            targets_M = x.targets_M - index * 43
            window = 4 * index, 43 - index
            return None, blocks.joined(
                pallas_triton.forward_block(x.hidden_MD, head_WD, targets_M, *window, spec=EMULATED)
            )

        return jax.lax.scan(of_block, None, (jnp.arange(2), head_BWD))[1]

    ours = jax.tree.map(np.asarray, scanned(x.head_WD.reshape(2, 43, 64)))
    for index, (first, last) in enumerate(((0, 43), (47, 85))):
        expected = oracle(x, first, last, spec=EMULATED)[0]
        part = jax.tree.map(lambda a, index=index: a[index, 0], ours)
        assert_partials_close(part._replace(centred_PM=expected.centred_PM.astype(np.float32)), expected)


TOKEN_STATS = [
    (1024, {}),
    (257, {"softcap": 5.0, "vocab_block": 100}),
    (1257, {"logit_scale": 0.7, "softcap": 4.0, "vocab_size": 1003, "vocab_block": 300}),
    (1257, {"vocab_size": 1}),
]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("V", "options"), TOKEN_STATS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "head_dtype"), [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")]
)
def test_token_stats_and_gradients_match_float64(V, options, dtype, head_dtype):
    spec = HeadSpec(**options, compute_dtype=dtype, interpret=True, want_entropy=True, want_argmax=True)
    hidden_ND, head_VD, targets_N, cotangents = test_kernels.inputs(
        V, tokens=150, width=48, vocab_size=spec.vocab_size, dtype=dtype
    )
    args = hidden_ND, head_VD.astype(head_dtype), targets_N, cotangents
    results = test_kernels.run(pallas_triton.token_stats, *args, spec=spec)
    assert (results[1].dtype, results[2].dtype) == (dtype, head_dtype)
    gradients = tolerances.KERNEL_GRADIENT_F32 if dtype == "float32" else tolerances.KERNEL_GRADIENT_BF16
    expected = test_kernels.oracle(*args, spec=spec)
    test_kernels.assert_matches_oracle(results, expected, values=tolerances.KERNEL_VALUE, gradients=gradients)
    np.testing.assert_array_equal(results[0].is_argmax_N, expected[0].is_argmax_N)
    np.testing.assert_array_equal(results[2][spec.vocab_size or V :], 0)


def test_the_same_bits_twice():
    x = inputs(Block(M=150, W=521, D=80, first=3, last=500))
    spec = HeadSpec(interpret=True, want_entropy=True)
    first, second = (
        (run_forward(x, 3, 500, spec=spec), run_dlogits(x, np.ones(150), 3, 500, spec=spec)) for _ in range(2)
    )
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("row", [20, 149])  # the last one is read for rows that are not there
def test_a_nan_stays_in_its_row(row):
    x = inputs(Block(M=150, W=300, D=48, first=0, last=300))
    broken = x._replace(hidden_MD=x.hidden_MD.at[row].set(jnp.nan))
    lse_M = np.full(150, 5.0)
    for ours, clean in (
        (np.stack(run_forward(broken, 0, 300, spec=EMULATED)[:2]).T, run_forward(x, 0, 300, spec=EMULATED)[:2]),
        (run_dlogits(broken, lse_M, 0, 300, spec=EMULATED), run_dlogits(x, lse_M, 0, 300, spec=EMULATED).T),
    ):
        ours, clean = ours.astype(np.float32), np.stack(clean).T.astype(np.float32)
        assert np.isnan(ours[row]).any()
        np.testing.assert_array_equal(np.delete(ours, row, 0), np.delete(clean, row, 0))


def test_tiles_are_of_the_gpu_that_is_compiled_for(compile_as_for):
    hidden_MD = jnp.zeros((1, 16), jnp.bfloat16)
    compile_as_for("NVIDIA A100-SXM4-80GB")
    assert pallas_triton.tile_of(hidden_MD.dtype, plain=True) == pallas_triton.WIDE_TILES["NVIDIA A100"]
    assert pallas_triton.tile_of(hidden_MD.dtype, plain=False) == pallas_triton.TILE
    assert pallas_triton.tile_of("float32", plain=True) == pallas_triton.FLOAT32
    compile_as_for("NVIDIA L40S")
    assert pallas_triton.tile_of(hidden_MD.dtype, plain=True) == pallas_triton.TILE


def test_splits_keep_the_processors_busy(compile_as_for):
    """Turns of all processors, against the fewest there could be: at most 6 % more at the sizes we care about."""
    compile_as_for("NVIDIA A100-SXM4-80GB")
    for tokens in (8192, 16384, 32768):
        for V, D in ((32000, 4096), (128256, 4096), (256000, 3584), (151936, 2048)):
            pieces, tiles = tokens // 128, -(-V // 256)
            splits = pallas_triton._splits(pieces, tiles, 128 * D * 2)
            turns = -(-pieces * splits // 108) * -(-tiles // splits)
            assert turns < 1.06 * pieces * tiles / 108, (tokens, V, splits)
    for pieces, tiles, D in ((1, 1, 64), (1, 3, 4096), (500, 1, 8192)):
        assert 1 <= pallas_triton._splits(pieces, tiles, 256 * D) <= tiles


SUPPORTED = {"rows": 50257, "width": 80, "dtype": "bfloat16", "compute_capability": "8.0"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, ""),
        ({"compute_capability": "8.9"}, ""),
        ({"compute_capability": "10.0"}, ""),
        ({"dtype": "float32"}, ""),
        ({"compute_capability": "7.5"}, "compute capability 7.5 is not 8.0 or above (NVIDIA A100 or newer)"),
        ({"compute_capability": "gfx942"}, "compute capability gfx942 is not 8.0 or above"),
        ({"compute_capability": ""}, "compute capability of no GPU is not 8.0"),
        ({"dtype": "float64"}, "float64 operands; the Triton kernels multiply bfloat16 and float32"),
        ({"width": 24}, "hidden width 24 is not a multiple of 16"),
    ],
    ids=str,
)
def test_unsupported_names_the_fact_and_the_limit(change, message):
    found = pallas_triton.unsupported(**SUPPORTED | change)
    assert found == "" if not message else message in found


def test_a_jax_without_triton_is_told(monkeypatch):
    monkeypatch.setattr(pallas_triton, "plgpu", None)
    assert f"jax {jax.__version__} has no Pallas Triton" in pallas_triton.unsupported(**SUPPORTED)
    args = test_kernels.inputs(40, width=16, dtype="bfloat16")[:3]
    with pytest.raises(ValueError, match="has no Pallas Triton.*; use the implementation 'chunked'"):
        pallas_triton.token_stats(*args, spec=EMULATED)
