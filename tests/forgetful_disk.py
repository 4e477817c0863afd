"""A disk that forgets, when the power goes, everything that was not synced: content of files and names in folders.

While it is in force every `os.fsync` is written down: of a file what it held, of a folder which names stood for which
files. `rebuild` makes the tree that is left after any number of them: a name is there where its folder was synced after
it was made, with the content of the file's last sync, or empty where it never was; what was renamed or removed since
stands as it did. That is the worst that a disk may do; a kinder one is a SIGKILL.
"""

import os
import stat
from pathlib import Path
from typing import NamedTuple

import pytest


class Sync(NamedTuple):
    """One call of fsync: which file or folder, and what it held."""

    inode: int
    content: bytes | dict[str, tuple[int, bool]]  # a folder's names: inode, and whether it is a folder


class Disk:
    """Records fsync from its making to the end of the test."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        self.root, self.syncs = root, list[Sync]()
        self._root = root.stat().st_ino
        self._held: dict[int, int] = {}  # open, so that no inode's number comes again
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self._note)

    def __enter__(self) -> "Disk":
        return self

    def __exit__(self, *_: object) -> None:
        for number in self._held.values():
            os.close(number)

    def rebuild(self, count: int, target: Path) -> Path:
        """Make the tree that the first `count` syncs have left."""
        contents = {sync.inode: sync.content for sync in self.syncs[:count]}

        def make(inode: int, folder: bool, path: Path) -> None:
            content = contents.get(inode)
            if not folder:
                path.write_bytes(content if isinstance(content, bytes) else b"")
                return
            path.mkdir()
            for name, (below, is_folder) in content.items() if isinstance(content, dict) else ():
                make(below, is_folder, path / name)

        make(self._root, True, target)
        return target

    def _note(self, number: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{number}"))
        if path.is_relative_to(self.root):
            found = os.fstat(number)
            self._hold(found.st_ino, path)
            if stat.S_ISDIR(found.st_mode):
                names = {}
                for entry in os.scandir(path):
                    self._hold(entry.inode(), Path(entry.path))
                    names[entry.name] = entry.inode(), entry.is_dir(follow_symlinks=False)
                self.syncs.append(Sync(found.st_ino, names))
            else:
                self.syncs.append(Sync(found.st_ino, path.read_bytes()))
        self._fsync(number)

    def _hold(self, inode: int, path: Path) -> None:
        if inode not in self._held:
            self._held[inode] = os.open(path, os.O_RDONLY)
