"""The whole head and the loss of preference groups as one TPU kernel.

In: hidden states, head, targets, which tokens count, and a group loss. Out: losses and log-probs per group.
One `pallas_call` folds the tiles of logits into a softmax per token (`pallas_tpu.fold_tile`), the finished tokens into
sums per candidate, and at its last step runs the group loss and its derivative, traced from the Python function that it
is given. Nothing of size N*V exists, and nothing but per-token rows and [B, K] numbers leaves the chip's VMEM.

The backward pass is that of `pallas_tpu.token_stats`: the kernel has already left d loss / d log-prob behind.

What it asks for: every group whole on one device, the head not cut. A chip whose TensorCores share a program (v5p) runs
it on one of them, since the tiles of tokens meet in the sums.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from fpo_jax.kernels import blocks, head_loss, pallas_tpu
from fpo_jax.kernels import spec as specs


def fused_head_loss(
    hidden_ND: specs.Array,
    head_VD: specs.Array,
    targets_N: specs.Array,
    scored_N: specs.Array,
    operands: head_loss.Operands,
    *,
    group_loss: head_loss.GroupLoss,
    groups: tuple[int, int],
    spec: specs.HeadSpec,
) -> head_loss.HeadLoss:
    """Compute what `head_loss.fpo_head_loss` does, in one kernel; bfloat16 or float32 operands.

    `group_loss` must be hashable and lower in a TPU kernel: elementwise functions and reductions over K.

    Raises:
        ValueError: shapes or dtypes that do not fit; a head that is cut; groups that the devices do not divide.
    """
    specs.check(hidden_ND, head_VD, targets_N, spec)
    pallas_tpu.check(hidden_ND, head_VD, spec, backward=False)
    head_loss.check(hidden_ND, scored_N, operands, groups)
    axes = specs.axes(spec)
    if axes.vocab or axes.width:
        raise ValueError(
            f"the head is cut along mesh axis {axes.vocab or axes.width!r}, and the fused loss needs it whole on every"
            " device; use fpo_head_loss with a token_stats"
        )
    if groups[0] % specs.shards(spec, axes.tokens):
        raise ValueError(
            f"{groups[0]} groups are not divisible by the {specs.shards(spec, axes.tokens)} devices along {axes.tokens}"
        )
    operands = jax.tree.map(lambda x: lax.stop_gradient(jnp.asarray(x, jnp.float32)), operands)
    arrays = (jnp.asarray(hidden_ND), jnp.asarray(head_VD), jnp.asarray(targets_N), jnp.asarray(scored_N))
    with jax.named_scope("fused_head_loss"):
        return _fused(*arrays, operands, group_loss, groups, spec)


def _forward(hidden_ND, head_VD, targets_N, scored_N, operands, group_loss, groups, spec):
    return _run(hidden_ND, head_VD, targets_N, scored_N, operands, group_loss, groups, spec)[0]


def _forward_with_residuals(hidden_ND, head_VD, targets_N, scored_N, operands, group_loss, groups, spec):
    """Losses, and what the backward pass needs: the inputs, lse, and the derivative of each loss."""
    out, lse_N, slopes_BK = _run(hidden_ND, head_VD, targets_N, scored_N, operands, group_loss, groups, spec)
    return out, (hidden_ND, head_VD, targets_N, scored_N, operands, lse_N, slopes_BK)


def _backward(group_loss, groups, spec, residuals, cotangents):
    """Spread dlogp = dloss * slope + dlogp over the candidate's scored tokens, then run the shared backward pass."""
    hidden_ND, head_VD, targets_N, scored_N, operands, lse_N, slopes_BK = residuals
    dlogps_BK = cotangents.losses_B[:, None] * slopes_BK + cotangents.logps_BK
    dlogps_N = jnp.repeat(dlogps_BK.reshape(-1), hidden_ND.shape[0] // dlogps_BK.size)
    dlogps_N = jnp.where(scored_N, dlogps_N, 0)
    grads = blocks.backward(
        hidden_ND, head_VD, targets_N, lse_N, dlogps_N, -dlogps_N, spec=spec, engine=pallas_tpu.ENGINE
    )
    return (*grads, None, None, jax.tree.map(jnp.zeros_like, operands))


def _run(hidden_ND, head_VD, targets_N, scored_N, operands, group_loss, groups, spec):
    """Run the kernel on every device: (HeadLoss, lse_N, slopes_BK)."""
    rows = PartitionSpec(specs.axes(spec).tokens)
    operand_specs = jax.tree.map(lambda x: rows if x.ndim else PartitionSpec(), operands)
    on_device = functools.partial(
        _run_on_device,
        group_loss=group_loss,
        groups=(groups[0] // specs.shards(spec, specs.axes(spec).tokens), groups[1]),
        spec=spec,
    )
    in_specs = (rows, PartitionSpec(), rows, rows, operand_specs)
    return blocks.on_mesh(
        on_device, (hidden_ND, head_VD, targets_N, scored_N, operands), spec, in_specs=in_specs, out_specs=rows
    )


def _run_on_device(hidden_ND, head_VD, targets_N, scored_N, operands, *, group_loss, groups, spec):
    operand = specs.operand_dtype(hidden_ND.dtype, head_VD.dtype, spec)
    tokens, (B, K) = hidden_ND.shape[0], groups
    candidates_N = jnp.where(scored_N, jnp.arange(tokens, dtype=jnp.int32) // (tokens // (B * K)), -1)
    window = (0, spec.vocab_size or head_VD.shape[0])
    call = pallas_tpu.Call.of("forward", hidden_ND.astype(operand), head_VD, (targets_N, candidates_N), window)
    leaves, tree = jax.tree.flatten(operands)
    row = jax.ShapeDtypeStruct((1, tokens), jnp.float32)
    group, column = jax.ShapeDtypeStruct((B, K), jnp.float32), jax.ShapeDtypeStruct((B, 1), jnp.float32)
    outputs = pl.pallas_call(
        functools.partial(_kernel, call=call, spec=spec, group_loss=group_loss, tree=tree),
        grid=call.grid,
        in_specs=[*call.in_specs, *(_whole(x) if x.ndim else pl.BlockSpec(memory_space=pltpu.SMEM) for x in leaves)],
        out_specs=[call.row_spec] * 3 + [_whole(column), _whole(group), _whole(group)],
        out_shape=[row] * 3 + [column, group, group],
        scratch_shapes=[pltpu.VMEM((1, call.tokens), jnp.float32)] * 4,
        compiler_params=pallas_tpu.parameters("arbitrary", "arbitrary"),
        interpret=spec.interpret,
        name="fused_head_loss",
    )(*call.inputs, *(x if x.ndim else x[None] for x in leaves))
    lse_1N, entropy_1N, is_argmax_1N, losses_B1, logps_BK, slopes_BK = outputs
    out = head_loss.HeadLoss(
        losses_B1[:, 0],
        logps_BK,
        entropy_1N[0] if spec.want_entropy else None,
        is_argmax_1N[0] if spec.want_argmax else None,
    )
    return out, lse_1N[0], slopes_BK


def _kernel(window, hidden, head, targets, candidates, *references, call, spec, group_loss, tree):
    """Tokens outside, head inside: finish a tile of tokens after its last tile of logits, the groups after all."""
    operands, rest = references[: tree.num_leaves], references[tree.num_leaves :]
    lse, entropy, is_argmax, losses, logps, slopes, *partials = rest
    tile, last_tile = pl.program_id(0), pl.num_programs(0) - 1
    block, last_block = pl.program_id(1), pl.num_programs(1) - 1

    @pl.when((tile == 0) & (block == 0))
    def _():
        logps[...] = jnp.zeros_like(logps)

    @pl.when(block == 0)
    def _():
        pallas_tpu.clear(partials)

    running = pallas_tpu.fold_tile(partials, window, hidden, head, targets, call=call, spec=spec)
    pallas_tpu.write(partials, running)

    @pl.when(block == last_block)
    def _():
        max_1M, sum_1M, target_logit_1M, centred_1M = (partial[...] for partial in partials)
        lse[...] = max_1M + jnp.log(sum_1M)
        entropy[...] = jnp.log(sum_1M) - centred_1M / sum_1M
        is_argmax[...] = (target_logit_1M >= max_1M).astype(jnp.float32)
        in_vocab_1M = (targets[...] >= window[0]) & (targets[...] < window[1])
        logps_1M = jnp.where(in_vocab_1M, target_logit_1M - lse[...], jnp.nan)
        tokens_1M = tile * call.tokens + lax.broadcasted_iota(jnp.int32, logps_1M.shape, 1)
        candidates_1M = jnp.where(tokens_1M < call.token_total, candidates[...], -1)
        logps[...] += _sums_of_candidates(logps_1M, candidates_1M, logps.shape)

    @pl.when((tile == last_tile) & (block == last_block))
    def _():
        values = [operand[...] if operand.ndim == 2 else operand[0] for operand in operands]
        loss_of = functools.partial(group_loss, operands=jax.tree.unflatten(tree, values))
        losses_B, pullback = jax.vjp(loss_of, logps[...])
        losses[...] = losses_B[:, None]
        (slopes[...],) = pullback(jnp.ones_like(losses_B))


def _sums_of_candidates(logps_1M, candidates_1M, groups):
    """Sum the log-probs of each candidate's tokens: [B, K]."""
    B, K = groups
    group_BM = lax.broadcasted_iota(jnp.int32, (B, logps_1M.shape[1]), 0)
    candidate_BK = lax.broadcasted_iota(jnp.int32, (B, K), 1)
    sums_BK = jnp.zeros((B, K), jnp.float32)
    for k in range(K):
        own_BM = jnp.where(group_BM * K + k == candidates_1M, logps_1M, 0)
        sums_BK += jnp.where(candidate_BK == k, jnp.sum(own_BM, axis=1, keepdims=True), 0)
    return sums_BK


def _whole(x) -> pl.BlockSpec:
    """An array that every step of the grid sees whole."""
    return pl.BlockSpec(x.shape, lambda i, j: (0, 0))


_fused = jax.custom_vjp(_forward, nondiff_argnums=(5, 6, 7))
_fused.defvjp(_forward_with_residuals, _backward)
