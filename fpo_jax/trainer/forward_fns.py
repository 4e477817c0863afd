"""What turns batches into log-probs or scores, in updates and in passes: which attention and which head run, and why.

config, Blueprint, where activations live -> scorers, and the choices in words. Asks no device but for its description.
"""

import dataclasses
from typing import Any

from fpo_jax import attention, logprobs, models, sharding
from fpo_jax import config as configuration
from fpo_jax.inference import reward_model
from fpo_jax.trainer import run_schedule, train_step


def of_updates(
    config: configuration.Config, blueprint: run_schedule.Blueprint, layout: sharding.Layout
) -> tuple[train_step.AnyScorer, list[str]]:
    """Settle what scores the batches of updates; returns the choices and their reasons as text."""
    model_config, dtype = blueprint.model_config, config.model.compute_dtype
    attends = _attention(config, model_config, blueprint.lengths, layout)
    gathered = f"weights: {sharding.GATHER[layout.gather]}"
    attended = f"attention: {attends.implementation} ({attends.reason})"
    choices = [gathered, attended, *_left_out(model_config)]
    if model_config.reward_head:
        scorer = reward_model.RewardScorer(
            model_config, dtype, config.model.remat, attends, layout, adapter=blueprint.adapter
        )
        return scorer, [*choices, "head: one score at the last token of a row, float32"]
    head, kept = _head(config, blueprint, model_config, layout), config.kernel.kept_logits_mib
    sizes = {
        "workspace_bytes": config.kernel.workspace_mib * 2**20,
        "kept_bytes": None if kept is None else kept * 2**20,
    }
    frozen = blueprint.adapter is not None
    explained = logprobs.explain(**head, fuse_loss=config.kernel.fuse_loss, frozen=frozen, **sizes)
    choice = logprobs.choose(**head, fuse_loss=config.kernel.fuse_loss)
    scorer = train_step.Scorer(
        config=model_config,
        compute_dtype=dtype,
        remat=config.model.remat,
        attention=attends,
        implementation=choice.implementation,
        fuse_loss=choice.fuse_loss,
        interpret=choice.interpret,
        **sizes,
        temperature=blueprint.loss.temperature,
        layout=layout,
        adapter=blueprint.adapter,
    )
    return scorer, [*choices, explained]


def kept_logits(config: configuration.Config, blueprint: run_schedule.Blueprint, layout: sharding.Layout) -> int | None:
    """Return the bytes on each device that keeping the logits of an update takes; None where they cannot be kept."""
    if blueprint.model_config.reward_head:
        return None
    return logprobs.kept_if_unlimited(**_head(config, blueprint, blueprint.model_config, layout))


def _left_out(model_config: models.ModelConfig) -> list[str]:
    """Say which drop-out of config.json is not done; `job.read_model` has refused it where nobody asked for that."""
    named = ", ".join(f"{key}={share:g}" for key, share in model_config.dropout)
    return [f"drop-out: none, by model.dropout=off; config.json names {named}"] if named else []


def of_passes(
    config: configuration.Config,
    blueprint: run_schedule.Blueprint,
    layout: sharding.Layout,
    scorer: train_step.AnyScorer,
) -> tuple[train_step.AnyScorer, train_step.AnyScorer, list[str]]:
    """Settle what scores the batches of evaluations and of the reference pass; tells what differs from updates."""
    told = []

    def attention_of(name: str, model_config: models.ModelConfig, lengths: tuple[int, ...]) -> attention.Choice:
        choice = _attention(config, model_config, lengths or blueprint.lengths, layout)
        if choice != scorer.attention:
            told.append(f"{name}: attention: {choice.implementation} ({choice.reason})")
        return choice

    with configuration.about("evaluations"):
        attends = attention_of("evaluations", blueprint.model_config, blueprint.evaluation_lengths)
    evaluation_scorer = dataclasses.replace(scorer, attention=attends)
    other = blueprint.reference
    described = other or blueprint.model_config
    with configuration.about("reference pass" if other is None else "reference.path"):
        attends = attention_of("reference pass", described, blueprint.reference_lengths)
        reference_scorer = dataclasses.replace(scorer, config=described, attention=attends, adapter=None)
        if isinstance(reference_scorer, train_step.Scorer) and other is not None:
            head = logprobs.choose(**_head(config, blueprint, other, layout), fuse_loss="off")
            if head.implementation != reference_scorer.implementation:
                told.append(f"reference pass: log-probs: {head.implementation} ({head.reason})")
            reference_scorer = dataclasses.replace(
                reference_scorer, implementation=head.implementation, interpret=head.interpret
            )
    return evaluation_scorer, reference_scorer, told


def _attention(
    config: configuration.Config, model_config: models.ModelConfig, lengths: tuple[int, ...], layout: sharding.Layout
) -> attention.Choice:
    assert layout.mesh is not None
    target = logprobs.Target.of(layout.mesh.devices.flat[0])
    return attention.choose(
        config.model.attention,
        platform=target.platform,
        dtype=config.model.compute_dtype,
        head_dim=model_config.head_dim,
        heads=model_config.heads,
        kv_heads=model_config.kv_heads,
        positions=lengths,
        sliding_window=model_config.sliding_window,
        soft_cap=model_config.attention_soft_cap,
        segments=config.data.packing or config.data.layout != "padded",
        shared=config.data.layout == "shared",
        compute_capability=target.compute_capability,
        layout=layout,
    )


def _head(
    config: configuration.Config,
    blueprint: run_schedule.Blueprint,
    model_config: models.ModelConfig,
    layout: sharding.Layout,
) -> dict[str, Any]:
    """Facts for the choice of the head, at the sizes of an update."""
    assert layout.mesh is not None
    slotted = config.data.layout != "padded"
    rows = config.train.micro_batch_per_device * layout.row_ways * (1 if slotted else config.data.group_size)
    return {
        "target": logprobs.Target.of(layout.mesh.devices.flat[0]),
        "shapes": logprobs.HeadShapes(
            tokens=rows * blueprint.scored, width=model_config.width, vocab=model_config.vocab_size
        ),
        "dtype": config.model.compute_dtype,
        "head_dtype": config.model.param_dtype,
        "requested": config.kernel.implementation,
        "placement": layout.head,
    }
