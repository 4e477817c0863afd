"""Which kernel computes the log-probs, and why: settled once, before anything is compiled.

Static facts about target, sizes and mesh go in, a `Selection` comes out; `explain` says the same in words, with the
memory it takes. Nothing here asks a device, so that a plan for absent hardware gets the same answer.
"""

import difflib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fpo_jax.kernels.lm_head import blocks, chunked, pallas_gpu, pallas_tpu, pallas_triton, reference
from fpo_jax.kernels.lm_head import spec as specs

IMPLEMENTATIONS = {
    "reference": reference.token_stats,
    "chunked": chunked.token_stats,
    "pallas_tpu": pallas_tpu.token_stats,
    "pallas_gpu": pallas_gpu.token_stats,
    "pallas_triton": pallas_triton.token_stats,
}
ENGINES: dict[str, blocks.Engine] = {
    "chunked": chunked.ENGINE,
    "pallas_tpu": pallas_tpu.ENGINE,
    "pallas_gpu": pallas_gpu.ENGINE,
    "pallas_triton": pallas_triton.ENGINE,
}
PLATFORMS = {  # the others run everywhere
    "pallas_tpu": "tpu",
    "pallas_gpu": "gpu",
    "pallas_triton": "gpu",
}
FUSE_LOSS = ("auto", "on", "off")
OLDEST_JAX = (0, 10, 2)
TPU_KINDS = ("TPU v5", "TPU v6", "TPU7")  # beginnings of `device_kind` with 64 MiB of VMEM or more


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


class Selection(NamedTuple):
    """What computes the log-probs, and why, for the log."""

    implementation: str  # a key of IMPLEMENTATIONS
    fuse_loss: bool  # the loss of the groups runs in a kernel too
    interpret: bool  # the kernel is emulated
    reason: str


def select(
    *,
    target: Target,
    shapes: HeadShapes,
    dtype,
    head_dtype=None,
    requested: str = "auto",
    fuse_loss: str = "auto",
    placement: specs.Placement | None = None,
    jax_version: str = jax.__version__,
) -> Selection:
    """Choose the implementation of the head for a target and shapes. Pure: queries no device.

    Args:
        target: what the program is compiled for.
        shapes: sizes of the call.
        dtype: of the hidden states, in which the head is multiplied.
        head_dtype: of the head in memory; None: the same.
        requested: "auto", or a key of IMPLEMENTATIONS, which is then chosen or refused, never replaced.
        fuse_loss: "auto", "on" or "off"; "on" is refused where it cannot be.
        placement: where rows and head live on a mesh.
        jax_version: as `jax.__version__` says it.

    Returns:
        Selection.

    Raises:
        ValueError: unknown name, unsupported dtype or jax version, a request that cannot run on the target.

    >>> select(target=Target("cpu"), shapes=HeadShapes(64, 8, 99), dtype="float32").reason
    'auto on cpu: XLA vocabulary blocks, which run everywhere; loss apart: chunked has no kernel for it'
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
            if target.platform == "gpu" and not _obstacle("pallas_triton", **options, jax_version=jax_version):
                reason += "; pallas_triton would run here, and nobody has measured which is faster"
        else:
            reason = f"auto on {target.device_kind or target.platform}: Pallas kernels"
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
    fused, fused_reason = _select_fused(implementation, fuse_loss)
    return Selection(implementation, fused, interpret, f"{reason}; {fused_reason}")


def implementation_of(name: str) -> Callable[..., specs.TokenStats]:
    """Look up an implementation.

    Raises:
        ValueError: there is none of that name; the nearest one.
    """
    if name not in IMPLEMENTATIONS:
        names = ["auto", *IMPLEMENTATIONS]
        nearest = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"implementation {name!r} is unknown; use one of {', '.join(names)}{hint}")
    return IMPLEMENTATIONS[name]


def _check_request(requested, fuse_loss, dtype, jax_version) -> None:
    """Raise ValueError for a name, dtype or version that does not exist here."""
    if requested != "auto":
        implementation_of(requested)
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


def _obstacle(implementation: str, *, target: Target, shapes: HeadShapes, dtype, head_dtype, jax_version: str) -> str:
    """Say why an implementation cannot run on a target; "" where it can."""
    needs = PLATFORMS.get(implementation)
    if needs and target.platform not in (needs, "cpu"):
        return f"it runs on a {needs.upper()}, and this is a {target.platform.upper()}"
    if needs == "tpu":
        if target.platform == "tpu" and not target.device_kind.startswith(TPU_KINDS):
            return f"{target.device_kind or 'this TPU'} is not one of v5e, v5p, v6e, v7x"
        return pallas_tpu.unsupported(width=shapes.width, head_dtype=head_dtype, dtype=dtype)
    if implementation == "pallas_triton":
        return pallas_triton.unsupported(
            width=shapes.width,
            rows=shapes.vocab,
            dtype=dtype,
            compute_capability=target.compute_capability if target.platform == "gpu" else "8.0",
        )
    if needs == "gpu":
        if _version(jax_version) < (0, 11):
            return f"jax {jax_version} is below 0.11, which the GPU kernels need"
        absent = pallas_gpu.missing() if jax_version == jax.__version__ else ""
        return absent or pallas_gpu.unsupported(
            width=shapes.width,
            rows=shapes.vocab,
            dtype=dtype,
            compute_capability=target.compute_capability if target.platform == "gpu" else "9.0",
        )
    return ""


def _select_fused(implementation: str, fuse_loss: str) -> tuple[bool, str]:
    """Whether the loss runs in a kernel, and why."""
    if fuse_loss == "off":
        return False, "loss apart, as requested"
    obstacle = f"{implementation} has no kernel for it"
    if implementation in PLATFORMS:
        if ENGINES[implementation].loss_parameters is not None:
            return True, "loss inside"
        obstacle = f"jax {jax.__version__} has no Pallas Triton, which compiles its kernel"
    if fuse_loss == "on":
        raise ValueError(f"fuse_loss='on' cannot be: {obstacle}; use 'auto' or 'off'")
    return False, f"loss apart: {obstacle}"


def explain(
    *,
    vocab_size: int | None = None,
    workspace_bytes: int = specs.DEFAULT_WORKSPACE_BYTES,
    kept_bytes: int | None = None,
    frozen: bool = False,
    placement: specs.Placement | None = None,
    **choice,
) -> str:
    """Say what would run: implementation, reason, blocks and workspace, against the dense logits.

    Args:
        vocab_size: real rows of the head; None: all.
        workspace_bytes: memory for one block of logits, per device.
        kept_bytes: memory for logits that are kept for the backward pass, per device.
        frozen: whether the head is not trained.
        placement: as for `select`.
        choice: the other arguments of `select`.

    Returns:
        One line per fact.

    Raises:
        ValueError: as `select` and `completion_logps`.

    >>> print(explain(target=Target("tpu", "TPU v5"), shapes=HeadShapes(8192, 4096, 128256), dtype="bfloat16"))
    log-probs: pallas_tpu (auto on TPU v5: Pallas kernels; loss inside)
    8192 tokens x 128256 vocabulary entries x 4096 wide, bfloat16 operands, float32 accumulation
    forward: one kernel, logits on the chip only
    backward: 32 blocks of 4096 head rows x 1 of 8192 tokens per device, 192.0 MiB of workspace (limit 192.0 MiB)
    dense float32 logits, which are never held: 4008.0 MiB per device
    """
    chosen = select(placement=placement, **choice)
    shapes, dtype = choice["shapes"], choice["dtype"]
    options = {"workspace_bytes": workspace_bytes, "kept_bytes": kept_bytes, "placement": placement}
    spec = specs.HeadSpec(vocab_size=vocab_size, **options)
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
    head_dtype, engine = choice.get("head_dtype") or dtype, ENGINES[chosen.implementation]
    kept = engine.kept_tiles(
        tokens, shapes.vocab // specs.shards(spec, cuts.vocab), shapes.width, head_dtype, dtype, spec=spec
    )
    plans = {"forward": engine.forward_tiles, "backward": engine.backward_tiles}
    if kept:
        plans = {"forward alone": plans["forward"]}
    elif frozen and engine.pull is not None:
        plans = {"forward alone": plans["forward"], "forward and backward, the head frozen": engine.pull_tiles}
    for name, plan_of in plans.items():
        plan = plan_of(tokens, rows, head_dtype, dtype, spec=spec)
        if plan.workspace_bytes:
            lines.append(
                f"{name}: {plan.vocab_count} blocks of {plan.vocab} head rows x {plan.token_count} of {plan.tokens} "
                f"tokens per device, {_mib(plan.workspace_bytes)} of workspace (limit {_mib(workspace_bytes)})"
            )
        else:
            lines.append(f"{name}: one kernel, logits on the chip only")
    if kept:
        limit = workspace_bytes if kept_bytes is None else kept_bytes
        lines.append(
            f"forward and backward: all logits at once, kept between them, {_mib(kept.workspace_bytes)} of workspace "
            f"(limit {_mib(limit)})"
        )
    held = "" if kept else ", which are never held"
    return "\n".join([*lines, f"dense {accumulator.name} logits{held}: {dense}"])


def kept_if_unlimited(
    *, target: Target, placement: specs.Placement | None, shapes: HeadShapes, dtype, **choice
) -> int | None:
    """Return the bytes a device that keeping all logits takes, asked as `select` is; None where they cannot be kept."""
    chosen = select(target=target, placement=placement, shapes=shapes, dtype=dtype, **choice)
    if chosen.implementation == "reference":
        return None
    spec = specs.HeadSpec(placement=placement, kept_bytes=2**62)
    cuts, head_dtype = specs.axes(spec), choice.get("head_dtype") or dtype
    tokens, rows = shapes.tokens // specs.shards(spec, cuts.tokens), shapes.vocab // specs.shards(spec, cuts.vocab)
    plan = ENGINES[chosen.implementation].kept_tiles(tokens, rows, shapes.width, head_dtype, dtype, spec=spec)
    return None if plan is None else plan.workspace_bytes


def _version(text):
    """(major, minor, patch) of a version such as 0.10.2, 0.12.0.1 or 0.13.0rc1."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


def _mib(count):
    """Bytes as text."""
    return f"{count / 2**20:.1f} MiB"
