"""Digests that each process makes of its own files, and the seal that gathers them."""

import json
import os

import pytest

from fpo_jax.checkpoint import integrity
from tests import damage

OWN = ("params/ocdbt.process_0/d/a", "params/ocdbt.process_1/d/b", "optimizer/ocdbt.process_1/manifest.ocdbt")
MERGED = ("params/manifest.ocdbt", "params/d/c", "optimizer/manifest.ocdbt", "meta/metadata", "_CHECKPOINT_METADATA")


@pytest.fixture
def step(tmp_path):
    """A committed step of two processes, with the digests that each of them made."""
    folder = tmp_path / "checkpoints" / "3"
    for number, name in enumerate((*OWN, *MERGED)):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]) * (100 + number))
    (folder / "meta" / "metadata").write_text(json.dumps({"step": 3}))
    for item in ("params", "optimizer"):
        for process in (0, 1):
            integrity.digest_own(folder / item, process)
    return folder


def reading(monkeypatch, folder):
    """The names of the files that are read from now on."""
    names, digest = [], integrity.digest
    record = lambda path, algorithm: names.append(str(path.relative_to(folder))) or digest(path, algorithm)  # noqa: E731
    monkeypatch.setattr(integrity, "digest", record)
    return names


def test_a_seal_reads_what_no_process_digested_and_is_that_of_one_process(step, monkeypatch):
    read = reading(monkeypatch, step)
    integrity.seal(step)
    assert sorted(read) == sorted(MERGED)
    gathered = (step / integrity.MANIFEST).read_bytes()
    assert [path.parent for path in step.rglob(integrity.MANIFEST)] == [step], "the parts are gone"
    read.clear()
    integrity.seal(step)
    assert sorted(read) == sorted(OWN + MERGED), "without parts process 0 reads all"
    assert (step / integrity.MANIFEST).read_bytes() == gathered
    assert integrity.faults(step) == ""


@pytest.mark.parametrize("name", OWN + MERGED)
@pytest.mark.parametrize("how", ["flipped", "cut", "removed"])
def test_damage_after_the_seal_is_found_whoever_digested_the_file(step, name, how):
    integrity.seal(step)
    if how == "flipped":
        damage.flip(step / name, 8 * 9)
    elif how == "cut":
        os.truncate(step / name, 9)
    else:
        (step / name).unlink()
    assert integrity.faults(step).startswith(f"{name} ")


def test_damage_between_the_digest_of_a_process_and_the_seal_is_found(step):
    damage.flip(step / OWN[1], 8 * 9)
    integrity.seal(step)
    assert integrity.faults(step).startswith(f"{OWN[1]} is not what was written")


def test_what_the_shared_disk_lost_of_another_process_is_no_checkpoint(step):
    os.truncate(step / OWN[1], 50)
    with pytest.raises(OSError, match=r"process_1/d/b has 50 bytes, its process wrote 101"):
        integrity.seal(step)
    (step / OWN[1]).unlink()
    with pytest.raises(FileNotFoundError, match="process_1/d/b"):
        integrity.seal(step)
    assert not integrity.sealed(step)


def test_damaged_digests_of_a_process_are_no_seal(step):
    damage.flip(step / "params" / "ocdbt.process_1" / integrity.MANIFEST, 8 * 30)
    with pytest.raises(ValueError, match=r"digests\.json (cannot be read|is not what was written)"):
        integrity.seal(step)
    assert not integrity.sealed(step)


def test_a_process_that_wrote_nothing_of_an_item_has_no_digests(step):
    integrity.digest_own(step / "params", 7)
    assert not (step / "params" / "ocdbt.process_7").exists()
