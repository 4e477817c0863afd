"""A process that outlives its parent: run with `-m` and a FOLDER, it has the last words on its input.

jax ends a process from C++ when another one is missing; nothing of ours runs then. This process sees its input close,
and says what was handed to it, and what can be resumed. An empty line, written before an orderly end, makes it silent.
"""

import signal
import sys
from pathlib import Path


def resumption(checkpoints: Path) -> str:
    """Say what is saved; a folder named by a number is a complete step, orbax renames it so at the end."""
    steps = [int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()]
    if not steps:
        return f"{checkpoints} holds no complete checkpoint; the same command on every host starts again."
    return f"The newest complete checkpoint is step {max(steps)}; the same command on every host goes on from there."


def main() -> None:
    """Wait for the end of the input."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    last = ""
    for line in sys.stdin:
        last = line.strip()
    if last:
        print(f"{last} {resumption(Path(sys.argv[1]))}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
