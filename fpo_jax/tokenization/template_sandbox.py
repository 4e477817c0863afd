"""Conversations -> text by a chat template, which is a stranger's program and therefore runs in a process of its own.

The process (`template_sandbox_worker`) is started with the first conversation, inherits no environment variable, and
ends with this program. What a template may use there is bounded for each conversation, because what it does depends on
the data.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fpo_jax.tokenization import template_sandbox_worker

_PROGRAM = Path(template_sandbox_worker.__file__)
SECONDS = 3.0  # of processor time; real conversations take thousandths
_lock = threading.Lock()
_process: subprocess.Popen[bytes] | None = None
_owner = 0  # the process that started it: a fork must not talk into its parent's pipes


class Conversation(NamedTuple):
    """What a template is asked to render."""

    messages: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool = False  # what stands before an answer comes last, for the answer to follow
    tools: Sequence[Mapping[str, Any]] | None = None  # that the model may call, as JSON schemas


class Refused(ValueError):
    """A conversation, the one of this index, that a sound template cannot or will not render."""

    def __init__(self, fact: str, index: int):
        super().__init__(fact)
        self.index = index


def render(template: str, conversations: Sequence[Conversation], *, variables: Mapping[str, Any]) -> list[str]:
    """Return the text of each conversation.

    Args:
        template: Jinja.
        conversations: what is rendered.
        variables: what else the template may name (`bos_token`, `enable_thinking`, ...).

    Raises:
        Refused: the template refuses a conversation.
        ValueError: the template is broken, or takes more time, memory or text than any conversation needs.
    """
    asked = [conversation._asdict() for conversation in conversations]
    question = {"template": template, "conversations": asked, "variables": dict(variables), "seconds": SECONDS}
    line = json.dumps(question, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
    with _lock:
        found = _ask(line)
    if "kind" not in found:
        _check_written(found["texts"])
        return found["texts"]
    if found["kind"] == "refused":
        raise Refused(found["fact"], len(found["texts"]))
    if found["kind"] == "broken":
        raise ValueError(f"chat_template is broken Jinja {found['fact']}")
    raise ValueError(f"the chat template {found['fact']}, and is refused; pass another chat_template.")


def _check_written(texts: Sequence[str]) -> None:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise ValueError(
            "the chat template writes half a surrogate pair, which no tokenizer takes; pass another chat_template."
        ) from None


def _ask(question: bytes) -> dict:
    global _process, _owner
    if _owner != os.getpid():
        _process, _owner = None, os.getpid()
    process = _process = _process or _start()
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(question)
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = b""
    if line.endswith(b"\n"):
        return json.loads(line)
    _process = None
    code = _stop(process)
    if code == -signal.SIGPROF:
        return {"kind": "limit", "fact": f"takes more than {SECONDS:g} s for one conversation"}
    return {"kind": "limit", "fact": f"ends the process that renders it (exit code {code})"}


def _start() -> subprocess.Popen[bytes]:
    """Start the process, out of reach of the signals that a terminal or a scheduler sends to all of a run's."""
    path = os.pathsep.join(filter(None, sys.path))
    process = subprocess.Popen(
        [sys.executable, "-P", "-S", str(_PROGRAM)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": path, "PYTHONHASHSEED": "0"},
        start_new_session=True,
    )
    atexit.register(_stop, process)
    return process


def _stop(process: subprocess.Popen[bytes]) -> int:
    """End the process, which ends by itself once it has no more input; return its exit code."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.close()
    except BrokenPipeError:
        pass
    code = process.wait()
    process.stdout.close()
    return code
