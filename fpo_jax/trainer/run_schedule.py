"""The order and the sizes of a run: batches, steps, passes, and what its programs are compiled for."""

import logging
import math
from typing import NamedTuple

from fpo_jax import attention, data, losses, models
from fpo_jax import config as configuration
from fpo_jax.data import group_packing
from fpo_jax.optimizer import adamw
from fpo_jax.perf import flops
from fpo_jax.trainer import adapters
from fpo_jax.trainer.run_inputs import Dataset, Inputs, buckets

log = logging.getLogger("fpo_jax")


class RunSchedule(NamedTuple):
    """The order and the sizes of a run, and its passes over whole sets."""

    schedule: data.Schedule  # of the training batches
    shapes: list[tuple[int, int]]  # their (T, R): one compilation each
    accumulation: int  # micro-batches per step
    steps: int  # steps of the whole run
    warmup: int  # steps of the learning rate's rise
    total_steps: int  # steps over which it falls
    evaluation: data.Schedule | None  # one pass over the evaluation data; None without
    references: tuple[data.Schedule | None, data.Schedule | None]  # of the train and the eval groups; None without


class Blueprint(NamedTuple):
    """What the compiled programs depend on besides the configuration and the mesh."""

    loss: losses.Loss
    model_config: models.ModelConfig
    lengths: tuple[int, ...]  # T of any batch of a step
    scored: int  # the largest R
    warmup: int
    total_steps: int
    adapter: models.Adapter | None = None
    evaluation_lengths: tuple[int, ...] = ()  # T of any batch of an evaluation; () = those of steps
    reference_lengths: tuple[int, ...] = ()  # and of a reference pass
    reference: models.ModelConfig | None = None  # None = the model below the adapter, or with it
    reference_adapted: bool = False  # with the adapter that the run starts from


def build(
    config: configuration.Config, inputs: Inputs, *, devices: int, sizes: group_packing.Sizes | None = None
) -> RunSchedule:
    """Work out order, shapes, accumulation, steps, warm-up and the batches of every pass.

    Args:
        config: the run's configuration.
        inputs: from `prepare`.
        devices: ways a batch is cut over the mesh.
        sizes: of the training groups in the layout of the configuration, where they are known.

    Raises:
        ValueError: the batch does not divide, there is less than one batch of data, a row holds not even one group.
    """
    schedule, micro_batches, (steps, warmup, total_steps) = training(config, inputs, devices=devices, sizes=sizes)
    shapes = data.batch_shapes(schedule, steps=steps)
    if inputs.evaluation is None and not config.completions.count:
        log.info("no evaluation: neither data.eval nor completions.count is set.")
    return RunSchedule(
        schedule, shapes, micro_batches, steps, warmup, total_steps, *_passes(config, inputs, schedule, devices)
    )


def training(
    config: configuration.Config,
    inputs: Inputs,
    *,
    devices: int,
    sizes: group_packing.Sizes | None = None,
    most: int | None = None,
) -> tuple[data.Schedule, int, tuple[int, int, int]]:
    """Return the schedule of the training batches, the micro-batches of a step, and the durations.

    Args:
        config: of the run.
        inputs: of the run.
        devices: ways a batch is cut over the mesh.
        sizes: as for `build`.
        most: steps whose groups are packed; None = all.

    Raises:
        ValueError: as `build`.
    """
    prepared, train = inputs.train.prepared, config.train
    order = {"batch_size": train.batch_size, "seed": config.seed, "shuffle": config.data.shuffle}
    order["last_batch"] = config.data.last_batch
    if config.data.layout == "padded":
        micro_batches = accumulation(config, ways=devices)
        schedule = data.schedule(prepared, **order, buckets=buckets(config))
        return schedule, micro_batches, durations(config, steps_per_epoch=schedule.steps_per_epoch)
    per_epoch = data.steps_per_epoch(prepared.groups, batch_size=train.batch_size, last_batch=config.data.last_batch)
    lasts = durations(config, steps_per_epoch=per_epoch)
    multiple = train.micro_batch_per_device * devices
    options = _rows(config, inputs.model_config) | {"multiple": multiple, "steps": min(lasts[0], most or lasts[0])}
    schedule = data.packed(prepared, **order, **options, sizes=sizes)
    return schedule, schedule.parts // multiple, lasts


def longest(config: configuration.Config, sizes: group_packing.Sizes | None) -> int:
    """Return a bound on the tokens of a training sequence.

    Args:
        config: of the run, with its layout.
        sizes: of the groups; None for sequences that hold one completion.
    """
    if sizes is None:
        return buckets(config)[-1]
    bound = min(config.data.group_size * config.data.max_length, attention.MAX_MASKED)
    return max(int(sizes.tokens_B.max()), config.data.row_length or bound)


def _passes(
    config: configuration.Config, inputs: Inputs, schedule: data.Schedule, devices: int
) -> tuple[data.Schedule | None, tuple[data.Schedule | None, data.Schedule | None]]:
    """Return the passes of an evaluation and of the reference, whose rows are no longer than training's can be."""

    def one_pass(dataset: Dataset, per_device: int, sizes: group_packing.Sizes | None = None) -> data.Schedule:
        options = {"batch_size": per_device * devices, "longest": schedule.buckets[-1], "sizes": sizes}
        return sequential_schedule(config, dataset.prepared, inputs.model_config, **options)

    evaluation = reference_train = reference_eval = None
    per_device = config.reference.batch_per_device
    if inputs.loss.needs_reference:
        reference_train = one_pass(inputs.train, per_device, schedule.sizes)
    if inputs.evaluation is not None:
        with configuration.about("data.eval"):
            evaluation = one_pass(inputs.evaluation, config.train.eval_batch_per_device)
        if inputs.loss.needs_reference:
            reference_eval = one_pass(inputs.evaluation, per_device, evaluation.sizes)
    return evaluation, (reference_train, reference_eval)


def _rows(config: configuration.Config, model_config: models.ModelConfig, *, longest: int | None = None) -> dict:
    """How groups are packed: rows of at most `longest`, else of what a group takes with a row for each completion."""
    return {
        "layout": config.data.layout,
        "longest": longest or min(config.data.group_size * config.data.max_length, attention.MAX_MASKED),
        "length": config.data.row_length,
        "head_cost": flops.head_cost(model_config),
    }


def accumulation(config: configuration.Config, *, ways: int) -> int:
    """Return the micro-batches per step, with batches cut `ways` ways over the mesh.

    Raises:
        ValueError: the batch does not divide.
    """
    train = config.train
    per_pass = train.micro_batch_per_device * ways
    if train.batch_size % per_pass:
        near = sorted({max(1, train.batch_size // per_pass) * per_pass, (train.batch_size // per_pass + 1) * per_pass})
        raise ValueError(
            f"train.batch_size={train.batch_size} is not divisible by train.micro_batch_per_device="
            f"{train.micro_batch_per_device} x {ways} devices = {per_pass}; use {' or '.join(map(str, near))}."
        )
    return train.batch_size // per_pass


def durations(config: configuration.Config, *, steps_per_epoch: int) -> tuple[int, int, int]:
    """Return the steps of the run, of the warm-up, and of the learning rate's decay.

    Raises:
        ValueError: more steps than the epochs have, a warm-up that does not end or a window that is not full within
            the run.
    """
    train, optimizer = config.train, config.optim
    whole = max(1, round(train.epochs * steps_per_epoch))
    steps = whole if train.max_steps is None else train.max_steps
    if steps > whole:
        raise ValueError(
            f"train.max_steps={steps} exceeds the {whole} steps of train.epochs={train.epochs:g} ({steps_per_epoch} an"
            f" epoch); use at most {whole}, or train.epochs={math.ceil(100 * steps / steps_per_epoch) / 100:g}."
        )
    total_steps = whole if optimizer.decay_over == "epochs" else steps
    warmup = adamw.warmup_steps(
        fraction=optimizer.warmup_fraction, steps=optimizer.warmup_steps, total_steps=total_steps
    )
    _check_warmup(config, warmup, total_steps, steps=steps)
    if train.skip_spikes and train.spike_window >= steps:
        shorter = f"use a window of at most {steps - 1}, or skip_spikes=0" if steps > 2 else "use skip_spikes=0"
        raise ValueError(
            f"train.skip_spikes={train.skip_spikes:g} skips nothing in a run of {steps} steps: before"
            f" train.spike_window={train.spike_window} steps no deviation is known; {shorter}."
        )
    return steps, warmup, total_steps


def _check_warmup(config: configuration.Config, warmup: int, total_steps: int, *, steps: int) -> None:
    """Refuse a warm-up after which no step is left: step i, counted from 0, has the rate at i."""
    if warmup == 0 or warmup < steps:
        return
    given, fraction = config.optim.warmup_steps, config.optim.warmup_fraction
    if (
        steps == 1 and given is None and fraction * total_steps < 1
    ):  # a trial of one step, and a share that is rounded up
        log.warning("optim.warmup_fraction=%g: the learning rate of the only step is 0.", fraction)
        return
    name, value, most = "steps", given, f"{steps - 1}"
    if given is None:
        name, value, most = "fraction", fraction, f"{math.floor(1000 * (steps - 1) / total_steps) / 1000:g}"
    raise ValueError(
        f"optim.warmup_{name}={value:g} is a warm-up of {warmup} steps in a run of {steps}, whose learning rate never"
        f" reaches its peak; use at most {most}."
    )


def blueprint(config: configuration.Config, inputs: Inputs, build: RunSchedule) -> Blueprint:
    """Return what the programs of a run are compiled for."""
    passes = [() if one is None else one.buckets for one in (build.evaluation, *build.references)]
    return Blueprint(
        inputs.loss,
        inputs.model_config,
        build.schedule.buckets,
        max(scored for _, scored in build.shapes),
        build.warmup,
        build.total_steps,
        adapters.of_run(config, inputs.model_config),
        evaluation_lengths=passes[0],
        reference_lengths=tuple(sorted({*passes[1], *passes[2]})),
        reference=None if inputs.reference is None else inputs.reference.model_config,
        reference_adapted=adapters.in_reference(config),
    )


def sequential_schedule(
    config: configuration.Config,
    prepared: data.Prepared,
    model_config: models.ModelConfig,
    *,
    batch_size: int,
    longest: int,
    sizes: group_packing.Sizes | None = None,
) -> data.Schedule:
    """Return the schedule of every group once, the last of its batches of so many groups or rows filled up.

    Args:
        config: of the run.
        prepared: the rows.
        model_config: of the run's model.
        batch_size: groups, or rows that hold groups, of a batch.
        longest: bound on rows that hold groups, unless a group is longer.
        sizes: of the groups, where they are known.

    Raises:
        ValueError: a group is longer than `data.row_length`.
    """
    if config.data.layout != "padded":
        rows = _rows(config, model_config, longest=longest)
        return data.sequence(prepared, **rows, rows=batch_size, sizes=sizes)
    return data.schedule(
        prepared, batch_size=batch_size, seed=0, shuffle=False, last_batch="pad", buckets=buckets(config)
    )
