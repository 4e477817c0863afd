"""The program that renders chat templates, in a process of its own; `template_sandbox` starts it and talks to it.

A chat template is a program that came with a model. Jinja's sandbox keeps it from Python's internals, but bounds
neither its time nor its memory: nested ranges, macros that call themselves, `"x" * n`, doubled strings, `9**9**9` and
the widths of a dozen filters each need a rule of their own in Python, and the kernel has one for all of them. So this
process may hold MEMORY bytes and spend `template_sandbox.SECONDS` of processor time on a conversation (waiting on a
busy machine does not count), and it can open no file, write none and start no program, should a template ever leave the
sandbox.

It imports Jinja alone, so that it starts in a tenth of a second. One line of JSON comes in, one goes out:

    {"template", "variables", "conversations", "seconds"}  ->  {"texts"}, or also {"kind", "fact"} of
                                                               the first that failed: refused, broken, limit

A conversation is {"messages", "add_generation_prompt", "tools"}.
"""

import codecs
import datetime
import functools
import json
import pprint  # noqa: F401 - as jinja2.debug and the next
import resource
import signal
import sys
import textwrap  # noqa: F401
from typing import Any

import jinja2.constants
import jinja2.debug  # Jinja imports these when it first needs them, and then nothing can be imported any more
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils

MEMORY = 2**29
SPARE_TEXT = 2**20  # characters that a template may write beyond four times what it was given
DATE = datetime.datetime(2024, 7, 26)  # what Llama-3.1's template writes when it is given none; today's changes the ids


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what transformers trains on; here it is passed over."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own way

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """A namespace without names that mean something to Python."""

    def __init__(*args: Any, **names: Any):
        self, *rest = args
        for name in dict(*rest, **names):
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, *rest, **names)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: str) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """Compile a template in the environment that transformers gives it, apart from the date."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": DATE.strftime,
        "dict": lambda *args, **names: dict(*args, **names),
        "namespace": _Namespace,
    }
    return environment.from_string(source)


def _size(value: Any) -> int:
    """Count the characters of the texts in JSON."""
    if isinstance(value, dict):
        return sum(len(key) + _size(item) for key, item in value.items())
    return sum(map(_size, value)) if isinstance(value, list) else len(value) if isinstance(value, str) else 0


def rendered(source: str, variables: dict[str, Any], conversation: dict[str, Any]) -> str:
    """Render one conversation.

    Raises:
        MemoryError: too much text.
    """
    room = SPARE_TEXT + 4 * _size(conversation)
    chunks = []
    stream = compiled(source).generate({"documents": None, **variables, **conversation})
    for chunk in stream:
        room -= len(chunk)
        if room < 0:
            raise MemoryError
        chunks.append(chunk)
    return "".join(chunks)


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Render the conversations of a question, each within its time."""
    texts = []
    try:
        for conversation in question["conversations"]:
            signal.setitimer(signal.ITIMER_PROF, question["seconds"])
            texts.append(rendered(question["template"], question["variables"], conversation))
    except MemoryError:
        kind, fact = "limit", "needs too much memory or writes far more than the conversation holds"
    except RecursionError:
        kind, fact = "limit", "is nested too deeply, or calls itself without an end"
    except jinja2.TemplateSyntaxError as error:
        kind, fact = "broken", f"at its line {error.lineno}: {error.message}"
    except jinja2.TemplateError as error:
        kind, fact = "refused", str(error)
    except Exception as error:  # whatever a template makes Python raise
        kind, fact = "refused", f"{type(error).__name__}: {error}"
    else:
        return {"texts": texts}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return {"texts": texts, "kind": kind, "fact": fact}


def main() -> None:
    """Give up every right, then answer until the input ends."""
    codecs.lookup("unicode-escape")  # how Jinja reads a string; a module as well
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    for line in sys.stdin.buffer:
        text = json.dumps(answer(json.loads(line)), ensure_ascii=False)
        sys.stdout.buffer.write(text.encode("utf-8", "surrogatepass") + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
