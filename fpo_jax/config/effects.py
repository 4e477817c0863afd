"""Config fields that would change nothing beside the others: one table, each entry with what makes it so and a remedy.

Only a value that differs from its default is refused, and none that a recipe sets to say what its family of runs has in
common. What depends on the loss, on the data or on the steps of the run is checked in `trainer`, where these are known.
"""

from collections.abc import Callable
from typing import NamedTuple

from fpo_jax.config.fields import Config, default, value_at


class Idle(NamedTuple):
    """Fields without effect, where that is, and the reason with its remedy; it completes "FIELD=VALUE is not used"."""

    fields: tuple[str, ...]
    where: Callable[[Config], bool]
    why: str


IDLE = (
    Idle(
        tuple(f"lora.{name}" for name in default().lora if name not in ("rank", "path")),
        lambda c: c.lora.rank == 0 and not c.lora.path,
        "while lora.rank is 0; set lora.rank",
    ),
    Idle(
        ("reference.adapter",),
        lambda c: not c.lora.path,
        "without lora.path, as a new adapter adds nothing; unset it (start)",
    ),
    Idle(
        ("reference.adapter",),
        lambda c: bool(c.lora.path and c.reference.path),
        "by reference.path={reference.path!r}; unset one of them",
    ),
    Idle(("train.spike_window",), lambda c: not c.train.skip_spikes, "while train.skip_spikes is 0; set it too"),
    Idle(
        ("train.max_nonfinite",),
        lambda c: c.train.on_nonfinite == "stop" and not c.train.skip_spikes,
        "while train.on_nonfinite='stop' ends the run at the first such step; set train.on_nonfinite='skip' or"
        " train.skip_spikes, or unset it",
    ),
    Idle(
        tuple(f"completions.{name}" for name in default().completions if name != "count"),
        lambda c: not c.completions.count,
        "while completions.count is 0; set it",
    ),
    Idle(
        ("data.eval_split", "data.eval_rows"),
        lambda c: not c.data.eval,
        "without data.eval; set that, or unset this",
    ),
    Idle(
        ("data.row_length",),
        lambda c: c.data.layout == "padded",
        "by data.layout='padded'; set data.layout to packed or shared, or unset it",
    ),
    Idle(
        ("data.buckets",),
        lambda c: c.data.layout in ("packed", "shared"),
        "by data.layout={data.layout!r}, whose rows have one length; unset it",
    ),
    Idle(
        ("data.max_completion_length",),
        lambda c: c.data.rule == "chat",
        "by data.rule='chat' (completions get max_length - max_prompt_length tokens); unset it or use rule='raw'",
    ),
    Idle(
        ("data.max_prompt_length",),
        lambda c: c.data.rule == "raw",
        "by data.rule='raw' (prompts get what the completion leaves of max_length); unset it or use rule='chat'",
    ),
    Idle(
        (
            "tokenizer.chat_template",
            "tokenizer.chat_template_kwargs",
            "data.truncate_together",
            "data.assistant_header",
            "data.append_eos",
            "data.auto_insert_empty_system",
            "data.prepend_bos",
            "data.assistant_turns",
            "data.thoughts",
        ),
        lambda c: c.data.rule == "raw",
        "by data.rule='raw', which renders no conversation; unset it or use rule='chat'",
    ),
    Idle(
        ("data.cut_prompts_together",),
        lambda c: c.data.rule == "chat",
        "by data.rule='chat', which cuts the prompts of a group alike; unset it or use rule='raw'",
    ),
    Idle(
        ("data.truncation",),
        lambda c: c.data.on_long_prompt in ("drop", "error"),
        "by data.on_long_prompt={data.on_long_prompt!r}, which keeps no prompt that would be cut; unset it or use"
        " on_long_prompt='truncate'",
    ),
    Idle(
        ("data.assistant_turns",),
        lambda c: c.stage == "reward",
        "by stage={stage!r}, whose score stands at the end of a conversation; unset it",
    ),
    Idle(
        ("data.hh_split",),
        lambda c: c.data.format != "hh",
        "by data.format={data.format!r}, only by 'hh'; unset it",
    ),
    Idle(
        ("optim.decay_over",),
        lambda c: c.optim.schedule == "constant" and not c.optim.warmup_fraction,
        "by optim.schedule='constant' without a warmup_fraction; unset it (run)",
    ),
    Idle(
        ("kernel.workspace_mib", "kernel.kept_logits_mib"),
        lambda c: c.kernel.implementation == "reference",
        "by kernel.implementation='reference', which holds all logits at once; unset it",
    ),
)


def idle_problems(config: Config) -> list[str]:
    """List the fields that are set to something else than their default and have no effect beside the others."""
    initial = default()
    initial.stage, initial.data.max_length = config.stage, config.data.max_length  # others follow these

    def unset(path: str) -> str:
        value = value_at(initial, path)
        return "" if value is None or value in ("", ()) else f" (unset means {path}={value!r})"

    return [
        f"{path}={value_at(config, path)!r} is not used {entry.why.format_map(config)}{unset(path)}."
        for entry in IDLE
        if entry.where(config)
        for path in entry.fields
        if value_at(config, path) != value_at(initial, path)
    ]
