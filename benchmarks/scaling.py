"""What an update costs against length, vocabulary, candidates, groups and depth, with the fitted exponents.

    python -m benchmarks.scaling --json runs/scaling.json
    python -m benchmarks.scaling --axes length candidates --updates 5

One axis at a time moves away from BASE, in both layouts: a random Llama, DPO (above two candidates EXO), float32.
A time is the median of updates, the first one, which compiles, left out and told apart. An exponent is the slope of a
straight line through logarithms: 1 is proportional, 0 is free. Operations are what the rows need (`perf.flops`),
temporaries what the compiler says of the update beyond its state.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import train_step_sides
from fpo_jax.io import atomic_io

BASE = train_step_sides.Case("base", vocab=16_384, layers=2, groups=2, candidates=2, prompt=192, completion=64)
LAYOUTS = ("padded", "shared")
AXES = {  # values of each axis; a length is three quarters prompt
    "length": (64, 128, 256, 512, 1024),
    "vocabulary": (4_096, 16_384, 65_536, 131_072),
    "candidates": (2, 4, 8),
    "groups": (1, 2, 4, 8),
    "layers": (1, 2, 4, 8),
}
COSTS = ("seconds", "operations", "temporaries")


def case_at(axis: str, value: int, *, updates: int) -> train_step_sides.Case:
    """Return BASE with one axis moved."""
    changes = {
        "length": {"prompt": value * 3 // 4, "completion": value // 4},
        "vocabulary": {"vocab": value},
        "candidates": {"candidates": value},
        "groups": {"groups": value},
        "layers": {"layers": value},
    }[axis]
    return dataclasses.replace(BASE, updates=updates, rounds=0, **changes)


def measure(axis: str, value: int, layout: str, *, updates: int) -> dict:
    """Return the costs of an update at one point."""
    case = case_at(axis, value, updates=updates)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        train_step_sides.write_model(case, model)
        run = train_step_sides.our_run(case, model, layout)
    seconds = []
    for number in range(updates):
        started = time.perf_counter()
        run.update(number)
        run.read()
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds[1:])
    return {
        "axis": axis,
        "value": value,
        "layout": layout,
        "seconds": median,
        "operations": run.operations(1),
        "temporaries": run.programs.train.temporaries,
        "first_update_s": seconds[0] - median,
    }


def exponents(rows: list[dict]) -> dict[str, float]:
    """Return the slope of each cost over an axis, in logarithms; NaN where the compiler tells no temporaries."""
    places = np.log([row["value"] for row in rows])
    return {cost: float(np.polyfit(places, np.log([row[cost] or np.nan for row in rows]), 1)[0]) for cost in COSTS}


def table(rows: list[dict]) -> str:
    """Rows as Markdown, a line of an axis for each layout and cost."""
    lines = ["| axis | layout | cost | at each value | exponent |", "|---" * 5 + "|"]
    units = {"seconds": (1, "s", ".3f"), "operations": (1e9, "GFLOP", ",.1f"), "temporaries": (2**20, "MiB", ",.0f")}
    for axis in dict.fromkeys(row["axis"] for row in rows):
        for layout in LAYOUTS:
            found = [row for row in rows if (row["axis"], row["layout"]) == (axis, layout)]
            fitted = exponents(found)
            for cost, (unit, name, form) in units.items():
                values = ", ".join(f"{row['value']:,}: {(row[cost] or 0) / unit:{form}}" for row in found)
                lines.append(f"| {axis} | {layout} | {cost} ({name}) | {values} | {fitted[cost]:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what the command line says, print one table, write the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=AXES)
    parser.add_argument("--updates", type=int, default=4, help="of each point; the first one compiles")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for axis in options.axes:
        for value in AXES[axis]:
            rows += [measure(axis, value, layout, updates=options.updates) for layout in LAYOUTS]
    print(table(rows))
    if options.json:
        atomic_io.write_json(options.json, rows)


if __name__ == "__main__":
    main()
