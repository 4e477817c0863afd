"""Files and folders that appear whole or not at all, and stay when the power goes.

What is written lies beside its place until it is on the disk, and is then moved there. What a killed writer left beside
it has one name, so that the next writer of the same place replaces it; a folder's writer holds a lock, which the kernel
drops however its process ends.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_LOCK = "lock"  # beside what is not finished
_NO_FLOCK = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)


class Taken(ValueError):
    """Another process is writing a folder, or may be."""


class Lockless(Taken):
    """A folder is unfinished, on a disk that does not tell whether its writer still runs."""


def write(path: Path, text: str) -> Path:
    """Write a text, and return its place; missing folders are made."""
    return write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> Path:
    """Write bytes, and return their place; missing folders are made."""
    with writing(path) as temporary:
        temporary.write_bytes(content)
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write JSON for people to read; a number that is not finite is a fault of ours."""
    return write(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is missing, or holds something else; names it.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); put a copy back, or begin again elsewhere.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object; put a copy back, or begin again elsewhere.")
    return found


def temporary(path: Path) -> Path:
    """Return where a file lies until it is whole."""
    return path.with_name(path.name + ".tmp")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Give the place at which to write a file; it is moved to `path` at the end, and removed after an error."""
    make_folder(path.parent)
    beside = temporary(path)
    try:
        yield beside
        sync(beside)
        beside.replace(path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # a write's own names none
        raise
    sync(path.parent)


def vacant(folder: Path) -> Path:
    """Return where a new folder will lie: where a link leads, if that is what it is.

    Raises:
        ValueError: something is there that is no empty folder, or over which no folder can be moved.
    """
    try:
        place = folder.resolve()
        used = place.exists() and (not place.is_dir() or any(place.iterdir()))
    except (OSError, RuntimeError) as error:  # a circle of links, or nothing that this user may see
        raise ValueError(f"{folder} cannot be looked into ({error}); choose another.") from None
    if used:
        raise ValueError(f"{folder} exists and is not an empty directory; choose another or remove it.")
    if place.is_mount():
        raise ValueError(f"{folder} is where a disk is mounted, and cannot be replaced; name a new folder in it.")
    return place


@contextlib.contextmanager
def writing_folder(folder: Path) -> Iterator[Path]:
    """Give a new folder in which to write; it is moved to `folder` at the end, and removed after an error.

    Raises:
        ValueError: `folder` is not vacant, or another process is writing it.
    """
    place = vacant(folder)
    beside = place.with_name(f".{place.name}.partial")
    mine = not beside.exists()  # a signal may come from here on
    try:
        make_folder(beside)
        with (beside / _LOCK).open("a") as lock:
            _take_over(beside, lock, folder)
            mine = True
            new = beside / place.name
            new.mkdir()
            yield new
            sync_tree(new)
            new.rename(place)
    except Taken:
        mine = False
        raise
    except OSError as error:
        error.filename = error.filename or str(folder)
        raise
    finally:
        if mine:
            shutil.rmtree(beside, ignore_errors=True)
    sync(place.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, and bring their names to the disk."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in reversed(missing):
        sync(one.parent)


def sync_tree(folder: Path) -> None:
    """Bring a folder with all that is in it to the disk; what is in it first."""
    for where, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(where, name))
        sync(Path(where))


def sync_parents(path: Path) -> None:
    """Bring the names of all folders above a path to the disk, whoever made them."""
    for folder in path.absolute().parents:
        with contextlib.suppress(PermissionError):  # not this user's: it was there before
            sync(folder)


def flock(file: int) -> bool | None:
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


def sync(path: Path) -> None:
    """Bring a file's content, or the names in a folder, to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some file systems sync no folder
            raise
    finally:
        os.close(number)


def _take_over(beside: Path, lock: IO[str], folder: Path) -> None:
    """Make an unfinished folder this process's own, with nothing in it."""
    left = [one for one in beside.iterdir() if one.name != _LOCK]
    got = flock(lock.fileno())
    if got is False:
        raise Taken(f"{folder} is being written by another process; wait for it, or choose another.")
    if got is None and left:
        raise Lockless(
            f"{beside} is unfinished, and its disk does not tell whether its writer still runs; once it is certain that"
            " it has ended, remove that folder."
        )
    for one in left:
        shutil.rmtree(one)
