"""What a run is before it touches a device: checked configuration, model description, tokenised data, sizes.

config -> Inputs (loss, model config, data with audits) -> Plan (accumulation, steps) -> a workdir that is its own
                 Inputs, Plan -> Blueprint: what the programs are compiled for, which needs neither data nor weights
"""

import dataclasses
import json
import logging
from pathlib import Path
from typing import NamedTuple

import jax
from transformers import PreTrainedTokenizerFast

from fpo_jax import __version__, attention, chat, checkpoint, data, files, flops, hf, losses, model, optim, params
from fpo_jax import config as configuration
from fpo_jax.data import decontamination

log = logging.getLogger("fpo_jax")


class Dataset(NamedTuple):
    """Token rows, what was found while making them, and one decoded row with its scored part marked."""

    prepared: data.Prepared
    audit: data.Audit
    sample: str


class Inputs(NamedTuple):
    """What a run reads before it touches a device."""

    loss: losses.Loss
    source: Path
    model_config: model.ModelConfig
    train: Dataset
    evaluation: Dataset | None


class Plan(NamedTuple):
    """The order and the sizes of a run."""

    schedule: data.Schedule  # of the training batches
    shapes: list[tuple[int, int]]  # their (T, R): one compilation each
    accumulation: int  # micro-batches per update
    steps: int  # updates of the whole run
    warmup: int  # updates of the learning rate's rise
    horizon: int  # updates over which it falls


class Blueprint(NamedTuple):
    """What the compiled programs depend on besides the configuration and the mesh."""

    loss: losses.Loss
    model_config: model.ModelConfig
    lengths: tuple[int, ...]  # T of any batch
    scored: int  # the largest R
    warmup: int
    horizon: int
    adapter: model.Adapter | None = None


def prepare(config: configuration.Config) -> Inputs:
    """Check the configuration and read model config, tokenizer and data; touches no device and writes nothing."""
    loss = check(config)
    source = hf.local_dir(config.model.path, revision=config.model.revision or None)
    model_config = read_model(config, source)
    adapter(config, model_config)
    hf.check_weights(source, model_config)
    return Inputs(loss, source, model_config, *read_data(config, source, model_config))


def check(config: configuration.Config) -> losses.Loss:
    """Return the loss of a configuration.

    Raises:
        ValueError: with everything that is wrong with the configuration.
    """
    problems, loss = [], None
    try:
        loss = losses.resolve(config.loss.name, **configuration.loss_options(config))
    except ValueError as error:
        problems.append(str(error))
    else:
        problems += _stage_problems(config, loss)
    configuration.validate(config, extra=problems)
    assert loss is not None
    return loss


def _stage_problems(config: configuration.Config, loss: losses.Loss) -> list[str]:
    """List what does not fit the stage, and entries of a mixture that are none."""
    found = []
    for entry in config.data.mixer:
        try:
            data.parse(entry)
        except ValueError as error:
            found.append(f"data.mixer: {error}")
    for entry in config.data.decontaminate:
        try:
            decontamination.check(entry)
        except ValueError as error:
            found.append(f"data.decontaminate: {error}")
    if config.stage == "sft" and loss.name != "sft":
        found.append(f"loss.name={config.loss.name!r} does not belong to stage 'sft'; use 'sft'.")
    if loss.of_scores != (config.stage == "reward"):
        fitting = "bradley_terry or binary_cross_entropy" if config.stage == "reward" else "a loss of log-probs"
        found.append(f"loss.name={config.loss.name!r} does not belong to stage {config.stage!r}; use {fitting}.")
    if config.data.group_size < loss.minimum_candidates:
        found.append(
            f"data.group_size={config.data.group_size} leaves nothing to compare, and loss {config.loss.name!r} needs"
            f" {loss.minimum_candidates}."
        )
    if config.stage != "align" and loss.minimum_candidates == 1 and config.data.group_size != 1:
        found.append(
            f"data.group_size={config.data.group_size}: loss {config.loss.name!r} in stage {config.stage!r} trains on"
            " one response of each prompt and would ignore the others; use 1."
        )
    unused = {f"reference.{key}": f"loss {config.loss.name!r}" for key in ("path", "cache_dir")}
    unused = {} if loss.needs_reference else unused
    if config.stage == "sft":
        unused["loss.tie_policy"] = "stage 'sft'"
    if config.stage == "reward":
        unused |= dict.fromkeys(("kernel.implementation", "kernel.fuse_loss", "kernel.workspace_mib"), "stage 'reward'")
    default = configuration.default()
    for key, why in unused.items():
        value = configuration.value_at(config, key)
        if value != configuration.value_at(default, key):
            found.append(f"{key}={value!r} is not used by {why}; unset it.")
    return found


def read_model(config: configuration.Config, source: Path) -> model.ModelConfig:
    """Read the description of the model in a directory, and check that the rows fit its window."""
    model_config = hf.read_config(source)
    if config.stage == "reward":
        model.filler_id(model_config)
        model_config = dataclasses.replace(model_config, reward_head=True)
    elif model_config.reward_head:
        raise ValueError(f"{source} is a reward model, and stage {config.stage!r} needs a language model.")
    if (config.data.packing or config.data.layout != "padded") and model_config.rope.type == "dynamic":
        raise ValueError(
            f"the rotary frequencies of {source} depend on a row's length (rope type 'dynamic'), which packed texts"
            " share; set data.packing=False and data.layout='padded'."
        )
    if config.data.max_length > model_config.max_positions:
        raise ValueError(
            f"data.max_length={config.data.max_length} exceeds the model's window of {model_config.max_positions}"
            f" tokens ({source}); use at most {model_config.max_positions}."
        )
    return model_config


def read_tokenizer(config: configuration.Config, source: Path) -> PreTrainedTokenizerFast:
    """Read the tokenizer of a run: the model's, unless the configuration names another."""
    return chat.load_tokenizer(
        config.tokenizer.path or source,
        chat_template=config.tokenizer.chat_template or None,
        eos_token=config.tokenizer.eos_token or None,
    )


def read_data(
    config: configuration.Config, source: Path, model_config: model.ModelConfig
) -> tuple[Dataset, Dataset | None]:
    """Read the tokenizer and with it the training and the evaluation data."""
    tokenizer = read_tokenizer(config, source)
    hf.check_vocabulary(len(tokenizer), model_config)
    train = _dataset(config, "train", tokenizer, model_config.vocab_size)
    evaluation = _dataset(config, "eval", tokenizer, model_config.vocab_size) if config.data.eval else None
    return train, evaluation


def _dataset(config: configuration.Config, name: str, tokenizer, vocab_size: int) -> Dataset:
    """Read and tokenise the train or eval data."""
    options = config.data
    rows = configuration.row_slice(options[f"{name}_rows"])

    def read(part: data.Part) -> data.Records:
        return data.read(
            part.source,
            format=options.format,
            split=part.split or None,
            hh_split=options.hh_split,
            on_bad_row=options.on_bad_row,
            start=rows.start or 0,
            stop=rows.stop,
            data_dir=options.subfolder or None,
            revision=options.revision or None,
            tokenizer=tokenizer,
        )

    if name == "train" and options.mixer:
        records = data.mixture([data.parse(entry) for entry in options.mixer], read)
    else:
        records = read(data.Part(options[name], options[f"{name}_split"], 1.0))
    if name == "train" and options.decontaminate:
        texts = [text for entry in options.decontaminate for text in decontamination.texts(entry)]
        records = decontamination.clean(records, texts)
    if options.group_size == 1:
        records = data.best_only(records)
    chat_only = {}
    if options.rule == "chat":
        chat_only = {
            "max_prompt_length": options.max_prompt_length,
            "truncate_together": options.truncate_together,
            "auto_insert_empty_system": options.auto_insert_empty_system,
        }
    prepared, audit = data.prepare(
        records,
        tokenizer,
        rule=options.rule,
        max_length=options.max_length,
        max_response_length=options.max_response_length,
        group_size=options.group_size,
        truncation_mode=options.truncation,
        on_empty_response=options.on_empty_response,
        on_long_prompt=options.on_long_prompt,
        on_identical=options.on_identical,
        buckets=buckets(config),
        vocab_size=vocab_size,
        score_eos=config.stage != "reward",
        **chat_only,
    )
    sample = data.masked_sample(prepared, tokenizer)
    if options.packing:
        prepared = data.pack(prepared, length=options.max_length)
        audit = audit.with_packed(prepared.groups, length=options.max_length)
    return Dataset(prepared, audit, sample)


def plan(config: configuration.Config, inputs: Inputs, *, devices: int) -> Plan:
    """Work out order, shapes, accumulation, steps and warm-up.

    Args:
        config: the run's configuration.
        inputs: from `prepare`.
        devices: ways a batch is cut over the mesh.

    Raises:
        ValueError: the batch does not divide, or there is less than one batch of data.
    """
    prepared, train = inputs.train.prepared, config.train
    order = {"batch_size": train.batch_size, "seed": config.seed, "shuffle": config.data.shuffle}
    order["last_batch"] = config.data.last_batch
    if config.data.layout == "padded":
        micro_batches = accumulation(config, ways=devices)
        schedule = data.schedule(prepared, **order, buckets=buckets(config))
        steps, warmup, horizon = durations(config, steps_per_epoch=schedule.steps_per_epoch)
    else:
        per_epoch = data.steps_per_epoch(
            prepared.groups, batch_size=train.batch_size, last_batch=config.data.last_batch
        )
        steps, warmup, horizon = durations(config, steps_per_epoch=per_epoch)
        multiple = train.micro_batch_per_device * devices
        schedule = data.packed(prepared, **order, **_rows(config, inputs.model_config), multiple=multiple, steps=steps)
        micro_batches = schedule.parts // multiple
    return Plan(schedule, data.batch_shapes(schedule, steps=steps), micro_batches, steps, warmup, horizon)


def _rows(config: configuration.Config, model_config: model.ModelConfig, *, longest: int | None = None) -> dict:
    """How groups are packed: rows of at most `longest`, else of what one group may take in a row for each candidate."""
    return {
        "layout": config.data.layout,
        "longest": longest or min(config.data.group_size * config.data.max_length, attention.MAX_MASKED),
        "length": config.data.row_length,
        "head_cost": flops.head_cost(model_config),
    }


def accumulation(config: configuration.Config, *, ways: int) -> int:
    """Return the micro-batches per update, with batches cut `ways` ways over the mesh.

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
    """Return the updates of the run, of the warm-up, and of the learning rate's horizon."""
    train = config.train
    whole = max(1, round(train.epochs * steps_per_epoch))
    steps = whole if train.max_steps is None else min(whole, train.max_steps)
    horizon = whole if config.optim.decay_over == "epochs" else steps
    warmup = optim.warmup_steps(fraction=config.optim.warmup_fraction, steps=config.optim.warmup_steps, horizon=horizon)
    return steps, warmup, horizon


def blueprint(config: configuration.Config, inputs: Inputs, plan: Plan) -> Blueprint:
    """Return what the programs of a run are compiled for."""
    scored, lengths = max(scored for _, scored in plan.shapes), plan.schedule.buckets
    added = adapter(config, inputs.model_config)
    return Blueprint(inputs.loss, inputs.model_config, lengths, scored, plan.warmup, plan.horizon, added)


def adapter(config: configuration.Config, model_config: model.ModelConfig) -> model.Adapter | None:
    """Return the description of the adapter that is trained, or None.

    Raises:
        ValueError: the model has no matrix of the names asked for.
    """
    return params.adapter(model_config, **config.lora) if config.lora.rank else None


def sequential_schedule(
    config: configuration.Config,
    prepared: data.Prepared,
    model_config: model.ModelConfig,
    *,
    batch_size: int,
    longest: int,
) -> data.Schedule:
    """Return the schedule of every group once, the last of its batches of so many groups or rows filled up.

    Rows that hold groups are at most `longest`, unless a group is: those of training, for which attention was chosen.
    """
    if config.data.layout != "padded":
        return data.sequence(prepared, **_rows(config, model_config, longest=longest), rows=batch_size)
    return data.schedule(
        prepared, batch_size=batch_size, seed=0, shuffle=False, last_batch="pad", buckets=buckets(config)
    )


def fingerprints(inputs: Inputs) -> dict[str, str]:
    """Return what must be the same for a checkpoint to be resumed."""
    return {
        "model": hf.weights_fingerprint(inputs.source),
        "train data": inputs.train.prepared.fingerprint(),
        "eval data": "" if inputs.evaluation is None else inputs.evaluation.prepared.fingerprint(),
    }


def identity(config: configuration.Config) -> dict[str, object]:
    """Return what else every process of a run must have alike: the versions and every knob."""
    return {"fpo_jax": __version__, "jax": jax.__version__} | configuration.flatten(config.to_dict())


def buckets(config: configuration.Config) -> tuple[int, ...]:
    """Return the lengths T that rows are padded to, ascending."""
    return tuple(config.data.buckets) or (config.data.max_length,)


def claim_workdir(config: configuration.Config, workdir: Path, inputs: Inputs) -> None:
    """Write the run's identity into the workdir, or check that it is the same run's.

    Raises:
        ValueError: the workdir belongs to another configuration; lists what differs.
    """
    path = workdir / "config.json"
    mine = json.loads(config.to_json())
    if path.exists():
        before = json.loads(path.read_text())
        # of so many batches of an evaluation the layout decides which groups they hold
        fixed = {"data.layout", "data.row_length"} if config.train.eval_batches else set()
        changed = configuration.difference(before, mine, ignore=configuration.RESUMABLE - fixed)
        if changed:
            raise ValueError(
                f"{workdir} holds a run with another configuration:\n  "
                + "\n  ".join(changed)
                + "\nuse another --workdir, or give the old values to go on with that run."
            )
        for line in configuration.difference(before, mine):
            known = line.partition(":")[0] in configuration.FITTING
            log.info("this start has %s%s", line, "; sums may round differently" if known else "")
    elif workdir.is_dir() and (workdir / checkpoint.FOLDER).exists():
        raise ValueError(f"{workdir} holds checkpoints but no config.json; use another --workdir.")
    workdir.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps(mine, indent=2) + "\n")
    audits = {"train": inputs.train.audit.as_dict()}
    if inputs.evaluation is not None:
        audits["eval"] = inputs.evaluation.audit.as_dict()
    files.write(workdir / "audit.json", json.dumps(audits, indent=2) + "\n")
