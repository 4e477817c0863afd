"""Convert a checkpoint of a run into a Hugging Face directory that transformers and vLLM read.

fpo export --workdir runs/hh --out runs/hh/export [--step 400] [--dtype bfloat16] [--push-to-hub OWNER/NAME [--public]]

With --push-to-hub the directory gets a model card and goes to the Hugging Face hub, into a private repository unless
--public is given. The token is HF_TOKEN or that of `hf auth login`. When the upload fails, the directory stays, and the
message has the command that uploads it alone.

Exit codes: 0 written, and uploaded; 1 the disk or the upload failed; 2 the input cannot be used, or another process
writes there.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fpo_jax import checkpoint, hf
from fpo_jax.cli import args as command_line
from fpo_jax.io import terminal
from fpo_jax.trainer import export


def main(arguments: Sequence[str] | None = None) -> int:
    """Export as the command line says; return the exit status."""
    options = _parser().parse_args(arguments)

    def work() -> int:
        settings = {"step": options.step, "dtype": options.dtype, "lora": options.lora}
        if options.push_to_hub is None:
            if options.public:
                raise ValueError("--public says who may see an upload, and there is none; give --push-to-hub too.")
            terminal.say(export.export(options.workdir, options.out, **settings))
            return 0
        hf.upload.check(options.push_to_hub, public=options.public)
        terminal.say(export.export(options.workdir, options.out, **settings, card=True))
        try:
            terminal.say(hf.upload.push(options.out, options.push_to_hub, public=options.public))
        except hf.upload.Failed as error:
            terminal.refuse("export", error)
            return 1
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
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload to this repository of the hub, with a card")
    parser.add_argument("--public", action="store_true", help="let everybody see the upload (default: it is private)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
