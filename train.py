"""Train a model: `python train.py --config configs/mistral_base.py --workdir runs/mistral [--config.key=value ...]`.

`--plan TARGET` in place of `--workdir` trains nothing: it compiles the run for devices that need not be here, such as
h100:4, h100:2x8 or v5e-16, and prints what it needs there.

Exit codes: 0 finished; 1 loss or gradient not finite; 2 the input cannot be used, or the plan does not fit (the message
says what to change); 75 stopped by a signal with everything saved: the same command goes on.
"""

import logging
import sys
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/; override with --config.key=value.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Folder for checkpoints, metrics and logs; resumes what it holds.")
_PLAN = flags.DEFINE_string("plan", "", "Compile for h100:4, h100:2x8, v5e-16, v5p-8, ..., here; train nothing.")
flags.mark_flags_as_required(["config"])


def parse(argv: list[str]) -> list[str]:
    """Parse the flags; a key that does not exist or a value of another type ends the program with one sentence."""
    try:
        rest = flags.FLAGS(argv)
        _ = _CONFIG.value  # loads the file
    except (AttributeError, KeyError) as error:
        _fail(2, f"unknown configuration key: {error.args[0]}; `fpo_jax/config.py` lists every key.")
    except (flags.Error, TypeError, ValueError, OSError) as error:
        _fail(2, error)
    if not _WORKDIR.value and not _PLAN.value:
        _fail(2, "--workdir is missing; give the folder of the run, new or to be resumed.")
    if rest[1:]:
        _fail(2, f"unexpected arguments {rest[1:]}; settings are given as --config.key=value.")
    return rest


def main(_argv: list[str]) -> None:
    """Run, and turn each outcome into an exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("fpo_jax").setLevel(logging.INFO)
    if _PLAN.value:
        sys.exit(_plan())
    from fpo_jax import execution, loop  # after the flags: a misspelt option answers at once

    try:
        loop.run(_CONFIG.value, Path(_WORKDIR.value))
    except ValueError as error:
        _fail(2, error)
    except loop.NonFinite as error:
        _fail(1, error)
    except execution.Stopped as error:
        _fail(75, error)


def _plan() -> int:
    from fpo_jax import plan

    try:
        return plan.main(_CONFIG.value, _PLAN.value)
    except ValueError as error:
        _fail(2, error)


def _fail(code: int, error: object) -> NoReturn:
    print(f"train.py: {error}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
