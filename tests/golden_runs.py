"""Whether a change of structure changed a number: record what short runs compute, before and after, and compare.

    python -m tests.golden_runs record before.json      # minutes, on the CPU
    python -m tests.golden_runs record after.json       # after the change
    python -m tests.golden_runs compare before.json after.json

A record holds, of every run, the SHA-256 of the final parameters and of each metric's values. Bits depend on jax and on
the processor: both records have to come from one machine.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from fpo_jax import checkpoint
from fpo_jax.trainer import metric_logger
from tests import compiling, paths, tiny

STEPS = 12
RENAMED: dict[str, str] = {}  # metrics of the first record -> their names today
COMMON = {
    "data.format": "json", "data.max_length": 40, "data.max_completion_length": 16, "data.subfolder": "",
    "data.train_split": "", "data.eval_split": "", "model.compute_dtype": "float32", "optim.learning_rate": 3e-3,
    "train.batch_size": 8, "train.micro_batch_per_device": 1, "train.max_steps": STEPS, "train.epochs": 4.0,
    "train.eval_every": 5, "train.eval_batch_per_device": 2, "train.eval_groups": 8, "train.save_every": 6,
    "logging.tensorboard": False,
}  # fmt: skip
ONE = {"mesh.data": 1, "mesh.fsdp": 1}
LAST_TURN = {"data.hh_split": "last_turn"}  # rows of prompt, chosen and rejected
RUNS = {  # name -> recipe, inputs, virtual devices, what is changed
    "preference": ("pythia_hh_pref", "pairs", 1, ONE | LAST_TURN),
    "rewards, K=4": ("quickstart", "rewards", 1, ONE),
    "sft": ("pythia_hh_sft", "pairs", 1, ONE | LAST_TURN),
    "reward model": ("pythia_hh_reward", "pairs", 1, ONE | LAST_TURN),
    "lora": ("pythia_hh_pref", "pairs", 1, ONE | LAST_TURN | {"lora.rank": 3}),
    "shared rows": ("pythia_hh_pref", "pairs", 1, ONE | LAST_TURN | {"data.layout": "shared"}),
    "fsdp=4, tensor=2": ("pythia_hh_pref", "pairs", 8, LAST_TURN | {"mesh.fsdp": 4, "mesh.tensor": 2}),
    "stories260K on HH": ("pythia_hh_pref", "stories", 1, ONE),
}


def record() -> dict:
    """Run everything; {run: {"parameters": digest, metric: digest}}."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tiny.write_model(root / "model", layers=2, vocab_size=260)  # divisible by the tensor axis
        tiny.write_pairs(root / "pairs.jsonl", count=32)
        tiny.write_pairs(root / "rewards.jsonl", count=32, completions=4)
        for name, (recipe, source, devices, changed) in RUNS.items():
            options = _options(root, source) | changed
            workdir = root / name.replace(" ", "_")
            command = [sys.executable, "train.py", "--config", f"configs/{recipe}.py", "--workdir", str(workdir)]
            _run([*command, *(f"--config.{key}={value}" for key, value in options.items())], devices)
            found[name] = outcome(workdir)
            print(f"{name}: parameters {found[name]['parameters'][:12]}", flush=True)
        _run([sys.executable, "-m", "fpo_jax.eval.quickstart.quickstart", "--workdir", str(root / "quickstart")], 1)
        for workdir in sorted(path.parent for path in (root / "quickstart").rglob(metric_logger.METRICS_FILE)):
            name = f"quickstart/{workdir.relative_to(root / 'quickstart')}"
            found[name] = outcome(workdir)
            print(f"{name}: parameters {found[name]['parameters'][:12]}", flush=True)
    return found


def outcome(workdir: Path) -> dict[str, str]:
    """Return the digests of a run's final parameters and of every metric's values."""
    weights, _ = checkpoint.restore_params(workdir, None)
    parameters = hashlib.sha256()
    for leaf in jax.tree.leaves(weights):
        parameters.update(np.ascontiguousarray(np.asarray(leaf)).view(np.uint8))
    values: dict[str, list] = {}
    for line in metric_logger.read(workdir / metric_logger.METRICS_FILE):
        for name, value in line.items():
            values.setdefault(name, []).append((line["step"], value))
    digests = {name: hashlib.sha256(json.dumps(column).encode()).hexdigest() for name, column in values.items()}
    return {"parameters": parameters.hexdigest(), **digests}


def compare(before: dict, after: dict) -> list[str]:
    """Return a sentence for every number that differs."""
    differences = [f"{name}: in one record only" for name in before.keys() ^ after.keys()]
    for name in before.keys() & after.keys():
        old = {RENAMED.get(key, key): digest for key, digest in before[name].items()}
        new = after[name]
        differences += [f"{name}: {key} in one record only" for key in old.keys() ^ new.keys()]
        differences += [f"{name}: {key} differs" for key in old.keys() & new.keys() if old[key] != new[key]]
    return sorted(differences)


def _options(root: Path, source: str) -> dict:
    if source == "stories":
        data = str(paths.shared_data("hh_rlhf", "harmless-base.1800.jsonl.gz"))
        keep = {key: COMMON[key] for key in COMMON if not key.startswith("data.")}
        keep |= {"data.subfolder": "", "data.train_split": "", "data.eval_split": ""}
        keep |= {"data.train_rows": "0:64", "data.eval_rows": "64:96"}
        return keep | {"model.path": str(paths.shared_data("stories260K")), "data.train": data, "data.eval": data}
    rows = str(root / f"{source}.jsonl")
    return COMMON | {"model.path": str(root / "model"), "data.train": rows, "data.eval": rows}


def _run(command: list[str], devices: int) -> None:
    environment = os.environ | {"XLA_FLAGS": compiling.flags(devices=devices), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=paths.REPO, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-4000:]}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["record", path]:
            Path(path).write_text(json.dumps(record(), indent=1))
        case ["compare", first, second]:
            found = compare(json.loads(Path(first).read_text()), json.loads(Path(second).read_text()))
            sys.exit("\n".join(found) if found else print("every number is the same") or 0)
        case _:
            sys.exit(__doc__)
