"""The correctness part of `benchmarks/kernels.py`: the loss through the kernels of this device, against float64.

Groups of three, one a row (padded) or two a row (packed, shared), bfloat16 operands; on a CPU the kernels are emulated.
The bits of two calls have to be the same.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fpo_jax import logprobs, losses
from fpo_jax.kernels.lm_head import head_loss, reference, spec

ROWS, T, K, D, V = 8, 384, 3, 256, 4096
LOSSES = {"dpo": {}, "simpo": {}, "alpha": {"alpha": 0.3}, "jensen_shannon": {}}


def check() -> list[dict]:
    """Print and return the largest error of losses, log-probs and gradients, relative to the largest entry."""
    device = logprobs.Target.of(jax.devices()[0])
    names = [name for name, platform in logprobs.PLATFORMS.items() if platform == device.platform]
    found = []
    for name in names or ["pallas_tpu", "pallas_triton"]:
        for groups_of_row in (1, 2):
            for loss_name, options in LOSSES.items():
                row = {"kernel": name, "groups of a row": groups_of_row, "loss": loss_name}
                found.append(row | one(name, groups_of_row, losses.resolve(loss_name, **options), emulated=not names))
                print("  ".join(f"{key} {value}" for key, value in found[-1].items()), flush=True)
    return found


def one(name: str, groups_of_row: int, loss: losses.Loss, *, emulated: bool) -> dict:
    """Errors of one kernel, arrangement and loss."""
    rows, tokens = (2, 48) if emulated else (ROWS, T)
    rng, groups = np.random.default_rng(0), rows * groups_of_row
    hidden_ND = jnp.asarray(rng.standard_normal((rows * tokens, D)), jnp.bfloat16)
    head_VD = jnp.asarray(rng.standard_normal((V, D)) * 3 / np.sqrt(D), jnp.bfloat16)
    targets_N = jnp.asarray(rng.integers(0, V, rows * tokens), jnp.int32)
    loss_mask_N, slots_N = jnp.asarray(rng.random(rows * tokens) < 0.9), None
    if groups_of_row > 1:
        slots_N = np.sort(rng.integers(0, groups_of_row * K, (rows, tokens), np.int32), axis=1).reshape(-1)
    scale = tokens / K / groups_of_row * -np.log(V)
    operands = losses.Completions(
        np.zeros((groups, K), np.float32),
        (rng.normal(size=(groups, K)) * 5 + scale * 1.5).astype(np.float32),
        np.full((groups, K), tokens / K / groups_of_row, np.float32),
        rng.normal(size=(groups, K)).astype(np.float32),
        np.zeros((), np.float32),
    )
    args = (targets_N, loss_mask_N, operands)
    options = {"group_loss": loss.of_logps, "groups": (groups, K), "slots_N": slots_N, "rows": rows}
    fused = functools.partial(
        head_loss.fused_head_loss, **options, engine=logprobs.ENGINES[name], spec=spec.HeadSpec(interpret=emulated)
    )
    ours, again = (jax.device_get(_results(fused, hidden_ND, head_VD, *args)) for _ in range(2))
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        dense = functools.partial(
            head_loss.fpo_head_loss, **options, token_stats=reference.token_stats, spec=spec.HeadSpec()
        )
        wide_ND, wide_VD = (jnp.asarray(np.asarray(x, np.float32), "float64") for x in (hidden_ND, head_VD))
        wide_operands = jax.tree.map(lambda x: np.asarray(x, "float64"), operands)
        on_host = (np.asarray(targets_N), np.asarray(loss_mask_N), wide_operands)
        exact = jax.device_get(_results(dense, wide_ND, wide_VD, *on_host))
    return {
        what: f"{np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max():.1e}"
        for what, a, b in zip(("losses", "log-probs", "dhidden", "dhead"), ours, exact, strict=True)
    } | {"same bits": all(np.array_equal(a, b) for a, b in zip(ours, again, strict=True))}


def _results(head_loss_of, hidden_ND, head_VD, targets_N, loss_mask_N, operands):
    """Losses, log-probs, and the gradients of the losses' sum."""

    @jax.jit
    def run(hidden_ND, head_VD):
        def total(hidden_ND, head_VD):
            out = head_loss_of(hidden_ND, head_VD, targets_N, loss_mask_N, operands)
            return jnp.sum(out.losses_B), (out.losses_B, out.logps_BK)

        (_, out), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(hidden_ND, head_VD)
        return (*out, *grads)

    return run(hidden_ND, head_VD)
