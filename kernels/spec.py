"""What the log-prob kernels share: the options of the head, the statistics they return, and the checks on their input.

In: static facts about the LM head (`HeadSpec`). Out: `TokenStats`, four float32 numbers per token. Every
implementation is a function `token_stats(hidden_ND, head_VD, targets_N, *, spec) -> TokenStats` in a module of its
own; callers may swap them.

Letters in this folder: N tokens (rows of the scored responses, flattened), D model width, V rows of the head
(vocabulary and its padding). The head is [V, D], the layout of Hugging Face heads and of tied embeddings.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray

DTYPES = ("bfloat16", "float32", "float64")
DEFAULT_WORKSPACE_BYTES = 256 * 2**20
MIN_WORKSPACE_BYTES = 2**20


class TokenStats(NamedTuple):
    """Statistics of one token's distribution over the vocabulary; its log-prob is `target_logit_N - lse_N`.

    All float32 (float64 when given float64). `target_logit_N` and `lse_N` carry gradients, with independent
    cotangents, so log-probs, z-loss and any per-token weighting need no further kernel. The two by-products carry
    none. A target outside [0, vocab_size) has target logit NaN: a loud error instead of a plausible number.
    """

    target_logit_N: Array  # z[target]
    lse_N: Array  # log sum_v exp z[v], natural log
    entropy_N: Array | None  # -sum_v p[v] log p[v] in nats, p = softmax(z); None unless asked for
    is_argmax_N: (
        Array | None
    )  # 1.0 where no logit is above the target's (a tie counts), else 0.0; None unless asked for


@dataclasses.dataclass(frozen=True)
class HeadSpec:
    """How hidden states become logits, and what computing them may cost. Hashable: a static argument under jit.

        z[v] = logit_scale * cap(hidden . head[v]),   cap(x) = softcap * tanh(x / softcap), or x without a softcap

    The cap belongs to the model and comes first; the scale is 1 / sampling temperature.

    Args:
        logit_scale: 1 / temperature, finite and > 0.
        softcap: bound on the magnitude of the raw logits (Gemma-2: 30), > 0; None for none.
        vocab_size: rows of the head that are real tokens, 1 to V; rows beyond are padding, with probability 0 and
            gradient 0. None: all of them.
        compute_dtype: dtype of the operands of every matrix product, one of DTYPES; products always accumulate in
            float32. None: the common dtype of hidden and head. The head is cast block by block, so a float32 master
            head can be multiplied in bfloat16 without a copy, and its gradient is still float32.
        workspace_bytes: bound on what a blocked implementation keeps per block of logits, at least 1 MiB, per device.
        vocab_block: rows of the head per block; the tokens are then cut to fit the budget. None: as many as fit.
        token_shards: devices that the N tokens are spread over, so that the budget is met on each of them.
        want_entropy: return `entropy_N`.
        want_argmax: return `is_argmax_N`.

    Raises:
        ValueError: a value outside its range.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None
    compute_dtype: str | None = None
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES
    vocab_block: int | None = None
    token_shards: int = 1
    want_entropy: bool = False
    want_argmax: bool = False

    def __post_init__(self):
        if not (math.isfinite(self.logit_scale) and self.logit_scale > 0):
            raise ValueError(f"logit_scale={self.logit_scale} is not a finite number > 0; use 1 / temperature")
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"softcap={self.softcap} is not a finite number > 0; use None for a head without a cap")
        if self.compute_dtype is not None and self.compute_dtype not in DTYPES:
            raise ValueError(f"compute_dtype={self.compute_dtype!r} is not supported; use one of {', '.join(DTYPES)}")
        if self.workspace_bytes < MIN_WORKSPACE_BYTES:
            raise ValueError(
                f"workspace_bytes={self.workspace_bytes} is below {MIN_WORKSPACE_BYTES} (1 MiB); "
                f"use at least that, or leave it at {DEFAULT_WORKSPACE_BYTES}"
            )
        for name in ("vocab_size", "vocab_block", "token_shards"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is below 1; use a positive integer")


def operand_dtype(hidden_dtype, head_dtype, spec: HeadSpec) -> np.dtype:
    """Dtype in which hidden and head are multiplied: `spec.compute_dtype`, or the one they share.

    Raises:
        ValueError: the dtypes differ and the spec does not say which to use, or the dtype is not one of DTYPES.
    """
    if spec.compute_dtype is None and hidden_dtype != head_dtype:
        raise ValueError(
            f"hidden is {hidden_dtype} and head is {head_dtype}; set HeadSpec.compute_dtype to the one to multiply in"
        )
    dtype = jnp.dtype(spec.compute_dtype or hidden_dtype)
    if dtype.name not in DTYPES:
        raise ValueError(f"{dtype.name} operands are not supported; cast hidden and head to one of {', '.join(DTYPES)}")
    return dtype


def accumulator_dtype(dtype) -> np.dtype:
    """Dtype of products, logits, softmax and sums: float64 for float64 operands, else float32."""
    return jnp.dtype("float64" if jnp.dtype(dtype) == jnp.float64 else "float32")


def check(hidden_ND: Array, head_VD: Array, targets_N: Array, spec: HeadSpec) -> None:
    """Check the shapes and dtypes that every implementation relies on, before anything is traced.

    Raises:
        ValueError: shapes that do not fit together, non-integer targets, unsupported dtypes, or vocab_size above V.
    """
    if hidden_ND.ndim != 2 or head_VD.ndim != 2 or hidden_ND.shape[1] != head_VD.shape[1]:
        raise ValueError(
            f"hidden {hidden_ND.shape} and head {head_VD.shape} are not [N, D] and [V, D] with the same D; "
            "flatten the tokens and pass the head with one row per vocabulary entry"
        )
    if targets_N.shape != hidden_ND.shape[:1] or not jnp.issubdtype(targets_N.dtype, jnp.integer):
        raise ValueError(
            f"targets are {targets_N.dtype}{list(targets_N.shape)}, not {hidden_ND.shape[0]} integers; "
            "pass one token id per row of hidden"
        )
    if 0 in hidden_ND.shape or 0 in head_VD.shape:
        raise ValueError(
            f"hidden {hidden_ND.shape} or head {head_VD.shape} has an empty axis; pass at least one of each"
        )
    if spec.vocab_size is not None and spec.vocab_size > head_VD.shape[0]:
        raise ValueError(
            f"vocab_size={spec.vocab_size} is above the {head_VD.shape[0]} rows of the head; "
            f"use at most {head_VD.shape[0]}"
        )
    operand_dtype(hidden_ND.dtype, head_VD.dtype, spec)
