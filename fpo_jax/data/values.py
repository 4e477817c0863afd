"""Values of a row's columns, checked: texts, messages, tools, completions, rewards; a `BadRow` says what is none."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from fpo_jax.io import jsonl
from fpo_jax.io.jsonl import BadRow
from fpo_jax.tokenization.messages import Completion, Message, Tool

_BESIDE = {"assistant": ("tool_calls",), "tool": ("name", "tool_call_id")}  # role -> keys beside role and content
_NO_CALLS = (("tool_calls", []), ("tool_calls", ""), ("tool_calls", "[]"))


class Parsed(NamedTuple):
    """What a row says: a prompt, its completions and their rewards."""

    prompt: str | list[Message]
    completions: Sequence[Completion]
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
    """Return a turn of a conversation; an assistant's may call tools and say nothing beside."""
    given = dict(turn) if isinstance(turn, dict) else {}
    given = {key: field for key, field in given.items() if field is not None and (key, field) not in _NO_CALLS}
    calls = given.get("role") == "assistant" and "tool_calls" in given
    if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys() | ({"content"} if calls else set()):
        keys = f" with the keys {', '.join(turn)}" if isinstance(turn, dict) else ""
        raise BadRow(f"{name} must be an object with role and content, not {kind(turn)}{keys}")
    role = text(turn["role"], f"{name}.role")
    beside = _BESIDE.get(role, ())
    if extra := [key for key in given if key not in ("role", "content", *beside)]:
        raise BadRow(f"{name} carries {', '.join(extra)}, which no template here would show; drop it first")
    content = turn.get("content")
    found: Message = {"role": role, "content": None if calls and content is None else text(content, f"{name}.content")}
    if calls:
        found["tool_calls"] = tool_calls(given["tool_calls"], f"{name}.tool_calls")
        return found
    return found | {key: text(given[key], f"{name}.{key}") for key in beside if key in given}


def tool_calls(value: Any, name: str) -> list[dict[str, Any]]:
    """Return the calls of an assistant turn; arguments that stand in a text, as in OpenAI's form, are read."""
    found = []
    for index, call in enumerate(_listed(value, name)):
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(f'{name}[{index}] names no function; write {{"name": ..., "arguments": {{...}}}}')
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments, f"{name}[{index}].arguments")
        if not isinstance(arguments, dict):
            raise BadRow(f"{name}[{index}].arguments must be an object, not {kind(arguments)}")
        function = {**function, "arguments": arguments}
        found.append({**call, "function": function} if "function" in call else function)
    return found


def tools(value: Any) -> list[Tool] | None:
    """Return the tools of a row, JSON schemas in a list or in a text; None where it has none."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    found = _listed(value, "tools")
    for index, tool in enumerate(found):
        schema = tool.get("function", tool)
        if not isinstance(schema, dict) or not isinstance(schema.get("name"), str) or not schema["name"]:
            raise BadRow(
                f"tools[{index}] has no name; write a JSON schema as transformers.utils.get_json_schema makes it"
            )
    return found or None


def _listed(value: Any, name: str) -> list[dict[str, Any]]:
    """Return a list of objects, which may stand in a text; null keys, with which Arrow fills up its rows, are left out.

    What stands in a text is taken as it is.
    """
    found = _parsed(value, name) if isinstance(value, str) else _without_nulls(value)
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise BadRow(f"{name} must be a list of objects, or that list as a JSON text, not {_described(found)}")
    return _checked(found, name)


def _described(found: Any) -> str:
    return "a list with something else" if isinstance(found, list) else kind(found)


def _parsed(value: str, name: str) -> Any:
    try:
        return jsonl.parse(value.encode("utf-8", "surrogatepass"))
    except BadRow as error:
        raise BadRow(f"{name}: {error}") from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def _checked(value: Any, name: str) -> Any:
    """Return JSON of which every text has an encoding, and every part could be parsed."""
    if isinstance(value, BadRow):
        raise value
    if isinstance(value, dict):
        return {text(key, name): _checked(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_checked(item, f"{name}[{index}]") for index, item in enumerate(value)]
    return text(value, name) if isinstance(value, str) else value


def completion(value: Any, prompt: str | list[Message], index: int) -> Completion:
    """Return a completion: a text, an assistant message, or several messages from an assistant's to an assistant's.

    The messages may come after those of the prompt, which are left out.
    """
    name = f"completion {index}"
    if isinstance(value, str):
        return text(value, name)
    turns = messages(value if isinstance(value, list) else [value], name)
    opening = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    turns = turns[len(opening) :] if len(turns) > len(opening) and turns[: len(opening)] == opening else turns
    if len(turns) > 1 and turns[0]["role"] != "assistant":
        raise BadRow(f"{name} is a conversation that does not begin with the prompt")
    return answer(turns, name)


def answer(turns: list[Message], name: str) -> Message | list[Message]:
    """Return the turns of a completion, one alone as a message."""
    if wrong := next((turn["role"] for turn in (turns[-1], turns[0]) if turn["role"] != "assistant"), None):
        raise BadRow(f"{name} must be an assistant turn, not one of role {wrong!r}")
    return turns if len(turns) > 1 else turns[0]


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
