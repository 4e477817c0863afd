"""Log-probs of the responses: hidden states, LM head and a batch's scored positions in, one number per row out.

The R scored positions of every row are gathered before the head, so neither prompts nor padding cost a logit, and the
head is applied by a kernel of `kernels/` that never holds [N, R, V]. `response_losses` goes one step further, to the
losses of the groups, in one kernel where there is one. Which kernel runs is decided by `choose`, a pure function;
`explain` says in words what would run. What this module does not do: losses of its own, and the reference policy (its
log-probs are this function called with other weights).

Letter beyond `shapes.py`: M = N*R, the scored positions in one row.
"""

import difflib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from fpo_jax.kernels import blocks, chunked, head_loss, pallas_gpu, pallas_tpu, pallas_tpu_loss, reference
from fpo_jax.kernels import spec as specs
from fpo_jax.shapes import Array

IMPLEMENTATIONS = {
    "reference": reference.token_stats,
    "chunked": chunked.token_stats,
    "pallas_tpu": pallas_tpu.token_stats,
    "pallas_tpu_lean": pallas_tpu.lean_token_stats,
    "pallas_gpu": pallas_gpu.token_stats,
}
PLATFORMS = {"pallas_tpu": "tpu", "pallas_tpu_lean": "tpu", "pallas_gpu": "gpu"}  # the others run everywhere
FUSE_LOSS = ("auto", "on", "off")
OLDEST_JAX = (0, 10, 2)
TPU_KINDS = ("TPU v5", "TPU v6", "TPU7")  # beginnings of `device_kind` with 64 MiB of VMEM or more
TWO_CORES = ("TPU v5", "TPU v5p")  # one device, two TensorCores


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


class Target(NamedTuple):
    """What a program is compiled for, as its devices say it."""

    platform: str  # "cpu", "gpu" or "tpu"
    device_kind: str = ""  # "TPU v5 lite", "NVIDIA H200"
    compute_capability: str = ""  # "9.0" on a Hopper GPU

    @staticmethod
    def of(device: Any) -> "Target":
        """Describe a device, present or not."""
        platform = "gpu" if device.platform in ("gpu", "cuda", "rocm") else device.platform
        return Target(platform, device.device_kind, str(getattr(device, "compute_capability", "")))


class Choice(NamedTuple):
    """What computes the log-probs, and why, for the log."""

    implementation: str  # a key of IMPLEMENTATIONS
    fuse_loss: bool  # the loss of the groups runs in the same kernel
    interpret: bool  # the kernel is emulated
    reason: str


def response_logps(
    hidden_NTD: Float[Array, "N T D"],
    head_VD: Float[Array, "V D"],
    predictors_NR: Int[Array, "N R"],
    targets_NR: Int[Array, "N R"],
    scored_NR: Bool[Array, "N R"],
    *,
    slots_NR: Int[Array, "N R"] | None = None,
    slots: int = 1,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    implementation: str = "auto",
    interpret: bool = False,
    workspace_bytes: int = specs.DEFAULT_WORKSPACE_BYTES,
    placement: specs.Placement | None = None,
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
        slots_NR: of rows that hold several responses: which of them a position belongs to, in [0, slots); None: a row
            is one.
        slots: responses that a row has places for.
        temperature: sampling temperature that divides the logits, > 0.
        softcap: cap of the model's head, before the temperature; None for none.
        vocab_size: real rows of the head; rows beyond are padding with probability 0. None: all V.
        implementation: "auto", or a key of IMPLEMENTATIONS. "auto" asks jax for its first device; where the program is
            compiled for another one, settle it with `choose` and pass the result.
        interpret: emulate a Pallas kernel on the CPU; slow, for tests.
        workspace_bytes: memory for one block of logits, per device, at least 1 MiB; where all of them fit on one
            device, "chunked" keeps them for the backward pass. The dense reference has no blocks.
        placement: where rows and head live on a mesh; None for one device.

    Returns:
        ResponseLogps, each field of shape [N], with slots [N * slots], those of a row next to each other.

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
    if implementation == "auto":
        shapes = HeadShapes(targets_NR.size, head_VD.shape[1], head_VD.shape[0])
        target = Target.of(jax.devices()[0])
        implementation = choose(
            target=target, shapes=shapes, dtype=hidden_NTD.dtype, head_dtype=head_VD.dtype, placement=placement
        ).implementation
    spec = _spec(hidden_NTD, temperature, softcap, vocab_size, interpret, workspace_bytes, placement)
    with jax.named_scope("response_logps"):
        hidden_MD, targets_M, scored_M = _scored(hidden_NTD, predictors_NR, targets_NR, scored_NR)
        stats = _implementation(implementation)(hidden_MD, head_VD, targets_M, spec=spec)
        logps_M = jnp.where(scored_M, stats.target_logit_N - stats.lse_N, 0)
        sum_N = sum_slots(logps_M.reshape(scored_NR.shape), slots_NR, slots=slots).reshape(-1)
        return _response(sum_N, hidden_MD, head_VD, scored_NR, spec, slots_NR, slots)


def response_losses(
    hidden_NTD: Float[Array, "N T D"],
    head_VD: Float[Array, "V D"],
    predictors_NR: Int[Array, "N R"],
    targets_NR: Int[Array, "N R"],
    scored_NR: Bool[Array, "N R"],
    operands: head_loss.Operands,
    *,
    group_loss: head_loss.GroupLoss,
    groups: tuple[int, int],
    slots_NR: Int[Array, "N R"] | None = None,
    implementation: str,
    fuse_loss: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    interpret: bool = False,
    workspace_bytes: int = specs.DEFAULT_WORKSPACE_BYTES,
    placement: specs.Placement | None = None,
) -> tuple[Array, ResponseLogps]:
    """Return the losses of B groups of K rows, and the log-probs they come from; both carry gradients.

    Args, beyond those of `response_logps`:
        operands: what else the group loss reads, [B, K] arrays and scalars, without gradient.
        group_loss: (logps_BK, operands) -> losses_B, such as `Loss.of_logps`.
        groups: (B, K), N = B*K; with slots B*K = N * slots.
        implementation: a key of IMPLEMENTATIONS.
        fuse_loss: run the group loss in the kernel of the log-probs; "pallas_tpu" alone can.

    Raises:
        ValueError: as `response_logps`; fuse_loss with an implementation that cannot, or with slots.
    """
    if fuse_loss and slots_NR is not None:
        raise ValueError("fuse_loss with slots_NR: the kernel of the loss reads one candidate a row; set it False")
    if fuse_loss and implementation != "pallas_tpu":
        raise ValueError(
            f"fuse_loss with implementation {implementation!r}: only 'pallas_tpu' runs the loss in its kernel"
        )
    spec = _spec(hidden_NTD, temperature, softcap, vocab_size, interpret, workspace_bytes, placement)
    slots = groups[0] * groups[1] // len(scored_NR)
    with jax.named_scope("response_losses"):
        hidden_MD, targets_M, scored_M = _scored(hidden_NTD, predictors_NR, targets_NR, scored_NR)
        inputs = (hidden_MD, head_VD, targets_M, scored_M, operands)
        if fuse_loss:
            out = pallas_tpu_loss.fused_head_loss(*inputs, group_loss=group_loss, groups=groups, spec=spec)
        else:
            token_stats = _implementation(implementation)

            def candidate_sums(logps_M):
                return sum_slots(logps_M.reshape(scored_NR.shape), slots_NR, slots=slots).reshape(groups)

            out = head_loss.fpo_head_loss(
                *inputs,
                group_loss=group_loss,
                groups=groups,
                spec=spec,
                token_stats=token_stats,
                candidate_sums=None if slots_NR is None else candidate_sums,
            )
        return out.losses_B, _response(out.logps_BK.reshape(-1), hidden_MD, head_VD, scored_NR, spec, slots_NR, slots)


def sum_slots(values_NR: jax.Array, slots_NR: Array | None, *, slots: int) -> jax.Array:
    """Sum values over the positions of every response in a row: [..., N, slots]; without slots over the row.

    >>> sum_slots(jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[0, 1, 1]]), slots=3).tolist()
    [[1.0, 6.0, 0.0]]
    """
    if slots_NR is None:
        return jnp.sum(values_NR, axis=-1, keepdims=True)
    mine_NRP = slots_NR[..., None] == jnp.arange(slots)
    return jnp.sum(jnp.where(mine_NRP, values_NR[..., None], 0), axis=-2)


def choose(
    *,
    target: Target,
    shapes: HeadShapes,
    dtype,
    head_dtype=None,
    requested: str = "auto",
    fuse_loss: str = "auto",
    placement: specs.Placement | None = None,
    slotted: bool = False,
    jax_version: str = jax.__version__,
) -> Choice:
    """Choose the implementation of the head for a target and shapes. Pure: queries no device.

    Args:
        target: what the program is compiled for.
        shapes: sizes of the call.
        dtype: of the hidden states, in which the head is multiplied.
        head_dtype: of the head in memory; None: the same.
        requested: "auto", or a key of IMPLEMENTATIONS, which is then chosen or refused, never replaced.
        fuse_loss: "auto", "on" or "off"; "on" is refused where it cannot be.
        placement: where rows and head live on a mesh.
        slotted: rows hold several candidates.
        jax_version: as `jax.__version__` says it.

    Returns:
        Choice.

    Raises:
        ValueError: unknown name, unsupported dtype or jax version, a request that cannot run on the target.

    >>> choose(target=Target("cpu"), shapes=HeadShapes(64, 8, 99), dtype="float32").reason
    'auto on cpu: XLA vocabulary blocks, which run everywhere'
    """
    _check_request(requested, fuse_loss, dtype, jax_version)
    cuts = specs.axes(specs.HeadSpec(placement=placement))
    rows = shapes.vocab // specs.shards(specs.HeadSpec(placement=placement), cuts.vocab)
    on_device = shapes._replace(vocab=rows)
    options = {"target": target, "shapes": on_device, "dtype": dtype, "head_dtype": head_dtype or dtype}
    if requested == "auto":
        implementation = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}.get(target.platform, "chunked")
        obstacle = _obstacle(implementation, **options, jax_version=jax_version)
        if implementation == "chunked":
            reason = f"auto on {target.platform}: XLA vocabulary blocks, which run everywhere"
        elif obstacle:
            implementation, reason = "chunked", f"auto on {target.platform}: XLA vocabulary blocks, because {obstacle}"
        else:
            reason = f"auto on {target.device_kind or target.platform}: fused kernel"
    else:
        implementation, reason = requested, "requested"
        obstacle = _obstacle(implementation, **options, jax_version=jax_version)
        if obstacle:
            raise ValueError(f"implementation {requested!r} cannot run: {obstacle}; use 'auto' or 'chunked'")
        if requested == "reference":
            dense = shapes.tokens * shapes.vocab * specs.accumulator_dtype(dtype).itemsize
            reason += f": holds {_mib(dense)} of logits ({shapes.tokens} tokens x {shapes.vocab} entries)"
    interpret = target.platform == "cpu" and implementation in PLATFORMS
    if interpret:
        reason += ", emulated on the CPU: for tests, very slow"
    fused, fused_reason = _choose_fused(implementation, fuse_loss, target, cuts, slotted)
    return Choice(implementation, fused, interpret, f"{reason}; {fused_reason}" if fused_reason else reason)


def _check_request(requested, fuse_loss, dtype, jax_version) -> None:
    """Raise ValueError for a name, dtype or version that does not exist here."""
    if requested != "auto":
        _implementation(requested)
    if fuse_loss not in FUSE_LOSS:
        raise ValueError(f"fuse_loss={fuse_loss!r} is unknown; use one of {', '.join(FUSE_LOSS)}")
    if jnp.dtype(dtype).name not in specs.DTYPES:
        raise ValueError(
            f"hidden states in {jnp.dtype(dtype).name} are not supported; "
            f"compute the model in one of {', '.join(specs.DTYPES)}"
        )
    if _version(jax_version) < OLDEST_JAX:
        oldest = ".".join(map(str, OLDEST_JAX))
        raise ValueError(f"jax {jax_version} is below {oldest}, the oldest tested; install jax>={oldest}")


def _implementation(name: str):
    """Look up an implementation."""
    if name not in IMPLEMENTATIONS:
        names = ["auto", *IMPLEMENTATIONS]
        nearest = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"implementation {name!r} is unknown; use one of {', '.join(names)}{hint}")
    return IMPLEMENTATIONS[name]


def _obstacle(implementation: str, *, target: Target, shapes: HeadShapes, dtype, head_dtype, jax_version: str) -> str:
    """Say why an implementation cannot run on a target; "" where it can."""
    needs = PLATFORMS.get(implementation)
    if needs and target.platform not in (needs, "cpu"):
        return f"it runs on a {needs.upper()}, and this is a {target.platform.upper()}"
    if needs == "tpu":
        if target.platform == "tpu" and not target.device_kind.startswith(TPU_KINDS):
            return f"{target.device_kind or 'this TPU'} is not one of v5e, v5p, v6e, v7x"
        lean = implementation == "pallas_tpu_lean"
        return pallas_tpu.unsupported(width=shapes.width, head_dtype=head_dtype, dtype=dtype, backward=lean)
    if needs == "gpu":
        if _version(jax_version) < (0, 11):
            return f"jax {jax_version} is below 0.11, which the GPU kernels need"
        return pallas_gpu.unsupported(
            width=shapes.width,
            rows=shapes.vocab,
            dtype=dtype,
            compute_capability=target.compute_capability if target.platform == "gpu" else "9.0",
        )
    return ""


def _choose_fused(
    implementation: str, fuse_loss: str, target: Target, cuts: specs.Axes, slotted: bool
) -> tuple[bool, str]:
    """Whether the loss runs in the kernel, and the reason where there is something to say."""
    cut = cuts.vocab or cuts.width
    if fuse_loss == "off":
        return False, "loss apart, as requested"
    if implementation != "pallas_tpu":
        obstacle = f"{implementation} has no kernel for it" if fuse_loss == "on" else ""
    elif slotted:
        obstacle = "rows hold several candidates"
    elif cut:
        obstacle = f"the head is cut along mesh axis {cut!r}"
    elif fuse_loss == "auto" and target.device_kind in TWO_CORES:
        obstacle = "it would use one of the chip's two TensorCores"
    else:
        return True, "loss in the same kernel"
    if fuse_loss == "on":
        raise ValueError(f"fuse_loss='on' cannot be: {obstacle}; use 'auto' or 'off'")
    return False, f"loss apart: {obstacle}" if obstacle else ""


def explain(
    *,
    vocab_size: int | None = None,
    workspace_bytes: int = specs.DEFAULT_WORKSPACE_BYTES,
    placement: specs.Placement | None = None,
    **choice,
) -> str:
    """Say what would run: implementation, reason, blocks and workspace, against the dense logits.

    Args:
        vocab_size: real rows of the head; None: all.
        workspace_bytes: memory for one block of logits, per device.
        placement: as for `choose`.
        choice: the other arguments of `choose`.

    Returns:
        One line per fact.

    Raises:
        ValueError: as `choose` and `response_logps`.

    >>> print(explain(target=Target("tpu", "TPU v5"), shapes=HeadShapes(8192, 4096, 128256), dtype="bfloat16"))
    log-probs: pallas_tpu (auto on TPU v5: fused kernel; loss apart: it would use one of the chip's two TensorCores)
    8192 tokens x 128256 vocabulary entries x 4096 wide, bfloat16 operands, float32 accumulation
    forward: one kernel, logits on the chip only
    backward: 32 blocks of 4096 head rows x 1 of 8192 tokens per device, 192.0 MiB of workspace (limit 192.0 MiB)
    dense float32 logits, which are never held: 4008.0 MiB per device
    """
    chosen = choose(placement=placement, **choice)
    shapes, dtype = choice["shapes"], choice["dtype"]
    spec = specs.HeadSpec(vocab_size=vocab_size, workspace_bytes=workspace_bytes, placement=placement)
    accumulator, cuts = specs.accumulator_dtype(dtype), specs.axes(spec)
    tokens = shapes.tokens // specs.shards(spec, cuts.tokens)
    rows = shapes.vocab // specs.shards(spec, cuts.vocab) if cuts.vocab else vocab_size or shapes.vocab
    dense = f"{_mib(tokens * rows * accumulator.itemsize)} per device"
    lines = [
        f"log-probs: {chosen.implementation} ({chosen.reason})",
        f"{shapes.tokens} tokens x {shapes.vocab} vocabulary entries x {shapes.width} wide, "
        f"{jnp.dtype(dtype).name} operands, {accumulator.name} accumulation",
    ]
    if chosen.implementation == "reference":
        return "\n".join([*lines, f"dense {accumulator.name} logits, held in full: {dense}"])
    head_dtype = choice.get("head_dtype") or dtype
    engine = ENGINES[chosen.implementation]
    plans = {
        "forward": engine.plan_forward(tokens, rows, head_dtype, dtype, spec=spec),
        "backward": engine.plan_backward(tokens, rows, head_dtype, dtype, spec=spec),
    }
    kept = engine.plan_kept(tokens, shapes.vocab, shapes.width, head_dtype, dtype, spec=spec)
    if kept:
        plans = {"forward alone": plans["forward"]}
    for name, plan in plans.items():
        if plan.workspace_bytes:
            lines.append(
                f"{name}: {plan.vocab_count} blocks of {plan.vocab} head rows x {plan.token_count} of {plan.tokens} "
                f"tokens per device, {_mib(plan.workspace_bytes)} of workspace (limit {_mib(workspace_bytes)})"
            )
        else:
            lines.append(f"{name}: one kernel, logits on the chip only")
    if kept:
        lines.append(
            f"forward and backward: all logits at once, kept between them, {_mib(kept.workspace_bytes)} of workspace "
            f"(limit {_mib(workspace_bytes)})"
        )
    held = "" if kept else ", which are never held"
    return "\n".join([*lines, f"dense {accumulator.name} logits{held}: {dense}"])


ENGINES: dict[str, blocks.Engine] = {
    "chunked": chunked.ENGINE,
    "pallas_tpu": pallas_tpu.ENGINE,
    "pallas_tpu_lean": pallas_tpu.LEAN_ENGINE,
    "pallas_gpu": pallas_gpu.ENGINE,
}


def _spec(hidden_NTD, temperature, softcap, vocab_size, interpret, workspace_bytes, placement) -> specs.HeadSpec:
    """Options of the head, for the kernels."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} is not > 0; use 1.0 for the model's own distribution")
    return specs.HeadSpec(
        logit_scale=1.0 / temperature,
        softcap=softcap,
        vocab_size=vocab_size,
        compute_dtype=jnp.dtype(hidden_NTD.dtype).name,
        workspace_bytes=workspace_bytes,
        placement=placement,
        interpret=interpret,
    )


def _scored(hidden_NTD, predictors_NR, targets_NR, scored_NR):
    """Hidden states, targets and mask of the scored positions, in one row of M."""
    hidden_NRD = jnp.take_along_axis(jnp.asarray(hidden_NTD), predictors_NR[:, :, None], axis=1)
    hidden_NRD = jnp.where(scored_NR[:, :, None], hidden_NRD, 0)  # before the head: 0 * NaN is NaN in its gradient
    safe_targets_NR = jnp.where(scored_NR, targets_NR, 0)
    return hidden_NRD.reshape(-1, hidden_NTD.shape[-1]), safe_targets_NR.reshape(-1), jnp.asarray(scored_NR).reshape(-1)


def _response(sum_N, hidden_MD, head_VD, scored_NR, spec: specs.HeadSpec, slots_NR, slots: int) -> ResponseLogps:
    """The sums, with what goes into metrics."""
    count_N = sum_slots(jnp.asarray(scored_NR, sum_N.dtype), slots_NR, slots=slots).reshape(-1)
    if spec.softcap is not None:
        return ResponseLogps(sum_N, count_N, None)
    hidden_NRD, head_VD = jax.lax.stop_gradient((hidden_MD.reshape(*scored_NR.shape, -1), jnp.asarray(head_VD)))
    mean_head_D = jnp.mean(head_VD[: spec.vocab_size], axis=0, dtype=count_N.dtype)
    if slots_NR is None:
        mean_hidden_ND = jnp.sum(hidden_NRD, axis=1, dtype=count_N.dtype) / jnp.maximum(count_N, 1)[:, None]
        mean_N = jnp.einsum("ND,D->N", mean_hidden_ND, mean_head_D, precision=jax.lax.Precision.HIGHEST)
        return ResponseLogps(sum_N, count_N, mean_N)
    # Mean raw logit over the vocabulary and the scored positions, by linearity, without logits; 0 where none is scored.
    mean_NR = jnp.einsum(
        "NRD,D->NR", hidden_NRD.astype(count_N.dtype), mean_head_D, precision=jax.lax.Precision.HIGHEST
    )
    mean_N = sum_slots(mean_NR, slots_NR, slots=slots).reshape(-1) / jnp.maximum(count_N, 1)
    return ResponseLogps(sum_N, count_N, mean_N)


def _version(text):
    """(major, minor, patch) of a version such as 0.10.2, 0.12.0.1 or 0.13.0rc1."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


def _mib(count):
    """Bytes as text."""
    return f"{count / 2**20:.1f} MiB"
