"""Which implementation of attention runs, and why: settled once, before anything is compiled.

Static facts about the model, the rows and the hardware go in, a `Choice` comes out. Nothing here asks a device, so that
a plan for absent hardware gets the same answer.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fpo_jax import sharding

IMPLEMENTATIONS = ("xla", "cudnn")
CUDNN_MAX_HEAD_DIM = 128  # what every generation from Ampere on takes; Hopper alone takes 256


class Choice(NamedTuple):
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
    segments: bool


def choose(
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
    segments: bool,
    layout: sharding.Layout,
) -> Choice:
    """Pick the implementation of `attend`; one choice holds for rows of every length.

    Args:
        requested: "auto" or one of IMPLEMENTATIONS.
        platform: where the program will run, as a device names it: "cpu", "gpu", "cuda" or "tpu".
        dtype: compute dtype of queries, keys and values.
        head_dim: C.
        heads: H.
        kv_heads: G.
        positions: every padded row length T that will be compiled.
        sliding_window: positions a query sees, itself included; None = all before it.
        soft_cap: bound on the magnitude of the logits; None for none.
        segments: whether rows hold several segments.
        layout: where activations live on a mesh.

    Raises:
        ValueError: unknown request, or one that cannot run.

    >>> facts = {"head_dim": 64, "heads": 8, "kv_heads": 8, "positions": [512], "sliding_window": None}
    >>> facts.update(soft_cap=None, segments=False, layout=sharding.Layout())
    >>> choose("auto", platform="gpu", dtype="float32", **facts).reason
    'cuDNN attention needs bfloat16 or float16, not float32'
    """
    if requested not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"attention {requested!r} is not one of auto, {', '.join(IMPLEMENTATIONS)}.")
    platform = "gpu" if platform == "cuda" else platform
    facts = _Facts(platform, jnp.dtype(dtype).name, head_dim, positions, soft_cap, segments)
    if requested != "auto":
        obstacle = _OBSTACLES[requested](facts)
        if obstacle:
            raise ValueError(f"{obstacle}; set model.attention to auto or xla.")
        return Choice(requested, "asked for by the configuration")
    obstacle = _OBSTACLES["cudnn"](facts)
    if not obstacle:
        return Choice("cudnn", f"flash attention for {facts.dtype}, head_dim {head_dim} on a GPU")
    return Choice("xla", obstacle)


def _no_xla(facts: _Facts) -> str | None:
    if facts.soft_cap is not None:
        return f"XLA attention has no soft-cap, and the model has one of {facts.soft_cap}"
    return None


def _no_cudnn(facts: _Facts) -> str | None:
    if facts.platform != "gpu":
        return f"cuDNN attention needs an NVIDIA GPU, not {facts.platform}"
    if facts.dtype not in ("bfloat16", "float16"):
        return f"cuDNN attention needs bfloat16 or float16, not {facts.dtype}"
    if facts.head_dim % 8 or facts.head_dim > CUDNN_MAX_HEAD_DIM:
        return f"cuDNN attention needs a head_dim divisible by 8 and at most {CUDNN_MAX_HEAD_DIM}, not {facts.head_dim}"
    odd = [length for length in facts.positions if length % 2]
    if odd:
        return f"cuDNN attention needs rows of an even length to train, not {odd[0]}"
    if facts.soft_cap is not None:
        return f"cuDNN attention has no soft-cap, and the model has one of {facts.soft_cap}"
    if facts.segments:
        return "cuDNN attention takes no segment ids"
    return None


# implementation -> what keeps it from running, None if nothing does
_OBSTACLES: dict[str, Callable[[_Facts], str | None]] = {"xla": _no_xla, "cudnn": _no_cudnn}
