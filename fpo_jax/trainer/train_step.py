"""The step and the evaluation of one batch: pure functions, jitted once per batch shape.

    batch [A micro-batches] -> scan: hidden states -> log-probs -> losses -> gradients (float32 sums) -> AdamW

Every mean is taken over the whole step, not over a micro-batch, so that the number of micro-batches changes nothing
but rounding. A step whose loss, gradient or reference is not finite leaves the state as it was, and so does what
`skip_step` adds.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from fpo_jax import logprobs, losses, sharding, types
from fpo_jax.models import params as trees
from fpo_jax.models import routing
from fpo_jax.optimizer import adamw, skip_step
from fpo_jax.trainer import forward, metrics


class Resharding(NamedTuple):
    """Where the results between the parts of a step live on a mesh; each maps a tree to the same tree, placed."""

    gather_params: Callable  # parameters -> what the micro-batches differentiate: the same, or gathered once a step
    shard_grads: Callable  # gradients -> where the parameters live
    load_opt_state: Callable  # optimiser state -> the devices, from the host where it is kept there


class Replicas(NamedTuple):
    """Copies of the model along the mesh axis `data`: each sums the gradients of its rows before all are added once."""

    mesh: Mesh
    forward_fn: forward.AnyForward  # of one of them
    shard_grads: Callable  # as that of `Resharding`, within one of them


def train_step(
    state: types.TrainState,
    batch: types.Batch,
    *,
    forward_fn: forward.AnyForward,
    loss: losses.Loss,
    optimizer: optax.GradientTransformationExtraArgs,
    rate: Callable,
    ratio_b: float = 1.0,
    resharding: Resharding | None = None,
    replicas: Replicas | None = None,
    skip_rule: skip_step.SkipRule | None = None,
) -> tuple[types.TrainState, metrics.Pairs]:
    """Apply one step of the A micro-batches in `batch` (every leaf has a leading A).

    objective = sum_b w_b L_b / sum_b w_b + sft_weight * sum_b NLL_b / sum_b tokens_b  (second sum: chosen completions)

    A loss over tokens (`sft`) has sum_b tokens_b below its own sum as well. For a mixture of experts with a weight for
    them, `routing.balancing_loss` and `routing.z_loss` of the micro-batches are added, their means by valid tokens.

    Args:
        state: parameters, optimiser state and count.
        batch: the micro-batches.
        forward_fn: how a batch becomes log-probs.
        loss: what is minimised.
        optimizer: from `adamw.optimizer`.
        rate: the schedule in it, for the metrics.
        ratio_b: what the rate of an adapter's B is a multiple of it by, for the same.
        resharding: where the intermediate results live; None on one device.
        replicas: of the model on the mesh; None where there is one.
        skip_rule: what is not applied besides; it needs `state.skipped`. None = nothing.

    Returns:
        The new state (unchanged but for `step` and `skipped` where the step is not applied) and metrics as
        (sum, count).
    """
    totals = _totals(batch, loss)
    weights, frozen = state.params, state.frozen
    if resharding:
        if frozen is None:
            weights = resharding.gather_params(weights)
        else:
            frozen = resharding.gather_params(frozen)
    batch_kl = None
    if loss.needs_batch_kl:
        batch_kl = _batch_kl(_whole(weights, frozen), batch, forward_fn=forward_fn, weight=totals[0])
    key = jax.random.fold_in(jax.random.key(_DROPOUT_STREAM), state.step) if _drops(forward_fn) else None

    filled_A = jnp.any(batch.weight_B > 0, axis=1)
    operands = _Operands(weights, frozen, batch, filled_A, totals, batch_kl, key)
    shard_grads = resharding.shard_grads if resharding else lambda grads: grads
    if replicas is None:
        value, grads, pairs = _gradients(operands, forward_fn=forward_fn, loss=loss, shard_grads=shard_grads)
    else:
        value, grads, pairs = _over_replicas(operands, replicas=replicas, loss=loss)
    with jax.named_scope("optimizer"):
        grads = shard_grads(grads)
        old_state = resharding.load_opt_state(state.opt_state) if resharding else state.opt_state
        applied = adamw.steps_applied(old_state)
        grad_norm = optax.global_norm(grads)
        # An infinite reference leaves a loss that is finite: the completion has no share in its group any more.
        finite = jnp.isfinite(value) & jnp.isfinite(grad_norm) & jnp.isfinite(batch.reference_logps_BK).all()
        keep, spike = finite, None
        if skip_rule is not None:
            keep &= state.skipped < skip_rule.most
            if skip_rule.sigmas:
                spike = finite & skip_rule.spike(old_state, value, grad_norm)
                keep &= ~spike
        observed = {"value": value, "grad_norm": grad_norm} if spike is not None else {}
        updates, opt_state = optimizer.update(grads, old_state, state.params, keep=keep, **observed)
        fresh = adamw.apply_updates(state.params, updates, jax.random.fold_in(jax.random.key(0), applied))
        params = adamw.kept(fresh, state.params, keep)
    one = jnp.float32(1.0)
    pairs |= {
        "loss": (value, one),
        "grad_norm": (grad_norm, one),
        "learning_rate": (rate(applied), one),
        "nonfinite": (1.0 - finite.astype(jnp.float32), one),
    }
    if ratio_b != 1:
        pairs["learning_rate_b"] = (ratio_b * rate(applied), one)
    if spike is not None:
        pairs["spike"] = (spike.astype(jnp.float32), one)
    skipped = state.skipped
    if skip_rule is not None:
        skipped = skip_rule.in_a_row(skipped, applied=keep, finite=finite)
    return types.TrainState(params, opt_state, state.step + 1, state.frozen, skipped), pairs


def eval_step(
    evaluated: tuple[types.PyTree, types.Array],
    batch: types.Batch,
    *,
    forward_fn: forward.AnyForward,
    loss: losses.Loss,
) -> metrics.Pairs:
    """Return the metrics of one batch of B groups as (sum, count), `loss` (without the SFT term) among them.

    Args:
        evaluated: the weights, and the mean of logp - reference logp over the whole evaluation (its `reference_kl`),
            which a loss with a batch statistic (KTO) reads.
        batch: the groups.
        forward_fn: how a batch becomes log-probs.
        loss: what is minimised.
    """
    params, batch_kl = evaluated
    completion = forward_fn(params, batch)
    completions = _completions(batch, completion, batch_kl)
    losses_B = jnp.where(batch.weight_B > 0, loss.loss(completions), 0.0)
    pairs = metrics.pairs(batch, completion, completions, losses_B, loss)
    groups = jnp.sum(batch.weight_B * loss.counted(batch.rewards_BK))
    count = pairs["sft_loss"][1] if loss.over_tokens else groups
    return pairs | {"loss": (jnp.sum(batch.weight_B * losses_B), count)}


def logprob_step(params: types.PyTree, batch: types.Batch, *, forward_fn: forward.AnyForward) -> jax.Array:
    """Return the summed log-probs [B, K], float32: the reference pass."""
    return jnp.asarray(forward_fn(params, batch).sum_N).reshape(batch.rewards_BK.shape)


def jit_train_step(step: Callable, *, mesh: Mesh, state_shardings: types.TrainState) -> jax.stages.Wrapped:
    """Jit `step(state, batch)` over the mesh, donating the state."""
    return jax.jit(
        step,
        in_shardings=(state_shardings, sharding.batch_sharding(mesh, stacked=True)),
        out_shardings=(state_shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def jit_eval_step(step: Callable, *, mesh: Mesh, first_shardings: types.PyTree) -> jax.stages.Wrapped:
    """Jit `step(first, batch)` over the mesh; the result is replicated."""
    return jax.jit(
        step,
        in_shardings=(first_shardings, sharding.batch_sharding(mesh, stacked=False)),
        out_shardings=sharding.replicated(mesh),
    )


def stack_micro_batches(batch: types.Batch, *, accumulation: int) -> types.Batch:
    """Cut a batch into A micro-batches of consecutive groups: every leaf gets a leading A."""
    return jax.tree.map(lambda leaf: leaf.reshape(accumulation, leaf.shape[0] // accumulation, *leaf.shape[1:]), batch)


_DROPOUT_STREAM = 2  # keeps what adapters drop independent of other noise


def _drops(forward_fn: forward.AnyForward) -> bool:
    return forward_fn.adapter is not None and forward_fn.adapter.dropout > 0


class _Operands(NamedTuple):
    """What the gradients of a step are computed from."""

    weights: types.PyTree
    frozen: types.PyTree
    batch: types.Batch
    filled_A: types.Array  # whether a micro-batch holds groups on any device
    totals: types.PyTree
    batch_kl: types.PyTree
    key: types.PyTree  # of drop-out; None without


def _over_replicas(operands: _Operands, *, replicas: Replicas, loss: losses.Loss) -> tuple:
    """What `_gradients` returns, summed over the replicas once, after all micro-batches."""
    everywhere = PartitionSpec()
    specs: Any = [PartitionSpec(None, "data") if name == "batch" else everywhere for name in _Operands._fields]

    def of_one(operands: _Operands):
        if operands.key is not None:  # rows of different replicas drop different entries
            operands = operands._replace(key=jax.random.fold_in(operands.key, jax.lax.axis_index("data")))
        sums = _gradients(operands, forward_fn=replicas.forward_fn, loss=loss, shard_grads=replicas.shard_grads)
        return jax.lax.psum(sums, "data")

    return jax.shard_map(
        of_one,
        mesh=replicas.mesh,
        in_specs=(_Operands(*specs),),
        out_specs=everywhere,
        axis_names={"data"},
        check_vma=False,
    )(operands)


def _gradients(
    operands: _Operands, *, forward_fn: forward.AnyForward, loss: losses.Loss, shard_grads: Callable
) -> tuple:
    """The objective, its gradients and the metrics, summed over the micro-batches in float32."""
    weights, frozen, batch, filled_A, totals, batch_kl, key = operands

    def objective(trained, micro, number, *, totals, batch_kl):
        own = None if key is None else jax.random.fold_in(key, number)
        params = _whole(trained, frozen)
        return _objective(
            params, micro, totals=totals, batch_kl=batch_kl, forward_fn=forward_fn, loss=loss, dropout_key=own
        )

    differentiate = jax.value_and_grad(objective, has_aux=True)

    def add(carry, micro, number):
        (value, pairs), grads = differentiate(weights, micro, number, totals=totals, batch_kl=batch_kl)
        grads = shard_grads(grads)
        return jax.tree.map(lambda total, part: total + part.astype(total.dtype), carry, (value, grads, pairs))

    def accumulate(carry, numbered):
        micro, number, filled = numbered
        if micro.slots_NR is None:
            return add(carry, micro, number), None
        # Groups fill more rows in one step than in another; what is left of them costs nothing.
        return jax.lax.cond(filled, add, lambda carry, micro, number: carry, carry, micro, number), None

    if batch.weight_B.shape[0] == 1:  # nothing to add up: no second tree of gradients
        (value, pairs), grads = differentiate(
            weights, jax.tree.map(lambda leaf: leaf[0], batch), jnp.int32(0), totals=totals, batch_kl=batch_kl
        )
        return jax.tree.map(_wide, (value, grads, pairs))
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)),
        _carry_shapes(differentiate, weights, batch, totals, batch_kl),
    )
    numbers = jnp.arange(batch.weight_B.shape[0])
    return jax.lax.scan(accumulate, zeros, (batch, numbers, filled_A))[0]


def _whole(trained: types.PyTree, frozen: types.PyTree) -> types.PyTree:
    return trained if frozen is None else trees.union(frozen, trained)


def _objective(
    params, batch: types.Batch, *, totals, batch_kl, forward_fn: forward.AnyForward, loss: losses.Loss, dropout_key
):
    operands = _operands(batch, batch_kl)
    losses_B, completion, routes = forward_fn.group_losses(params, batch, operands, loss=loss, dropout_key=dropout_key)
    completions = _completions(batch, completion, batch_kl)
    with jax.named_scope("objective"):
        losses_B = jnp.where(batch.weight_B > 0, losses_B, 0.0)
        groups, tokens, valid = totals
        value = jnp.sum(batch.weight_B * losses_B) / (tokens if loss.over_tokens else groups)
        pairs = metrics.pairs(batch, completion, completions, losses_B, loss)
        if loss.sft_weight:
            value += loss.sft_weight * pairs["sft_loss"][0] / tokens
        if routes is not None:
            of_router, ways = _of_all_replicas(routes, forward_fn)
            aux_weight, z_weight = forward_fn.router_aux_weight, forward_fn.router_z_weight
            pairs |= routing.metrics(of_router, z_weight=z_weight)
            share = jnp.mean(of_router.tokens_L) / (valid * ways)
            if aux_weight:
                value += aux_weight * share * routing.balancing_loss(of_router)
            if z_weight:
                value += z_weight * share * routing.z_loss(of_router)
    return value, jax.lax.stop_gradient(pairs)


def _of_all_replicas(routes: routing.Routing, forward_fn: forward.AnyForward) -> tuple[routing.Routing, int]:
    """Return the routing of the micro-batch on all replicas, and how often it is added up then."""
    layout = forward_fn.layout
    if not layout.within_replica:
        return routes, 1
    assert layout.mesh is not None
    return routes.summed("data"), layout.mesh.shape["data"]


def _completions(batch: types.Batch, completion: logprobs.CompletionLogps, batch_kl) -> losses.Completions:
    shape_BK = batch.rewards_BK.shape
    return _operands(batch, batch_kl)._replace(
        logps_BK=completion.sum_N.reshape(shape_BK), lengths_BK=completion.count_N.astype(jnp.float32).reshape(shape_BK)
    )


def _operands(batch: types.Batch, batch_kl) -> losses.Completions:
    """What the loss of a batch reads besides the log-probs, which are 0 here."""
    shape_BK = batch.rewards_BK.shape
    return losses.Completions(
        logps_BK=jnp.zeros(shape_BK, jnp.float32),
        reference_logps_BK=batch.reference_logps_BK,
        lengths_BK=_lengths_BK(batch),
        rewards_BK=batch.rewards_BK,
        batch_kl=jnp.float32(0.0) if batch_kl is None else batch_kl,
    )


def _lengths_BK(batch: types.Batch) -> jax.Array:
    """Scored tokens of every completion, float32; axes before the rows stay."""
    lengths_NP = logprobs.sum_slots(
        jnp.asarray(batch.loss_mask_NR, jnp.float32), batch.slots_NR, slots=forward.slots_per_sequence(batch)
    )
    return lengths_NP.reshape(batch.rewards_BK.shape)


def _totals(batch: types.Batch, loss: losses.Loss) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Groups, chosen and valid tokens of the whole step: the denominators of its means."""
    rewards_BK = batch.rewards_BK.reshape(-1, batch.rewards_BK.shape[-1])
    lengths_BK = _lengths_BK(batch).reshape(rewards_BK.shape)
    zeros_BK = jnp.zeros_like(lengths_BK)
    chosen_BK = loss.chosen(losses.Completions(zeros_BK, zeros_BK, lengths_BK, rewards_BK, jnp.float32(0.0)))
    weight_B = batch.weight_B.reshape(-1)
    groups = jnp.sum(weight_B * loss.counted(rewards_BK))
    tokens = jnp.sum(weight_B[:, None] * chosen_BK * lengths_BK)
    valid = jnp.sum(batch.valid_NT, dtype=jnp.float32)
    return jnp.maximum(groups, 1.0), jnp.maximum(tokens, 1.0), jnp.maximum(valid, 1.0)


def _batch_kl(params, batch: types.Batch, *, forward_fn: forward.AnyForward, weight) -> jax.Array:
    """Mean of logp - reference logp over every completion of the step, by a forward pass of its own."""

    def add(total, micro):
        ratio_BK = logprob_step(params, micro, forward_fn=forward_fn) - micro.reference_logps_BK
        return total + jnp.sum(micro.weight_B[:, None] * ratio_BK), None

    total, _ = jax.lax.scan(add, jnp.float32(0.0), batch)
    return total / (weight * batch.rewards_BK.shape[-1])


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _carry_shapes(differentiate, params, batch, totals, batch_kl):
    micro = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    (value, pairs), grads = jax.eval_shape(
        functools.partial(differentiate, totals=totals, batch_kl=batch_kl), params, micro, number
    )
    return value, grads, pairs
