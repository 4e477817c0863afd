"""An update of DPO end to end against TRL and tunix: same weights, same token ids, losses asserted equal, in one run.

    python -m benchmarks.train_step                                     every case, every side that is installed
    python -m benchmarks.train_step --cases long --sides ours-shared tunix --json runs/train_step.json

Every side is a process of its own with two threads of work at most, and they take turns round by round, so that what
else happens on the machine falls on all of them. A time is the median over rounds of the seconds of one update, data
collation and metrics included; the first round, which compiles, is told apart. `with reference` adds the share of the
reference pass that an update of a run of one epoch has, timed in every round (TRL's once, as it makes it once); tunix
recomputes the reference in every update. `times ours` is the median of the rounds' ratios. Tokens are those of all
candidates with their prompts, for every side alike. Memory is the peak of resident memory over the rounds beyond the
imports' own. With K = 4 the others train on two pairs a prompt, since they have no loss over a group, and no losses are
compared.

    python -m benchmarks.train_step --device gpu --layers 12 --json runs/train_step_gpu.json

On a GPU (`train_step_gpu.CASES`: a Mistral shape in bfloat16) one side's process follows the other, as two do not fit
its memory; memory is then the most that the process's allocator ever held on the device, loading and reference pass
included, and a table has the model FLOP/s utilisation. A side that fails is left out and said to be. The losses of the
first update are asserted to agree within 0.02.

TRL and tunix: pip install trl google-tunix (with the CPU wheel of torch) into an environment that has fpo_jax.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from benchmarks import train_step_gpu
from benchmarks.train_step_sides import CPU_SIDES, GPU_SIDES, SIDES, Case, write_model
from fpo_jax import hf
from fpo_jax.io import atomic_io

CASES = (
    Case("short", vocab=32_000, layers=4, groups=4, candidates=2, prompt=64, completion=64),
    Case("vocabulary", vocab=128_256, layers=2, groups=4, candidates=2, prompt=128, completion=128),
    Case("long", vocab=32_000, layers=4, groups=2, candidates=2, prompt=448, completion=64),
    Case("long, K=4", vocab=32_000, layers=4, groups=2, candidates=4, prompt=448, completion=64),
)
NEEDS = {
    "trl": ("trl",), "tunix": ("tunix",), "trl-bf16": ("trl",),
    "trl-liger": ("trl", "liger_kernel"), "trl-bf16-liger": ("trl", "liger_kernel"),
}  # fmt: skip
LOSS_RTOL = 1e-4  # AdamW divides by the root of a second moment near 0, which enlarges rounding; measured: 1e-5


class Side:
    """One process."""

    def __init__(self, name: str, case: Case, model: Path):
        """Start it; it loads the model and waits."""
        command = [sys.executable, "-m", "benchmarks.train_step_sides", "--side", name, "--model", str(model)]
        self.name, self._updates, self._log = name, case.updates, tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [*command, "--case", json.dumps(dataclasses.asdict(case))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ
            | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
            | train_step_gpu.environment(name, case.device),
        )
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.losses: list[float] = []
        self.references: list[float] = []  # of the rounds
        self._reference = 0.0
        self.device = ""
        assert "ready" in self._found(), name

    def round(self) -> None:
        """Let it do one round."""
        assert self._process.stdin
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        found = self._found()
        self.references.append(self._reference)
        self.seconds.append(found["seconds"])
        self.cpu_seconds.append(found["cpu_seconds"])
        self.losses += found["losses"]

    def close(self) -> int:
        """Return the peak of its memory."""
        found = self._read()
        self._process.wait()
        self.device = found.get("device", "")
        return found["peak_bytes"]

    def kill(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()

    def per_step(self) -> list[float]:
        """Seconds of an update with its share of the reference pass, in every round but the one that compiles."""
        pairs = zip(self.seconds[1:], self.references[1:], strict=True)
        return [seconds / self._updates + reference for seconds, reference in pairs]

    def _found(self) -> dict:
        """What it says next, but for the times of its reference passes."""
        while "reference_seconds" in (found := self._read()):
            self._reference = found["reference_seconds"]
        return found

    def _read(self) -> dict:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"{self.name} ended:\n{self._log.read()[-3000:]}")
        return json.loads(line)


def compare(case: Case, sides: list[str], folder: Path) -> list[dict]:
    """Return a row for each side."""
    model = folder / "model"
    write_model(case, model)
    running = [Side(name, case, model) for name in sides]
    for number in range(case.rounds + 1):
        for side in running[number % len(running) :] + running[: number % len(running)]:
            side.round()
    if case.candidates == 2:
        check_losses(running)
    return [described(case, side) for side in running]


def one_by_one(case: Case, sides: list[str], model: Path) -> list[dict]:
    """Return a row for each side that runs, one process after the other."""
    config, rows = hf.read_config(model), []
    for name in sides:
        side = None
        try:
            side = Side(name, case, model)
            for _ in range(case.rounds + 1):
                side.round()
            row = described(case, side)
        except (OSError, RuntimeError) as error:  # a pipe whose other end is gone
            print(f"{case.name}, {name}: {error}", flush=True)
            continue
        finally:
            if side is not None:
                side.kill()
        rows.append(row | train_step_gpu.utilisation(case, config, row))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def described(case: Case, side: Side) -> dict:
    """Return the row of a side whose rounds are over."""
    tokens = case.groups * case.candidates * (case.prompt + case.completion)
    seconds = statistics.median(side.seconds[1:]) / case.updates
    return {
        "case": case.name,
        "side": side.name,
        "seconds": seconds,
        "fastest": min(side.seconds[1:]) / case.updates,
        "slowest": max(side.seconds[1:]) / case.updates,
        "cpu_seconds": statistics.median(side.cpu_seconds[1:]) / case.updates,
        "with_reference": statistics.median(side.per_step()),
        "rounds": side.per_step(),
        "tokens_per_s": tokens / statistics.median(side.per_step()),
        "peak_mib": side.close() / 2**20,
        "device": side.device,
        "first_round_s": side.seconds[0] - seconds * case.updates,
        "losses": side.losses,
    }


def check_losses(sides: list[Side]) -> None:
    """Refuse to compare times of different work."""
    first = sides[0]
    for side in sides[1:]:
        worst = max(abs(a - b) / abs(a) for a, b in zip(first.losses, side.losses, strict=True))
        print(f"losses of {side.name} and {first.name} over {len(first.losses)} updates: within {worst:.1e}")
        if worst > LOSS_RTOL:
            raise RuntimeError(f"{side.name} has other losses than {first.name}: {side.losses} {first.losses}")


def table(rows: list[dict]) -> str:
    """Rows as Markdown; a ratio is that of seconds with reference to our best, the median over rounds."""
    columns = "case, side, s / update (range), CPU s, with reference, tokens/s, peak MiB, compile s, times ours, memory"
    lines = [f"| {columns.replace(', ', ' | ').replace('(range)', '(least and most)')} |", "|---" * 10 + "|"]
    for row in rows:
        best = next((one for one in rows if one["case"] == row["case"] and one["side"] == "ours-shared"), row)
        lines.append(
            f"| {row['case']} | {row['side']} | {row['seconds']:.3f} ({row['fastest']:.3f}, {row['slowest']:.3f})"
            f" | {row['cpu_seconds']:.3f} | {row['with_reference']:.3f} | {row['tokens_per_s']:,.0f}"
            f" | {row['peak_mib']:,.0f}"
            f" | {row['first_round_s']:.1f} | {times(row, best):.2f}"
            f" | {row['peak_mib'] / best['peak_mib']:.2f} |"
        )
    return "\n".join(lines)


def times(row: dict, best: dict) -> float:
    """Return how often the seconds of `best` go into those of a row, round by round: what else runs then meets both."""
    return statistics.median(one / other for one, other in zip(row["rounds"], best["rounds"], strict=True))


def on_gpu(options: argparse.Namespace, sides: list[str]) -> tuple[list[dict], list[str]]:
    """Run the cases of a GPU; returns the rows, and losses that differ. The numbers are written as they come."""
    changes = {key: getattr(options, key) for key in ("layers", "rounds", "remat", "trl_remat", "micro", "trl_micro")}
    changes = {key: value for key, value in changes.items() if value is not None}
    rows, problems = [], []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        for case in train_step_gpu.CASES:
            if options.cases and case.name not in options.cases:
                continue
            case = dataclasses.replace(case, fields=tuple(options.fields), **changes)
            case = train_step_gpu.tiny(case) if options.tiny else case
            if not model.exists():  # one shape for all
                started = time.perf_counter()
                write_model(case, model)
                print(f"wrote {case.layers} layers in {time.perf_counter() - started:.1f} s", flush=True)
            found = one_by_one(case, sides, model)
            rows += found
            if case.candidates == 2 and found:
                problems += train_step_gpu.check_losses(found)
            if options.json:
                atomic_io.write_json(options.json, {"case": dataclasses.asdict(case), "rows": rows})
    return rows, problems


def main() -> None:
    """Compare what the command line says, print one table, write the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", help="names; all of the device's")
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="all of the device's")
    parser.add_argument("--rounds", type=int, help="5; on a GPU 3")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    gpu = parser.add_argument_group("with --device gpu")
    gpu.add_argument("--layers", type=int, help="12")
    gpu.add_argument("--remat", choices=("none", "dots", "full", "offload"), help="model.remat of ours; full")
    gpu.add_argument("--trl-remat", choices=("none", "full"), help="gradient checkpointing of TRL; full")
    gpu.add_argument("--micro", type=int, help="groups of a pass of ours; all of them")
    gpu.add_argument("--trl-micro", type=int, help="pairs of a pass of TRL's; 4")
    gpu.add_argument("--fields", nargs="+", default=[], metavar="KEY=VALUE", help="of our configuration")
    gpu.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # the same on a CPU, in seconds
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # this process leaves the GPU to its sides
    allowed = GPU_SIDES if options.device == "gpu" else CPU_SIDES
    sides = []
    for name in options.sides or allowed:
        if name not in allowed:
            parser.error(f"--sides {name} does not run with --device {options.device}: {', '.join(allowed)} do")
        missing = [needed for needed in NEEDS.get(name, ()) if importlib.util.find_spec(needed) is None]
        if missing:
            print(f"{name}: {missing[0]} is not installed, left out")
        else:
            sides.append(name)
    rows, problems = [], []
    if options.device == "gpu":
        rows, problems = on_gpu(options, sides)
    for case in CASES if options.device == "cpu" else ():
        if not options.cases or case.name in options.cases:
            with tempfile.TemporaryDirectory() as folder:
                rows += compare(dataclasses.replace(case, rounds=options.rounds or 5), sides, Path(folder))
    machine = {"cpus": os.cpu_count(), "python": platform.python_version()}
    packages = ("jax", "numpy") if options.device == "cpu" else ("jax", "numpy", "torch", "transformers", "trl")
    machine |= {name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name)}
    print(machine)
    print((table if options.device == "cpu" else train_step_gpu.table)(rows))
    if options.json:
        atomic_io.write_json(options.json, {"machine": machine, "rows": rows})
    if problems:
        raise SystemExit("losses differ: " + "; ".join(problems))


if __name__ == "__main__":
    main()
