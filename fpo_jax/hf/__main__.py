"""Check an exported model: `python -m fpo_jax.hf DIRECTORY`; exit code 1 names every file and tensor that is wrong."""

import json
import sys
from pathlib import Path

from fpo_jax.checkpoint import integrity
from fpo_jax.hf import digests
from fpo_jax.io import terminal


def main(arguments: list[str]) -> int:
    """Print what is wrong, or what was found as written."""
    if len(arguments) != 1:
        print("usage: python -m fpo_jax.hf DIRECTORY", file=sys.stderr)
        return 2
    directory = Path(arguments[0])
    if found := digests.check(directory):
        print("\n".join(terminal.shown(f"{directory}: {line}") for line in found), file=sys.stderr)
        return 1
    content = json.loads((directory / integrity.MANIFEST).read_text())
    size = sum(entry["bytes"] for entry in content["files"].values())
    terminal.say(
        f"{directory}: {len(content['files'])} files, {len(content['tensors'])} tensors, {size:,} bytes as written"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
