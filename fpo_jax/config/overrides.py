"""Settings on the command line: --config FILE, --config.key=value, and --config.key=None for a field that may be unset.

A field may be unset where it has a placeholder in the file: its type is known, and its value may be None.
"""

import difflib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags import config_path

from fpo_jax.config import fields

NAME = "config"
_RECIPES = Path(__file__).parent.parent / "configs"


def _optional(kind: type[flags.ArgumentParser], what: str) -> type[flags.ArgumentParser]:
    """Return a parser of flags that reads None as None; `what` it reads is said of what it cannot."""

    class Optional(kind):
        def parse(self, argument: Any) -> Any:
            try:
                return None if argument == "None" else super().parse(argument)
            except (ValueError, TypeError):
                raise ValueError(f"{argument!r} is not {what}") from None

    return Optional


_PARSERS = {
    int: _optional(flags.IntegerParser, "a whole number"),
    float: _optional(flags.FloatParser, "a number"),
    bool: _optional(flags.BooleanParser, "True or False"),
    str: _optional(flags.ArgumentParser, "a text"),
}
_STAGES = ("sft", "reward", "align")  # sections of a pipeline, each with the fields of a run


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


def parse(
    values: flags.FlagValues, arguments: list[str], *, keys: str, about: str | None, pipeline: bool | None = None
) -> Any:
    """Parse the flags and return the configuration; --help prints them and ends the program.

    Args:
        values: from `flag_values`.
        arguments: the same.
        keys: where a reader finds every key.
        about: the first lines of --help.
        pipeline: whether the configuration is to be a pipeline's; None = either.

    Raises:
        ValueError: an unknown flag or key, a value of another type, None for a field that has always a value, no such
            file or recipe, none at all; one sentence.
    """
    if {"-h", "--help", "-help"} & set(arguments):
        print(about or "", values.get_help(), sep="\n")
        sys.exit(0)
    arguments = _with_files(arguments)
    file = _file_of(arguments)
    sys.modules.pop(f"{NAME}_config", None)  # into which ml_collections loads a file; another's get_config would stay
    try:
        rest = values(["", *arguments])[1:]
        config = values[NAME].value
        if config is not None:
            config.keys()  # what could not be loaded says so here
    except flags.Error as error:
        raise ValueError(" ".join(str(error).split()).removeprefix("flag ")) from None
    except Exception as error:
        raise ValueError(_refusal(error, file, arguments, keys)) from None
    if config is None:
        raise ValueError(
            f"--{NAME} is missing; give a file, which `fpo init` writes for your own data, or one of"
            f" {', '.join(recipes())}."
        )
    if pipeline is not None and (is_run := "loss" in config and "optim" in config) == pipeline:
        of, program = ("one training run", "fpo train") if is_run else ("a pipeline", "fpo pipeline")
        raise ValueError(f"--{NAME}={file} is the recipe of {of}; give it to {program}.")
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


def _file_of(arguments: Sequence[str]) -> str:
    """Return the file that --config names, without what follows its colon."""
    found = ""
    for place, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in (f"--{NAME}", f"-{NAME}"):
            found = value if equals else "".join(arguments[place + 1 : place + 2])
    return found.partition(":")[0]


def _refusal(error: Exception, file: str, arguments: Sequence[str], keys: str) -> str:
    """Say what was wrong with a configuration's file or with what the command line changes of it."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno} is no Python ({error.msg}); mend the file of --{NAME}."
    if "has no attribute 'get_config'" in str(error):
        return (
            f"--{NAME}={file} defines no get_config(), which returns the configuration; `fpo init` writes such a file."
        )
    inside = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_same(frame.filename, file)]
    if inside:
        return f"{file}:{inside[-1].lineno}: {_cause(error)}; mend the file of --{NAME}, {keys} lists every key."
    changed = [argument.partition("=")[0].lstrip("-") for argument in arguments]
    paths = [flag.removeprefix(f"{NAME}.") for flag in changed if flag.startswith(f"{NAME}.")]
    wrong = [
        f"--{NAME}.{path} is no config field; did you mean --{NAME}.{hint}?"
        for path in paths
        if (hint := _nearest(path))
    ]
    if wrong:
        return " ".join([*wrong, f"{keys} lists every key."])
    if isinstance(error, AttributeError | KeyError):
        return f"unknown configuration key: {_cause(error)}; {keys} lists every key."
    return _cause(error)


def _is_same(one: str, other: str) -> bool:
    return bool(other) and Path(one).resolve() == Path(other).resolve()


def _cause(error: Exception) -> str:
    """Return what an error says in one line, without the quotes that KeyError puts around it."""
    said = error
    while said.args and isinstance(said.args[0], Exception):
        said = said.args[0]
    text = str(said.args[0]) if isinstance(said, AttributeError | KeyError) and said.args else str(said)
    return " ".join(text.split()) or type(error).__name__


def _nearest(path: str) -> str:
    """Return the field that a path that is none was meant to be; "" where it is one, or nothing is near."""
    known = [field.name for field in fields.FIELDS]
    stage, _, rest = path.partition(".")
    prefix = f"{stage}." if stage in _STAGES and rest else ""
    name = path.removeprefix(prefix)
    if name in known:
        return ""
    last = [field for field in known if field.rpartition(".")[2] == name.rpartition(".")[2]]
    near = (
        last
        or difflib.get_close_matches(name, known, n=1)
        or [
            field
            for match in difflib.get_close_matches(name, [field.rpartition(".")[2] for field in known], n=1)
            for field in known
            if field.rpartition(".")[2] == match
        ]
    )
    return f"{prefix}{near[0]}" if near else ""


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
                beside = [path.name for path in Path(name).parent.glob("*.py")] if Path(name).parent.is_dir() else []
                near = difflib.get_close_matches(Path(name).name, [*recipes(), *beside], n=1)
                meant = f"; did you mean {near[0]}?" if near else "."
                raise ValueError(f"--{NAME}={name} is neither a file nor one of {', '.join(recipes())}{meant}")
    return found
