"""How a prompt and its completions become token ids, decided once and kept as one record.

A run settles it from its configuration and writes it beside its tokenizer, an export carries both, and every program
that reads that run or that model reads the record: sampling, sample completions, labelling, reward scores, win rates,
benchmarks. A program that is told something else refuses. A model without a record is taken as `transformers` takes
it: its own chat template where it has one, plain text where it has none.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fpo_jax.io import atomic_io

FILE = "prompt_format.json"
RULES = ("raw", "chat")
ASSISTANT_HEADERS = ("prompt", "completion")
APPEND_EOS = ("where_missing", "unless_last")
THOUGHTS = ("refuse", "keep", "drop")
LARGEST_RECORD = 2**24  # bytes
# what a template is given by whoever renders it; kwargs that name one of these would replace it
RESERVED_VARIABLES = frozenset({"messages", "add_generation_prompt", "tools", "documents"})


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """The record. Its defaults are the way of `transformers`; the recipes of the original set the others."""

    rule: str = "chat"  # chat: the chat template | raw: prompt + completion + EOS as plain text
    chat_template: str = ""  # Jinja; "" = none
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # {"enable_thinking": False}
    auto_insert_empty_system: bool = False  # put an empty system turn first where the template knows such turns
    prepend_bos: bool = False  # put BOS first where the tokenizer opens texts with it and the template does not
    # to which part of a sequence the header of an answer belongs; trained in completion
    assistant_header: str = "prompt"
    append_eos: str = "where_missing"  # where the template writes no end token | unless the last token is EOS
    thoughts: str = "refuse"  # refuse | keep | drop the thought parts of completions
    eos_token: str = ""  # spelling
    end_ids: tuple[int, ...] = ()  # every token that ends a completion, EOS first
    tokenizer: str = ""  # sha256 of its vocabulary, merges and normalisation
    limits: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # max_length, ... of the training; "" of none

    def __post_init__(self) -> None:
        """Refuse a value that is none of its choices."""
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}.")
        if wrong := RESERVED_VARIABLES & self.chat_template_kwargs.keys():
            raise ValueError(
                f"chat_template_kwargs may not set {', '.join(sorted(wrong))}, which every rendering sets."
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain containers, ready for `json.dumps`."""
        return {**dataclasses.asdict(self), "end_ids": list(self.end_ids)}

    @property
    def text(self) -> str:
        """In a few words, for the first lines of a program."""
        if self.rule == "raw":
            return f"plain text, EOS {self.eos_token!r} (rule raw)"
        set_apart = [
            f"{field.name}={value!r}"
            for field in dataclasses.fields(self)
            if field.name in _TOLD and (value := getattr(self, field.name)) != field.default
        ]
        kwargs = [f"chat_template_kwargs={json.dumps(dict(self.chat_template_kwargs))}"] * bool(
            self.chat_template_kwargs
        )
        return ", ".join([f"chat template of {len(self.chat_template):,} characters", *set_apart, *kwargs]) + (
            f", EOS {self.eos_token!r} (rule chat)"
        )


_CHOICES = {"rule": RULES, "assistant_header": ASSISTANT_HEADERS, "append_eos": APPEND_EOS, "thoughts": THOUGHTS}
_TOLD = ("auto_insert_empty_system", "prepend_bos", "assistant_header", "append_eos", "thoughts")


def parse_kwargs(text: str) -> dict[str, Any]:
    """Read the variables of a chat template from JSON, as a user writes them; "" = none.

    Raises:
        ValueError: no JSON object.

    >>> parse_kwargs('{"enable_thinking": false}')
    {'enable_thinking': False}
    """
    if not text:
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"chat_template_kwargs={text!r} is not JSON ({error}).") from error
    if not isinstance(found, dict):
        raise ValueError(f'chat_template_kwargs={text!r} is no JSON object; write e.g. {{"enable_thinking": false}}.')
    return found


def write(directory: Path, prompt_format: PromptFormat, *, example: Mapping[str, Any] | None = None) -> None:
    """Write the record into a directory, beside the tokenizer that it speaks of.

    Args:
        directory: of a run or of an export.
        prompt_format: what every program shall do.
        example: a conversation of the training and its token ids, by which an export is checked.
    """
    atomic_io.write_json(
        directory / FILE, {**prompt_format.as_dict(), "example": None if example is None else dict(example)}
    )


def read(directory: Path) -> tuple[PromptFormat, dict[str, Any] | None] | None:
    """Return the record of a directory and the example in it; None where it has none.

    Raises:
        ValueError: the record is broken, or of another version.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > LARGEST_RECORD:
            raise ValueError(f"more than {LARGEST_RECORD:,} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
        example = found.pop("example")
        return PromptFormat(**found | {"end_ids": tuple(found["end_ids"])}), example
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no record of a prompt format ({error}); fetch or export it again.") from error
