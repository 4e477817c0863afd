"""Files and folders appear whole or not at all: errors, kills, signals, links, other writers, a power cut."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from fpo_jax.io import atomic_io
from tests.paths import REPO

# writes two files of a folder, says so, and waits to be struck
WRITER = """
import sys, time
from pathlib import Path
from fpo_jax.io import atomic_io
with atomic_io.writing_folder(Path(sys.argv[1])) as new:
    (new / "a").write_text("half")
    (new / "b").mkdir()
    (new / "b" / "c").write_text("half")
    print("begun", flush=True)
    time.sleep(60)
"""


# the same, as the programs do it
PROGRAM = WRITER.replace("with atomic_io", "def work():\n  with atomic_io").replace("\n    ", "\n      ")
PROGRAM += "from fpo_jax.cli import args\nsys.exit(args.ended('fpo x', work))\n"


def begun(place, source=WRITER):
    process = subprocess.Popen(
        [sys.executable, "-c", source, place], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    return process


def write_whole(place):
    with atomic_io.writing_folder(place) as new:
        (new / "a").write_text("whole")


def test_what_a_killed_writer_left_is_gone_with_the_next_one_and_a_living_one_is_left_alone(tmp_path):
    place = tmp_path / "out"
    process = begun(place)
    with pytest.raises(ValueError, match="out is being written by another process; wait"):
        write_whole(place)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    write_whole(place)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in place.iterdir()] == ["a"] and (place / "a").read_text() == "whole"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_takes_away_what_was_written(tmp_path, number):
    process = begun(tmp_path / "out", PROGRAM)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == 75 and "Traceback" not in said, said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), ValueError(), KeyboardInterrupt()])
def test_an_error_leaves_nothing(tmp_path, error):
    for name, writing in (("out", atomic_io.writing_folder), ("file", atomic_io.writing)):
        with pytest.raises(type(error)) as described, writing(tmp_path / name) as beside:
            (beside / "a" if name == "out" else beside).write_text("half")
            raise type(error)(*error.args)
        if isinstance(error, OSError):
            assert described.value.filename == str(tmp_path / name), "what a full disk says names no file"
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_an_empty_folder_is_filled_and_stays_a_link(tmp_path):
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    for name, target in (("full", "disk/empty"), ("dangling", "disk/new/deep")):
        (tmp_path / name).symlink_to(target)
        write_whole(tmp_path / name)
        assert (tmp_path / name).is_symlink() and (tmp_path / target / "a").read_text() == "whole"
        assert sorted(path.name for path in tmp_path.glob(".*")) == []


def test_what_cannot_be_replaced_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").write_text("")
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path).endswith("mounted"))
    monkeypatch.setattr(type(tmp_path), "is_mount", lambda path: path.name == "mounted")
    before = sorted(tmp_path.rglob("*"))
    for name, described in {
        "file": "exists and is not an empty directory",
        "link": "exists and is not an empty directory",
        "used": "exists and is not an empty directory",
        "circle": "cannot be looked into",
        "mounted": "is where a disk is mounted",
    }.items():
        with pytest.raises(ValueError, match=f"{name} {described}"):
            write_whole(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_without_locks_is_written_and_what_may_live_there_is_left(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    write_whole(tmp_path / "out")
    (tmp_path / ".other.partial" / "other").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"\.other\.partial is unfinished, and its disk does not tell .* remove that"):
        write_whole(tmp_path / "other")
    assert (tmp_path / ".other.partial" / "other").is_dir()
