"""The jitted steps of a run, built once from its configuration before any weight is read."""

import dataclasses
import functools
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from fpo_jax import config as configuration
from fpo_jax import models, sharding, types
from fpo_jax.models import nf4, params
from fpo_jax.optimizer import adamw, skip_step
from fpo_jax.trainer import compiled_step, device_batch, forward, run_schedule, train_state, train_step


class Steps(NamedTuple):
    """What a run computes, each step compiled once per batch shape, and where its arrays live.

    Each step has the attention of its own sequences; `logprobs` runs the model below the adapter, or with the one that
    the run starts from, or a reference of its own.
    """

    train: compiled_step.CompiledStep  # (state, batch) -> state, metrics
    evaluate: compiled_step.CompiledStep  # ((params, batch_kl), batch) -> metrics
    logprobs: compiled_step.CompiledStep  # (params, batch) -> log-probs [B, K]
    state: train_state.StateSharding
    batches: device_batch.BatchSharding
    layout: sharding.Layout
    forward_fn: forward.AnyForward  # of `train`
    choices: list[str]  # of implementations, with their reasons

    @property
    def mesh(self) -> Mesh:
        """The mesh of `layout`."""
        assert self.layout.mesh is not None
        return self.layout.mesh


def build(config: configuration.Config, blueprint: run_schedule.Blueprint, layout: sharding.Layout) -> Steps:
    """Settle implementations and shardings, and jit the steps; compiles nothing.

    Raises:
        ValueError: the mesh does not divide the parameters; an implementation cannot run here.
    """
    assert layout.mesh is not None
    mesh, dtype = layout.mesh, config.model.compute_dtype
    rate = adamw.schedule(
        kind=config.optim.schedule,
        peak=config.optim.learning_rate,
        warmup=blueprint.warmup,
        total_steps=blueprint.total_steps,
    )
    skip_rule = _skip_rule(config)
    trained = params.trained_entries(blueprint.model_config, blueprint.adapter)
    ratio = config.lora.loraplus_lr_ratio
    optimizer = adamw.optimizer(
        rate,
        b1=config.optim.b1,
        b2=config.optim.b2,
        eps=config.optim.eps,
        weight_decay=config.optim.weight_decay,
        clip_norm=config.optim.clip_norm,
        decay_mask=params.nest({entry.path: entry.decay for entry in trained}),
        state_dtype=config.optim.state_dtype,
        faster=None if ratio == 1 else (ratio, params.nest({entry.path: params.is_b(entry.path) for entry in trained})),
    )
    optimizer = skip_rule.watching(optimizer)
    forward_fn, choices = forward.for_steps(config, blueprint, layout)
    eval_forward_fn, reference_forward_fn, notes = forward.for_passes(config, blueprint, layout, forward_fn)
    state = train_state.StateSharding(config, blueprint, mesh, optimizer)
    replicas = _replicas(layout, forward_fn, state)
    if mesh.shape["data"] > 1:
        reason = "after every micro-batch, as mesh.tensor is not 1" if replicas is None else "once a step"
        notes.append(f"gradients: summed over data {reason}")
    train = functools.partial(
        train_step.train_step,
        forward_fn=forward_fn,
        loss=blueprint.loss,
        optimizer=optimizer,
        rate=rate,
        ratio_b=ratio,
        resharding=_resharding(blueprint.model_config, layout, state, compute_dtype=dtype),
        replicas=replicas,
        skip_rule=skip_rule,
    )
    evaluate = functools.partial(train_step.eval_step, forward_fn=eval_forward_fn, loss=blueprint.loss)
    evaluated = (state.all_params(state.shardings), sharding.replicated(mesh))
    score = functools.partial(train_step.logprob_step, forward_fn=reference_forward_fn)
    jitted = {
        "train_step": train_step.jit_train_step(train, mesh=mesh, state_shardings=state.shardings),
        "eval_step": train_step.jit_eval_step(evaluate, mesh=mesh, first_shardings=evaluated),
        "reference pass": train_step.jit_eval_step(score, mesh=mesh, first_shardings=state.reference),
    }
    first, second, third = (compiled_step.CompiledStep(name, step) for name, step in jitted.items())
    batches = device_batch.BatchSharding(config, layout)
    return Steps(first, second, third, state, batches, layout, forward_fn, [*choices, *notes])


def _resharding(
    model_config: models.ModelConfig, layout: sharding.Layout, state: train_state.StateSharding, *, compute_dtype: str
) -> train_step.Resharding:
    """Where the parts of a step hand over their results."""
    assert layout.mesh is not None
    on_device = jax.tree.map(lambda place: place.with_memory_kind("device"), state.shardings.opt_state)
    gather = lambda weights: weights  # noqa: E731
    if layout.gather == "step":
        gather = functools.partial(
            _gather_layers, model_config=model_config, mesh=layout.mesh, compute_dtype=compute_dtype
        )
    return train_step.Resharding(
        gather_params=gather,
        shard_grads=lambda grads: jax.lax.with_sharding_constraint(grads, state.params),
        load_opt_state=lambda opt_state: jax.tree.map(jax.device_put, opt_state, on_device),
    )


def _replicas(
    layout: sharding.Layout, forward_fn: forward.AnyForward, state: train_state.StateSharding
) -> train_step.Replicas | None:
    """The replicas along `data`, where there are several and none of them is cut over `tensor`.

    XLA's partitioner ends the process where it partitions the embedding's gather over `tensor` inside a `shard_map`
    over `data` (jaxlib 0.10.2 and 0.12.0.1: "Check failed" in ExpandDeviceGroupsWithIota).
    """
    assert layout.mesh is not None
    if layout.mesh.shape["data"] == 1 or layout.mesh.shape["tensor"] > 1:
        return None
    within = dataclasses.replace(layout, within_replica=True)
    specs = jax.tree.map(lambda place: place.spec, state.params)
    return train_step.Replicas(
        layout.mesh,
        dataclasses.replace(forward_fn, layout=within),
        lambda grads: jax.lax.with_sharding_constraint(grads, specs),
    )


def _gather_layers(
    weights: types.PyTree, *, model_config: models.ModelConfig, mesh: Mesh, compute_dtype: str
) -> types.PyTree:
    """Hold the layers' weights whole along fsdp. Matrices are cast first, as every use of them does."""
    whole = params.flatten(params.shardings(model_config, mesh=mesh, rules=sharding.GATHERED_RULES))
    is_matrix = params.flatten(params.decay_mask(model_config))

    def gathered(path, x):
        if path.partition("/")[0] not in model_config.stacks:
            return x
        if isinstance(x, nf4.NF4):  # four bits are gathered where they are read
            return x
        return jax.lax.with_sharding_constraint(x.astype(compute_dtype) if is_matrix[path] else x, whole[path])

    return params.nest({path: gathered(path, x) for path, x in params.flatten(weights).items()})


def _skip_rule(config: configuration.Config) -> skip_step.SkipRule:
    train = config.train
    weight = train.max_nonfinite if train.on_nonfinite == "stop" else 1
    return skip_step.SkipRule(train.max_nonfinite, weight=weight, sigmas=train.skip_spikes, window=train.spike_window)
