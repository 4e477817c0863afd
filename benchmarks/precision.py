"""What 8-bit products and 8-bit moments do to learning: whole runs on HH, several seeds of each, side by side.

    python -m benchmarks.precision --data ../shared/data --json runs/precision.json
    python -m benchmarks.precision --data ../shared/data --model MODEL --sides bfloat16 fp8 --rows 192

DPO of a small trained model (stories260K beside the data, or `--model`) on Anthropic's harmless-base; a seed gives the
order of the data. Of every side the mean and the range over the seeds of what the held-out pairs say at the end: a side
learns as bfloat16 does where its mean lies within the range of bfloat16's seeds. FP8 is emulated where the device has
none: the same roundings, no speed.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import jax

import fpo_jax
from fpo_jax import config as configuration
from fpo_jax.io import atomic_io
from fpo_jax.trainer import metric_logger

SIDES: dict[str, dict[str, str]] = {
    "bfloat16": {},
    "fp8": {"model.matmul_dtype": "fp8"},
    "int8 moments": {"optim.state_dtype": "int8"},
    "fp8, int8 moments": {"model.matmul_dtype": "fp8", "optim.state_dtype": "int8"},
}
METRICS = ("eval_rewards/margins", "eval_rewards/accuracies", "eval_loss", "eval_reference_kl")


def configured(data: Path, model: Path, *, rows: int, learning_rate: float) -> configuration.Config:
    """Return the run: DPO on the first rows, evaluated on 128 that follow, with a constant rate."""
    config = fpo_jax.load_config("pythia_hh_pref:dpo")
    file = str(data / "hh_rlhf" / "harmless-base.1800.jsonl.gz")
    config.model.path, config.data.train, config.data.eval = str(model), file, file
    config.data.subfolder = config.data.train_split = config.data.eval_split = ""
    config.data.train_rows, config.data.eval_rows = f"0:{rows}", f"{rows}:{rows + 128}"
    config.data.max_length, config.data.max_completion_length = 256, 96
    config.optim.learning_rate, config.train.batch_size, config.train.epochs = learning_rate, 16, 2.0
    config.train.eval_every, config.train.save_every, config.train.eval_groups = 10_000, 10_000, 128
    config.logging.tensorboard = False
    config.mesh.data = config.mesh.fsdp = 1
    return config


def measure(config: configuration.Config, side: str, seed: int) -> dict[str, float]:
    """Train; return the metrics of the evaluation at the end."""
    config = config.copy_and_resolve_references()
    config.seed = seed
    with config.unlocked():
        config.update_from_flattened_dict(SIDES[side])
    with tempfile.TemporaryDirectory() as folder:
        fpo_jax.Trainer(config, folder, devices=jax.devices()[:1]).train()
        lines = metric_logger.read(Path(folder) / metric_logger.METRICS_FILE)
    last = [line for line in lines if METRICS[0] in line][-1]
    return {name: last[name] for name in METRICS if name in last}


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Mean and range over the seeds as Markdown."""
    names = list(next(iter(found.values()))[0])
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for side, runs in found.items():
        cells = []
        for name in names:
            values = [run[name] for run in runs]
            cells.append(f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})")
        lines.append(f"| {side} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with hh_rlhf (and stories260K)")
    parser.add_argument("--model", type=Path, help="Hugging Face directory; stories260K of the data without it")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = options.model or options.data / "stories260K"
    config = configured(options.data, model, rows=options.rows, learning_rate=options.learning_rate)
    found: dict[str, list[dict[str, float]]] = {side: [] for side in options.sides}
    for seed in range(options.seeds):  # the sides take turns
        for side in options.sides:
            found[side].append(measure(config, side, seed))
            print(json.dumps({"side": side, "seed": seed, **found[side][-1]}), flush=True)
            if options.json:
                atomic_io.write(options.json, json.dumps(found, indent=1))
    print(table(found))


if __name__ == "__main__":
    main()
