"""attention.attend, every implementation: float64 oracle, literal masks, padding, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from numpy.testing import assert_allclose, assert_array_equal

from fpo_jax import attention, sharding, types
from fpo_jax.attention import blockwise, dispatch, splash
from tests import jaxpr_tools, tolerances
from tests.attention_oracle import Case, program, run

ALONE = sharding.Layout()
ENGINES = ("xla", "chunked", "splash")  # those that run, or are emulated, on a CPU
OPTIONS = {
    "causal": {},
    "window": {"window": 5},
    "window beyond the row": {"window": 50},
    "cap": {"cap": 0.7},
    "segments": {"segments": True},
    "all": {"window": 5, "cap": 0.7, "segments": True},
    "sinks": {"sinks": True},
    "sinks and all": {"window": 5, "cap": 0.7, "shared": True, "sinks": True},
}


def skip_what_is_refused(implementation, case):
    if implementation == "xla" and case.cap is not None:
        pytest.skip("JAX's own attention has no soft-cap; select takes chunked")
    if case.sinks and implementation not in dispatch.WITH_SINKS:
        pytest.skip(f"{implementation} has no sinks; select takes another")


def assert_matches(results, expected, *, dtype, bounds=tolerances.ATTENTION):
    names = ("out", "dq", "dk", "dv", "dsinks")[: len(expected)]
    for name, got, want in zip(names, results, expected, strict=True):
        assert got.dtype == ("float32" if name == "dsinks" else dtype)
        scale = 1.0 if name == "out" else max(np.abs(want).max(), 1.0)
        assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=bounds[dtype] * scale)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of eight positions, so that a short row has several of them."""
    monkeypatch.setattr(blockwise, "MIN_BLOCK", 8)
    monkeypatch.setattr(blockwise, "MAX_BLOCK", 8)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        *(("float32", options) for options in OPTIONS),
        ("bfloat16", "causal"),
        ("bfloat16", "segments"),
        ("bfloat16", "all"),
        ("bfloat16", "sinks"),
    ],
)
@pytest.mark.parametrize("implementation", ENGINES)
def test_values_and_gradients_match_the_oracle(implementation, dtype, options, small_blocks):
    case = Case(**OPTIONS[options])
    skip_what_is_refused(implementation, case)
    arrays = case.inputs(dtype)
    assert_matches(run(case, arrays, implementation=implementation), case.oracle(*arrays), dtype=dtype)


@pytest.mark.parametrize("sizes", [(4, 4, 64), (8, 2, 80), (4, 1, 128), (2, 1, 20)], ids=str)
@pytest.mark.parametrize("implementation", ENGINES)
def test_group_sizes_and_head_dims(implementation, sizes, small_blocks):
    H, G, C = sizes
    case = Case(T=19, H=H, G=G, C=C, window=11, scale=C**-0.5, lengths=(19, 7))
    arrays = case.inputs()
    assert_matches(run(case, arrays, implementation=implementation), case.oracle(*arrays), dtype="float32")


@pytest.mark.parametrize("length", [1, 8, 17])
def test_chunked_takes_every_length(length, small_blocks):
    case = Case(T=length, lengths=(length, length // 2), window=9, cap=2.0)
    arrays = case.inputs()
    assert_matches(run(case, arrays, implementation="chunked"), case.oracle(*arrays), dtype="float32")


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("length", "window"), [(300, None), (300, 130), pytest.param(1153, 200, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("implementation", ["chunked", "splash"])
def test_rows_of_several_blocks(implementation, length, window, monkeypatch):
    """Blocks as they are in use; 1,153 positions of splash are padded to 1,280 in blocks of 256."""
    monkeypatch.setattr(splash, "MAX_BLOCK", 256)
    case = Case(T=length, H=2, G=1, C=16, window=window, segments=window is not None, lengths=(length, 140))
    arrays = case.inputs()
    assert_matches(run(case, arrays, implementation=implementation), case.oracle(*arrays), dtype="float32")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("segments", ["segments", "shared"])
@pytest.mark.parametrize("copies", [1, 2, 0])
def test_every_backward_pass_of_splash(copies, segments, monkeypatch):
    """One fused kernel in one step or two, or one kernel for the queries and one for keys and values."""
    monkeypatch.setattr(splash, "MAX_BLOCK", 128)
    monkeypatch.setattr(splash, "MAX_QUERY_GRADIENTS", copies)
    case = Case(T=250 + copies, H=2, G=1, C=8, cap=2.0, **{segments: True}, lengths=(250, 100))
    arrays = case.inputs("bfloat16")
    assert_matches(run(case, arrays, implementation="splash"), case.oracle(*arrays), dtype="bfloat16")


@pytest.mark.parametrize(
    ("T", "padded", "block", "fused"),
    [
        (1, 128, 128, 128),
        (129, 256, 256, 256),
        (513, 768, 384, 384),
        (1024, 1024, 512, 512),
        (1153, 1280, 256, None),
        (1664, 1792, 256, None),
        (2000, 2048, 512, 512),
        (4096, 4096, 512, 1024),
        (8192, 8192, 512, None),
    ],
)
def test_blocks_of_splash(T, padded, block, fused):
    assert splash._cut(T) == (padded, block, fused)


@pytest.mark.parametrize(
    ("T", "block", "blocks", "size"), [(256, 256, 1, 256), (300, 256, 2, 152), (4096, 256, 16, 256), (1, 8, 1, 8)]
)
def test_blocks_of_chunked(T, block, blocks, size):
    assert blockwise._cut(T, block) == (blocks, size)


def test_blocks_of_chunked_fit_the_workspace():
    assert blockwise._block(8) == 256
    assert blockwise._block(128) == 256  # 128 * 256 * 256 * 4 bytes = 32 MiB
    assert blockwise._block(129) == 128
    assert blockwise._block(10_000) == 128


def test_the_oracle_matches_its_own_finite_differences():
    case = Case(T=7, window=3, cap=0.9, lengths=(7, 4, 0))
    host = [np.asarray(x, np.float64) for x in case.inputs()]
    grads = case.oracle(*host)[1:]
    rng = np.random.default_rng(2)
    for which, grad in enumerate(grads):
        direction = rng.normal(size=grad.shape)
        ahead, behind = (
            np.sum(case.oracle(*(x + h * direction if i == which else x for i, x in enumerate(host)))[0] * host[3])
            for h in (1e-5, -1e-5)
        )
        assert_allclose(np.sum(grad * direction), (ahead - behind) / 2e-5, rtol=tolerances.ATTENTION_SLOPE)


def seen(implementation, *, valid, window=None, segments=None):
    """Which keys each query reads: with equal logits and one-hot values the output is mask / row sum."""
    size = len(valid)
    nothing = jnp.zeros((1, size, 1, size))
    out = jax.jit(
        functools.partial(
            attention.attend,
            valid_NT=jnp.asarray([valid]),
            scale=1.0,
            sliding_window=window,
            segments=segments,
            choice=attention.Selection(implementation, reason="a test", interpret=implementation == "splash"),
            layout=ALONE,
        )
    )(nothing, nothing, jnp.eye(size)[None, :, None, :])
    return (np.asarray(out)[0, :, 0, :] > 0).astype(int)


def packed(ids, parents=None):
    """One row of texts, with the positions that their tokens have there."""
    positions = [ids[:place].count(number) for place, number in enumerate(ids)]
    if parents is None:
        return types.Segments(jnp.array([ids]), jnp.array([positions]))
    shared = [0 if parent == number else ids.count(parent) for number, parent in zip(ids, parents, strict=True)]
    positions = [own + before for own, before in zip(positions, shared, strict=True)]
    return types.Segments(jnp.array([ids]), jnp.array([positions]), jnp.array([parents]))


SHARING = ["xla", "chunked", "splash"]


@pytest.mark.parametrize("implementation", SHARING)
def test_completions_see_their_prompt_and_not_each_other(implementation):
    """Two prompts; the first has two completions, whose windows of 3 count positions of the conversation."""
    row = packed([0, 0, 1, 1, 2, 2, 3, 4], [0, 0, 0, 0, 0, 0, 3, 3])
    causal = [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1, 1],
    ]
    assert_array_equal(seen(implementation, valid=[True] * 8, segments=row), causal)
    windowed = np.array(causal)
    windowed[3, 0] = windowed[5, 0] = 0
    assert_array_equal(seen(implementation, valid=[True] * 8, window=3, segments=row), windowed)


@pytest.mark.parametrize("options", [{}, {"window": 150}, {"cap": 2.0}], ids=str)
@pytest.mark.parametrize("implementation", SHARING)
def test_shared_prompts_match_the_oracle_over_several_blocks(implementation, options):
    if implementation == "xla" and "cap" in options:
        pytest.skip("XLA attention has no soft-cap")
    case = Case(T=500, H=2, G=1, C=8, shared=True, lengths=(500, 340), **options)
    arrays = case.inputs()
    assert_matches(run(case, arrays, implementation=implementation), case.oracle(*arrays), dtype="float32")


@pytest.mark.parametrize("implementation", ENGINES)
def test_causal_mask_with_padding(implementation):
    assert_array_equal(
        seen(implementation, valid=[True, True, True, True, False]),
        [
            [1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 1, 1, 1, 0],
            [0, 0, 0, 0, 0],  # padding reads nothing and returns zero
        ],
    )


@pytest.mark.parametrize("implementation", ENGINES)
def test_sliding_window_of_three_counts_the_query_itself(implementation):
    assert_array_equal(
        seen(implementation, valid=[True] * 6, window=3),
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [0, 1, 1, 1, 0, 0],
            [0, 0, 1, 1, 1, 0],
            [0, 0, 0, 1, 1, 1],
        ],
    )


@pytest.mark.parametrize("implementation", ENGINES)
def test_sliding_window_of_one_reads_only_itself(implementation):
    assert_array_equal(seen(implementation, valid=[True, True, False], window=1), [[1, 0, 0], [0, 1, 0], [0, 0, 0]])


@pytest.mark.parametrize("implementation", ENGINES)
def test_segments_see_their_own_keys_and_the_window_goes_on(implementation):
    assert_array_equal(
        seen(implementation, valid=[True] * 6 + [False], window=3, segments=packed([7, 7, 3, 3, 3, 3, 3])),
        [
            [1, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0],
            [0, 0, 1, 0, 0, 0, 0],
            [0, 0, 1, 1, 0, 0, 0],
            [0, 0, 1, 1, 1, 0, 0],
            [0, 0, 0, 1, 1, 1, 0],
            [0, 0, 0, 0, 0, 0, 0],
        ],
    )


@pytest.mark.parametrize("options", ["causal", "all"])
@pytest.mark.parametrize("implementation", ENGINES)
def test_padding_changes_nothing_and_gets_no_gradient(implementation, options, small_blocks):
    case = Case(**OPTIONS[options])
    skip_what_is_refused(implementation, case)
    padding = ~case.valid_NT
    noisy = [np.where(padding[:, :, None, None], np.float32(1e4) * x, x) for x in case.inputs()]
    clean, results = (run(case, arrays, implementation=implementation) for arrays in (case.inputs(), noisy))
    assert_array_equal(clean[0], results[0])
    for array in map(np.asarray, results):
        assert np.isfinite(array).all()
        assert np.all(array[padding] == 0)
        assert np.any(array[~padding] != 0)


def layout(data, fsdp, tensor):
    devices = jax.devices()[: data * fsdp * tensor]
    return sharding.Layout(Mesh(np.array(devices).reshape(data, fsdp, 1, tensor), sharding.MESH_AXES))


# (data, fsdp, tensor), query heads, key/value heads
MESHES = {
    "rows": ((2, 4, 1), 6, 2),
    "rows and heads": ((2, 2, 2), 6, 2),
    "two devices for a kv head": ((1, 2, 4), 8, 2),
    "a device and a third for a kv head": ((1, 2, 4), 12, 3),
    "heads that stay whole": ((1, 2, 4), 6, 2),
}


@pytest.mark.parametrize(
    ("implementation", "mesh"),
    [
        *(("chunked", mesh) for mesh in MESHES),
        *(("splash", mesh) for mesh in list(MESHES)[1:4]),
        ("xla", "rows and heads"),
    ],
)
def test_a_mesh_gives_what_the_oracle_gives(implementation, mesh, small_blocks):
    sizes, H, G = MESHES[mesh]
    rows = (21, 13, 0, 5, 21, 1, 8, 9)[: max(4, sizes[0] * sizes[1])]
    case = Case(H=H, G=G, window=9, segments=True, sinks=implementation != "xla", lengths=rows)
    arrays = case.inputs()
    results = run(case, arrays, implementation=implementation, layout=layout(*sizes))
    assert_matches(results, case.oracle(*arrays), dtype="float32")


def test_rows_that_the_mesh_does_not_divide_stay_whole():
    case = Case()
    arrays = case.inputs()
    results = run(case, arrays, implementation="chunked", layout=layout(2, 2, 2))
    assert_matches(results, case.oracle(*arrays), dtype="float32")


def test_chunked_holds_no_logits():
    case = Case(T=1024, H=4, G=4, C=16, lengths=(1024,))
    arrays = case.inputs()
    for implementation, most in (("chunked", 4 * 256 * 256), ("xla", 4 * 1024 * 1024)):
        text = program(case, implementation, ALONE).lower(*arrays).compile().as_text()
        assert jaxpr_tools.shapes_in_text(text, elements=most)
        assert not jaxpr_tools.shapes_in_text(text, elements=most + 1)


@pytest.mark.parametrize(
    ("implementation", "options", "message"),
    [
        ("flash", {}, "'flash' is not one of xla, chunked, cudnn, mosaic, splash"),
        ("xla", {"cap": 2.0}, "'xla' runs without the soft-cap 2.0"),
        ("cudnn", {"cap": 2.0}, "'cudnn' runs without the soft-cap 2.0"),
        ("xla", {"sinks": True}, "'xla' runs without the sinks asked for; take the implementation from"),
        ("mosaic", {"sinks": True}, "'mosaic' runs without the sinks"),
    ],
)
def test_what_an_implementation_lacks_is_refused(implementation, options, message):
    case = Case(**options)
    with pytest.raises(ValueError, match=message):
        run(case, case.inputs(), implementation=implementation)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN attention needs an NVIDIA GPU")
@pytest.mark.parametrize(
    "options", [{}, {"window": 5}, {"segments": True}, {"segments": True, "window": 5}, {"shared": True}], ids=str
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cudnn_matches_the_oracle(dtype, options):
    case = Case(T=22, **options)
    arrays = case.inputs(dtype)
    assert_matches(run(case, arrays, implementation="cudnn"), case.oracle(*arrays), dtype=dtype)
