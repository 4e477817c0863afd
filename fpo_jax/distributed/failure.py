"""How a process of several leaves, and what the others do when one is gone.

A process that fails says so in the key-value store before it leaves, and a thread of every other one waits for that
word: they end within seconds, also while their main thread waits in a collective. A process that dies without a word is
found by its closed connections (gloo) or its missing heartbeat, upon which jax ends the others.
"""

import contextlib
import faulthandler
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import jax

from fpo_jax.distributed import consensus, exit_reporter, process, workdir_lock
from fpo_jax.io import terminal

LOST = 70  # exit code: another process is gone
FAILED = 1
UNUSABLE = 2
GRACE_S = 5.0  # for the main thread to end by itself once another process has failed
LINGER_S = 10.0  # process 0 keeps the store so long for those who still want to read why
LAST_S = 30.0  # within which a process that leaves is gone

_STATUS = re.compile(r"[A-Z][A-Z_]+: ")  # of a runtime error; jax raises some of them as ValueError
_PEER = re.compile(r"\bGloo \w+ failed|\bNCCL\b|Connection (closed|reset) by peer|Socket closed")
_OWN_FAULT = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")

_leaving = threading.Lock()  # held for good by the thread that ends this process
_speaking = threading.Lock()
_follower: threading.Thread | None = None
_exit_reporter: subprocess.Popen | None = None
_checkpoints = Path()


def set_exit_message(words: str, workdir: Path) -> None:
    """Have the exit reporter say these words if this process is ended from C++ or killed."""
    global _exit_reporter, _checkpoints
    if _exit_reporter is None:
        _checkpoints = workdir / "checkpoints"
        command = [sys.executable, exit_reporter.__file__, str(_checkpoints)]
        _exit_reporter = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
    _tell_exit_reporter(words)


def watch(workdir: Path) -> None:
    """Follow what the other processes say, from here to `finish` or `leave`."""
    global _follower
    set_exit_message(
        f"{_me()} was ended from outside: killed here, or by jax because another process died or cannot be reached (the"
        " lines above then say which).",
        workdir,
    )
    _follower = threading.Thread(target=_follow, name="fpo_jax.distributed", daemon=True)
    _follower.start()


def finish() -> None:
    """Part from the other processes in order: all of them come here, after a run or an error of `CollectiveError`."""
    if _follower is not None:
        consensus.share("")
        process.put(f"word/{process.process_index()}", "")
        _follower.join()  # a thread that waits in C++ would abort the interpreter's end
    _tell_exit_reporter("")


@contextlib.contextmanager
def guard() -> Iterator[None]:
    """End a process of several at once where its error is its own: no clean-up may wait for processes that are gone.

    Errors that every process raises (`CollectiveError`) pass, and so does every error of a process that is alone.
    """
    try:
        yield
    except process.CollectiveError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        if process.process_count() == 1:
            raise
        code, text = _judged(error)
        leave(code, f"{_me()}: {text}", tell=text)


def leave(code: int, message: str, *, tell: str, stacks: bool = False) -> NoReturn:
    """End this process at once, without waiting for those of several that cannot go on.

    Args:
        code: the exit code.
        message: for the standard error.
        tell: what the other processes shall name as the reason for their end.
        stacks: they shall show where they are, too.
    """
    if not _leaving.acquire(blocking=False):
        threading.Event().wait()  # another thread is ending this process
    last = threading.Timer(LAST_S, os._exit, [code])  # the store, the disk or a stream may hang as well
    last.daemon = True
    last.start()
    with _speaking:
        print(terminal.shown(message), file=sys.stderr, flush=True)
    if process.process_count() > 1:
        _part(json.dumps({"process": process.process_index(), "text": tell, "stacks": stacks}))
    workdir_lock.release()
    _tell_exit_reporter("")  # this end is an orderly one
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)  # the usual way out waits up to five minutes for the other processes


def show_stacks(heading: str) -> None:
    """Print where every thread is, unless the last words of this process have been said: nothing comes after them."""
    with _speaking:
        if not _leaving.locked():
            print(terminal.shown(heading), file=sys.stderr, flush=True)
            faulthandler.dump_traceback(all_threads=True)


def _part(word: str) -> None:
    """Tell the other processes why this one leaves; process 0 stays until they have read it."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0 is gone already
        for other in range(process.process_count()):
            process.put(f"word/{other}", word)
        process.put(f"left/{process.process_index()}", "")
        end = time.monotonic() + LINGER_S
        for other in range(1, process.process_count() if process.is_main_process() else 0):
            process.get(f"left/{other}", timeout_s=max(0.0, end - time.monotonic()))
    if process.is_main_process():
        time.sleep(1.0)  # the last of them has its answer, and is gone


def _judged(error: BaseException) -> tuple[int, str]:
    """Exit code and sentence for an error that this process alone may have."""
    cause: BaseException | None = error
    while cause is not None:  # what a peer's death raised may lie below: a save that failed by it
        line = terminal.first_line(cause)
        if _from_runtime(cause) and not line.startswith(_OWN_FAULT):
            return LOST, f"{_reason(line)} {exit_reporter.resumption(_checkpoints)}"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, ValueError | OSError) and not _from_runtime(error):
        return UNUSABLE, terminal.sentence(error)
    print(terminal.shown("".join(traceback.format_exception(error))), file=sys.stderr)
    return FAILED, f"{type(error).__name__}: {terminal.first_line(error)}"


def _from_runtime(error: BaseException) -> bool:
    line = terminal.first_line(error)
    return isinstance(error, jax.errors.JaxRuntimeError) or bool(_STATUS.match(line) or _PEER.search(line))


def _reason(first_line: str) -> str:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        if word := process.get(f"word/{process.process_index()}", timeout_s=1.0):
            return _described(word)
    return f"another process died or cannot be reached ({first_line})."


def _follow() -> None:
    """Wait until a process says that it failed, and end this one."""
    try:
        while (word := process.get(f"word/{process.process_index()}", timeout_s=3600.0)) is None:
            pass
    except jax.errors.JaxRuntimeError:
        return  # process 0 is gone, and jax ends this process
    if word and json.loads(word)["process"] != process.process_index():
        if json.loads(word)["stacks"]:
            show_stacks(f"{_me()}: {_described(word)} Its threads are at:")
        time.sleep(GRACE_S)
        leave(LOST, f"{_me()}: {_described(word)} {exit_reporter.resumption(_checkpoints)}", tell=_described(word))


def _described(word: str) -> str:
    failed = json.loads(word)
    return f"process {failed['process']} ended: {failed['text']}"


def _me() -> str:
    return f"process {process.process_index()} of {process.process_count()}"


def _tell_exit_reporter(line: str) -> None:
    if _exit_reporter is None:
        return
    assert _exit_reporter.stdin is not None
    with contextlib.suppress(OSError):
        _exit_reporter.stdin.write(line + "\n")
        _exit_reporter.stdin.flush()
