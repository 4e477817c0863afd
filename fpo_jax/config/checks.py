"""What can be wrong with the values of a config, each with the nearest legal value, without touching a device."""

import math
import re
from collections.abc import Iterable, Sequence

from fpo_jax.config.effects import idle_problems
from fpo_jax.config.fields import FIELDS, Config, value_at


def validate(config: Config, *, extra: Iterable[str] = ()) -> None:
    """Raise ValueError with every problem at once, numbered; `extra` adds problems other modules found."""
    raise_problems([*problems(config), *extra])


def raise_problems(found: Sequence[str]) -> None:
    """Raise ValueError with a numbered list, or return when it is empty."""
    if found:
        lines = "\n".join(f"  {i}. {problem}" for i, problem in enumerate(found, 1))
        raise ValueError(f"the configuration has {len(found)} problem{'s' * (len(found) > 1)}:\n{lines}")


def problems(config: Config) -> list[str]:
    """List what is wrong with the values, one sentence each: fact, limit, remedy."""
    found: list[str] = []

    for field in FIELDS:
        value = value_at(config, field.name)
        if field.choices and value not in field.choices:
            found.append(f"{field.name}={value!r} is not one of {', '.join(field.choices)}.")

    def number(
        path: str, low: float, *, exclusive: bool = False, high: float = math.inf, below: float = math.inf
    ) -> None:
        value = value_at(config, path)
        if value is None:
            return
        inside = (value > low if exclusive else value >= low) and value <= high and value < below
        if not inside:
            bound = f"{'greater than' if exclusive else 'at least'} {low:g}"
            bound += "" if high == math.inf else f" and at most {high:g}"
            bound += "" if below == math.inf else f" and less than {below:g}"
            found.append(f"{path}={value!r} must be finite and {bound}.")

    def required(path: str, what: str) -> None:
        if not value_at(config, path):
            found.append(f"{path} is empty; give {what}.")

    required("model.path", "a Hugging Face directory or hub name, e.g. --config.model.path=...")
    if not config.data.mixer:
        required("data.train", "a file, a directory or a hub name, e.g. --config.data.train=...")
    for name in ("train", "train_split", "train_rows") if config.data.mixer else ():
        if config.data[name]:
            found.append(f"data.{name}={config.data[name]!r} and data.mixer exclude each other; unset one.")
    number("model.router_aux_weight", 0.0)
    number("model.router_z_weight", 0.0)
    number("lora.rank", 0)
    number("train.hang_timeout", 0)
    number("lora.alpha", 0.0, exclusive=True)
    number("lora.loraplus_lr_ratio", 0.0, exclusive=True)
    if config.lora.base_dtype == "nf4" and config.model.remat == "none":
        found.append(
            "model.remat=none keeps every matrix as it is multiplied by, and lora.base_dtype=nf4 holds them in four"
            " bits; use auto, dots or full."
        )
    if config.lora.dropout is not None and not 0 <= config.lora.dropout < 1:
        found.append(f"lora.dropout={config.lora.dropout} must lie in [0, 1).")
    try:
        re.compile(config.lora.modules)
    except re.error as error:
        found.append(f"lora.modules={config.lora.modules!r} is no regular expression: {error}.")
    number("data.row_length", 2)
    for path in ("data.train_rows", "data.eval_rows"):
        try:
            row_slice(value_at(config, path))
        except ValueError as error:
            found.append(f"{path}: {error}")
    number("data.max_length", 2)
    number("data.group_size", 1)
    if config.data.packing and config.stage != "sft":
        found.append(f"data.packing=True is for stage 'sft', not {config.stage!r}; unset it.")
    found += _layout_problems(config)
    found += _length_problems(config)
    number("optim.learning_rate", 0.0, exclusive=True)
    number("optim.warmup_fraction", 0.0, high=1.0)
    number("optim.warmup_steps", 0)
    if config.optim.warmup_steps is not None and config.optim.warmup_fraction:
        found.append(
            f"optim.warmup_steps={config.optim.warmup_steps} and optim.warmup_fraction={config.optim.warmup_fraction:g}"
            " are both set; set one (warmup_fraction=0 or warmup_steps=None)."
        )
    for path in ("optim.b1", "optim.b2"):
        number(path, 0.0, below=1.0)
    number("optim.eps", 0.0, exclusive=True)
    number("optim.weight_decay", 0.0)
    number("optim.clip_norm", 0.0)
    number("train.epochs", 0.0, exclusive=True)
    for path in ("batch_size", "micro_batch_per_device", "eval_batch_per_device", "save_every", "keep_checkpoints"):
        number(f"train.{path}", 1)
    for path in ("log_every", "max_nonfinite", "max_steps", "eval_groups"):
        number(f"train.{path}", 1)
    number("train.skip_spikes", 0.0)
    number("train.spike_window", 2)
    number("train.eval_every", 0)
    if config.train.keep_best and not (config.data.eval or config.completions.count):
        found.append(f"train.keep_best={config.train.keep_best!r} needs an evaluation; set data.eval.")
    if config.train.keep_best and not config.train.keep_best.startswith("eval_"):
        found.append(f"train.keep_best={config.train.keep_best!r} must name a metric of an evaluation, e.g. eval_loss.")
    found += _sample_completions_problems(config)
    number("completions.count", 0)
    number("completions.max_new_tokens", 1)
    number("completions.temperature", 0.0)
    number("completions.batch_per_device", 1)
    number("reference.batch_per_device", 1)
    number("kernel.workspace_mib", 1)
    number("kernel.kept_logits_mib", 0)
    number("plan.groups", 1)
    axes = {axis: config.mesh[axis] for axis in ("data", "fsdp", "expert", "tensor")}
    given = [size for size in axes.values() if size is not None]
    if any(size == 0 or size < -1 for size in given) or given.count(-1) > 1:
        found.append(
            f"mesh {' '.join(f'{axis}={size}' for axis, size in axes.items())}: each axis is a number of devices, and"
            " at most one is -1 (all that remain)."
        )
    return found + idle_problems(config)


def _layout_problems(config: Config) -> list[str]:
    """List what does not go with the layout of rows."""
    found, layout = [], config.data.layout
    if layout in ("auto", "padded"):
        return found
    if config.data.packing:
        found.append(f"data.packing=True and data.layout={layout!r} exclude each other; unset one.")
    if layout == "shared" and config.data.group_size == 1:
        found.append(
            "data.layout='shared' needs completions that share a prompt, and data.group_size is 1; use packed."
        )
    return found


def _length_problems(config: Config) -> list[str]:
    data, found = config.data, []
    if data.rule == "chat":
        if not 0 < data.max_prompt_length < data.max_length:
            found.append(
                f"data.max_prompt_length={data.max_prompt_length} leaves no room for a completion in"
                f" data.max_length={data.max_length}; use at most {data.max_length - 1}."
            )
    elif data.rule == "raw":
        limit = data.max_completion_length
        if limit is None or not 0 < limit < data.max_length:
            found.append(
                f"data.max_completion_length={limit} must lie between 1 and data.max_length - 1 ="
                f" {data.max_length - 1} for data.rule='raw'."
            )
    buckets = tuple(data.buckets)
    if buckets and (list(buckets) != sorted(set(buckets)) or buckets[-1] != data.max_length or buckets[0] < 2):
        found.append(
            f"data.buckets={buckets} must ascend and end with data.max_length={data.max_length}, e.g."
            f" {(data.max_length // 4, data.max_length // 2, data.max_length)}."
        )
    return found


def _sample_completions_problems(config: Config) -> list[str]:
    """List what keeps the model from answering prompts."""
    found, options = [], config.completions
    if not options.count:
        return found
    if not options.prompts and not config.data.eval:
        found.append(f"completions.count={options.count} needs prompts; set completions.prompts or data.eval.")
    if config.stage == "reward":
        found.append(f"completions.count={options.count}: stage 'reward' trains a model that writes no text; use 0.")
    if config.lora.rank or config.lora.path:
        given = f"lora.rank={config.lora.rank}" if config.lora.rank else f"lora.path={config.lora.path}"
        found.append(
            f"completions.count={options.count}: completions are written by whole models, and {given} trains an"
            " adapter; use 0, and fpo generate on the export."
        )
    return found


def row_slice(text: str) -> slice:
    """Parse "first:last" (either may be empty; "" = all rows) into a slice.

    >>> row_slice("0:1600")
    slice(0, 1600, None)
    """
    if not text:
        return slice(None)
    parts = text.split(":")
    try:
        first, last = (int(part) if part else None for part in parts)
    except ValueError:
        raise ValueError(f"{text!r} is not a row slice; write first:last, e.g. 0:1600 or 1600:") from None
    if (first or 0) < 0 or (last is not None and last <= (first or 0)):
        raise ValueError(f"{text!r} selects no row; write first:last with 0 <= first < last, e.g. 0:1600.")
    return slice(first, last)
