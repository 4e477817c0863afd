"""What a run settles for itself against settings chosen by hand, on real lengths: seconds of a step, all in one run.

    python -m benchmarks.settings --data ../shared/data --json runs/settings.json

Layout, remat and micro-batch are left to the run, and beside it given in every combination of the table. All sides take
turns, step by step, on the same groups, in one process, with the model and the sets of `benchmarks/layouts.py`; losses
are asserted equal first. A share below 1 says how much of the best hand-chosen setting's speed is left to the run.
"""

import argparse
import itertools
import statistics
from pathlib import Path

import numpy as np

from benchmarks import layouts
from fpo_jax.io import atomic_io

HAND = (
    *itertools.product(("shared",), ("none", "dots_and_attention"), (1, 4)),
    ("shared", "full", 1),
    ("padded", "none", 4),
)


def compare(name: str, folder: Path, *, updates: int) -> list[dict]:
    """Return a row for each setting of one of the SETS, the automatic one first."""
    settings = {
        (layout, remat, micro): {"layout": layout, "remat": remat, "micro": micro}
        for layout, remat, micro in (("auto", "auto", None), *HAND)
    }
    runs = layouts.sides(name, folder, settings, updates=updates)
    seconds = layouts.in_turns(name, runs, updates=updates)
    auto, *hand = runs
    for setting in hand:
        np.testing.assert_allclose(runs[setting].losses, runs[auto].losses, rtol=layouts.LOSS_RTOL)
    rows = []
    for setting, run in runs.items():
        ratios = [one / other for one, other in zip(seconds[setting][1:], seconds[auto][1:], strict=True)]
        config = run.settled.config
        rows.append(
            {
                "set": name, "automatic": setting == auto, "layout": config.data.layout, "remat": config.model.remat,
                "micro": config.train.micro_batch_per_device, "seconds": statistics.median(seconds[setting][1:]),
                "share": statistics.median(ratios),
            }
        )  # fmt: skip
    return rows


def table(rows: list[dict]) -> str:
    """Rows as Markdown, the fastest first."""
    lines = ["| set | settings | s / step | speed of the automatic one over it |", "|---" * 4 + "|"]
    for row in sorted(rows, key=lambda row: (row["set"], row["seconds"])):
        named = f"{row['layout']}, remat {row['remat']}, micro-batch {row['micro']}"
        named = f"**automatic: {named}**" if row["automatic"] else named
        lines.append(f"| {row['set']} | {named} | {row['seconds']:.2f} | {row['share']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Compare what the command line says, print a table, write the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the SETS' files")
    parser.add_argument("--sets", nargs="+", default=list(layouts.SETS), choices=layouts.SETS)
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [row for name in options.sets for row in compare(name, options.data, updates=options.updates)]
    print(table(rows))
    if options.json:
        atomic_io.write_json(options.json, rows)


if __name__ == "__main__":
    main()
