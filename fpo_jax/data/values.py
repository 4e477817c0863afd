"""Values of a row's columns, checked: texts, messages, completions, rewards; a `BadRow` says what is none."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from fpo_jax.data.record_file import Message
from fpo_jax.io.jsonl import BadRow


class Parsed(NamedTuple):
    """What a row says: a prompt, its completions and their rewards."""

    prompt: str | list[Message]
    completions: Sequence[str | Message]
    rewards: Sequence[float]
    note: str = ""
    more: Sequence["Parsed"] = ()  # other records of the same row


def columns_of(row: Any) -> dict[str, Any]:
    """Return a row, which must be an object."""
    if not isinstance(row, dict):
        raise BadRow(f"a row must be a JSON object, not {kind(row)}")
    return row


def text(value: Any, name: str) -> str:
    """Return a text that has an encoding."""
    if not isinstance(value, str):
        raise BadRow(f"{name} must be a text, not {kind(value)}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow(f"{name} holds half a surrogate pair at character {error.start + 1}") from error
    return value


def prompt(value: Any) -> str | list[Message]:
    """Return a prompt, a text or messages."""
    return text(value, "prompt") if isinstance(value, str) else messages(value, "prompt")


def messages(value: Any, name: str) -> list[Message]:
    """Return a conversation."""
    if not isinstance(value, list) or not value:
        raise BadRow(f"{name} must be a list of messages, not {kind(value)}")
    return [message(turn, f"{name}[{index}]") for index, turn in enumerate(value)]


def message(turn: Any, name: str) -> Message:
    """Return a turn of a conversation."""
    if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
        keys = f" with the keys {', '.join(turn)}" if isinstance(turn, dict) else ""
        raise BadRow(f"{name} must be an object with role and content, not {kind(turn)}{keys}")
    if extra := [key for key, field in turn.items() if key not in ("role", "content") and field is not None]:
        raise BadRow(f"{name} carries {', '.join(extra)}, which no template here would show; drop it first")
    return {key: text(turn[key], f"{name}.{key}") for key in ("role", "content")}


def completion(value: Any, prompt: str | list[Message], index: int) -> str | Message:
    """Return a completion: a text, an assistant message, or the last turn of a conversation that ends in one."""
    name = f"completion {index}"
    if isinstance(value, str):
        return text(value, name)
    turns = messages(value if isinstance(value, list) else [value], name)
    opening = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if len(turns) > 1 and turns[:-1] != opening:
        raise BadRow(f"{name} is a conversation that does not begin with the prompt")
    if turns[-1]["role"] != "assistant":
        raise BadRow(f"{name} must be an assistant turn, not one of role {turns[-1]['role']!r}")
    return turns[-1]


def reward(value: Any, index: int) -> float:
    """Return a reward, a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"reward {index} must be a number, not {kind(value)}")
    try:
        found = float(value)
    except OverflowError:  # an integer of more than 308 digits
        found = math.inf
    if not math.isfinite(found):
        raise BadRow(f"reward {index} is {found}; rewards must be finite")
    return found


def kind(value: Any) -> str:
    """Name what a value is; a fault found while parsing speaks for itself."""
    if isinstance(value, BadRow):
        raise value
    names = {dict: "an object", list: "a list", str: "a text", bool: "true/false", type(None): "null"}
    if isinstance(value, list) and not value:
        return "an empty list"
    return names.get(type(value), "a number")
