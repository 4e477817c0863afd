"""An update of DPO end to end against TRL and tunix: same weights, same token ids, losses asserted equal, in one run.

    python -m benchmarks.train_step                                     every case, every side that is installed
    python -m benchmarks.train_step --cases long --sides ours-shared tunix --json runs/train_step.json

Every side is a process of its own with two threads of work at most, and they take turns round by round, so that what
else happens on the machine falls on all of them. A time is the median over rounds of the seconds of one update, data
collation and metrics included; the first round, which compiles, is told apart. `with reference` adds the share of the
reference pass that an update of a run of one epoch has; tunix recomputes the reference in every update. Tokens are
those of all candidates with their prompts, for every side alike. Memory is the peak of resident memory over the rounds
beyond the imports' own. With K = 4 the others train on two pairs a prompt, since they have no loss over a group, and
no losses are compared.

TRL and tunix: pip install trl google-tunix (with the CPU wheel of torch) into an environment that has fpo_jax.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.train_step_sides import SIDES, Case, write_model
from fpo_jax import files

CASES = (
    Case("short", vocab=32_000, layers=4, groups=4, candidates=2, prompt=64, response=64),
    Case("vocabulary", vocab=128_256, layers=2, groups=4, candidates=2, prompt=128, response=128),
    Case("long", vocab=32_000, layers=4, groups=2, candidates=2, prompt=448, response=64),
    Case("long, K=4", vocab=32_000, layers=4, groups=2, candidates=4, prompt=448, response=64),
)
NEEDS = {"trl": "trl", "tunix": "tunix"}
LOSS_RTOL = 1e-4  # AdamW divides by the root of a second moment near 0, which enlarges rounding; measured: 1e-5


class Side:
    """One process."""

    def __init__(self, name: str, case: Case, model: Path):
        """Start it; it loads the model and waits."""
        command = [sys.executable, "-m", "benchmarks.train_step_sides", "--side", name, "--model", str(model)]
        self.name, self._log = name, tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [*command, "--case", json.dumps(dataclasses.asdict(case))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"},
        )
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.losses: list[float] = []
        self.reference = 0.0
        while "ready" not in (found := self._read()):
            self.reference = found.get("reference_seconds", self.reference)

    def round(self) -> None:
        """Let it do one round."""
        assert self._process.stdin
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        found = self._read()
        self.seconds.append(found["seconds"])
        self.cpu_seconds.append(found["cpu_seconds"])
        self.losses += found["losses"]

    def close(self) -> int:
        """Return the peak of its memory."""
        peak = self._read()["peak_bytes"]
        self._process.wait()
        return peak

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
    tokens = case.groups * case.candidates * (case.prompt + case.response)
    rows = []
    for side in running:
        seconds = statistics.median(side.seconds[1:]) / case.updates
        rows.append(
            {
                "case": case.name,
                "side": side.name,
                "seconds": seconds,
                "fastest": min(side.seconds[1:]) / case.updates,
                "slowest": max(side.seconds[1:]) / case.updates,
                "cpu_seconds": statistics.median(side.cpu_seconds[1:]) / case.updates,
                "with_reference": seconds + side.reference,
                "tokens_per_s": tokens / (seconds + side.reference),
                "peak_mib": side.close() / 2**20,
                "first_round_s": side.seconds[0] - seconds * case.updates,
                "losses": side.losses,
            }
        )
    return rows


def check_losses(sides: list[Side]) -> None:
    """Refuse to compare times of different work."""
    first = sides[0]
    for side in sides[1:]:
        worst = max(abs(a - b) / abs(a) for a, b in zip(first.losses, side.losses, strict=True))
        print(f"losses of {side.name} and {first.name} over {len(first.losses)} updates: within {worst:.1e}")
        if worst > LOSS_RTOL:
            raise RuntimeError(f"{side.name} has other losses than {first.name}: {side.losses} {first.losses}")


def table(rows: list[dict]) -> str:
    """Rows as Markdown; a ratio is that of seconds with reference to our best."""
    columns = "case, side, s / update (range), CPU s, with reference, tokens/s, peak MiB, compile s, times ours, memory"
    lines = [f"| {columns.replace(', ', ' | ').replace('(range)', '(least and most)')} |", "|---" * 10 + "|"]
    for row in rows:
        best = next((one for one in rows if one["case"] == row["case"] and one["side"] == "ours-shared"), row)
        lines.append(
            f"| {row['case']} | {row['side']} | {row['seconds']:.3f} ({row['fastest']:.3f}, {row['slowest']:.3f})"
            f" | {row['cpu_seconds']:.3f} | {row['with_reference']:.3f} | {row['tokens_per_s']:,.0f}"
            f" | {row['peak_mib']:,.0f}"
            f" | {row['first_round_s']:.1f} | {row['with_reference'] / best['with_reference']:.2f}"
            f" | {row['peak_mib'] / best['peak_mib']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Compare what the command line says, print one table, write the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sides = []
    for name in options.sides:
        if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
            print(f"{name}: not installed, left out")
        else:
            sides.append(name)
    rows = []
    for case in CASES:
        if case.name in options.cases:
            with tempfile.TemporaryDirectory() as folder:
                rows += compare(dataclasses.replace(case, rounds=options.rounds), sides, Path(folder))
    machine = {"cpus": os.cpu_count(), "python": platform.python_version()}
    machine |= {name: importlib.import_module("importlib.metadata").version(name) for name in ("jax", "numpy")}
    print(machine)
    print(table(rows))
    if options.json:
        files.write_json(options.json, {"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
