"""One function over many tasks in processes of our own, its results in the order of the tasks.

The processes are started afresh (a tokenizer that has run threads does not survive a fork, nor does JAX) and not by
`multiprocessing`, whose children run the caller's script again. They end when this process does, however it ends, and
get none of the signals of its terminal. With one worker everything happens here.
"""

import contextlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

_SERVE = "import sys; from fpo_jax.data import worker_pool; worker_pool.serve(int(sys.argv[1]))"
MOST = 32  # processes; each takes some hundred MiB for its libraries
_AHEAD = 4  # results of each worker that may wait for an earlier one


class Failure(NamedTuple):
    """The sentence of a ValueError in a worker."""

    text: str


def cpus() -> int:
    """Return the number of processors that this process may use, at most MOST."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST, usable)


def in_order(function: Callable[[Any, Any], Any], state: Any, tasks: Sequence[Any], *, workers: int) -> Iterator[Any]:
    """Yield `function(state, task)` of every task, in their order.

    Args:
        function: of a module.
        state: the same for all tasks; a worker gets it once.
        tasks: what is done.
        workers: processes; 1 = this one alone.

    Raises:
        ValueError: the function raised it; of several tasks that of the first.
        RuntimeError: a worker ended by itself.
    """
    if workers < 2 or len(tasks) < 2:
        yield from (function(state, task) for task in tasks)
        return
    with contextlib.ExitStack() as running:
        processes = []
        for _ in range(min(workers, len(tasks))):
            connection, process = _start()
            running.callback(_stop, connection, process)
            processes.append(connection)
        try:
            for connection in processes:
                connection.send((function, state))
            yield from _results(processes, tasks)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise RuntimeError(
                "a process that prepares data ended by itself; what it said stands above. If it was killed for want of"
                " memory, give the job more of it, or fewer processors."
            ) from None


def serve(number: int) -> None:
    """Work for the process at the other end of a connection until it closes it."""
    with Connection(number) as connection, contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        function, state = connection.recv()
        while True:
            task = connection.recv()
            try:
                result = function(state, task)
            except ValueError as error:
                result = Failure(str(error))
            connection.send(result)


def _results(processes: Sequence[Connection], tasks: Sequence[Any]) -> Iterator[Any]:
    idle, busy = list(processes), {}
    done: dict[int, Any] = {}
    given = 0
    for number in range(len(tasks)):
        while number not in done:
            while idle and given < min(len(tasks), number + _AHEAD * len(processes)):
                connection = idle.pop()
                connection.send(tasks[given])
                busy[connection] = given
                given += 1
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                done[busy.pop(connection)] = connection.recv()
                idle.append(connection)
        result = done.pop(number)
        if isinstance(result, Failure):
            raise ValueError(result.text)
        yield result


def _start() -> tuple[Connection, subprocess.Popen]:
    here, there = multiprocessing.Pipe()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TOKENIZERS_PARALLELISM": "false",  # its threads: the processes are as many as the processors
    }
    with there:
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(there.fileno())],
            pass_fds=[there.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return here, process


def _stop(connection: Connection, process: subprocess.Popen) -> None:
    connection.close()
    process.terminate()  # it may be in the midst of a task whose result nobody wants
    process.wait()
