"""One attention call for every decoder, and the choice of its implementation.

Queries, keys and values go in, the attended values come out. Rows are right-padded, so causality alone keeps padding
keys from every valid query and no length mask is needed; padding queries return exactly zero. The cuDNN flash kernel
runs on NVIDIA GPUs in 16-bit types, XLA everywhere else; the softmax is float32 in both. Rotary embedding, projections
and caches are the models' business.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from fpo_jax import sharding

IMPLEMENTATIONS = ("xla", "cudnn")
CUDNN_MAX_HEAD_DIM = 128  # what every generation from Ampere on takes; Hopper alone takes 256


class Choice(NamedTuple):
    """What attends, and why, for the log."""

    implementation: str  # one of IMPLEMENTATIONS
    reason: str = ""


def attend(
    q_NTHC: Float[jax.Array, "N T H C"],
    k_NTGC: Float[jax.Array, "N T G C"],
    v_NTGC: Float[jax.Array, "N T G C"],
    *,
    valid_NT: Bool[jax.Array, "N T"],
    scale: float,
    sliding_window: int | None,
    choice: Choice,
    layout: sharding.Layout = sharding.ONE_DEVICE,
) -> Float[jax.Array, "N T H C"]:
    """Attend causally within each row.

        out_i = sum_j softmax_j(scale * q_i . k_j) v_j   over j <= i and, with a window W, j > i - W
        out_i = 0                                        where row position i is padding

    Query head h reads key/value head h // (H / G).

    Args:
        q_NTHC: queries, already rotated.
        k_NTGC: keys, already rotated; G divides H.
        v_NTGC: values.
        valid_NT: True = a real token. Rows are right-padded: no True after a False.
        scale: factor on the logits, usually C**-0.5.
        sliding_window: W, positions a query sees, itself included (Mistral); None = all before it.
        choice: from `choose`.
        layout: where rows and heads live on a mesh.

    Returns:
        [N, T, H, C] in the dtype of the queries; logits and softmax are float32.

    Raises:
        ValueError: unknown implementation.
    """
    if choice.implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention {choice.implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}.")
    reach = q_NTHC.shape[1] if sliding_window is None else sliding_window
    out_NTHC = jax.nn.dot_product_attention(
        q_NTHC,
        k_NTGC,
        v_NTGC,
        scale=scale,
        is_causal=True,
        local_window_size=(reach - 1, 0) if reach < q_NTHC.shape[1] else None,
        implementation=choice.implementation,
    )
    # Every query sees at least itself, so the value under the select is finite and so is its gradient.
    return jnp.where(valid_NT[:, :, None, None], out_NTHC, 0)


def choose(
    requested: str,
    *,
    platform: str,
    dtype: jax.typing.DTypeLike,
    head_dim: int,
    positions: Sequence[int],
    **_,
) -> Choice:
    """Pick the implementation of `attend`; pure, so that a plan for absent hardware gets the same answer."""
    name, odd = jnp.dtype(dtype).name, [length for length in positions if length % 2]
    if platform not in ("gpu", "cuda"):
        obstacle = f"cuDNN attention needs an NVIDIA GPU, not {platform}"
    elif name not in ("bfloat16", "float16"):
        obstacle = f"cuDNN attention needs bfloat16 or float16, not {name}"
    elif head_dim % 8 or head_dim > CUDNN_MAX_HEAD_DIM:
        obstacle = f"cuDNN attention needs a head_dim divisible by 8 and at most {CUDNN_MAX_HEAD_DIM}, not {head_dim}"
    elif odd:
        obstacle = f"cuDNN attention needs rows of an even length to train, not {odd[0]}"
    else:
        obstacle = ""
    if requested == "xla" or (requested == "cudnn" and not obstacle):
        return Choice(requested, "asked for by the configuration")
    if requested == "cudnn":
        raise ValueError(f"{obstacle}; set model.attention to auto or xla.")
    if requested != "auto":
        raise ValueError(f"attention {requested!r} is not one of auto, {', '.join(IMPLEMENTATIONS)}.")
    if obstacle:
        return Choice("xla", obstacle)
    return Choice("cudnn", f"flash attention for {name}, head_dim {head_dim} on a GPU")
