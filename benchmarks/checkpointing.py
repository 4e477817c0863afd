"""What digests cost: `python benchmarks/checkpointing.py [--megabytes 500] [--repeats 5] [--out FILE]`.

Saves and restores one state with digests and without, in turn, in one process, and compares the estimate of its bytes
with what lies on the disk. Prints a table and one line of JSON. Goals: digests at most 10 % of a save, verification at
most 15 % of a restore, the estimate within 5 %.

With `--processes N` (2 or more) that many processes, over loopback, save a state that is sharded over them and open the
checkpoint again. Prints what each of them read and how long its digests took, at the save and at the verification.
They share the cores of this machine: the bytes are those of N hosts, the seconds are not.
"""

import argparse
import contextlib
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fpo_jax import checkpoint, distributed, types
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


class Digests:
    """Counts the bytes that this process reads for digests, and the seconds in which at least one file is read."""

    def __init__(self) -> None:
        """Count from now on, in any thread."""
        self._calls: list[tuple[float, float, int]] = []
        digest = integrity.digest

        def counted(path: Path, algorithm: str) -> dict:
            started = time.perf_counter()
            found = digest(path, algorithm)
            self._calls.append((started, time.perf_counter(), found["bytes"]))
            return found

        integrity.digest = counted

    def since(self) -> dict[str, float]:
        """Return what came since the last call."""
        calls, self._calls = sorted(self._calls), []
        busy = end = 0.0
        for started, ended, _ in calls:
            busy += max(0.0, ended - max(started, end))
            end = max(end, ended)
        return {"files": len(calls), "bytes": sum(count for *_, count in calls), "seconds": round(busy, 3)}


def measure(megabytes: int, repeats: int) -> dict:
    """Return medians, and the shares that the goals are about."""
    values = state(megabytes, 0)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), values)
    parts = (values.params, values.opt_state)
    times: dict[str, list[float]] = {name: [] for name in ("save", "save bare", "restore", "restore bare", "digests")}
    digests, acts = Digests(), {"digest_own": integrity.digest_own, "seal": integrity.seal}
    with tempfile.TemporaryDirectory() as folder:
        workdir, number = Path(folder), 0
        steps = workdir / checkpoint.FOLDER
        estimates, real = {"first": disk_space.estimate(steps, parts)}, 0
        with opened(workdir) as one:
            for turn in range(repeats + 1):
                sides = ("save", "save bare")
                for name in sides if turn % 2 else sides[::-1]:
                    number += 1
                    act = acts if name == "save" else dict.fromkeys(acts, lambda *_: None)
                    os.sync()  # what the save before it left to write would be this one's
                    with mock.patch.multiple(integrity, **act):
                        times[name].append(seconds(lambda: (one.save(number, values, {}), one.wait())))  # noqa: B023
                    if name == "save":
                        times["digests"].append(digests.since()["seconds"])
                        real = sum(path.stat().st_size for path in (steps / str(number)).rglob("*") if path.is_file())
                    else:  # both sides estimate the next save by a sealed step
                        integrity.seal(steps / str(number))
                        digests.since()
                    estimates["next"] = disk_space.estimate(steps, parts)
        for _ in range(repeats + 1):
            for name, faults in (("restore", integrity.faults), ("restore bare", lambda step, **_: "")):

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


def take_part(folder: Path, megabytes: int, address: str, count: int, index: int) -> None:
    """Save and open as one of several processes, and write down what this one read."""
    settings = distributed.Settings("auto", address, count, index, 120, heartbeat_timeout_s=100)
    distributed.start(settings, folder)
    place = NamedSharding(Mesh(jax.devices(), "process"), PartitionSpec(None, "process"))

    def sharded(number: int) -> dict[str, jax.Array]:
        make = jax.jit(lambda key: jax.random.normal(key, (LAYERS, rows, WIDTH)), out_shardings=place)
        return {"ffn": make(jax.random.key(number))}

    rows = max(1, megabytes * 10**6 // (3 * 4 * WIDTH * LAYERS) // count) * count
    values = types.TrainState(sharded(0), (sharded(1), sharded(2)), jnp.int32(0))
    digests = Digests()
    with distributed.guard():
        with opened(folder) as one:
            one.commit(1, values, {})
        saved = digests.since()
        distributed.share("saved")
        with opened(folder):
            pass
        found = {"process": index, "seal": saved, "verify": digests.since()}
    (folder / f"{index}.json").write_text(json.dumps(found))
    distributed.finish()


def divided(megabytes: int, count: int) -> list[dict]:
    """Return what each process read."""
    with socket.socket() as one, tempfile.TemporaryDirectory() as folder:
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"
        one.close()
        program = [sys.executable, __file__, f"--megabytes={megabytes}", f"--processes={count}"]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        started = [
            subprocess.Popen([*program, "--member", str(index), address, folder], env=environment)
            for index in range(count)
        ]
        codes = [process.wait() for process in started]
        if any(codes):
            sys.exit(f"the processes ended with {codes}")
        return [json.loads((Path(folder) / f"{index}.json").read_text()) for index in range(count)]


def table_of_processes(found: list[dict]) -> str:
    """Return it for a reader."""
    cell = lambda one: f"{one['seconds']:.2f} s, {disk_space.gb(one['bytes'])}"  # noqa: E731
    return "\n".join(
        f"process {one['process']}: seal {cell(one['seal'])}; verify {cell(one['verify'])}" for one in found
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="file for the JSON")
    parser.add_argument("--processes", type=int, default=1, help="over loopback; what each of them reads")
    parser.add_argument("--member", nargs=3, metavar=("INDEX", "ADDRESS", "FOLDER"), help="of such a run; internal")
    options = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)
    if options.member:
        index, address, folder = options.member
        return take_part(Path(folder), options.megabytes, address, options.processes, int(index))
    if options.processes > 1:
        found = divided(options.megabytes, options.processes)
        print(table_of_processes(found))
    else:
        found = measure(options.megabytes, options.repeats)
        print(table(found))
    text = json.dumps(found)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
