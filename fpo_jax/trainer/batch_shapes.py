"""What a plan knows of a run without its weights: model, batch shapes, steps; from the data where they are at hand.

configuration -> Known -> Sizes. The data are read where they and the tokenizer are files of this machine; elsewhere the
limits of the configuration bound the shapes, and `plan.groups` says how many groups there are.
"""

import logging
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import huggingface_hub.errors
import numpy as np

from fpo_jax import config as configuration
from fpo_jax import data, losses, models
from fpo_jax.data import group_packing
from fpo_jax.io import terminal
from fpo_jax.perf import flops
from fpo_jax.trainer import adapters, run_inputs, run_schedule

log = logging.getLogger("fpo_jax")


class Shape(NamedTuple):
    """Of the largest batch of a program."""

    length: int  # T
    scored: int  # R
    places: int = 1  # groups that a row has places for, where it holds groups


class Sizes(NamedTuple):
    """A run's model, shapes and durations."""

    blueprint: run_schedule.Blueprint
    train_step: Shape
    accumulation: int  # micro-batches of the largest step
    filled: float  # mean share of them that hold groups; the others are passed over
    evaluation: Shape | None  # None without evaluation
    scoring: Shape | None  # of the reference pass over the training data; None without
    scoring_eval: Shape | None  # and over the evaluation data, where its rows are larger
    scoring_batches: int | None  # of the pass over the training data; None without, or unknown
    groups: int | None  # of the training data; None = unknown
    steps: int | None  # steps of the run
    valid: flops.Work | None  # mean of a step's real rows; None = unknown
    origin: str  # where the shapes come from, in words


class Known(NamedTuple):
    """What is read of a run without its weights."""

    loss: losses.Loss
    model_config: models.ModelConfig
    reference: run_inputs.Reference | None  # of its own
    inputs: run_inputs.Inputs | None  # None where the data are not here
    why: str  # they are not


def read(config: configuration.Config) -> Known:
    """Read the model's description, and the data where they are here.

    Raises:
        ValueError: the configuration, the model or the data cannot be used.
    """
    loss = run_inputs.check(config)
    source = description(config.model.path, revision=config.model.revision or None)
    model_config = run_inputs.read_model(config, source)
    reference = None
    if loss.needs_reference and config.reference.path:
        with configuration.about("reference.path"):
            other = description(config.reference.path)
            reference = run_inputs.Reference(other, run_inputs.read_reference(config, other))
    return Known(loss, model_config, reference, *_inputs(config, loss, source, model_config, reference))


def sizes(config: configuration.Config, known: Known, *, ways: int) -> Sizes:
    """Return the shapes and the durations of a run.

    Args:
        config: of the run, in which nothing is automatic.
        known: of it.
        ways: that a batch is cut over the mesh.

    Raises:
        ValueError: the configuration cannot run.
    """
    if known.inputs is None:
        return _bounds(config, known, ways=ways)
    inputs = known.inputs
    plan, batch = run_schedule.build(config, inputs, devices=ways), config.train.batch_size
    evaluation, scoring, scoring_eval = (
        None if one is None else largest(one, one.steps_per_epoch) for one in (plan.evaluation, *plan.references)
    )
    if scoring and scoring_eval and scoring_eval.length <= scoring.length and scoring_eval.scored <= scoring.scored:
        scoring_eval = None
    rows = inputs.train.prepared
    texts, contexts = rows.text_lengths(np.arange(len(rows.lengths_N))), 0
    filled = 1.0
    if plan.schedule.rows is not None:
        used = [data.row_sizes(plan.schedule, number).rows for number in range(plan.steps)]
        filled = float(np.mean(used)) / plan.schedule.parts
        found, everything = plan.schedule.rows.packing.sizes, np.arange(rows.groups)
        texts, contexts = group_packing.texts(found, everything, texts, group_size=rows.group_size)
    total = flops.work(texts, rows.loss_tokens_N, contexts=contexts, sliding_window=known.model_config.windows)
    return Sizes(
        run_schedule.blueprint(config, inputs, plan),
        largest(plan.schedule, plan.steps),
        plan.accumulation,
        filled,
        evaluation,
        scoring,
        scoring_eval,
        None if plan.references[0] is None else plan.references[0].steps_per_epoch,
        rows.groups,
        plan.steps,
        flops.Work(*(round(number * batch / rows.groups) for number in total)),
        f"measured on the data: {rows.groups:,} groups",
    )


def largest(schedule: data.Schedule, steps: int) -> Shape:
    """Return the largest shape of the batches of so many steps."""
    places = 1 if schedule.rows is None else schedule.rows.packing.places
    return Shape(*data.batch_shapes(schedule, steps=steps)[-1], places)


def description(name_or_path: str, *, revision: str | None = None) -> Path:
    """Return a directory that holds a model's config.json; of a hub name that file alone is fetched.

    Raises:
        ValueError: there is none, or it cannot be reached.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    try:
        return Path(huggingface_hub.hf_hub_download(str(name_or_path), "config.json", revision=revision)).parent
    except (OSError, huggingface_hub.errors.HFValidationError) as error:
        raise ValueError(
            f"{name_or_path} is no directory here, and its config.json could not be fetched from the hub"
            f" ({type(error).__name__}: {terminal.first_line(error)}); a plan needs only that file: give a directory"
            " that holds it as model.path."
        ) from error


def _inputs(config, loss, source: Path, model_config, reference) -> tuple[run_inputs.Inputs | None, str]:
    """Read the data where they are files of this machine; else None and why."""
    sources = [data.parse(entry).source for entry in config.data.mixer] or [config.data.train]
    if absent := [source for source in sources if not Path(source).exists()]:
        return None, f"{absent[0]} is not a file here"
    try:
        datasets = run_inputs.read_data(config, run_inputs.read_encoder(config, source), model_config)
    except ValueError as error:
        return None, f"the data could not be read ({str(error).rstrip('.')})"
    inputs = run_inputs.Inputs(loss, source, model_config, *datasets, reference)
    run_inputs.check_reference_ids(inputs)
    return inputs, ""


def _bounds(config: configuration.Config, known: Known, *, ways: int) -> Sizes:
    """The largest shapes that the configuration allows."""
    loss, model_config, reference = known.loss, known.model_config, known.reference
    length, lengths = config.data.max_length, run_inputs.buckets(config)
    most = config.data.max_completion_length or length - 1  # rule chat: a prompt may be one token
    most = length - 1 if config.data.packing else most
    if config.data.layout == "padded":
        accumulation = run_schedule.accumulation(config, ways=ways)
    else:  # a group a row
        length, most = config.data.row_length or config.data.group_size * length, config.data.group_size * most
        lengths, most = (length,), min(most, length - 1)
        accumulation = -(-config.train.batch_size // (config.train.micro_batch_per_device * ways))
    shape = Shape(length, data.scored_positions(most, length=length))
    groups, steps, warmup, total_steps = config.plan.groups, None, 0, 1
    if groups is not None:
        steps_per_epoch = data.steps_per_epoch(
            groups, batch_size=config.train.batch_size, last_batch=config.data.last_batch
        )
        steps, warmup, total_steps = run_schedule.durations(config, steps_per_epoch=steps_per_epoch)
    batches = None
    if loss.needs_reference and groups is not None:
        batches = -(-groups // (config.reference.batch_per_device * ways))
    counted = "plan.groups is unset" if groups is None else f"{groups:,} groups by plan.groups"
    return Sizes(
        run_schedule.Blueprint(
            loss,
            model_config,
            lengths,
            shape.scored,
            warmup,
            total_steps,
            adapters.of_run(config, model_config),
            reference=None if reference is None else reference.model_config,
            reference_adapted=adapters.in_reference(config),
        ),
        shape,
        accumulation,
        1.0,
        shape if config.data.eval else None,
        shape if loss.needs_reference else None,
        None,
        batches,
        groups,
        steps,
        None,
        f"the largest that the configuration allows, every position counted as a token, for {known.why}; {counted}",
    )
