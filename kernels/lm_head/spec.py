"""What the log-prob kernels share: the options of the head, the statistics they return, and the checks on their input.

In: static facts about the LM head (`HeadSpec`). Out: `TokenStats`, four float32 numbers per token. Every
implementation is a function `token_stats(hidden_ND, head_VD, targets_N, *, spec) -> TokenStats` in a module of its
own; callers may swap them.

Letters in this folder: N tokens (rows of the scored completions, flattened), D model width, V rows of the head
(vocabulary and its padding). The head is [V, D], the layout of Hugging Face heads and of tied embeddings.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

Array = jax.Array | np.ndarray

DTYPES = ("bfloat16", "float32", "float64")
DEFAULT_WORKSPACE_BYTES = 192 * 2**20
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
    # 1.0 where no logit is above the target's (a tie counts), else 0.0; None unless asked for
    is_argmax_N: Array | None


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where hidden and head live on a mesh of devices. Logical shapes stay [N, D] and [V, D].

    Args:
        mesh: all its axes are used; the operands are replicated over those not named here.
        tokens: axes that the N tokens are cut over (data parallelism), in order.
        vocab: axis that the V rows of the head are cut over (tensor parallelism); None for none. Not one of `tokens`.
        width: axes that the D columns of the head are cut over (FSDP), in order; all of them in `tokens`.

    Raises:
        ValueError: axes that the mesh does not have, or that cannot be combined.
    """

    mesh: Mesh
    tokens: tuple[str, ...]
    vocab: str | None = None
    width: tuple[str, ...] = ()

    def __post_init__(self):
        for axis in (*self.tokens, self.vocab, *self.width):
            if axis is not None and axis not in self.mesh.shape:
                raise ValueError(f"mesh axis {axis!r} does not exist; use one of {', '.join(self.mesh.shape)}")
        if self.vocab is not None and self.vocab in self.tokens:
            raise ValueError(
                f"mesh axis {self.vocab!r} cuts both tokens and vocabulary, so that no device could score a token"
                " against all entries; use an axis of its own for the vocabulary"
            )
        if not set(self.width) <= set(self.tokens):
            raise ValueError(
                f"mesh axes {self.width} cut the width of the head and not all of them the tokens {self.tokens}; their"
                " devices would repeat each other's work: add them to tokens, or use ()"
            )


class Axes(NamedTuple):
    """The axes of a Placement that more than one device lies along; None for vocab where there is none, else ()."""

    tokens: tuple[str, ...]
    vocab: str | None
    width: tuple[str, ...]


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
            On one device, `chunked` keeps the whole plane from the forward to the backward pass where it fits.
        kept_bytes: bound on a whole plane of logits that is kept from the forward to the backward pass, with what the
            backward pass needs beside it, per device: two products less, on any mesh, for any implementation but the
            reference. 0: the logits are always computed again. None: as `workspace_bytes` says.
        vocab_block: rows of the head per block; the tokens are then cut to fit the budget. None: as many as fit.
        placement: where tokens and head live on a mesh; None for one device, or to leave the partitioning to XLA,
            which it can do for `chunked` alone.
        interpret: emulate a Pallas kernel on the CPU. Slow; for tests.
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
    kept_bytes: int | None = None
    vocab_block: int | None = None
    placement: Placement | None = None
    interpret: bool = False
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
        if self.kept_bytes is not None and self.kept_bytes < 0:
            raise ValueError(f"kept_bytes={self.kept_bytes} is below 0; use 0 to keep no logits")
        for name in ("vocab_size", "vocab_block"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is below 1; use a positive integer")


def axes(spec: HeadSpec) -> Axes:
    """Return the axes of the placement that cut something."""
    if spec.placement is None:
        return Axes((), None, ())
    place, sizes = spec.placement, spec.placement.mesh.shape
    tokens, width = (tuple(axis for axis in axes if sizes[axis] > 1) for axes in (place.tokens, place.width))
    return Axes(tokens, place.vocab if place.vocab and sizes[place.vocab] > 1 else None, width)


def mesh_or_rest(mesh: Mesh) -> dict[str, Any]:
    """Return the arguments of `jax.shard_map` that say where: the mesh, or inside another one the axes that it left."""
    taken = jax.sharding.get_abstract_mesh().manual_axes
    return {"axis_names": set(mesh.axis_names) - set(taken)} if taken else {"mesh": mesh}


def shards(spec: HeadSpec, axis: str | tuple[str, ...] | None) -> int:
    """Return how many parts the named axes of the placement cut an array dimension into."""
    names = () if axis is None else (axis,) if isinstance(axis, str) else axis
    return math.prod(spec.placement.mesh.shape[name] for name in names) if spec.placement else 1


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


def product(left: Array, right: Array, left_axis: int, right_axis: int) -> jax.Array:
    """Return the matrix product over one axis of each, accumulated in float32 (float64 for float64).

    Precision is explicit: by default a TPU multiplies float32 in bfloat16 passes, and a GPU in TF32.
    """
    return jax.lax.dot_general(
        left,
        right,
        (((left_axis,), (right_axis,)), ((), ())),
        precision=jax.lax.Precision.DEFAULT if left.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST,
        preferred_element_type=accumulator_dtype(left.dtype),
    )


def cap(raw: Array, spec: HeadSpec) -> tuple[Array, Array | float]:
    """Return the logits z of raw products, and dz/draw."""
    if spec.softcap is None:
        return spec.logit_scale * raw, spec.logit_scale
    tanh = jnp.tanh(raw / spec.softcap)
    return spec.logit_scale * spec.softcap * tanh, spec.logit_scale * (1 - tanh * tanh)


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
    cut = axes(spec)
    for what, size, axis in (
        ("tokens", hidden_ND.shape[0], cut.tokens),
        ("rows of the head", head_VD.shape[0], cut.vocab),
        ("columns of the head", head_VD.shape[1], cut.width),
    ):
        if size % shards(spec, axis):
            raise ValueError(
                f"{size} {what} are not divisible by the {shards(spec, axis)} devices along {axis!r}; "
                f"use a multiple of {shards(spec, axis)}"
            )
    operand_dtype(hidden_ND.dtype, head_VD.dtype, spec)
