"""Settings on the command line: --config FILE, --config.key=value, and --config.key=None for a field that may be unset.

A field may be unset where it has a placeholder in the file: its type is known, and its value may be None.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags import config_path

NAME = "config"
_RECIPES = Path(__file__).parent.parent / "configs"


def _optional(kind: type[flags.ArgumentParser]) -> type[flags.ArgumentParser]:
    """Return a parser of flags that reads None as None."""

    class Optional(kind):
        def parse(self, argument: Any) -> Any:
            return None if argument == "None" else super().parse(argument)

    return Optional


_PARSERS = {
    int: _optional(flags.IntegerParser),
    float: _optional(flags.FloatParser),
    bool: _optional(flags.BooleanParser),
    str: _optional(flags.ArgumentParser),
}


def flag_values(arguments: list[str]) -> flags.FlagValues:
    """Return the flags of a program with --config among them, to which it adds its own.

    Args:
        arguments: of the command line, without the program; --config.key=value are looked for in them.
    """
    for kind, parser in _PARSERS.items():
        config_flags.register_flag_parser_for_type(kind, parser())
    values = flags.FlagValues()
    about = "A recipe's name, or a file; override with --config.key=value."
    config_flags.DEFINE_config_file(NAME, help_string=about, flag_values=values, sys_argv=["", *arguments])
    return values


def parse(values: flags.FlagValues, arguments: list[str], *, keys: str, about: str | None) -> Any:
    """Parse the flags and return the configuration; --help prints them and ends the program.

    Args:
        values: from `flag_values`.
        arguments: the same.
        keys: where a reader finds every key.
        about: the first lines of --help.

    Raises:
        ValueError: an unknown flag or key, a value of another type, None for a field that has always a value, no such
            file or recipe, none at all; one sentence.
    """
    if {"-h", "--help", "-help"} & set(arguments):
        print(about or "", values.get_help(), sep="\n")
        sys.exit(0)
    arguments = _with_files(arguments)
    try:
        rest = values(["", *arguments])[1:]
        config = values[NAME].value
        if config is not None:
            config.keys()  # what could not be loaded says so here
    except (AttributeError, KeyError) as error:
        raise ValueError(f"unknown configuration key: {error.args[0]}; {keys} lists every key.") from None
    except (flags.Error, TypeError, OSError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    if config is None:
        raise ValueError(f"--{NAME} is missing; give a file, or one of {', '.join(recipes())}.")
    for path, value in config_flags.get_override_values(values[NAME]).items():
        # What None replaced for good had no placeholder.
        if value is None and config_path.get_type(path, config) is type(None):
            raise ValueError(f"{NAME}.{path}=None: this field always has a value; leave it out, or give one.")
    if rest:
        raise ValueError(f"unexpected arguments {rest}; settings are given as --config.key=value.")
    return config


def load_config(recipe: str, changes: Sequence[str] = ()) -> Any:
    """Return a recipe's configuration with some fields changed.

    Args:
        recipe: the name of one that the package brings, or a file; `name:LOSS` takes another loss.
        changes: each "field=value", as on the command line after `--config.`.

    Raises:
        ValueError: an unknown recipe or field, or a value of another type; one sentence.
    """
    arguments = [f"--{NAME}={recipe}", *(f"--{NAME}.{change}" for change in changes)]
    return parse(flag_values(arguments), arguments, keys="`fpo config`", about=None)


def recipes() -> list[str]:
    """Return the names of the recipes that the package brings, those of pipelines with their folder in front."""
    found = (path.relative_to(_RECIPES).with_suffix("").as_posix() for path in _RECIPES.rglob("*.py"))
    return sorted(name for name in found if name != "pipelines/common")


def _with_files(arguments: list[str]) -> list[str]:
    """Put the file of a recipe in the place of its name: `--config llama3_base:sigmoid`."""
    found = list(arguments)
    for place, argument in enumerate(found):
        flag, equals, value = argument.partition("=")
        if flag in (f"--{NAME}", f"-{NAME}"):
            at = place if equals else place + 1
            name, colon, loss = (value if equals else "".join(found[at : at + 1])).partition(":")
            if name in recipes():
                value = f"{_RECIPES / name}.py{colon}{loss}"
                found[at] = f"{flag}={value}" if equals else value
            elif name and not Path(name).is_file():
                raise ValueError(f"--{NAME}={name} is neither a file nor one of {', '.join(recipes())}.")
    return found
