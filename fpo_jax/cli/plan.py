"""Say what a run would need on devices that need not be here: `fpo plan --config llama3_base --target h100:4`.

The run is compiled for the target and not trained; neither weights nor data have to be at hand. Exit codes: 0 it fits;
2 it does not, or cannot be compiled (the message says what to change).
"""

import sys
from collections.abc import Sequence

from absl import flags

from fpo_jax.config import overrides
from fpo_jax.io import terminal


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan of the command line's run; return the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    values = overrides.flag_values(arguments)
    flags.DEFINE_string("target", "here", "h100:4, h100:2x8, v5e-16, v5p-2x8, ..., here.", flag_values=values)
    try:
        config = overrides.parse(values, arguments, keys="`fpo config`", about=__doc__, pipeline=False)
        from fpo_jax import plan  # after the flags: a misspelt option answers at once

        return plan.main(config, values.target)
    except (ValueError, OSError) as error:
        terminal.refuse("plan", error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
