"""Print config fields with type, default and meaning: `fpo config [WORD ...]`.

With words only the fields whose names hold one of them. `fpo config --markdown` prints docs/config.md.
"""

import argparse
import sys
import textwrap
from collections.abc import Sequence

from fpo_jax.config import fields


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the fields; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="fpo config", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="WORD", help="part of a name: loss, mesh.fsdp")
    parser.add_argument("--markdown", action="store_true", help="print the page of the documentation")
    options = parser.parse_args(arguments)
    if options.markdown:
        print(fields.page(), end="")
        return 0
    found = [field for field in fields.FIELDS if not options.words or any(word in field.name for word in options.words)]
    if not found:
        print(
            f"config: no field has {' or '.join(options.words)} in its name; `fpo config` prints all.", file=sys.stderr
        )
        return 2
    for field in found:
        print(f"{field.name}  {field.kind.__name__}, {field.shown()}")
        print(textwrap.fill(field.meaning(), 110, initial_indent="    ", subsequent_indent="    "))
    return 0


if __name__ == "__main__":
    sys.exit(main())
