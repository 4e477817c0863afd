"""When two processes may take a file for the same one."""

import os
import shutil

import pytest

from fpo_jax.io import file_identity


@pytest.fixture
def mounted(tmp_path, monkeypatch):
    """Say what is mounted where the test's file lies."""

    def mount(line):
        number = tmp_path.stat().st_dev
        text = (
            f"21 1 0:999 / /else rw - nfs4 else:/x rw\n36 35 {os.major(number)}:{os.minor(number)} / /data rw {line}\n"
        )
        (tmp_path / "mountinfo").write_text(text)
        monkeypatch.setattr(file_identity, "_MOUNTS", tmp_path / "mountinfo")

    (tmp_path / "boot").write_text("boot-1\n")
    monkeypatch.setattr(file_identity, "_BOOT", tmp_path / "boot")
    return mount


def on_another_host(tmp_path):
    """The same numbers as a clone of the disk has them, after another boot."""
    (tmp_path / "boot").write_text("boot-2\n")
    return file_identity.of(tmp_path / "file")


@pytest.mark.parametrize(
    ("line", "same"),
    [
        ("- ext4 /dev/sda1 rw", False),
        ("shared:1 - overlay overlay rw", False),
        ("shared:1 - nfs4 storage:/models rw", True),
        ("- lustre 10.0.0.1@tcp:/scratch rw", True),
        ("- nfs4 localhost:/models rw", False),
        ("- nfs4 127.0.0.1:/models rw", False),
    ],
)
def test_hosts_share_a_file_where_they_mount_one_network_disk(tmp_path, mounted, line, same):
    (tmp_path / "file").write_text("x")
    mounted(line)
    assert (file_identity.of(tmp_path / "file") == on_another_host(tmp_path)) == same


def test_a_file_is_another_after_a_copy_and_after_a_change(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    first = file_identity.of(file)
    assert first == file_identity.of(file)
    assert first != file_identity.of(shutil.copy2(file, tmp_path / "copy"))
    (tmp_path / "link").symlink_to(file)
    assert first == file_identity.of(tmp_path / "link")
    os.utime(file, ns=(0, 0))
    assert first != file_identity.of(file)


def test_a_system_that_tells_nothing_shares_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for name in ("_MOUNTS", "_BOOT"):
        monkeypatch.setattr(file_identity, name, tmp_path / "absent")
    found = file_identity.of(tmp_path / "file")
    assert found == file_identity.of(tmp_path / "file")
    monkeypatch.setattr(file_identity, "_unknown", "of another process")
    assert found != file_identity.of(tmp_path / "file")
