"""What the processes of a run tell each other: texts, errors, inputs, and whether to stop.

Texts go through the key-value store of `jax.distributed`, which waits for slow processes without a limit: a dead one is
found by its missing heartbeat. Only `Vote` and `from_first` use the devices.
"""

import contextlib
import itertools
import json
import logging
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fpo_jax.distributed import process
from fpo_jax.io import terminal

log = logging.getLogger("fpo_jax")

PATIENCE_S = 60.0  # before the log says who is waited for
SHARED_FOLDER_TIMEOUT_S = 30.0  # a network file system shows a new file to another host after its cache's life

_calls = itertools.count()


class InputError(process.CollectiveError, ValueError):
    """What some process cannot use stops all of them."""


def share(text: str) -> list[str]:
    """Return the texts of all processes, in their order. Every process calls it at the same points of the program."""
    if process.process_count() == 1:
        return [text]
    topic = f"share/{next(_calls)}"
    process.put(f"{topic}/{process.process_index()}", text)
    if process.is_main_process():
        everyone = [_wait(f"{topic}/{other}", f"process {other}") for other in range(process.process_count())]
        process.put(f"{topic}/all", json.dumps(everyone))
        return everyone
    return json.loads(_wait(f"{topic}/all", "process 0"))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Make an input error of one process an error of all: none goes on to wait for one that has gone.

    The body must not wait for other processes itself: no collective, no barrier.

    Raises:
        InputError: the body raised ValueError or OSError in some process; says which. One alone raises its own error.
    """
    if process.process_count() == 1:
        yield
        return
    mine = ""
    try:
        yield
    except (ValueError, OSError) as error:
        mine = terminal.sentence(error)
    texts = share(mine)
    if not any(texts):
        return
    if len(set(texts)) == 1:
        raise InputError(texts[0])
    raise InputError("\n".join(f"{_named(ids)}: {text}" for text, ids in _by_value(texts).items() if text))


def agree(facts: Mapping[str, object]) -> None:
    """Check that every process has the same facts.

    Raises:
        InputError: names every fact that differs, with the value of each process.
    """
    everyone = [json.loads(text) for text in share(json.dumps({name: str(fact) for name, fact in facts.items()}))]
    problems = []
    for name in sorted({name for one in everyone for name in one}):
        values = _by_value([one.get(name, "(absent)") for one in everyone])
        if len(values) > 1:
            problems.append(f"{name}: " + ", ".join(f"{value} on {_named(ids)}" for value, ids in values.items()))
    if problems:
        raise InputError(
            "the processes do not run the same job:\n  "
            + "\n  ".join(problems)
            + "\nstart the same command with the same version, data and model on every host."
        )


def check_shared(folder: Path) -> None:
    """Check that `folder` is one folder for all processes.

    Raises:
        InputError: names the processes that do not see a file of process 0.
    """
    if process.process_count() == 1:
        return
    name = f".shared-{secrets.token_hex(8)}"
    with together():
        if process.is_main_process():
            (folder / name).touch()
    seen = folder / share(name)[0]
    try:
        with together():
            if not _appears(seen):
                raise ValueError(
                    f"{folder} is not the folder that process 0 has under that name; several processes need a --workdir"
                    " on a file system that all hosts mount."
                )
    finally:
        if process.is_main_process():
            seen.unlink(missing_ok=True)


def from_first(array: np.ndarray) -> np.ndarray:
    """Return process 0's array; the others pass one of its shape and dtype."""
    return array if process.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(array))


class Vote:
    """The largest of one small number per process, computed behind the steps without holding them up."""

    def __init__(self, mesh: Mesh):
        """Take the devices of the run."""
        line = Mesh(mesh.devices.reshape(-1), ("device",))
        self._size = mesh.size
        self._place = NamedSharding(line, PartitionSpec("device"))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(line, PartitionSpec()))

    def cast(self, number: int) -> jax.Array:
        """Start to compare; `int()` of the result waits for it."""
        mine = np.full(1, number, np.int32)
        return self._largest(jax.make_array_from_callback((self._size,), self._place, lambda _: mine))


def _wait(key: str, who: str) -> str:
    started = time.monotonic()
    while (text := process.get(key, timeout_s=PATIENCE_S)) is None:
        log.warning("waiting for %s since %.0f s", who, time.monotonic() - started)
    return text


def _by_value(values: Sequence[str]) -> dict[str, list[int]]:
    return {value: [index for index, other in enumerate(values) if other == value] for value in dict.fromkeys(values)}


def _named(processes: Sequence[int]) -> str:
    return f"process{'es' * (len(processes) > 1)} {', '.join(map(str, processes))}"


def _appears(path: Path) -> bool:
    end = time.monotonic() + SHARED_FOLDER_TIMEOUT_S
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True
