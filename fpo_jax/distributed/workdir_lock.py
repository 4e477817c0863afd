"""One run in a workdir: a lock file that says whose it is.

The lock is flock's, because the kernel drops it however its process ends, so that no dead run ever keeps a workdir of
this host. The file's content (host, process, its start) speaks where flock does not reach: to other hosts, whose view
of a network file system may not share locks, and on file systems without flock.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

log = logging.getLogger("fpo_jax")

FILE = "lock.json"
_NO_FLOCK = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)

_held: list[IO[str]] = []


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """Keep other runs out of a workdir, which is made when absent, inside `with`.

    Raises:
        ValueError: another run is in it, or may be: one of another host that has not ended in order.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / FILE).open("a+") as file:
        free = _lock(file)
        file.seek(0)
        owner = _owner(file.read())
        if free is False or (owner and _may_live(owner, flocked=free is True)):
            raise ValueError(_refusal(workdir, owner))
        if owner:
            log.warning("%s: %s ended without releasing it; taken over.", workdir / FILE, _told(owner))
        file.truncate(0)
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "started": started(os.getpid())}, file)
        file.flush()
        _held.append(file)
        try:
            yield
        finally:
            release()


def release() -> None:
    """Give back what this process holds; for an end without the way out of `with`."""
    while _held:
        file = _held.pop()
        file.truncate(0)  # no claim is left for other hosts
        file.close()


def started(pid: int) -> str | None:
    """Return what tells a process from a later one of its number; None where there is no such process.

    Ticks since boot, and the boot; systems without /proc tell only that the process lives.
    """
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return boot + "/" + Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"


def _lock(file: IO[str]) -> bool | None:
    """Return whether the kernel gave the lock; None where the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        return None
    return True


def _owner(text: str) -> dict:
    """Read who the lock belongs to; nobody where the file is empty, or was cut while it was written."""
    with contextlib.suppress(json.JSONDecodeError):
        return json.loads(text)
    return {}


def _may_live(owner: dict, *, flocked: bool) -> bool:
    """Judge by the content: what another host may still run, and without flock what this host does."""
    if owner["host"] != socket.gethostname():
        return True
    return not flocked and owner["started"] is not None and started(owner["pid"]) == owner["started"]


def _told(owner: dict) -> str:
    return f"process {owner['pid']} of host {owner['host']}" if owner else "another process"


def _refusal(workdir: Path, owner: dict) -> str:
    if owner and owner["host"] != socket.gethostname():
        return (
            f"{workdir} is locked by {_told(owner)}, and {socket.gethostname()} cannot tell whether it still runs. Wait"
            f" for it or use another --workdir; once it is certain that it has ended, delete {workdir / FILE}."
        )
    return f"{workdir} is in use by {_told(owner)} on this host; wait for it, stop it, or use another --workdir."
