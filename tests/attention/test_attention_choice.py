"""attention.select: what `auto` picks where, what is refused, and that every choice can be made for absent hardware."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from fpo_jax import attention, sharding

needs_mosaic_gpu = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the GPU kernels need jax 0.11")
FACTS = {
    "platform": "gpu",
    "dtype": "bfloat16",
    "head_dim": 128,
    "heads": 8,
    "kv_heads": 4,
    "positions": [128, 512],
    "sliding_window": None,
    "soft_cap": None,
    "segments": False,
    "layout": sharding.Layout(),
}


def select(requested, **facts):
    return attention.select(requested, **{**FACTS, **facts})


@pytest.mark.parametrize(
    ("facts", "implementation", "reason"),
    [
        ({}, "cudnn", "flash attention for bfloat16, head_dim 128 on a gpu"),
        ({"platform": "cuda", "dtype": "float16", "head_dim": 80}, "cudnn", "for float16, head_dim 80"),
        ({"sliding_window": 64}, "cudnn", "; sliding window of 64"),
        ({"compute_capability": "8.0"}, "cudnn", "flash attention for bfloat16"),
        ({"compute_capability": "12.1"}, "cudnn", "flash attention for bfloat16"),
        (
            {"compute_capability": "7.5"},
            "chunked",
            "cuDNN attention needs an NVIDIA GPU of compute capability 8.0 or more, not 7.5; Mosaic .*, not 7.5; rows",
        ),
        ({"compute_capability": "7.0", "positions": [128]}, "xla", "8.0 or more, not 7.0; .*; rows of at most 384"),
        ({"compute_capability": "gfx942"}, "chunked", "8.0 or more, not gfx942; Mosaic .*, not gfx942; rows"),
        (
            {"compute_capability": "gfx90a:sramecc+:xnack-", "segments": True, "positions": [64]},
            "xla",
            "Mosaic .*, not gfx90a.*; cuDNN .* 8.0 or more, not gfx90a",
        ),
        ({"platform": "rocm", "compute_capability": "gfx942"}, "chunked", "no flash attention kernel for a rocm"),
        (
            {"dtype": "float32"},
            "chunked",
            "cuDNN attention needs bfloat16 or float16, not float32; Mosaic .*; rows of 512 positions, more than 384",
        ),
        ({"dtype": "float32", "positions": [384, 128]}, "xla", "not float32; .*; rows of at most 384 positions"),
        ({"head_dim": 20}, "chunked", "divisible by 8 and at most 128, not 20"),
        ({"head_dim": 256}, "chunked", "not 256"),
        ({"positions": [128, 127]}, "xla", "even length to train, not 127"),
        (
            {"soft_cap": 50.0, "positions": [64]},
            "chunked",
            "cuDNN attention has no soft-cap.* 50.0; Mosaic .*; XLA attention has no",
        ),
        (
            {"sinks": True, "positions": [64], "compute_capability": "9.0"},
            "chunked",
            "cuDNN attention has no sinks, and every head of the model has one; Mosaic .* no sinks.*; XLA att",
        ),
        ({"sinks": True, "platform": "cpu", "positions": [64]}, "chunked", "for a cpu; XLA attention has no sinks"),
        ({"sinks": True, "platform": "tpu"}, "splash", "flash attention for bfloat16"),
        ({"segments": True, "shared": True, "positions": [64, 8192]}, "cudnn", "flash attention .* not an unknown one"),
        (
            {"segments": True, "compute_capability": "8.0"},
            "cudnn",
            "flash attention .* needs a Hopper GPU, .*, not 8.0",
        ),
        ({"segments": True, "positions": [8194]}, "chunked", "at most 8192 positions with several texts, not 8194"),
        ({"platform": "tpu"}, "splash", "flash attention for bfloat16, head_dim 128 on a tpu"),
        ({"platform": "tpu", "head_dim": 80, "soft_cap": 50.0, "segments": True, "positions": [77]}, "splash", "flash"),
        ({"platform": "tpu", "segments": True, "shared": True, "positions": [8192]}, "splash", "flash"),
        (
            {"platform": "tpu", "segments": True, "shared": True, "positions": [128, 8320]},
            "chunked",
            "at most 8192 .* 8320",
        ),
        ({"platform": "tpu", "dtype": "float32"}, "chunked", "splash attention needs bfloat16, not float32"),
        ({"platform": "tpu", "dtype": "float16"}, "chunked", "splash attention needs bfloat16, not float16"),
        ({"platform": "cpu"}, "chunked", "no flash attention kernel for a cpu; rows of 512 positions"),
        ({"platform": "cpu", "positions": [384]}, "xla", "no flash attention kernel for a cpu; rows of at most 384"),
        ({"platform": "cpu", "positions": [8], "soft_cap": 30.0}, "chunked", "XLA attention has no soft-cap.* 30.0"),
    ],
    ids=str,
)
def test_auto(facts, implementation, reason):
    choice = select("auto", **facts)
    assert choice.implementation == implementation and not choice.interpret
    with pytest.raises(ValueError, match=reason):  # a pattern, as in the tests of errors
        raise ValueError(choice.reason)


@pytest.mark.parametrize(
    ("facts", "implementation", "reason"),
    [
        ({}, "cudnn", "flash attention for bfloat16, head_dim 128 on a gpu"),
        ({"segments": True}, "mosaic", "flash attention for bfloat16, head_dim 128 on a gpu"),
        (
            {"segments": True, "shared": True, "dtype": "float16", "positions": [64]},
            "mosaic",
            "for float16, head_dim 128",
        ),
        ({"head_dim": 20}, "mosaic", "divisible by 8 and at most 128, not 20"),
        ({"head_dim": 256}, "chunked", "Mosaic attention needs a head_dim of at most 128, not 256; rows"),
        ({"soft_cap": 50.0}, "chunked", "Mosaic attention has no soft-cap, and the model has one of 50.0; XLA"),
        ({"dtype": "float32"}, "chunked", "Mosaic attention needs bfloat16 or float16, not float32; rows"),
    ],
    ids=str,
)
@needs_mosaic_gpu
def test_auto_on_a_hopper_gpu(facts, implementation, reason):
    choice = select("auto", compute_capability="9.0", **facts)
    assert choice.implementation == implementation and not choice.interpret
    assert reason in choice.reason


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="this jax has the GPU kernels")
def test_an_old_jax_has_no_mosaic():
    choice = select("auto", compute_capability="9.0", segments=True)
    assert choice.implementation == "cudnn" and "Mosaic attention needs jax 0.11" in choice.reason


@pytest.mark.parametrize(
    ("requested", "facts"),
    [
        ("xla", {"positions": [4096]}),
        ("chunked", {"soft_cap": 2.0}),
        ("cudnn", {}),
        pytest.param("mosaic", {"compute_capability": "9.0", "segments": True}, marks=needs_mosaic_gpu),
        ("splash", {"platform": "tpu"}),
    ],
)
def test_a_request_is_granted(requested, facts):
    assert select(requested, **facts) == attention.Selection(requested, "asked for by the configuration", False)


@needs_mosaic_gpu
def test_mosaic_on_a_cpu_is_an_emulation():
    assert select("mosaic", platform="cpu", segments=True).interpret


def test_splash_on_a_cpu_is_an_emulation_and_says_so():
    choice = select("splash", platform="cpu", dtype="float32")
    assert choice.interpret and "emulated on a CPU, very slow" in choice.reason


@pytest.mark.parametrize(
    ("requested", "facts", "message"),
    [
        ("flash", {}, "'flash' is not one of auto, xla, chunked, cudnn, mosaic, splash"),
        ("cudnn", {"platform": "cpu"}, r"needs an NVIDIA GPU, not cpu; set model\.attention to auto or chunked"),
        ("cudnn", {"compute_capability": "7.5"}, "an NVIDIA GPU of compute capability 8.0 or more, not 7.5; set"),
        ("cudnn", {"compute_capability": "gfx942"}, "8.0 or more, not gfx942; set"),
        ("cudnn", {"platform": "rocm"}, "needs an NVIDIA GPU, not rocm; set"),
        ("cudnn", {"dtype": "float32"}, "not float32; set"),
        ("cudnn", {"positions": [64, 33]}, "even length to train, not 33; set"),
        ("cudnn", {"soft_cap": 50.0}, "no soft-cap, and the model has one of 50.0; set"),
        ("cudnn", {"segments": True, "positions": [9000]}, "at most 8192 positions with several .* memory; set"),
        ("mosaic", {"platform": "tpu"}, "needs a Hopper GPU, or a CPU to emulate one, not tpu; set"),
        ("mosaic", {}, "capability 9.0, not an unknown one; set"),
        (
            "cudnn",
            {"sinks": True},
            "cuDNN attention has no sinks, and every head of the model has one; set model.attention",
        ),
        ("mosaic", {"sinks": True}, "Mosaic attention has no sinks, .*; set model.attention to auto or chunked"),
        ("xla", {"sinks": True}, "XLA attention has no sinks, .*; set model.attention to auto or chunked"),
        ("xla", {"soft_cap": 50.0}, "XLA attention has no soft-cap, and the model has one of 50.0; set"),
        ("splash", {}, "splash attention needs a TPU, or a CPU to emulate one, not gpu; set"),
        ("splash", {"platform": "tpu", "dtype": "float32"}, "needs bfloat16, not float32: .*; set"),
    ],
)
def test_a_request_that_cannot_run_is_refused(requested, facts, message):
    with pytest.raises(ValueError, match=message):
        select(requested, **facts)


def test_heads_on_a_mesh():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(1, 2, 1, 4), sharding.MESH_AXES)
    layout = sharding.Layout(mesh)
    assert "key/value" not in select("auto", layout=layout).reason
    assert "2 key/value heads are whole on each of 4 devices" in select("auto", kv_heads=2, layout=layout).reason
    with pytest.raises(ValueError, match=r"6 attention heads are not divisible by mesh\.tensor=4; choose a divisor"):
        select("auto", heads=6, kv_heads=2, layout=layout)


def test_choices_are_static_arguments():
    assert hash(select("auto")) == hash(select("auto"))
