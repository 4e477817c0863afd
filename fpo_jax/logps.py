"""Log-probs of the responses: hidden states, LM head and a batch's scored positions in, one number per row out.

The R scored positions of every row are gathered before the head, so neither prompts nor padding cost a logit, and the
head is applied by a kernel of `kernels/` that never holds [N, R, V]. Which one runs is decided by `choose`, a pure
function; `explain` says in words what would run. What this module does not do: losses, and the reference policy (its
log-probs are this function called with other weights).

Letter beyond `shapes.py`: M = N*R, the scored positions in one row.
"""

import difflib
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from fpo_jax.kernels import chunked, reference
from fpo_jax.kernels import spec as specs
from fpo_jax.shapes import Array

IMPLEMENTATIONS = {"reference": reference.token_stats, "chunked": chunked.token_stats}
OLDEST_JAX = (0, 10, 2)


class ResponseLogps(NamedTuple):
    """Per row, over its scored positions; float32 (float64 when given float64)."""

    sum_N: Array  # log-prob of the response in nats; 0 for a row without a scored position
    count_N: Array  # scored positions
    mean_logit_N: (
        Array | None
    )  # mean over scored positions of the mean raw logit; no gradient; None for a soft-capped head


class HeadShapes(NamedTuple):
    """Logical sizes of one call to the head."""

    tokens: int  # M = N*R scored positions, over all devices
    width: int  # D
    vocab: int  # V, rows of the head


class Choice(NamedTuple):
    """Which implementation computes the log-probs, and why, for the log."""

    implementation: str  # a key of IMPLEMENTATIONS
    reason: str


def response_logps(
    hidden_NTD: Float[Array, "N T D"],
    head_VD: Float[Array, "V D"],
    predictors_NR: Int[Array, "N R"],
    targets_NR: Int[Array, "N R"],
    scored_NR: Bool[Array, "N R"],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    implementation: str = "auto",
    workspace_bytes: int = specs.DEFAULT_WORKSPACE_BYTES,
    token_shards: int = 1,
) -> ResponseLogps:
    """Sum the log-probs of every row's scored targets.

        sum[n] = sum over scored r of log softmax(cap(head . hidden[n, predictors[n, r]]) / temperature)[targets[n, r]]

    The head is multiplied in the dtype of `hidden_NTD`, accumulated in float32, and its gradient comes in its own
    dtype: pass the float32 master head of a bfloat16 model as it is. Positions that are not scored give exactly zero
    to value and gradient, whatever their hidden state holds, NaN included.

    Args:
        hidden_NTD: final hidden states, after the last norm.
        head_VD: LM head (or tied embedding), one row per vocabulary entry.
        predictors_NR: position whose hidden state predicts the target, in [0, T); any value in range where not scored.
        targets_NR: token ids in [0, vocab_size); any value where not scored. A scored target outside gives NaN.
        scored_NR: True = counts.
        temperature: sampling temperature that divides the logits, > 0.
        softcap: cap of the model's head, before the temperature; None for none.
        vocab_size: real rows of the head; rows beyond are padding with probability 0. None: all V.
        implementation: "auto", or a key of IMPLEMENTATIONS. "auto" asks jax for its default backend; where the
            program is compiled for another platform than the one it is traced on, resolve it with `choose` and pass
            the result.
        workspace_bytes: memory for one block of logits, per device, at least 1 MiB. The dense reference has no blocks.
        token_shards: devices that the N rows are spread over.

    Returns:
        ResponseLogps, each field of shape [N].

    Raises:
        ValueError: an option or a shape outside its range; an unknown implementation.

    >>> import numpy as np
    >>> hidden_NTD = np.ones((1, 3, 1), np.float32)  # the same at each of 3 tokens; logits log 1 and log 3
    >>> head_VD = np.log(np.array([[1.0], [3.0]], np.float32))
    >>> predictors_NR, targets_NR = np.array([[0, 1, 0]]), np.array([[1, 0, 0]])
    >>> scored_NR = np.array([[True, True, False]])
    >>> logps = response_logps(hidden_NTD, head_VD, predictors_NR, targets_NR, scored_NR)
    >>> print(f"{logps.sum_N[0]:.4f}, {logps.count_N[0]:.0f} tokens")  # log 3/4 + log 1/4
    -1.6740, 2 tokens
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} is not > 0; use 1.0 for the model's own distribution")
    N, R = targets_NR.shape
    V, D = head_VD.shape
    implementation, _ = choose(
        platform=jax.default_backend(),
        jax_version=jax.__version__,
        shapes=HeadShapes(N * R, D, V),
        dtype=hidden_NTD.dtype,
        requested=implementation,
    )
    spec = specs.HeadSpec(
        logit_scale=1.0 / temperature,
        softcap=softcap,
        vocab_size=vocab_size,
        compute_dtype=jnp.dtype(hidden_NTD.dtype).name,
        workspace_bytes=workspace_bytes,
        token_shards=token_shards,
    )
    with jax.named_scope("response_logps"):
        hidden_NRD = jnp.take_along_axis(jnp.asarray(hidden_NTD), predictors_NR[:, :, None], axis=1)
        hidden_NRD = jnp.where(scored_NR[:, :, None], hidden_NRD, 0)  # before the head: 0 * NaN is NaN in its gradient
        safe_targets_NR = jnp.where(scored_NR, targets_NR, 0)
        stats = IMPLEMENTATIONS[implementation](
            hidden_NRD.reshape(N * R, D), head_VD, safe_targets_NR.reshape(N * R), spec=spec
        )
        logps_NR = (stats.target_logit_N - stats.lse_N).reshape(N, R)
        sum_N = jnp.sum(jnp.where(scored_NR, logps_NR, 0), axis=1)
        count_N = jnp.sum(scored_NR, axis=1, dtype=sum_N.dtype)
        if softcap is None:
            mean_logit_N = _mean_logit(hidden_NRD, head_VD[:vocab_size], count_N)
        else:
            mean_logit_N = None
    return ResponseLogps(sum_N, count_N, mean_logit_N)


def choose(*, platform: str, jax_version: str, shapes: HeadShapes, dtype, requested: str) -> Choice:
    """Choose the implementation of the head for a platform and shapes. Pure: queries no device.

    Args:
        platform: "cpu", "gpu" or "tpu", as `jax.default_backend()` says it.
        jax_version: as `jax.__version__` says it.
        shapes: sizes of the call.
        dtype: of the hidden states, in which the head is multiplied.
        requested: "auto", or a key of IMPLEMENTATIONS, which is then chosen or refused, never replaced.

    Returns:
        Choice(implementation, reason).

    Raises:
        ValueError: unknown name, unsupported dtype or jax version.

    >>> choose(platform="cpu", jax_version="0.10.2", shapes=HeadShapes(64, 8, 99), dtype="float32", requested="auto")
    Choice(implementation='chunked', reason='auto on cpu: XLA vocabulary blocks, which run everywhere')
    """
    if requested != "auto" and requested not in IMPLEMENTATIONS:
        names = ["auto", *IMPLEMENTATIONS]
        nearest = difflib.get_close_matches(requested, names, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"implementation {requested!r} is unknown; use one of {', '.join(names)}{hint}")
    if jnp.dtype(dtype).name not in specs.DTYPES:
        raise ValueError(
            f"hidden states in {jnp.dtype(dtype).name} are not supported; "
            f"compute the model in one of {', '.join(specs.DTYPES)}"
        )
    if _version(jax_version) < OLDEST_JAX:
        oldest = ".".join(map(str, OLDEST_JAX))
        raise ValueError(f"jax {jax_version} is below {oldest}, the oldest tested; install jax>={oldest}")
    if requested == "auto":
        return Choice("chunked", f"auto on {platform}: XLA vocabulary blocks, which run everywhere")
    if requested == "reference":
        dense = shapes.tokens * shapes.vocab * specs.accumulator_dtype(dtype).itemsize
        return Choice(
            "reference", f"requested: holds {_mib(dense)} of logits ({shapes.tokens} tokens x {shapes.vocab} entries)"
        )
    return Choice(requested, "requested")


def explain(
    *,
    platform: str,
    jax_version: str,
    shapes: HeadShapes,
    dtype,
    requested: str = "auto",
    vocab_size: int | None = None,
    workspace_bytes: int = specs.DEFAULT_WORKSPACE_BYTES,
    token_shards: int = 1,
) -> str:
    """Say what `response_logps` would run: implementation, reason, blocks and workspace, against the dense logits.

    Args:
        platform: as for `choose`.
        jax_version: as for `choose`.
        shapes: as for `choose`.
        dtype: as for `choose`.
        requested: as for `choose`.
        vocab_size: real rows of the head; None: all.
        workspace_bytes: memory for one block of logits, per device.
        token_shards: devices that the tokens are spread over.

    Returns:
        One line per fact.

    Raises:
        ValueError: as `choose` and `response_logps`.

    >>> print(explain(platform="gpu", jax_version="0.10.2", shapes=HeadShapes(8192, 4096, 128256), dtype="bfloat16"))
    log-probs: chunked (auto on gpu: XLA vocabulary blocks, which run everywhere)
    8192 tokens x 128256 vocabulary entries x 4096 wide, bfloat16 operands, float32 accumulation
    24 blocks of 5376 head rows x 1 of 8192 tokens per device: 252.0 MiB of workspace (limit 256.0 MiB)
    dense float32 logits, which are never held: 4008.0 MiB
    """
    choice = choose(platform=platform, jax_version=jax_version, shapes=shapes, dtype=dtype, requested=requested)
    spec = specs.HeadSpec(vocab_size=vocab_size, workspace_bytes=workspace_bytes, token_shards=token_shards)
    accumulator = specs.accumulator_dtype(dtype)
    dense = _mib(shapes.tokens * shapes.vocab * accumulator.itemsize)
    lines = [
        f"log-probs: {choice.implementation} ({choice.reason})",
        f"{shapes.tokens} tokens x {shapes.vocab} vocabulary entries x {shapes.width} wide, "
        f"{jnp.dtype(dtype).name} operands, {accumulator.name} accumulation",
    ]
    if choice.implementation == "chunked":
        blocks = chunked.plan_blocks(shapes.tokens, shapes.vocab, dtype, spec=spec)
        lines += [
            f"{blocks.vocab_count} blocks of {blocks.vocab} head rows x {blocks.token_count} of {blocks.tokens} tokens "
            f"per device: {_mib(blocks.workspace_bytes)} of workspace (limit {_mib(workspace_bytes)})",
            f"dense {accumulator.name} logits, which are never held: {dense}",
        ]
    else:
        lines.append(f"dense {accumulator.name} logits, held in full: {dense}")
    return "\n".join(lines)


def _mean_logit(hidden_NRD, head_VD, count_N):
    """Mean raw logit over the vocabulary and the scored positions, by linearity, without logits.

    mean_r mean_v hidden[r] . head[v] = (mean_r hidden[r]) . (mean_v head[v]); rows without a scored position give 0.
    """
    hidden_NRD, head_VD = jax.lax.stop_gradient((hidden_NRD, jnp.asarray(head_VD)))
    mean_head_D = jnp.mean(head_VD, axis=0, dtype=count_N.dtype)
    mean_hidden_ND = jnp.sum(hidden_NRD, axis=1, dtype=count_N.dtype) / jnp.maximum(count_N, 1)[:, None]
    return jnp.einsum("ND,D->N", mean_hidden_ND, mean_head_D, precision=jax.lax.Precision.HIGHEST)


def _version(text):
    """(major, minor, patch) of a version such as 0.10.2, 0.12.0.1 or 0.13.0rc1."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


def _mib(count):
    """Bytes as text."""
    return f"{count / 2**20:.1f} MiB"
