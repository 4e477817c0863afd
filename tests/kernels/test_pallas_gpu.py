"""Hopper kernels under the GPU interpreter, with race detection, against float64 NumPy.

The interpreter emulates bulk copies, barriers, clusters and WGMMA; memory starts as NaN. It does not emulate registers,
timing or the hardware's approximate exp: see `test_pallas_gpu_compiled.py`, and the accuracy tests on a GPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from fpo_jax.kernels.lm_head import blocks, pallas_gpu
from fpo_jax.kernels.lm_head.spec import HeadSpec
from tests import tolerances
from tests.head_block import Block, Inputs, assert_partials_close, assert_rounded_once, inputs, oracle

if not hasattr(plgpu, "InterpretGPUParams"):
    pytest.skip(f"jax {jax.__version__} has no GPU interpreter; 0.11 is the first", allow_module_level=True)


def run(kernel, *args):
    """Result of one kernel under the interpreter, as NumPy, and whether threads raced."""
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races  # it has no public name

    options = {"on_race": "warn"} if hasattr(plgpu.InterpretGPUParams, "on_race") else {}  # 0.11 always warns
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True, **options)):
        result = jax.tree.map(np.asarray, jax.jit(kernel)(*args))
    return result, get_races().races_found


def run_forward(x: Inputs, first, last, *, spec):
    kernel = functools.partial(pallas_gpu.forward_block, spec=spec)
    partials, raced = run(lambda *args: blocks.joined(kernel(*args)), x.hidden_MD, x.head_WD, x.targets_M, first, last)
    return blocks.Partials(*(field[0] for field in partials)), raced


def run_dlogits(x: Inputs, lse_M, first, last, *, spec):
    kernel = functools.partial(pallas_gpu.dlogits_block, spec=spec)
    lse_M = jnp.asarray(lse_M, jnp.float32)
    return run(kernel, x.hidden_MD, x.head_WD, x.targets_M, lse_M, x.dtarget_M, x.dlse_M, first, last)


CASES = [
    (Block(M=256, W=512, D=320, first=0, last=512), {}),  # whole tiles; more steps than stages
    (Block(M=150, W=520, D=192, first=0, last=520), {"logit_scale": 1.25}),  # ragged both ways
    (Block(M=150, W=520, D=128, first=7, last=515), {"softcap": 5.0, "logit_scale": 0.7}),
    (Block(M=37, W=40, D=64, first=0, last=33), {"softcap": 4.0}),  # less than a tile
    (Block(M=300, W=1032, D=64, first=300, last=1000), {}),  # a tile without columns that count
    (Block(M=1, W=1544, D=64, first=1290, last=1291), {}),  # one column
]


@pytest.mark.parametrize("processors", [4, pallas_gpu.PROCESSORS])
@pytest.mark.parametrize(("block", "options"), CASES, ids=str)
def test_values_and_dlogits_match_float64(block, options, processors, monkeypatch):
    """With 4 processors a thread block works through several tiles, with 132 the vocabulary is split for each."""
    monkeypatch.setattr(pallas_gpu, "PROCESSORS", processors)
    spec = HeadSpec(**options, want_entropy=True)
    x = inputs(block)
    partials, lse_M, dlogits_MW = oracle(x, block.first, block.last, spec=spec)
    ours, raced = run_forward(x, block.first, block.last, spec=spec)
    assert not raced
    assert_partials_close(ours, partials)
    # What makes is_argmax exact: the maximum and the target logit are the same number where they are the same entry.
    is_argmax_M = partials.target_logit_PM == partials.max_PM
    np.testing.assert_array_equal((ours.target_logit_PM >= ours.max_PM)[is_argmax_M], True)

    ours_MW, raced = run_dlogits(x, lse_M, block.first, block.last, spec=spec)
    assert not raced
    assert_rounded_once(ours_MW, dlogits_MW)
    np.testing.assert_array_equal(ours_MW[:, : block.first], 0)
    np.testing.assert_array_equal(ours_MW[:, block.last :], 0)


def test_one_hot_is_folded_before_rounding():
    """A target with probability close to 1: 1 - p would be lost if p were rounded first."""
    block, spec = Block(M=64, W=264, D=64, first=0, last=264), HeadSpec()
    x = inputs(block)
    targets_M, target_logit_M = np.arange(64) * 4, np.linspace(8, 18, 64)
    row_MD = np.asarray(x.head_WD, np.float32)[targets_M]
    hidden_MD = row_MD * (target_logit_M / (row_MD**2).sum(1))[:, None]
    ones_M = jnp.ones(64)
    x = Inputs(jnp.asarray(hidden_MD, jnp.bfloat16), x.head_WD, jnp.asarray(targets_M, jnp.int32), ones_M, -ones_M)
    _, lse_M, dlogits_MW = oracle(x, 0, 264, spec=spec)
    at_target_M = dlogits_MW[np.arange(64), targets_M]
    assert at_target_M.min() < 1e-3 < 0.1 < at_target_M.max()
    ours_MW, _ = run_dlogits(x, lse_M, 0, 264, spec=spec)
    assert_rounded_once(ours_MW, dlogits_MW, magnitude=1.0)


def test_extreme_logits_and_padding_rows_stay_finite():
    """Logits up to 1e5; rows of the head outside the window hold values whose exp overflows."""
    block, spec = Block(M=40, W=304, D=64, first=8, last=290), HeadSpec(want_entropy=True)
    x = inputs(block)
    huge_WD = x.head_WD.at[290:].set(1e4).at[:8].set(-1e4)
    x = x._replace(hidden_MD=x.hidden_MD * 1e4, head_WD=huge_WD)
    partials, lse_M, _ = oracle(x, 8, 290, spec=spec)
    ours, _ = run_forward(x, 8, 290, spec=spec)
    assert all(np.isfinite(statistic_M).all() for statistic_M in ours)
    ours_lse_M = ours.max_PM + np.log(ours.sum_PM)
    atol = tolerances.GPU_PARTIALS * np.abs(lse_M).max()
    np.testing.assert_allclose(ours.target_logit_PM, partials.target_logit_PM, rtol=0, atol=atol)
    np.testing.assert_allclose(ours_lse_M, lse_M, rtol=0, atol=atol)
    ours_MW, _ = run_dlogits(x, ours_lse_M, 8, 290, spec=spec)
    assert np.isfinite(ours_MW.astype(np.float32)).all()
    np.testing.assert_array_equal(ours_MW[:, :8], 0)
    np.testing.assert_array_equal(ours_MW[:, 290:], 0)


@pytest.mark.parametrize(("first", "last"), [(5, 5), (9, 3), (50, 60), (-9, 0)])
def test_empty_windows_weigh_nothing(first, last):
    block, spec = Block(M=9, W=40, D=64, first=first, last=last), HeadSpec(want_entropy=True)
    x = inputs(block)
    ours, _ = run_forward(x, first, last, spec=spec)
    np.testing.assert_array_equal(ours.max_PM, np.float32(blocks.MASKED_LOGIT))
    np.testing.assert_array_equal(np.stack(ours[1:]), 0)
    ours_MW, _ = run_dlogits(x, np.zeros(9), first, last, spec=spec)
    np.testing.assert_array_equal(ours_MW, 0)


def test_spec_asks_for_the_interpreter_also_inside_scan():
    """As the driver calls it: blocks of the head in a scan, the bounds traced."""
    block, spec = Block(M=40, W=80, D=64, first=0, last=80), HeadSpec(interpret=True)
    x = inputs(block)

    @jax.jit
    def scanned(head_BWD):
        def of_block(_, part):
            index, head_WD = part
            targets_M = x.targets_M - index * 40
            window = 4 * index, 40 - index
            return None, blocks.joined(pallas_gpu.forward_block(x.hidden_MD, head_WD, targets_M, *window, spec=spec))

        return jax.lax.scan(of_block, None, (jnp.arange(2), head_BWD))[1]

    ours = jax.tree.map(np.asarray, scanned(x.head_WD.reshape(2, 40, 64)))
    for index, (first, last) in enumerate(((0, 40), (44, 79))):
        expected = oracle(x, first, last, spec=spec)[0]
        part = jax.tree.map(lambda a, index=index: a[index, 0], ours)
        np.testing.assert_array_equal(part.centred_PM, 0)  # not asked for
        assert_partials_close(part._replace(centred_PM=expected.centred_PM.astype(np.float32)), expected)


def test_race_detector_sees_a_race():
    """Positive control: one warpgroup reads what another writes, with no barrier between."""

    def racy(x_ref, out_ref, smem, done):
        def write():
            smem[...] = x_ref[...]
            plgpu.barrier_arrive(done)

        def read():
            out_ref[...] = smem[...]
            plgpu.barrier_wait(done)

        jax.lax.cond(jax.lax.axis_index("group") == 0, write, read)

    kernel = plgpu.kernel(
        racy,
        out_type=jax.ShapeDtypeStruct((128,), jnp.float32),
        scratch_types=[plgpu.SMEM((128,), jnp.float32), plgpu.Barrier()],
        num_threads=2,
        thread_name="group",
    )
    assert run(kernel, jnp.ones(128))[1]


def test_splits_keep_the_processors_busy():
    """Turns of all processors, against the fewest there could be: at most 6 % more at the sizes we care about."""
    clusters = pallas_gpu.PROCESSORS // pallas_gpu.PAIR
    for tokens in (8192, 16384, 32768):
        for V, D in ((32000, 4096), (128256, 4096), (256000, 3584), (151936, 2048)):
            pairs, tiles = tokens // pallas_gpu.PAIR_ROWS, -(-V // pallas_gpu.COLUMNS)
            splits = pallas_gpu._splits(pairs, tiles, D)
            turns = -(-pairs * splits // clusters) * -(-tiles // splits)
            assert turns < 1.06 * pairs * tiles / clusters, (tokens, V, splits)
    for pairs, tiles, D in ((1, 1, 64), (1, 3, 4096), (500, 1, 8192)):
        assert 1 <= pallas_gpu._splits(pairs, tiles, D) <= tiles


SUPPORTED = {
    "rows": 520,
    "width": 192,
    "dtype": "bfloat16",
    "compute_capability": "9.0",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, ""),
        ({"compute_capability": "8.0"}, "compute capability 8.0 is not 9.0 (Hopper: H100, H200)"),
        ({"compute_capability": ""}, "compute capability of no GPU is not 9.0"),
        ({"dtype": "float32"}, "float32 operands; the GPU kernels multiply bfloat16"),
        ({"width": 96}, "hidden width 96 is not a multiple of 64"),
        ({"rows": 50257}, "50257 rows of the head are not a multiple of 8"),
    ],
    ids=str,
)
def test_unsupported_names_the_fact_and_the_limit(change, message):
    found = pallas_gpu.unsupported(**SUPPORTED | change)
    assert found == "" if not message else message in found
