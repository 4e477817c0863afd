"""Messages of a conversation: who speaks, what is said, and the tools that an assistant calls.

A message is {"role", "content"}; an assistant's may have "tool_calls", and then no content, and a tool's "name" and
"tool_call_id": the form of transformers' chat templates. A completion is a text, an assistant's message, or several
messages of which the first and the last are an assistant's.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

NO_TOOLS = "rule='raw' takes plain text, and tools are shown by a chat template; use rule='chat', or leave tools out"

Message = dict[str, Any]
Tool = dict[str, Any]  # a JSON schema, or what wraps one: {"type": "function", "function": {"name": ..., ...}}
Completion = str | Message | list[Message]


def turns(completion: Completion) -> list[Message]:
    """Return the messages of a completion; a text is the content of one assistant turn."""
    if isinstance(completion, str):
        return [{"role": "assistant", "content": completion}]
    return [completion] if isinstance(completion, dict) else list(completion)


def content(message: Mapping[str, Any]) -> str:
    """Return what a message says in words; an empty text where it only calls tools."""
    return message["content"] or ""


def calls(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the functions that a message calls, each with its name and arguments."""
    return [call.get("function", call) for call in message.get("tool_calls") or ()]


def tool_name(tool: Mapping[str, Any]) -> str:
    """Return what a tool is called by."""
    return tool.get("function", tool)["name"]


def said(spoken: str | Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> str:
    """Return all that a prompt or a completion says, the calls of tools as JSON.

    >>> said([{"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}])
    '{"name": "add", "arguments": {"a": 1}}'
    """
    if isinstance(spoken, str):
        return spoken
    messages = [spoken] if isinstance(spoken, Mapping) else spoken
    parts = (
        part
        for message in messages
        for part in (content(message), *(json.dumps(call, ensure_ascii=False) for call in calls(message)))
    )
    return "\n\n".join(part for part in parts if part)


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Return JSON with every text and every key of it changed.

    >>> mapped({"a": ["b", 1]}, str.upper)
    {'A': ['B', 1]}
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): mapped(item, change) for key, item in value.items()}
    return [mapped(item, change) for item in value] if isinstance(value, list | tuple) else value
