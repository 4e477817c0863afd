"""The `fpo` command: `fpo PROGRAM [OPTIONS]`; `fpo PROGRAM --help` has the options of each."""

import runpy
import sys

from fpo_jax import __version__
from fpo_jax.cli import process
from fpo_jax.io import terminal

PROGRAMS = {  # name -> module, what it does
    "init": ("fpo_jax.cli.init", "a config for your own data: says what they are, shows an example, writes a file"),
    "train": ("fpo_jax.cli.train", "train a model: SFT, a reward model, or a preference loss"),
    "plan": ("fpo_jax.cli.plan", "memory, communication and time of a run on devices that need not be here"),
    "config": ("fpo_jax.cli.config", "every config field with type, default and meaning"),
    "export": ("fpo_jax.cli.export", "a checkpoint as a Hugging Face model directory"),
    "generate": ("fpo_jax.cli.generate", "completions of prompts, drawn from a model"),
    "label": ("fpo_jax.cli.label", "rewards of completions, or pairs of the best and the worst"),
    "winrate": ("fpo_jax.eval.judge.winrate", "two models' completions before a judge"),
    "benchmark": ("fpo_jax.eval.benchmarks.answer", "completions for AlpacaEval, Arena-Hard and MT-Bench"),
    "alpaca_eval": ("fpo_jax.eval.benchmarks.alpaca_eval", "win rates of AlpacaEval 2 annotations"),
    "arena_hard": ("fpo_jax.eval.benchmarks.arena_hard", "scores of Arena-Hard judgements"),
    "mt_bench": ("fpo_jax.eval.benchmarks.mt_bench", "scores of MT-Bench judgements"),
    "kl": ("fpo_jax.eval.stats.kl", "KL(policy ‖ reference) on the policy's own completions"),
    "report": ("fpo_jax.eval.report.report", "one page about a run or a pipeline, and its model card"),
    "divergence_figure": ("fpo_jax.eval.report.divergence_figure", "the figure of all divergences"),
    "pipeline": ("fpo_jax.eval.pipeline.pipeline", "a recipe from its base model to a reward report"),
    "quickstart": ("fpo_jax.eval.quickstart.quickstart", "align a small model from nothing, in minutes"),
    "losses": ("fpo_jax.losses.__main__", "every loss with its equation and options"),
}


def command() -> None:
    """Be the command `fpo`."""
    process.without_torch()
    main()


def main() -> None:
    """Run the program that the command line names."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__, end="\n\n")
        print("\n".join(f"  {program:18} {about}" for program, (_, about) in PROGRAMS.items()))
    elif name == "--version":
        print(f"fpo_jax {__version__}")
    elif name in PROGRAMS:
        sys.argv = [f"fpo {name}", *rest]
        runpy.run_module(PROGRAMS[name][0], run_name="__main__")
    else:
        terminal.refuse("fpo", f"{name!r} is not one of {', '.join(PROGRAMS)}.")
        sys.exit(2)


if __name__ == "__main__":
    command()
