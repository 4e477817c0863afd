"""Which implementation of attention runs, and why: settled once, before anything is compiled.

Static facts about the model, the rows and the hardware go in, a `Selection` comes out. Nothing here asks a device, so
that a plan for absent hardware gets the same answer.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fpo_jax import sharding
from fpo_jax.attention import blockwise, mosaic, splash

IMPLEMENTATIONS = ("xla", "chunked", "cudnn", "mosaic", "splash")
WITH_SINKS = ("chunked", "splash")
CUDNN_MIN_CAPABILITY = (8, 0)  # docs.nvidia.com/deeplearning/cudnn, Attention: "SM80 (Ampere) or newer"
CUDNN_MAX_HEAD_DIM = 128  # what every generation from Ampere on takes; Hopper alone takes 256
CUDNN_MAX_MASKED = 8192  # positions; a row's mask and the gradient that cuDNN gives it are 256 MiB then
MAX_MASKED = min(CUDNN_MAX_MASKED, splash.MAX_MASKED)  # rows of several texts that every kernel takes
# XLA's attention writes the logits [H, T, T] of every row to memory and keeps them for the backward pass. Measured on a
# CPU, forward and backward: blocks take 1.5 to 1.9 times as long at T = 256, as long at 384 and 512, 0.4 to 0.7 times
# above (H100, two rows of 32 heads: 40 MiB against 56 of blocks at 256, 160 against 97 at 512, 10,241 against 343 at
# 4,096).
XLA_MAX_POSITIONS = 384
# What `auto` tries first, in this order; for several texts in a row the other way round, as cuDNN then reads a mask
# from memory and computes what it hides.
_KERNELS = {"gpu": ("cudnn", "mosaic"), "tpu": ("splash",)}

# Primitives of the forward passes of flash attention, as they stand in a traced layer: splash, Mosaic, cuDNN.
_FORWARD_KERNELS = frozenset({"pallas_call", "mpmd_map", "dot_product_attention_fwd_wrapper"})
_named_results = jax.checkpoint_policies.save_only_these_names(blockwise.RESULTS)


class Selection(NamedTuple):
    """An implementation of `attend`; hashable, a static argument under jit."""

    implementation: str  # one of IMPLEMENTATIONS
    reason: str  # for the log
    interpret: bool = False  # emulate the Pallas kernel on the CPU: for tests, very slow


class _Facts(NamedTuple):
    """What the limits of the implementations are about."""

    platform: str  # "cpu", "gpu" or "tpu"
    dtype: str
    head_dim: int
    positions: Sequence[int]
    soft_cap: float | None
    sinks: bool
    segments: bool
    shared: bool
    compute_capability: str


def select(
    requested: str,
    *,
    platform: str,
    dtype: jax.typing.DTypeLike,
    head_dim: int,
    heads: int,
    kv_heads: int,
    positions: Sequence[int],
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: bool = False,
    segments: bool,
    shared: bool = False,
    compute_capability: str = "",
    layout: sharding.Layout,
) -> Selection:
    """Pick the implementation of `attend`; one choice holds for rows of every length.

    Args:
        requested: "auto" or one of IMPLEMENTATIONS.
        platform: where the program will run, as a device names it: "cpu", "gpu", "cuda" or "tpu".
        dtype: compute dtype of queries, keys and values.
        head_dim: C.
        heads: H.
        kv_heads: G.
        positions: every padded row length T that will be compiled.
        sliding_window: positions a query sees, itself included; None = all before it. Every implementation has it.
        soft_cap: bound on the magnitude of the logits; None for none.
        sinks: whether every head has one more logit, of a value that is zero (gpt-oss).
        segments: whether rows hold several texts.
        shared: whether texts of a row follow another one, their prompt.
        compute_capability: of a GPU, as `logprobs.Target` says it: "9.0" of an NVIDIA one, "gfx942" of an AMD one. ""
            is none, or an unknown GPU, which is taken for an NVIDIA one of 8.0: it gets cuDNN and never Mosaic.
        layout: where activations live on a mesh.

    Raises:
        ValueError: unknown request, one that cannot run, or heads that the mesh does not divide.

    >>> facts = {"head_dim": 64, "heads": 8, "kv_heads": 8, "positions": [128, 256], "sliding_window": None}
    >>> facts.update(soft_cap=None, segments=False, layout=sharding.Layout())
    >>> select("auto", platform="cpu", dtype="float32", **facts).reason
    'no flash attention kernel for a cpu; rows of at most 384 positions'
    """
    if requested not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"attention {requested!r} is not one of auto, {', '.join(IMPLEMENTATIONS)}.")
    facts = _Facts(
        "gpu" if platform == "cuda" else platform,
        jnp.dtype(dtype).name,
        head_dim,
        positions,
        soft_cap,
        sinks,
        segments,
        shared,
        compute_capability,
    )
    ways = layout.ways("heads")
    if heads % ways:
        raise ValueError(f"{heads} attention heads are not divisible by mesh.tensor={ways}; choose a divisor.")
    if requested == "auto":
        implementation, reason = _best(facts)
    else:
        implementation, reason = requested, "asked for by the configuration"
        obstacle = _OBSTACLES[requested](facts)
        if obstacle:
            raise ValueError(f"{obstacle}; set model.attention to auto or chunked.")
    interpret = implementation in ("mosaic", "splash") and facts.platform == "cpu"
    if interpret:
        reason += "; emulated on a CPU, very slow: for tests"
    if sliding_window is not None:
        reason += f"; sliding window of {sliding_window}"
    if kv_heads % ways:
        reason += f"; {kv_heads} key/value heads are whole on each of {ways} devices, which takes those it reads"
    return Selection(implementation, reason, interpret)


def keeps_results(primitive, *inputs, **options) -> bool:
    """Return whether an operation makes what attention's backward pass reads: a policy of `jax.checkpoint`.

    That is the attended values and the log-sum-exp of every query, of each implementation but `xla`, which has none.
    """
    return primitive.name in _FORWARD_KERNELS or bool(_named_results(primitive, *inputs, **options))


def _best(facts: _Facts) -> tuple[str, str]:
    """Return the fastest implementation that runs, and why it is not a faster one."""
    obstacles, kernels = [], _KERNELS.get(facts.platform, ())
    for kernel in reversed(kernels) if facts.segments else kernels:
        obstacles.append(_OBSTACLES[kernel](facts))
        if not obstacles[-1]:
            reason = f"flash attention for {facts.dtype}, head_dim {facts.head_dim} on a {facts.platform}"
            return kernel, "; ".join([reason, *obstacles[:-1]])
    obstacle = "; ".join(obstacles) or f"no flash attention kernel for a {facts.platform}"
    longest, no_xla = max(facts.positions), _no_xla(facts)
    if no_xla:
        return "chunked", obstacle if no_xla in obstacle else f"{obstacle}; {no_xla}"
    if longest > XLA_MAX_POSITIONS:
        return "chunked", f"{obstacle}; rows of {longest} positions, more than {XLA_MAX_POSITIONS}"
    return "xla", f"{obstacle}; rows of at most {XLA_MAX_POSITIONS} positions"


def _no_xla(facts: _Facts) -> str:
    if facts.sinks:
        return _no_sinks("XLA")
    if facts.soft_cap is not None:
        return f"XLA attention has no soft-cap, and the model has one of {facts.soft_cap}"
    return ""


def _no_sinks(name: str) -> str:
    return f"{name} attention has no sinks, and every head of the model has one"


def _no_cudnn(facts: _Facts) -> str:
    if facts.platform != "gpu":
        return f"cuDNN attention needs an NVIDIA GPU, not {facts.platform}"
    if facts.compute_capability and not _has_cudnn(facts.compute_capability):
        least, found = ".".join(map(str, CUDNN_MIN_CAPABILITY)), facts.compute_capability
        return f"cuDNN attention needs an NVIDIA GPU of compute capability {least} or more, not {found}"
    if facts.dtype not in ("bfloat16", "float16"):
        return f"cuDNN attention needs bfloat16 or float16, not {facts.dtype}"
    if facts.head_dim % 8 or facts.head_dim > CUDNN_MAX_HEAD_DIM:
        return f"cuDNN attention needs a head_dim divisible by 8 and at most {CUDNN_MAX_HEAD_DIM}, not {facts.head_dim}"
    if facts.sinks:
        return _no_sinks("cuDNN")
    odd = [length for length in facts.positions if length % 2]
    if odd:
        return f"cuDNN attention needs rows of an even length to train, not {odd[0]}"
    if facts.soft_cap is not None:
        return f"cuDNN attention has no soft-cap, and the model has one of {facts.soft_cap}"
    if facts.segments and max(facts.positions) > CUDNN_MAX_MASKED:
        return (
            f"cuDNN attention takes rows of at most {CUDNN_MAX_MASKED} positions with several texts, not"
            f" {max(facts.positions)}: it writes who sees whom to memory"
        )
    return ""


def _has_cudnn(compute_capability: str) -> bool:
    """Whether a GPU is NVIDIA's, whose capabilities alone are two numbers, and new enough."""
    numbers = re.fullmatch(r"(\d+)\.(\d+)", compute_capability)
    return numbers is not None and tuple(map(int, numbers.groups())) >= CUDNN_MIN_CAPABILITY


def _no_mosaic(facts: _Facts) -> str:
    if facts.platform not in ("gpu", "cpu"):
        return f"Mosaic attention needs a Hopper GPU, or a CPU to emulate one, not {facts.platform}"
    if facts.sinks:
        return _no_sinks("Mosaic")
    return mosaic.unsupported(
        dtype=facts.dtype,
        head_dim=facts.head_dim,
        soft_cap=facts.soft_cap,
        compute_capability=facts.compute_capability if facts.platform == "gpu" else "9.0",
    )


def _no_splash(facts: _Facts) -> str:
    if facts.shared and max(facts.positions) > splash.MAX_MASKED:
        return (
            f"splash attention takes rows of at most {splash.MAX_MASKED} positions with prompts that several"
            f" completions share, not {max(facts.positions)}"
        )
    if facts.platform not in ("tpu", "cpu"):
        return f"splash attention needs a TPU, or a CPU to emulate one, not {facts.platform}"
    # Its backward pass is traced when the gradient is, outside of the model's default_matmul_precision("highest").
    if facts.platform == "tpu" and facts.dtype != "bfloat16":
        return f"splash attention needs bfloat16, not {facts.dtype}: its backward pass multiplies in bfloat16"
    return ""


# implementation -> what keeps it from running, "" if nothing does
_OBSTACLES: dict[str, Callable[[_Facts], str]] = {
    "xla": _no_xla,
    "chunked": lambda _: "",
    "cudnn": _no_cudnn,
    "mosaic": _no_mosaic,
    "splash": _no_splash,
}
