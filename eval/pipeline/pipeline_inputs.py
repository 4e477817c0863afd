"""What a pipeline reads that is not its own: models and data, looked at before the first stage.

What flows in: the pipeline's settings and the training configuration of each stage. What flows out: nothing, or one
error that names the stage. Nothing is tokenised and no weight is read, so that it takes seconds before hours.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fpo_jax import config as configuration
from fpo_jax import data, hf, tokenization
from fpo_jax.cli import generate, generate_args
from fpo_jax.inference import sampler
from fpo_jax.tokenization import completion_texts
from fpo_jax.trainer import run_inputs


def problems(c: Any) -> list[str]:
    """List what is wrong between the sections of a pipeline: what one stage draws and the next needs."""
    found = []
    if c.tokenizer.chat_template and c.data.rule != "chat":
        found.append(f"tokenizer.chat_template={c.tokenizer.chat_template!r} belongs to data.rule=chat; set it to ''.")
    if c.generate.num_prompts == 1:
        found.append("generate.num_prompts=1: the report's intervals need at least 2 prompts.")
    for name in ("sample", "generate"):
        if name in c:
            found += [f"{name}: {problem}" for problem in _drawing_problems(c, c[name])]
    if "sample" not in c:
        return found
    drawn, size = c.sample.num_return * len(c.sample.seeds), c.align.data.group_size
    given = f"sample.num_return={c.sample.num_return} and {len(c.sample.seeds)} seeds give {drawn} completions"
    if drawn < 2:
        found.append(f"{given}, and there is nothing to compare; draw at least 2.")
    elif not c.pairing and drawn % size:
        found.append(f"{given}, which align.data.group_size={size} does not divide.")
    if c.pairing and size not in (1, 2):
        found.append(f"pairing={c.pairing!r} makes pairs, and align.data.group_size={size} needs more; set it to 2.")
    return found


def _drawing_problems(c: Any, section: Any) -> list[str]:
    """List what the sampler would refuse."""
    found = []
    if not section.seeds or len(set(section.seeds)) != len(section.seeds):
        found.append(f"seeds={tuple(section.seeds)} must hold at least one entry and none twice.")
    if section.max_new_tokens >= c.data.max_length:
        found.append(
            f"max_new_tokens={section.max_new_tokens} leaves no room for a prompt in data.max_length="
            f"{c.data.max_length} tokens; lower it, or raise data.max_length."
        )
    options = {key: value for key, value in section.items() if key != "seeds"}
    drawn = ("max_new_tokens", "temperature", "top_k", "top_p", "min_new_tokens")
    try:
        sampler.Decoding(**{key: options[key] for key in drawn if key in options})
        for seed in section.seeds:
            generate_args.check(generate.Options(out=Path("o"), data="d", model="m", seed=seed, **options))
    except (ValueError, TypeError) as error:
        found.append(str(error))
    return found


def check(c: Any, stages: Mapping[str, Any]) -> None:
    """Refuse models and data that a later stage could not use.

    Args:
        c: the pipeline.
        stages: name -> training configuration that starts from `c.base`; of an alignment to samples, with the data
            whose prompts are sampled.

    Raises:
        ValueError: the first that cannot be used, with the name of its stage.
    """
    if c.reward_model:
        with configuration.about("reward_model"):
            _check_judge(c)
    if "sft" not in c:
        with configuration.about("base"):
            tokenization.resolve(hf.local_dir(c.base), tokenization.Given(**sampling_format(c)))
    for name, config in stages.items():
        with configuration.about(name):
            source = hf.local_dir(config.model.path, revision=config.model.revision or None)
            run_inputs.read_model(config, source)
            encoder = run_inputs.read_encoder(config, source)
            if config.data.rule == "chat":
                completion_texts.require_template(encoder)
            for split in ("train", "eval"):
                if config.data[split]:
                    drawn = name == "align" and ("sample" in c or split == answered(c))
                    _check_records(
                        config, split, encoder.tokenizer, drawn=drawn, trained=name != "align" or "sample" not in c
                    )


def sampling_format(c: Any) -> dict[str, Any]:
    """Return what the sampler is told of the prompt format; a model that has its own on record refuses another."""
    given = {key: c.tokenizer[key] for key in ("chat_template", "chat_template_kwargs", "eos_token")}
    given |= {key: c.data[key] for key in ("rule", "auto_insert_empty_system", "prepend_bos")}
    return {**given, "tokenizer": c.tokenizer.path}


def answered(c: Any) -> str:
    """Return the split whose prompts are answered for the report."""
    return "eval" if c.data.eval else "train"


def _check_judge(c: Any) -> None:
    source = hf.local_dir(c.reward_model, revision=None)
    judge = hf.read_config(source)
    if not judge.reward_head:
        raise ValueError(f"{source} is a language model; give a sequence classifier.")
    if c.data.max_length > judge.max_positions:
        raise ValueError(
            f"data.max_length={c.data.max_length} exceeds the window of {judge.max_positions} tokens of {source}; lower"
            " it, or give another reward model."
        )
    judge_format = tokenization.resolve(
        source, tokenization.Given(thoughts=tokenization.judge_thoughts(source, c.data.thoughts))
    ).format
    if judge_format.rule == "raw" and c.data.rule == "chat":
        raise ValueError(
            f"{source} has no chat template, and reads conversations; give a reward model of conversations."
        )


def _check_records(config: Any, split: str, tokenizer: Any, *, drawn: bool, trained: bool) -> None:
    """Read the rows with their format: their prompts are answered, or they are trained on, or both."""
    options = config.data
    rows = configuration.row_slice(options[f"{split}_rows"])
    found = data.read(
        options[split],
        format=options.format,
        split=options[f"{split}_split"] or None,
        hh_split=options.hh_split,
        on_bad_row="error" if drawn else options.on_bad_row,  # fpo generate skips none
        start=rows.start or 0,
        stop=rows.stop,
        data_dir=options.subfolder or None,
        revision=options.revision or None,
        tokenizer=tokenizer,
    )
    size = options.group_size
    for record in found.rows:
        if trained and len(record.completions) % size:
            raise ValueError(
                f"{record.source} has {len(record.completions)} completions, which group_size={size} does not divide;"
                " give data of another kind, or another group_size."
            )
        said = [record.prompt, *record.completions] if trained else [record.prompt]
        if options.rule == "raw" and not all(isinstance(text, str) for text in said):
            raise ValueError(f"{record.source} holds messages, and rule='raw' takes plain text; set data.rule=chat.")
