"""One writer of a folder or a file at a time: a lock file that says whose it is, and a heartbeat that says it lives.

Three things tell a living owner from a dead one, in this order:

flock      the kernel drops it however its process ends. It speaks for this kernel, and for others where it is shared
identity   process, its start, and the boot and the name space that its number belongs to: decided at once, here
heartbeat  a counter in the file, which the owner raises every BEAT_S. Who comes looks whether it changes, for LEASE_S
           at most: no clock of one host is compared with that of another

An owner that was stopped for so long that another one took over finds that out in `verify`, before it writes on.
"""

import contextlib
import errno
import json
import logging
import os
import secrets
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from fpo_jax.io import atomic_io

log = logging.getLogger("fpo_jax")

FILE = "lock.json"  # in a folder; the lock of a file lies beside it, hidden
BEAT_S = 5.0
LEASE_S = 30.0  # six heartbeats: a file system may be slow, and hosts may show each other's files late
POLL_S = 1.0
_TRIES = 5  # the owner may remove the file between two of our looks
_SIZE = 512  # bytes of a claim
_LARGEST = 2**12  # that are read of what may be no lock
_FIELDS = {"host": str, "pid": int, "started": str, "machine": str, "token": str, "beat": int}

_held: list["_Lease"] = []


class LeaseLost(ValueError):
    """Another process writes now what this one wrote: it was taken for dead."""


@contextlib.contextmanager
def hold(folder: Path, *, option: str = "--workdir") -> Iterator[None]:
    """Keep other writers out of a folder, which is made when absent, inside `with`.

    Args:
        folder: what is written.
        option: what names it on the command line.

    Raises:
        ValueError: another process writes it; or there is no place for a lock.
    """
    with _locked(folder / FILE, folder, option):
        yield


@contextlib.contextmanager
def beside(path: Path, *, option: str = "--out") -> Iterator[None]:
    """Keep other writers from a file, or from a folder that must appear at once, inside `with`; as `hold`."""
    with _locked(path.with_name(f".{path.name}.lock"), path, option):
        yield


def peek(folder: Path, *, option: str = "--workdir") -> None:
    """Refuse at once what `hold` would refuse for certain, before anything expensive; nothing is made or taken.

    Raises:
        ValueError: a process of this machine holds the folder.
    """
    with contextlib.suppress(OSError):
        owner = _owner(folder / FILE, folder, _read(folder / FILE))
        if owner and owner["machine"] == _machine() and started(owner["pid"]) == owner["started"]:
            raise ValueError(_refusal(folder, owner, option))


def verify() -> None:
    """Check that everything this process holds is still its own: called before it writes.

    Raises:
        LeaseLost: names what is not.
    """
    for lease in _held:
        lease.verify()


def release() -> None:
    """Give back what this process holds; for an end without the way out of `with`."""
    while _held:
        _held.pop().release()


def started(pid: int) -> str | None:
    """Return what tells a process from a later one of its number; None where there is no such process.

    Ticks since boot, and the boot; systems without /proc tell only that the process lives. One that was killed and
    that nobody has waited for does not.
    """
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else f"{boot}/{fields[18]}"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"


def _machine() -> str:
    """Return what numbers of processes are numbers of: the boot and the name space, of a container perhaps."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + "/" + os.readlink("/proc/self/ns/pid")
    return socket.gethostname()


class _Lease:
    """A lock that this process holds."""

    def __init__(self, file: int, path: Path, what: Path, option: str):
        """Write the claim into the open file, and again every BEAT_S."""
        self._file, self._path, self._what, self._option = file, path, what, option
        self._token, self._beats = secrets.token_hex(8), 0
        self._mutex, self._over = threading.Lock(), threading.Event()
        self._write()
        os.ftruncate(file, _SIZE)
        threading.Thread(target=self._beat, name="fpo_jax.lock", daemon=True).start()

    def mine(self) -> bool:
        """Return whether the file still has this claim; one that cannot be read now has not changed."""
        try:
            return f'"{self._token}"' in _read(self._path)
        except FileNotFoundError:
            return False
        except OSError:
            return True

    def verify(self) -> None:
        """Raise LeaseLost where it is not this process's any more."""
        if not self.mine():
            raise LeaseLost(
                f"{self._what} is another process's now: this one stood still for more than {LEASE_S:.0f} s and was"
                f" taken for dead, or {self._path} was deleted; it stops without writing on. Leave the work to the"
                f" other process, or use another {self._option}."
            )

    def release(self) -> None:
        """Remove the file, unless it is another's by now."""
        self._over.set()
        held = self._mutex.acquire(timeout=BEAT_S)  # a heartbeat may wait for a file system that is gone
        with contextlib.suppress(OSError):
            if self.mine():
                self._path.unlink()
        if held:
            os.close(self._file)

    def _beat(self) -> None:
        described = False
        while not self._over.wait(BEAT_S):
            with self._mutex:
                if self._over.is_set() or not self.mine():
                    return
                try:
                    self._write()
                except OSError as error:
                    if not described:
                        log.warning("%s: no heartbeat can be written (%s)", self._path, error.strerror)
                    described = True

    def _write(self) -> None:
        self._beats += 1
        pid = os.getpid()
        claim = {"host": socket.gethostname(), "pid": pid, "started": started(pid), "machine": _machine()}
        line = json.dumps(claim | {"token": self._token, "beat": self._beats}).encode().ljust(_SIZE - 1) + b"\n"
        os.pwrite(self._file, line, 0)  # at once and of one length: nobody reads a part
        os.fsync(self._file)


@contextlib.contextmanager
def _locked(path: Path, what: Path, option: str) -> Iterator[None]:
    try:
        lease = _taken(path, what, option)
    except OSError as error:
        raise ValueError(
            f"{what} cannot be locked: {path}: {error.strerror or error}. A lock needs a writable folder with room for"
            f" a small file; mend it, or use another {option}."
        ) from error
    _held.append(lease)
    try:
        yield
    finally:
        if lease in _held:
            _held.remove(lease)
            lease.release()


def _taken(path: Path, what: Path, option: str) -> _Lease:
    for _ in range(_TRIES):
        path.parent.mkdir(parents=True, exist_ok=True)
        file, made = _open(path)
        lease, waited = None, False
        try:
            free, waited = _free(file, path, what, option, made=made)
            if free and _is_at(file, path):
                lease = _Lease(file, path, what, option)
        except FileNotFoundError:
            continue  # its owner has just released it
        except BaseException:
            if made:
                with contextlib.suppress(OSError):
                    path.unlink()
            raise
        finally:
            if lease is None:
                os.close(file)
        if lease is not None:
            if waited:
                _settle(lease, path, what, option)
            return lease
    raise ValueError(_refusal(what, {}, option))


def _settle(lease: _Lease, path: Path, what: Path, option: str) -> None:
    """Let one alone go on of two that took the same lock over, each on its host: the last claim counts."""
    time.sleep(2 * POLL_S)
    if not lease.mine():
        lease.release()
        raise ValueError(_refusal(what, _owner(path, what, _read(path)), option))


def _open(path: Path) -> tuple[int, bool]:
    """Open a lock file; return it, and whether it was not there."""
    with contextlib.suppress(FileExistsError):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o644)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "no regular file")
    return file, False


def _free(file: int, path: Path, what: Path, option: str, *, made: bool) -> tuple[bool, bool]:
    """Return whether the lock may be taken, and whether that took a wait; False = look again.

    Raises:
        ValueError: it has an owner that lives; or it is no lock.
    """
    flocked = atomic_io.flock(file)
    text = _read(path)
    if not text and not made and flocked is not False:  # its maker, on another host, may be about to write
        time.sleep(POLL_S)
        text = _read(path)
    owner = _owner(path, what, text)
    if not owner:
        if flocked is False:
            raise ValueError(_refusal(what, owner, option))
        return True, False
    here = owner["machine"] == _machine()
    if here and (flocked is False or started(owner["pid"]) == owner["started"]):
        raise ValueError(_refusal(what, owner, option))
    if not here and not _stands_still(path, what, text, owner, option):
        return False, True
    if not here and atomic_io.flock(file) is False:
        raise ValueError(
            f"{what} is locked by {_described(owner)}, which shows no sign of life, but whose file system has not given"
            f" its lock back yet; start again later, or use another {option}."
        )
    log.warning("%s: %s ended without releasing it; taken over.", path, _described(owner))
    return True, not here


def _stands_still(path: Path, what: Path, text: str, owner: dict, option: str) -> bool:
    """Watch the heartbeat of an owner elsewhere; False where it has just released the lock.

    Raises:
        ValueError: it lives.
    """
    log.warning(
        "%s: waiting up to %.0f s to see whether %s, which holds it, still lives", path, LEASE_S, _described(owner)
    )
    for _ in range(round(LEASE_S / POLL_S)):  # looks, and not seconds: none counts in which this process was stopped
        time.sleep(POLL_S)
        now = _read(path)
        if not now:
            return False
        if now != text:
            raise ValueError(_refusal(what, _owner(path, what, now), option))
    return True


def _read(path: Path) -> str:
    """Read a lock file anew, as a network file system shows what others wrote only to who opens it."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return os.read(file, _LARGEST).decode(errors="replace").strip(" \n\0")
    finally:
        os.close(file)


def _owner(path: Path, what: Path, text: str) -> dict:
    """Read whose a lock is; nobody's where it is empty.

    Raises:
        ValueError: it is no lock.
    """
    if not text:
        return {}
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text)
        if isinstance(found, dict) and all(type(found.get(name)) is kind for name, kind in _FIELDS.items()):
            return found
    raise ValueError(
        f"{path} is not a lock that this version wrote, so that nobody knows whether {what} is in use: once it is"
        " certain that it is not, delete that file."
    )


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is still the one of its path: its owner may have removed it meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False


def _described(owner: dict) -> str:
    return f"process {owner['pid']} of host {owner['host']}" if owner else "another process"


def _refusal(what: Path, owner: dict, option: str) -> str:
    where = " on this host" if owner and owner["machine"] == _machine() else ""
    return f"{what} is in use by {_described(owner)}{where}; wait for it, stop it, or use another {option}."
