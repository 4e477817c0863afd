"""Convert a checkpoint of a run into a Hugging Face directory that transformers and vLLM read.

fpo export --workdir runs/hh --out runs/hh/export [--step 400] [--dtype bfloat16]

Exit codes: 0 written; 1 the disk failed; 2 the input cannot be used, or another process writes there.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fpo_jax import checkpoint
from fpo_jax.cli import args as command_line
from fpo_jax.io import terminal
from fpo_jax.trainer import export


def main(arguments: Sequence[str] | None = None) -> int:
    """Export as the command line says; return the exit status."""
    options = _parser().parse_args(arguments)

    def work() -> int:
        line = export.export(options.workdir, options.out, step=options.step, dtype=options.dtype, lora=options.lora)
        terminal.say(line)
        return 0

    return command_line.ended("fpo export", work)


def _step(text: str) -> int | str:
    return text if text == checkpoint.BEST else int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fpo export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--out", type=Path, required=True, help="directory to write; absent or empty")
    parser.add_argument("--step", type=_step, help="which checkpoint: a number or best (default: the newest)")
    parser.add_argument("--lora", choices=("merged", "adapter"), default="merged", help="what of an adapter's run")
    parser.add_argument("--dtype", choices=export.DTYPES, help="weights on disk (default: as the start model)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
