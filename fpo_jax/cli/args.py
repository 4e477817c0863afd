"""A command line for a dataclass: every field is an option of its name, its default is the field's.

`run` is a program around it: what it prints and the exit codes that the long jobs of eval/ share.
"""

import argparse
import dataclasses
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from fpo_jax.io import terminal

_Options = TypeVar("_Options")


def parse(kind: type[_Options], arguments: Sequence[str] | None, *, program: str, about: str | None) -> _Options:
    """Read the command line.

    Args:
        kind: a dataclass; fields are int, float, str, Path, a tuple of one of them, or bool, False unless given.
        arguments: None = those of the process.
        program: how it is called.
        about: what --help says above the options.
    """
    parser = argparse.ArgumentParser(
        prog=program, description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):  # pyright: ignore[reportArgumentType]
        hint = hints[field.name]
        settings: dict[str, Any] = {"type": hint, "metavar": "TEXT" if hint in (str, Path) else "NUMBER"}
        if isinstance(hint, types.GenericAlias):
            settings = {"type": get_args(hint)[0], "nargs": "+", "metavar": "VALUE"}
        if hint is bool:
            parser.add_argument(f"--{field.name.replace('_', '-')}", action="store_true")
            continue
        required = field.default is dataclasses.MISSING
        settings |= {"required": True} if required else {"default": field.default, "help": _default(field.default)}
        parser.add_argument(f"--{field.name.replace('_', '-')}", **settings)
    found = vars(parser.parse_args(arguments))
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})


def _default(value: Any) -> str:
    """Say the default of an option as one would type it; one that is unset has none to say."""
    typed = " ".join(map(str, value)) if isinstance(value, tuple) else "" if value is None else str(value)
    return f"default {typed}".replace("%", "%%") if typed else "unset by default"


def run(
    kind: type[_Options],
    work: Callable[[_Options], int],
    arguments: Sequence[str] | None,
    *,
    program: str,
    about: str | None,
) -> int:
    """Run a program as the command line says, with its log on stderr; return the exit status.

    Args:
        kind: as for parse.
        work: does it, prints what it found, and returns the exit status.
        arguments: as for parse.
        program: as for parse.
        about: as for parse.

    Returns:
        As `ended` says.
    """
    options = parse(kind, arguments, program=program, about=about)
    return ended(program, lambda: work(options))


def ended(program: str, work: Callable[[], int]) -> int:
    """Do a program's work with its log on stderr; return the exit status.

    Args:
        program: how it is called.
        work: does it, prints what it found, and returns the exit status.

    Returns:
        That of `work`; 2 after what is no fault of the program, 75 after a signal, each told in one sentence.
    """
    from fpo_jax.distributed import preemption  # brings jax, which --help does not need

    terminal.log_to_stderr()
    try:
        with preemption.StopRequest(begun=False):  # until the job has one of its own
            return work()
    except (ValueError, OSError, preemption.Stopped) as error:
        terminal.refuse(program.removeprefix("fpo "), error)
        return 75 if isinstance(error, preemption.Stopped) else 2
