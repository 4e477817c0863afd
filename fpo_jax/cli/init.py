"""Look at data and write a config that trains a model on them: `fpo init --data FILE_OR_HUB --model DIR`.

It says which format the data have and shows one example as it will be trained, then writes a short Python file, which
`fpo train --config own.py --workdir runs/own` runs as it is. Nothing is asked and nothing is trained.

Exit codes: 0 written; 2 the data or the model cannot be used (the message says what to change).
"""

import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fpo_jax import config as configuration
from fpo_jax.cli import args as command_line
from fpo_jax.config import choices
from fpo_jax.io import atomic_io, terminal

SAMPLED = 2000  # rows that are tokenised to choose the lengths
LONGEST = 4096  # tokens that are chosen without being told; longer examples are cut
MOST_HELD_OUT = 500  # rows
_STAGES = {  # format -> stage; all others are pairs or groups
    **dict.fromkeys(("messages", "sharegpt", "alpaca", "demonstrations", "tldr_sft", "text"), "sft"),
    "labelled": "reward",
}
_GROUPS = ("json", "chat_groups", "rankings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says."""

    data: str
    model: str
    out: Path = Path("own.py")
    stage: str = ""
    split: str = ""


class Field(NamedTuple):
    """A line of the file: a field, its value, and why."""

    name: str
    value: Any
    why: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Look and write as the command line says; return the exit code."""
    return command_line.run(Options, run, arguments, program="fpo init", about=__doc__)


def run(options: Options) -> int:
    """Write the file; return the exit code.

    Raises:
        ValueError: the data or the model cannot be used, or the file is there.
    """
    choices.check("--stage", options.stage, ["", "sft", "reward", "align"])
    if options.out.exists():
        raise ValueError(f"{options.out} exists; give another --out, or take it away.")
    if not options.out.absolute().parent.is_dir():
        raise ValueError(f"the folder of --out={options.out} does not exist; make it, or give another --out.")
    from fpo_jax.trainer import run_inputs  # brings jax, which a misspelt option need not wait for

    fields, described = _settled(options)
    config = configured(fields)
    trial = config.copy_and_resolve_references()
    trial.data.train_rows, trial.data.eval, trial.data.eval_rows, trial.data.eval_split = f"0:{SAMPLED}", "", "", ""
    train = run_inputs.prepare(trial).train
    lines = [
        f"{options.data}: {described}",
        f"format {train.audit.format}",
        f"stage {config.stage}, loss {config.loss.name}; one example as the model gets it, trained between ⟦ and ⟧:",
        train.sample,
    ]
    atomic_io.write(options.out, text(fields, options, loss=config.stage == "align"))
    for line in [*lines, f"wrote {options.out}; train with", f"  {_command(options)}"]:
        terminal.say(line)
    return 0


def _command(options: Options) -> str:
    """Return the command that trains."""
    return (
        f"fpo train --config {shlex.quote(str(options.out))} --workdir {Path('runs') / shlex.quote(options.out.stem)}"
    )


def configured(fields: Sequence[Field]) -> configuration.Config:
    """Return the configuration that the file will give."""
    config = configuration.default()
    for field in fields:
        section, _, name = field.name.rpartition(".")
        setattr(configuration.value_at(config, section) if section else config, name, field.value)
    return config


def _settled(options: Options) -> tuple[list[Field], str]:
    """Choose every field from the first rows, and say what they are."""
    import jax

    from fpo_jax import data, hf, tokenization
    from fpo_jax.data import loading
    from fpo_jax.perf import hardware

    hardware.require_devices()
    source = (
        str(Path(options.data).expanduser().absolute()) if Path(options.data).expanduser().exists() else options.data
    )
    split, held_out_split = _splits(source, options.split)
    model = hf.local_dir(options.model)
    tokenizer = tokenization.load_tokenizer(model)
    has_template = bool(tokenizer.chat_template)
    read: dict[str, Any] = {
        "split": split or None,
        "wants": "demonstrations" if options.stage == "sft" else "any",
        "stop": SAMPLED,
    }
    records = data.read(source, format="auto", **read)
    if records.format.startswith("hh:") and has_template:
        records = data.read(source, format="auto", rule="chat", **read)
    format = records.format.partition(":")[0]
    if format == "prompts":
        raise ValueError(f"{options.data}: {records.format}, and nothing can be trained on them; give completions too.")
    stage = options.stage or _STAGES.get(format, "align")
    rows = sum(1 for _ in loading.rows(source, split=split or None, data_dir=None, revision=None))
    is_chat = any(isinstance(record.prompt, list) for record in records.rows)
    fields = [Field("stage", stage)] if stage != "align" else []
    fields += [Field("model.path", options.model)]
    plain = format in ("text", "hh") or not (has_template or is_chat)
    if not has_template and is_chat:
        why = "the model has no chat template of its own; see `fpo config chat_template`"
        fields.append(Field("tokenizer.chat_template", "zephyr", why))
    fields.append(Field("data.train", source))
    if split:
        fields.append(Field("data.train_split", split))
    held_out = 0 if held_out_split or rows < 20 else min(MOST_HELD_OUT, max(1, rows // 20))
    if held_out:
        fields += [
            Field("data.train_rows", f":{rows - held_out}"),
            Field("data.eval", source, f"the last {held_out} rows are held out"),
            *([Field("data.eval_split", split)] if split else []),
            Field("data.eval_rows", f"{rows - held_out}:"),
        ]
    elif held_out_split:
        fields += [Field("data.eval", source), Field("data.eval_split", held_out_split)]
    window = hf.read_config(model).max_positions
    fields += _lengths(records, tokenizer, min(window, LONGEST), plain=plain)
    fields += _loss(records, format, stage)
    devices = len(jax.devices())
    groups = max(devices, len(records.rows) * rows // SAMPLED if rows > SAMPLED else len(records.rows) - held_out)
    batch = max(devices, min(128, 2 ** int(math.log2(max(1, groups / 8)))) // devices * devices)
    rate = {"sft": 2e-5, "reward": 1e-5, "align": 1e-6}[stage]
    fields += [
        Field("optim.learning_rate", rate, "peak; adapters take ten times as much"),
        Field("optim.warmup_fraction", 0.1 if groups >= 20 * batch else 0.0),
        Field("train.batch_size", batch, "examples of a step, over all devices"),
        Field("train.epochs", 1.0),
        Field("train.eval_every", max(1, groups // batch // 5), "steps"),
    ]
    offering = sum(bool(record.tools) for record in records.rows)
    described = f", tools in {offering:,} of the first {len(records.rows):,} examples" if offering else ""
    return fields, f"{rows:,} rows{described}"


def _splits(source: str, named: str) -> tuple[str, str]:
    """Return the splits of a source to train and to evaluate on, "" where it has none."""
    from fpo_jax.data import loading

    def has(split: str) -> bool:
        try:
            return next(iter(loading.rows(source, split=split, data_dir=None, revision=None)), None) is not None
        except ValueError:
            return False

    if Path(source).is_file():
        if named:
            raise ValueError(f"--split={named} applies to folders and hub data sets, and {source} is one file.")
        return "", ""
    train = named or ("train" if has("train") else "")
    if not train and not Path(source).exists():
        train = "train"  # a hub data set, which then says what is wrong with it
    return train, next((name for name in ("test", "validation", "eval", "dev") if train and has(name)), "")


def _lengths(records: Any, tokenizer: Any, window: int, *, plain: bool) -> list[Field]:
    """Choose the rule and the lengths that cut nothing, as far as the model's window goes."""
    from fpo_jax.tokenization import messages

    def tokens(text: Any) -> int:
        turns = text if isinstance(text, list) else [text]
        spelt = [turn if isinstance(turn, str) else messages.said(turn) for turn in turns]
        return sum(len(tokenizer(one, verbose=False)["input_ids"]) + (0 if plain else 16) for one in spelt)

    completions = max(tokens(one) for record in records.rows for one in record.completions)
    longest = max(
        tokens(record.prompt)
        + (tokens(json.dumps(record.tools, indent=4)) if record.tools else 0)
        + max(map(tokens, record.completions))
        for record in records.rows
    )
    longest += 2
    length = min(window, -(-longest // 64) * 64)
    completion = min(length - 1, max(completions + 1, length // 2))
    why = "tokens of an example; longer ones are cut" + (f", as the longest of about {longest} is" * (longest > length))
    fields = [Field("data.max_length", length, why)]
    if plain:
        rule = Field("data.rule", "raw", "plain text, without a chat template")
        return [
            rule,
            *fields,
            Field("data.max_completion_length", completion, "of which the completion may take these"),
        ]
    return [
        *fields,
        Field("data.max_prompt_length", max(1, length - completion), "tokens kept of a prompt that is too long"),
    ]


def _loss(records: Any, format: str, stage: str) -> list[Field]:
    """Choose the loss and the size of its groups.

    Raises:
        ValueError: the numbers of completions have no common divisor.
    """
    if stage == "sft":
        return []
    if format == "labelled":
        labels = "its score is the log-odds of the label true"
        return [Field("loss.name", "binary_cross_entropy", labels), Field("data.group_size", 1)]
    numbers = sorted({len(record.completions) for record in records.rows})
    size = math.gcd(*numbers)
    if size < 2:
        raise ValueError(
            f"the rows have {' and '.join(map(str, numbers))} completions, which make no groups of one size; give every"
            " row as many."
        )
    group = [Field("data.group_size", size, "completions of a group")] if size > 2 else []
    if stage == "reward":
        return [Field("loss.name", "bradley_terry"), *group]
    if format in _GROUPS[:2] and any(set(record.rewards) != {0.0, 1.0} for record in records.rows):
        matches = [
            Field("loss.name", "alpha", "f-PO's α-divergence"),
            Field("loss.target", "rewards", "the target is the softmax of the rewards / beta_r"),
            Field("loss.beta_r", 0.5),
        ]
        return [*matches, Field("loss.beta", 0.1), *group]
    if size > 2:
        return [Field("loss.name", "alpha", "f-PO's α-divergence"), Field("loss.beta", 0.1), *group]
    return [
        Field("loss.name", "dpo", "`fpo losses` lists all; alpha is f-PO's own"),
        Field("loss.beta", 0.1, "distance to the start model: less goes further"),
    ]


def text(fields: Sequence[Field], options: Options, *, loss: bool) -> str:
    """Return the file."""
    lines = []
    for field in fields:
        comment = f"  # {field.why}" if field.why else ""
        value = json.dumps(field.value, ensure_ascii=False) if isinstance(field.value, str) else repr(field.value)
        lines.append(f"    c.{field.name} = {value}{comment}")
    signature, last, use = "", "", ""
    if loss:
        name = next(field.value for field in fields if field.name == "loss.name")
        signature, last = f'loss: str = "{name}"', "    recipes.use_loss(c, loss)  # FILE:LOSS takes another one\n"
        use = "from fpo_jax import recipes\n"
    sources = f"Train {options.model} on {options.data}", f"Command   {_command(options)}"
    about, command = (line.replace("\\", "\\\\").replace('"', '\\"') for line in sources)  # it stands in a docstring
    return (
        f'"""{about}; `fpo init` wrote it, and every field may be changed.\n\n'
        f"{command}\n"
        "Fields    `fpo config` has them all; --config.FIELD=VALUE changes one for a run\n"
        "Adapters  --config.lora.rank=16 trains adapters instead of the weights\n"
        '"""\n\n'
        f"from fpo_jax import config as configuration\n{use}\n\n"
        f"def get_config({signature}):\n"
        '    """Return the configuration."""\n'
        "    c = configuration.default()\n" + "\n".join(lines) + f"\n{last}    return c\n"
    )


if __name__ == "__main__":
    sys.exit(main())
