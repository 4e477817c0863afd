"""Settings on the command line: --config FILE, --config.key=value, and --config.key=None for a field that may be unset.

A field may be unset where it has a placeholder in the file: its type is known, and its value may be None.
"""

from typing import Any

from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags import config_path

NAME = "config"


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


def define(about: str, *, flag_values: flags.FlagValues = flags.FLAGS, sys_argv: list[str] | None = None) -> Any:
    """Define --config and return its holder.

    Args:
        about: shown by --help.
        flag_values: where; tests have their own.
        sys_argv: where --config.key=value are looked for; None = sys.argv.
    """
    for kind, parser in _PARSERS.items():
        config_flags.register_flag_parser_for_type(kind, parser())
    return config_flags.DEFINE_config_file(NAME, help_string=about, flag_values=flag_values, sys_argv=sys_argv)


def parse(argv: list[str], *, keys: str, flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parse the flags and load the file; return what is left of the command line.

    Args:
        argv: the command line.
        keys: where a reader finds every key.
        flag_values: where `define` put the flag.

    Raises:
        ValueError: an unknown flag or key, a value of another type, None for a field that has always a value, no such
            file; one sentence.
    """
    try:
        rest = flag_values(argv)
        config = flag_values[NAME].value
    except (AttributeError, KeyError) as error:
        raise ValueError(f"unknown configuration key: {error.args[0]}; {keys} lists every key.") from None
    except (flags.Error, TypeError, OSError) as error:
        raise ValueError(str(error)) from None
    if config is not None:
        for path, value in config_flags.get_override_values(flag_values[NAME]).items():
            # What None replaced for good had no placeholder.
            if value is None and config_path.get_type(path, config) is type(None):
                raise ValueError(f"{NAME}.{path}=None: this field always has a value; leave it out, or give one.")
    return rest
