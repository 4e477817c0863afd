"""What digests cost: `python benchmarks/checkpointing.py [--megabytes 500] [--repeats 5] [--out FILE]`.

Saves and restores one state with digests and without, in turn, in one process, and compares the estimate of its bytes
with what lies on the disk. Prints a table and one line of JSON. Goals: digests at most 10 % of a save, verification at
most 15 % of a restore, the estimate within 5 %.
"""

import argparse
import contextlib
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp

from fpo_jax import checkpoint, types
from fpo_jax.checkpoint import disk_space, integrity

LAYERS, WIDTH = 4, 1024


def state(megabytes: int, seed: int) -> types.TrainState:
    """Weights and the moments of Adam, float32, with the spread of trained ones."""
    rows = max(1, megabytes * 10**6 // (3 * 4 * WIDTH * (LAYERS + 1)))
    keys = jax.random.split(jax.random.key(seed), 4)
    tree = lambda a, b, scale: {  # noqa: E731
        "layers": {"ffn": scale * jax.random.normal(a, (LAYERS, rows, WIDTH))},
        "embed": scale * jax.random.normal(b, (rows, WIDTH)),
    }
    first = tree(keys[2], keys[3], 1e-4)
    found = types.TrainState(tree(keys[0], keys[1], 0.02), (first, jax.tree.map(jnp.square, first)), jnp.int32(0))
    return jax.block_until_ready(found)


@contextlib.contextmanager
def opened(workdir: Path) -> Iterator[checkpoint.Checkpointer]:
    """Keep one checkpoint, so that the disk is asked for two."""
    with contextlib.closing(checkpoint.Checkpointer(workdir, keep=1)) as one:
        yield one


def seconds(act: Callable[[], object]) -> float:
    """Time one call."""
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def measure(megabytes: int, repeats: int) -> dict:
    """Return medians, and the shares that the goals are about."""
    values = state(megabytes, 0)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), values)
    parts = (values.params, values.opt_state)
    times: dict[str, list[float]] = {name: [] for name in ("save", "save bare", "restore", "restore bare", "digests")}
    with tempfile.TemporaryDirectory() as folder:
        workdir, number = Path(folder), 0
        steps = workdir / checkpoint.FOLDER
        estimates, real = {"first": disk_space.estimate(steps, parts)}, 0
        with opened(workdir) as one:
            for turn in range(repeats + 1):
                sides = [("save", integrity.seal), ("save bare", lambda step: None)]
                for name, seal in sides if turn % 2 else sides[::-1]:
                    number += 1
                    digests: list[float] = []
                    timed = lambda step, seal=seal: digests.append(seconds(lambda: seal(step)))  # noqa: B023, E731
                    os.sync()  # what the save before it left to write would be this one's
                    with mock.patch.object(integrity, "seal", timed):
                        times[name].append(seconds(lambda: (one.save(number, values, {}), one.wait())))  # noqa: B023
                    if name == "save":
                        times["digests"] += digests
                        real = sum(path.stat().st_size for path in (steps / str(number)).rglob("*") if path.is_file())
                    else:  # both sides estimate the next save by a sealed step
                        integrity.seal(steps / str(number))
                    estimates["next"] = disk_space.estimate(steps, parts)
        for _ in range(repeats + 1):
            for name, faults in (("restore", integrity.faults), ("restore bare", lambda step, only: "")):

                def restore() -> None:
                    with opened(workdir) as one:
                        jax.block_until_ready(one.restore(number, abstract)[:2])

                with mock.patch.object(integrity, "faults", faults):
                    times[name].append(seconds(restore))
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}  # the first of each warms up
    return {
        "raw_bytes": disk_space.raw(parts),
        "disk_bytes": real,
        "cores": os.cpu_count(),
        "seconds": medians,
        "digests_of_save": medians["digests"] / medians["save bare"],
        "save_with_over_without": medians["save"] / medians["save bare"] - 1,
        "restore_with_over_without": medians["restore"] / medians["restore bare"] - 1,
        "estimate_error": {name: described / real - 1 for name, described in estimates.items()},
        "all_seconds": times,
    }


def table(found: dict) -> str:
    """Return the result for a reader."""
    took = found["seconds"]
    error = found["estimate_error"]
    sizes = [disk_space.gb(found[name]) for name in ("raw_bytes", "disk_bytes")]
    disk = f"state {sizes[0]}, on the disk {sizes[1]}, {found['cores']} cores"
    rows = [
        f"{name:8} {took[name]:6.2f} s with, {took[f'{name} bare']:6.2f} s without, {more:+.1%} (goal {goal} %)"
        for name, more, goal in (
            ("save", found["save_with_over_without"], 10),
            ("restore", found["restore_with_over_without"], 15),
        )
    ]
    alone = f"digests alone {took['digests']:.2f} s, {found['digests_of_save']:.1%} of a save without"
    off = f"estimate {error['first']:+.2%} before the first save, {error['next']:+.2%} after it (goal 5 %)"
    return "\n".join([disk, *rows, alone, off])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="file for the JSON")
    options = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)
    found = measure(options.megabytes, options.repeats)
    print(table(found))
    text = json.dumps(found)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
