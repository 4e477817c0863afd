"""The locks fit pyproject.toml and hold hashes; the list says what is installed beside what is known good."""

import importlib.metadata
import re
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from fpo_jax import versions
from tests.paths import REPO

LOCKS = sorted((REPO / "requirements").glob("python*.txt"))


def required():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [*map(Requirement, [*project["dependencies"], *extras["report"], *extras["eval"], *extras["tensorboard"]])]


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_a_lock_holds_every_dependency_within_its_bounds_and_hashes_alone(path):
    text = path.read_text()
    good = versions.known_good(path.stem.removeprefix("python"))
    for one in required():
        assert one.specifier.contains(good[one.name.replace("_", "-").lower()]), f"{one}: run make lock"
    entries = re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:]
    assert len(entries) == len(good) > 60 and all("--hash=sha256:" in entry for entry in entries)
    assert "://" not in text and "--index" not in text and "--find-links" not in text


def test_there_is_a_lock_for_this_python_and_each_before_it():
    assert [path.stem for path in LOCKS] == ["python3.11", "python3.12", "python3.13"]
    assert (REPO / "fpo_jax" / "requirements").readlink().as_posix() == "../requirements"


def test_what_is_installed_is_printed_beside_what_is_known_good(monkeypatch, capsys):
    good = {"jax": "0.10.2", "flax": "0.12.8", "optax": "0.2.8"}
    installed = good | {"flax": "0.12.7"}
    monkeypatch.setattr(versions, "known_good", lambda python: good)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["jax>=0.10", "flax", 'optax; extra == "x"'])
    monkeypatch.setattr(importlib.metadata, "version", installed.__getitem__)
    assert versions.main() == 1
    printed = capsys.readouterr().out
    assert re.search(r"^flax +0\.12\.7 +0\.12\.8 +differs$", printed, re.MULTILINE) and "1 of 2 differ" in printed
    installed |= good
    assert versions.main() == 0 and "all are known good" in capsys.readouterr().out
    monkeypatch.setattr(versions, "known_good", lambda python: {})
    assert versions.main() == 2
    assert f"known good for Python {sys.version_info.major}." in capsys.readouterr().out
