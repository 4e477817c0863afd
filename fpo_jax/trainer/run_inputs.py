"""What a run reads: checked configuration, model description, tokenised data. Touches no device.

Nothing is written but tokenised data that are worth keeping (`dataset_cache`).
"""

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from fpo_jax import config as configuration
from fpo_jax import data, hf, losses, models, tokenization
from fpo_jax.data import Dataset, dataset_folder, decontamination, record_file, worker_pool
from fpo_jax.trainer import adapters, best_checkpoint, dataset_cache, reward_labels, start_checks

log = logging.getLogger("fpo_jax")


class Reference(NamedTuple):
    """A reference that is not the model a run starts from."""

    source: Path
    model_config: models.ModelConfig


class Inputs(NamedTuple):
    """What a run reads before it touches a device."""

    loss: losses.Loss
    source: Path
    model_config: models.ModelConfig
    train: Dataset
    evaluation: Dataset | None
    reference: Reference | None = None  # None = the model of `source`, or none needed
    adapter: Path | None = None  # directory that it starts from; None = none, or drawn
    encoder: tokenization.Encoder | None = None  # tokenizer and prompt format; None where rows were made without
    rows: Mapping[str, Iterable[Mapping[str, Any]]] = MappingProxyType({})  # train or eval -> its rows in memory


Rows = Mapping[str, Iterable[Mapping[str, Any]]]  # train or eval -> rows in memory, of which each has its columns


def with_rows(config: configuration.Config, rows: Rows) -> configuration.Config:
    """Return the configuration of a run on rows in memory, which names them where a source would stand.

    Raises:
        ValueError: the configuration names a source too.
    """
    config = config.copy_and_resolve_references()
    for name in rows:
        named = [key for key in (name, f"{name}_split") if config.data[key] not in ("", IN_MEMORY)]
        named += ["mixer"] if name == "train" and config.data.mixer else []
        if named:
            raise ValueError(
                f"{name}_dataset is given, and so is data.{named[0]}={config.data[named[0]]!r}; unset one of them."
            )
        config.data[name] = IN_MEMORY
    return config


def prepare(config: configuration.Config, *, workdir: Path | None = None, rows: Rows = MappingProxyType({})) -> Inputs:
    """Check the configuration and read model config, tokenizer and data; touches no device.

    Args:
        config: of the run; of one on rows in memory, from `with_rows`.
        workdir: where large tokenised data are kept; None = nothing is written, unless `data.cache_dir` is set.
        rows: in memory.
    """
    loss = check(config, extra=[] if workdir is None else start_checks.problems(config, workdir))
    source = hf.local_dir(config.model.path, revision=config.model.revision or None)
    model_config = read_model(config, source)
    adapters.of_run(config, model_config)
    adapter = adapters.directory_of(config)
    hf.check_weights(source, model_config)
    reference = None
    if loss.needs_reference and config.reference.path:
        with configuration.about("reference.path"):
            other = hf.local_dir(config.reference.path)
            reference = Reference(other, read_reference(config, other))
            hf.check_weights(*reference)
    encoder = read_encoder(config, source)
    read = read_data(config, encoder, model_config, workdir=workdir, rows=rows)
    inputs = Inputs(loss, source, model_config, *read, reference, adapter, encoder, rows)
    check_reference_ids(inputs)
    reward_labels.check(loss, inputs.train.prepared, None if inputs.evaluation is None else inputs.evaluation.prepared)
    return inputs


def check(config: configuration.Config, *, extra: Sequence[str] = ()) -> losses.Loss:
    """Return the loss of a configuration.

    Args:
        config: of the run.
        extra: problems that others found.

    Raises:
        ValueError: with everything that is wrong with the configuration.
    """
    problems, loss = [*extra], None
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
    found = best_checkpoint.problems(config, loss)
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
    if config.data.group_size < loss.minimum_completions:
        found.append(
            f"data.group_size={config.data.group_size} leaves nothing to compare, and loss {config.loss.name!r} needs"
            f" {loss.minimum_completions}."
        )
    if config.stage != "align" and loss.minimum_completions == 1 and config.data.group_size != 1:
        found.append(
            f"data.group_size={config.data.group_size}: loss {config.loss.name!r} in stage {config.stage!r} trains on"
            " one completion of each prompt and would ignore the others; use 1."
        )
    unused = {
        f"reference.{key}": f"loss {config.loss.name!r}" for key in ("path", "adapter", "batch_per_device", "cache_dir")
    }
    unused = {} if loss.needs_reference else unused
    if config.stage == "sft":
        unused["loss.tie_policy"] = "stage 'sft'"
    if config.stage == "reward":
        names = ("implementation", "fuse_loss", "workspace_mib", "kept_logits_mib")
        unused |= dict.fromkeys((f"kernel.{name}" for name in names), "stage 'reward'")
    default = configuration.default()
    for key, why in unused.items():
        value = configuration.value_at(config, key)
        if value != configuration.value_at(default, key):
            found.append(f"{key}={value!r} is not used by {why}; unset it.")
    return found


def read_model(config: configuration.Config, source: Path) -> models.ModelConfig:
    """Read the description of the model in a directory, and check that the rows fit its window."""
    model_config = hf.read_config(source)
    if config.stage == "reward":
        models.pad_token_id(model_config)
        model_config = dataclasses.replace(model_config, reward_head=True)
    elif model_config.reward_head:
        raise ValueError(f"{source} is a reward model, and stage {config.stage!r} needs a language model.")
    if model_config.dropout and config.model.dropout == "refuse":
        named = ", ".join(f"{key}={share:g}" for key, share in model_config.dropout)
        raise ValueError(
            f"config.json of {source} names drop-out ({named}), and nothing is dropped in training here; set"
            " model.dropout=off to train without it."
        )
    for name in ("router_aux_weight", "router_z_weight"):
        if config.model[name] is not None and not model_config.experts:
            raise ValueError(
                f"model.{name}={config.model[name]} is not used by {source}, which has no experts; unset it."
            )
    if (config.mesh.expert or 1) != 1 and not model_config.experts:
        raise ValueError(
            f"mesh.expert={config.mesh.expert} is not used by {source}, which has no experts; give the devices to"
            " mesh.fsdp."
        )
    if model_config.experts and config.model.matmul_dtype == "fp8":
        raise ValueError(
            f"{source} is a mixture of experts, whose grouped products are not done in 8 bits; unset"
            " model.matmul_dtype."
        )
    _check_rows(config, source, model_config)
    return model_config


def read_reference(config: configuration.Config, source: Path) -> models.ModelConfig:
    """Read the description of a reference of its own, and check that it can score the rows."""
    model_config = hf.read_config(source)
    if model_config.reward_head:
        raise ValueError(f"{source} is a reward model; give a language model.")
    _check_rows(config, source, model_config)
    return model_config


def check_reference_ids(inputs: Inputs) -> None:
    """Refuse a reference of its own that has no embedding for a token of the data."""
    for dataset in (inputs.train, inputs.evaluation):
        if inputs.reference is None or dataset is None:
            continue
        most, known = int(dataset.prepared.tokens_S.max()), inputs.reference.model_config.vocab_size
        if most >= known:
            raise ValueError(
                f"reference.path: the data hold token {most}, and {inputs.reference.source} has {known} embeddings;"
                " give a reference that shares the tokenizer of model.path."
            )


def _check_rows(config: configuration.Config, source: Path, model_config: models.ModelConfig) -> None:
    """Refuse a model that cannot run the rows as they are laid out."""
    depends = model_config.rotation_depends_on_length(config.data.max_length)
    if (config.data.packing or config.data.layout not in ("auto", "padded")) and depends:
        raise ValueError(
            f"the rotary frequencies of {source} depend on a row's length (rope type {model_config.rope.type!r}), which"
            " packed texts share; set data.packing=False and data.layout='padded'."
        )
    if config.data.max_length > model_config.max_positions:
        raise ValueError(
            f"data.max_length={config.data.max_length} exceeds the model's window of {model_config.max_positions}"
            f" tokens ({source}); use at most {model_config.max_positions}."
        )


PARALLEL_FROM = 4000  # records; to start processes takes as long as to tokenise so many
IN_MEMORY = "<rows in memory>"  # in the place of a source
LIMITS = ("max_length", "max_prompt_length", "max_completion_length", "truncation")


def read_encoder(config: configuration.Config, source: Path) -> tokenization.Encoder:
    """Read the tokenizer of a run, the model's unless the configuration names another, and settle its prompt format."""
    tokenizer = tokenization.load_tokenizer(
        config.tokenizer.path or source,
        chat_template=config.tokenizer.chat_template or None,
        eos_token=config.tokenizer.eos_token or None,
    )
    options = config.data
    settled = tokenization.PromptFormat(
        rule=options.rule,
        chat_template_kwargs=tokenization.parse_kwargs(config.tokenizer.chat_template_kwargs),
        auto_insert_empty_system=options.auto_insert_empty_system,
        prepend_bos=options.prepend_bos,
        assistant_header=options.assistant_header,
        append_eos=options.append_eos,
        thoughts=options.thoughts,
        limits={name: options[name] for name in LIMITS},
    )
    encoder = tokenization.encoder(tokenizer, settled, end_ids=hf.end_ids(source))
    trained = {"model.path": source}
    if config.lora.path:
        trained["lora.path"] = hf.adapter_dir(config.lora.path)
    for name, folder in trained.items():
        if tokenization.prompt_format.read(folder) is not None and not tokenization.render_alike(
            encoder, before := tokenization.resolve(folder)
        ):
            described = name, before.format.text, encoder.format.text
            log.warning("%s was trained with another prompt format: %s; this run goes on with: %s", *described)
    return encoder


def read_data(
    config: configuration.Config,
    encoder: tokenization.Encoder,
    model_config: models.ModelConfig,
    *,
    workdir: Path | None = None,
    rows: Rows = MappingProxyType({}),
) -> tuple[Dataset, Dataset | None]:
    """Read the training and the evaluation data with the run's tokenizer and prompt format; the rest as `prepare`."""
    hf.check_vocabulary(len(encoder.tokenizer), model_config)
    kept = dataset_cache.place(config, workdir)
    train = _dataset(config, "train", encoder, model_config, kept, rows)
    evaluation = _dataset(config, "eval", encoder, model_config, kept, rows) if config.data.eval else None
    return train, evaluation


def reward_pad_id(encoder: tokenization.Encoder, model_config: models.ModelConfig) -> int:
    """Return the pad token of a reward model that is trained here: its tokenizer's, where the model knows that one."""
    pad_id = encoder.tokenizer.pad_token_id
    if isinstance(pad_id, int) and pad_id < model_config.vocab_size:
        return pad_id
    return models.pad_token_id(model_config)


def _dataset(
    config: configuration.Config,
    name: str,
    encoder: tokenization.Encoder,
    model_config: models.ModelConfig,
    kept: Path | None,
    rows: Rows,
) -> Dataset:
    """Return the train or eval data, from the folder where they are kept if they are, or may be."""
    reward_pad = reward_pad_id(encoder, model_config) if config.stage == "reward" else None
    if (config.data[name] == IN_MEMORY) != (name in rows):
        raise ValueError(f"data.{name}={IN_MEMORY!r} stands for {name}_dataset of fpo_jax.Trainer; give both or none.")

    def make(folder: Path | None) -> Dataset:
        return _made(config, name, encoder, model_config.vocab_size, reward_pad, folder, rows.get(name))

    sources = None if kept is None or name in rows else dataset_cache.sources(config, name)
    if kept is None or sources is None or not dataset_cache.is_kept(config, sources):
        return make(None)
    parts = dataset_cache.parts(config, name, sources, encoder, model_config, reward_pad_id=reward_pad)
    return dataset_cache.kept(kept, name, parts, sources, make)


def _made(
    config: configuration.Config,
    name: str,
    encoder: tokenization.Encoder,
    vocab_size: int,
    reward_pad: int | None,
    folder: Path | None,
    given: Iterable[Mapping[str, Any]] | None = None,
) -> Dataset:
    """Read and tokenise the train or eval data; what is large goes into the folder where there is one."""
    options, tokenizer = config.data, encoder.tokenizer
    writer = None if folder is None else record_file.Writer(folder / "records.tmp")
    rows = configuration.row_slice(options[f"{name}_rows"])

    def read(part: data.Part) -> data.Records:
        return data.read(
            part.source if given is None else given,
            format=options.format,
            split=part.split or None,
            hh_split=options.hh_split,
            on_bad_row=options.on_bad_row,
            start=rows.start or 0,
            stop=rows.stop,
            data_dir=options.subfolder or None,
            revision=options.revision or None,
            tokenizer=tokenizer,
            writer=writer,
            wants=wanted(config),
            rule=options.rule,
            turns=options.assistant_turns,
            name=f"{name}_dataset",
        )

    if name == "train" and options.mixer:
        records = data.mixture([data.parse(entry) for entry in options.mixer], read)
    else:
        records = read(data.Part(options[name], options[f"{name}_split"], 1.0))
    if name == "train" and options.decontaminate:
        texts = [text for entry in options.decontaminate for text in decontamination.comparable(entry)]
        records = decontamination.clean(records, texts, workers=_workers(records))
    if options.group_size == 1:
        records = data.best_only(records)
    of_rule = {"cut_prompts_together": options.cut_prompts_together}
    if options.rule == "chat":
        of_rule = {"max_prompt_length": options.max_prompt_length, "truncate_together": options.truncate_together}
        of_rule |= {"assistant_turns": options.assistant_turns}
    prepared, audit = data.prepare(
        records,
        encoder,
        max_length=options.max_length,
        max_completion_length=options.max_completion_length,
        group_size=options.group_size,
        truncation_mode=options.truncation,
        on_bad_row=options.on_bad_row,
        on_empty_completion=options.on_empty_completion,
        on_long_prompt=options.on_long_prompt,
        on_identical=options.on_identical,
        buckets=buckets(config),
        vocab_size=vocab_size,
        reward_pad_id=reward_pad,
        most=config.train.eval_groups if name == "eval" else None,
        workers=_workers(records),
        tokens_file=None if folder is None else folder / dataset_folder.TOKENS,
        **of_rule,
    )
    if writer is not None:
        writer.path.unlink(missing_ok=True)
    sample = data.masked_sample(prepared, tokenizer)
    if options.packing:
        prepared = data.pack(prepared, length=options.max_length)
        audit = audit.with_packed(prepared.groups, length=options.max_length)
    return Dataset(prepared, audit, sample)


def wanted(config: configuration.Config) -> str:
    """Return what the run trains on, one of `auto_format.WANTS`."""
    loss = losses.resolve(config.loss.name, **configuration.loss_options(config))
    if config.stage == "sft":
        return "demonstrations"
    if config.stage == "reward" and loss.minimum_completions == 1:
        return "labels"
    return "rewards" if loss.options.get("target") == "rewards" else "pairs"


def _workers(records: data.Records) -> int:
    """Return how many processes shall work on records: several where these are many, and on the disk for all."""
    many = isinstance(records.rows, record_file.RecordFile) and len(records.rows) >= PARALLEL_FROM
    return worker_pool.cpus() if many else 1


def buckets(config: configuration.Config) -> tuple[int, ...]:
    """Return the lengths T that rows are padded to, ascending."""
    return tuple(config.data.buckets) or (config.data.max_length,)
