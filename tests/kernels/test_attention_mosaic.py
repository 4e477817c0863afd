"""Mosaic attention, emulated: float64 oracle, who sees whom, blocks that are skipped. Its kernels need jax 0.11."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fpo_jax import types
from fpo_jax.attention import block_mask, mosaic, segment_mask
from fpo_jax.perf import flops
from tests import tolerances
from tests.attention_oracle import Case, run

needs_mosaic_gpu = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the GPU kernels need jax 0.11")


def assert_matches(results, expected, *, dtype):
    for got, want in zip(results, expected, strict=True):
        assert got.dtype == dtype
        scale = max(np.abs(want).max(), 1.0)
        assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=tolerances.ATTENTION[dtype] * scale)


# Of 128 positions a block: rows of two to four.
CASES = {
    "causal": {"T": 144, "lengths": (144,)},
    "window": {"window": 70, "lengths": (304, 140)},
    "window beyond the row": {"T": 144, "window": 200, "lengths": (144,)},
    "segments": {"segments": True, "lengths": (304, 140, 0)},
    "shared prompts": {"shared": True, "lengths": (304, 140)},
    "shared prompts, window": {"shared": True, "window": 30, "lengths": (304,)},
    "no multiple of 8": {"T": 397, "shared": True, "lengths": (397,)},
    "group of 3": {"T": 150, "H": 3, "shared": True, "lengths": (150,)},
    "a head each": {"T": 150, "G": 2, "segments": True, "lengths": (150,)},
    "head_dim 80": {"T": 150, "C": 80, "shared": True, "lengths": (150,)},
}


@needs_mosaic_gpu
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_match_the_oracle(name):
    case = Case(**{"T": 304, "H": 2, "G": 1, "C": 64, "scale": 0.125, **CASES[name]})
    arrays = case.inputs("bfloat16")
    assert_matches(run(case, arrays, implementation="mosaic"), case.oracle(*arrays), dtype="bfloat16")


@needs_mosaic_gpu
def test_float16_and_head_dim_128():
    case = Case(T=150, H=2, G=1, C=128, scale=0.1, shared=True, lengths=(150,))
    arrays = case.inputs("float16")
    assert_matches(run(case, arrays, implementation="mosaic"), case.oracle(*arrays), dtype="float16")


@needs_mosaic_gpu
def test_stages_are_filled_again_and_nothing_races(monkeypatch):
    """More visited blocks than stages, in every kernel: 5 blocks of keys, 10 of 64 keys and 10 of queries."""
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races  # it has no public name

    emulation = mosaic.tiles.plgpu.InterpretGPUParams
    options = {"on_race": "warn"} if hasattr(emulation, "on_race") else {}  # jax 0.11 always warns
    watched = functools.partial(emulation, detect_races=True, **options)
    monkeypatch.setattr(mosaic.tiles.plgpu, "InterpretGPUParams", watched)
    case = Case(T=600, H=1, G=1, C=64, scale=0.125, lengths=(600,))
    arrays = case.inputs("bfloat16")
    assert_matches(run(case, arrays, implementation="mosaic"), case.oracle(*arrays), dtype="bfloat16")
    assert not get_races().races_found


def random_rows(seed, N=3, T=256):
    """Prompts and up to three completions of each, of random lengths; padding at the end."""
    rng = np.random.default_rng(seed)
    ids_NT, places_NT, parents_NT = np.full((N, T), -1), np.zeros((N, T), int), np.full((N, T), -1)
    for ids, places, parents in zip(ids_NT, places_NT, parents_NT, strict=True):
        at = name = 0
        while at < T - 20:
            prompt, length = name, int(rng.integers(1, 80))
            for sibling in range(rng.integers(1, 5)):
                size = length if sibling == 0 else int(rng.integers(1, 50))
                here = slice(at, min(at + size, T - 9))
                ids[here], parents[here] = name, prompt
                places[here] = np.arange(here.stop - at) + (length if sibling else 0)
                name, at = name + 1, here.stop
                if at == T - 9:
                    break
    return types.Segments(*(jnp.asarray(x, jnp.int32) for x in (ids_NT, places_NT, parents_NT)))


@pytest.mark.parametrize("window", [None, 3, 60])
@pytest.mark.parametrize("parents", [False, True])
def test_bounds_and_visits_are_those_of_the_dense_mask(parents, window):
    rows = random_rows(5)
    rows = rows if parents else rows._replace(positions_NT=places_of(rows.ids_NT), parents_NT=None)
    bounds_N4P = block_mask.bounds(rows, rows=3, positions=256, padded=384, window=window)
    i, own, first, end = (np.asarray(bounds_N4P)[:, part, :, None] for part in range(4))
    j = np.arange(384)
    seen_NPP = ((own <= j) & (j <= i)) | ((first <= j) & (j < end))
    dense_NTT = np.asarray(segment_mask.seen(rows, rows, window=window)) & np.tri(256, dtype=bool)
    real_NT = np.asarray(rows.ids_NT) >= 0
    assert_array_equal(seen_NPP[:, :256, :256][real_NT], dense_NTT[real_NT])
    assert_array_equal(seen_NPP[:, 256:], np.broadcast_to(np.eye(384, dtype=bool)[256:], (3, 128, 384)))
    assert np.all(np.einsum("NPP->NP", seen_NPP)), "every query sees itself"
    blocks = seen_NPP.reshape(3, 6, 64, 3, 128)
    some_NXY, all_NXY = (reduce(blocks, axis=(2, 4)) for reduce in (np.any, np.all))
    keys_of, queries_of = block_mask.visits(bounds_N4P, queries=64, keys=128)
    transposed = (x_NXY.swapaxes(1, 2) for x_NXY in (some_NXY, all_NXY))
    for visits, some, all_ in ((keys_of, some_NXY, all_NXY), (queries_of, *transposed)):
        for place in np.ndindex(some.shape[:2]):
            order, (whole, count) = np.asarray(visits.order_NXY)[place], np.asarray(visits.counts_NX2)[place]
            assert_array_equal(order[:whole], np.flatnonzero(all_[place]))
            assert_array_equal(order[whole:count], np.flatnonzero(some[place] & ~all_[place]))


def places_of(ids_NT):
    """Positions that start anew with every segment."""
    ids_NT = np.asarray(ids_NT)
    begins_NT = np.pad(ids_NT[:, 1:] != ids_NT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    places_T = np.arange(ids_NT.shape[1])
    return jnp.asarray(places_T - np.maximum.accumulate(np.where(begins_NT, places_T, 0), axis=1), jnp.int32)


def test_rows_of_one_text_visit_the_band():
    bounds_N4P = block_mask.bounds(None, rows=1, positions=500, padded=512, window=100)
    keys_of, queries_of = block_mask.visits(bounds_N4P, queries=128, keys=128)
    # The last block's twelve added positions see themselves alone.
    assert keys_of.counts_NX2.tolist() == [[[0, 1], [0, 2], [0, 2], [0, 2]]]
    assert queries_of.counts_NX2.tolist() == [[[0, 2], [0, 2], [0, 2], [0, 1]]]
    keys_of, _ = block_mask.visits(
        block_mask.bounds(None, rows=1, positions=512, padded=512, window=None), queries=128, keys=64
    )
    assert keys_of.counts_NX2.tolist() == [[[0, 2], [2, 4], [4, 6], [6, 8]]]


@needs_mosaic_gpu
def test_flops_count_the_pairs():
    def total(q, k, v):
        out_NTHC = mosaic.attend(q, k, v, None, scale=1.0, window=None, soft_cap=None, interpret=True)
        return jnp.sum(out_NTHC, dtype=jnp.float32)

    q, k = (jax.ShapeDtypeStruct((2, 256, heads, 64), "bfloat16") for heads in (4, 2))
    pairs = 2 * 4 * 256 * 257 // 2
    mean = 2 * 2 * 4 * 256 * 64  # sum_j p_ij dp_ij, an ordinary product
    assert flops.traced(jax.jit(total).trace(q, k, k).jaxpr.jaxpr) == 2 * 2 * pairs * 64
    gradient = jax.jit(jax.grad(total, (0, 1, 2))).trace(q, k, k)
    assert flops.traced(gradient.jaxpr.jaxpr) == 2 * (2 + 3 + 4) * pairs * 64 + mean


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"soft_cap": 30.0}, "no soft-cap, and the model has one of 30.0; take"),
        ({"scale": -1.0}, "needs a scale above 0, not -1.0; take"),
        ({"dtype": "float32"}, "needs bfloat16 or float16, not float32; take"),
        ({"C": 256}, "head_dim of at most 128, not 256; take"),
    ],
    ids=str,
)
def test_what_cannot_run_is_refused(options, message):
    options = {"dtype": "bfloat16", "C": 64, "scale": 1.0, "soft_cap": None, **options}
    x_NTHC = jnp.zeros((1, 8, 1, options["C"]), options["dtype"])
    with pytest.raises(ValueError, match=message):
        mosaic.attend(x_NTHC, x_NTHC, x_NTHC, None, scale=options["scale"], window=None, soft_cap=options["soft_cap"])
