"""Which file a path leads to, told so that two processes know whether they read the same one."""

import os
import secrets
from pathlib import Path
from typing import NamedTuple

# of these, hosts that mount one source see one tree; any other disk is its machine's own
NETWORK = frozenset({"afs", "beegfs", "ceph", "cifs", "gpfs", "lustre", "nfs", "nfs4", "smb3", "wekafs"})
_OWN_SERVER = ("localhost", "127.", "[::1]")  # begins a source that is another one on every host
_MOUNTS = Path("/proc/self/mountinfo")
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_unknown = secrets.token_hex(8)  # of a system that does not tell: equal to no other process's


class Identity(NamedTuple):
    """A file, as two processes compare it."""

    disk: list[str]
    inode: int
    bytes: int
    modified_ns: int


def of(path: Path) -> Identity:
    """Return what is equal for two processes only where they read the same file, unchanged in between.

    Cloned disks have the same device numbers, inodes and times. So a file on a disk of its own is told with the boot of
    the machine, and one on a network file system with what is mounted.
    """
    found = path.stat()
    device = f"{os.major(found.st_dev)}:{os.minor(found.st_dev)}"
    return Identity(_mounted(device) or [_boot(), device], found.st_ino, found.st_size, found.st_mtime_ns)


def _mounted(device: str) -> list[str]:
    """Return type and source of the network file system that a device number stands for; empty where it is none."""
    try:
        lines = _MOUNTS.read_text().removesuffix("\n").split("\n")
    except OSError:
        return []
    for line in lines:  # 36 35 0:98 /root /where options tags - type source options
        before, _, after = line.partition(" - ")
        kind, source, *_ = after.split(" ")
        if before.split(" ")[2] == device and kind in NETWORK and not source.startswith(_OWN_SERVER):
            return [kind, source]
    return []


def _boot() -> str:
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return _unknown
