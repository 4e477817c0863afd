"""Faults of disks and of other runs: flipped bits, lost files, full disks, failing writers, two runs in one folder."""

import contextlib
import errno
import fcntl
import json
import os
import resource
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax import checkpoint, hf, integrity, locking, loop, params, shapes, space
from fpo_jax.hf import __main__ as checker
from fpo_jax.hf import manifest
from tests import faults, tiny
from tests.paths import REPO


def state(step, rows=64):
    """Values that differ between steps and compress little."""
    draw = lambda number, *shape: jax.random.normal(jax.random.key(10 * step + number), shape)  # noqa: E731
    weights = {"layers": {"attn": draw(0, 2, rows, 48)}, "embed": draw(1, rows, 32).astype(jnp.bfloat16)}
    return shapes.TrainState(weights, (draw(2, rows, 24), jnp.int32(step)), jnp.int32(0))


def saver(workdir, **options):
    return checkpoint.Checkpointer(workdir, **({"keep": 3} | options))


def listed(workdir):
    return sorted(path.name for path in (workdir / checkpoint.FOLDER).iterdir())


def assert_holds(checkpointer, step):
    """The newest step of a checkpointer is this one, and has its values."""
    assert checkpointer.latest_step() == step
    wanted = state(step)
    found = checkpointer.restore(
        step, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted)
    )
    for old, new in zip(jax.tree.leaves(wanted[:2]), jax.tree.leaves(found[:2]), strict=True):
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A workdir with the sealed steps 1 and 2, to be copied."""
    workdir = tmp_path_factory.mktemp("two") / "w"
    (workdir / checkpoint.SOURCE_FOLDER).mkdir(parents=True)
    (workdir / checkpoint.SOURCE_FOLDER / "config.json").write_text("{}")
    with contextlib.closing(saver(workdir)) as one:
        for step in (1, 2):
            one.save(step, state(step), {"note": "x"})
    return workdir


@pytest.fixture
def workdir(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "w")
    return tmp_path / "w"


def newest(workdir):
    return workdir / checkpoint.FOLDER / "2"


def payload(workdir, item="params"):
    """The file with the values of an item's largest array."""
    return max((newest(workdir) / item).rglob("d/*"), key=lambda path: path.stat().st_size)


def assert_recovers(workdir, damaged, caplog, *, words=()):
    """The damage is told with step and file, the step set aside and the older one restored."""
    caplog.clear()
    name = str(damaged.relative_to(newest(workdir)))
    with contextlib.closing(saver(workdir)) as one:
        assert_holds(one, 1)
    for word in ("checkpoint 2 of ", name, "set aside as 2.damaged", "using step 1", *words):
        assert word in caplog.text, word
    assert {"1", "2.damaged"} <= set(listed(workdir)) and "2" not in listed(workdir)


class TestDamage:
    def test_flipped_bit_names_file_and_parameter_and_the_older_step_is_restored(self, workdir, caplog):
        path = payload(workdir)
        faults.flip(path, 8 * 100)
        assert_recovers(workdir, path, caplog, words=["holds params layers.attn", "does not match its digest"])

    @pytest.mark.parametrize("name", [integrity.MANIFEST, "_CHECKPOINT_METADATA", "meta/metadata", "params/_METADATA"])
    def test_flipped_bit_of_metadata_is_noticed(self, workdir, caplog, name):
        faults.flip(newest(workdir) / name, 8 * 20 + 1)
        assert_recovers(workdir, newest(workdir) / name, caplog)

    def test_cut_file_tells_its_lengths(self, workdir, caplog):
        path = payload(workdir, "optimizer")
        size = path.stat().st_size
        os.truncate(path, size // 2)
        assert_recovers(workdir, path, caplog, words=[f"has {size // 2} bytes, {size} were written"])

    @pytest.mark.parametrize("name", ["commit_success.txt", "optimizer/manifest.ocdbt"])
    def test_missing_file_is_named(self, workdir, caplog, name):
        (newest(workdir) / name).unlink()
        assert_recovers(workdir, newest(workdir) / name, caplog, words=["is missing"])

    def test_half_written_step_is_named_and_its_files_counted(self, workdir, caplog):
        shutil.rmtree(newest(workdir) / "optimizer")
        assert_recovers(workdir, newest(workdir) / "optimizer/_METADATA", caplog, words=["more files"])

    def test_run_goes_on_from_there_and_saves_the_same_step_again(self, workdir):
        faults.flip(payload(workdir), 77)
        with contextlib.closing(saver(workdir)) as one:
            one.save(2, state(2), {})
        with contextlib.closing(saver(workdir)) as one:
            assert_holds(one, 2)
        assert listed(workdir) == ["1", "2", "2.damaged"]
        faults.flip(payload(workdir), 78)
        saver(workdir).close()
        assert listed(workdir) == ["1", "2.damaged", "2.damaged-2"], "nothing damaged is deleted"

    def test_no_good_step_lists_what_is_wrong_with_each_and_moves_nothing(self, workdir):
        faults.flip(payload(workdir), 7)
        (workdir / checkpoint.FOLDER / "1" / "meta" / "metadata").unlink()
        with pytest.raises(
            ValueError, match=r"no checkpoint of .*\n  step 1: meta/metadata is missing\n  step 2: params/"
        ):
            saver(workdir)
        assert listed(workdir) == ["1", "2"]

    def test_step_whose_run_was_killed_before_the_seal_gives_way_to_a_sealed_one(self, workdir, caplog):
        path = newest(workdir) / integrity.MANIFEST
        path.unlink()
        assert_recovers(workdir, path, caplog, words=["its run ended before the step was sealed"])

    def test_workdir_of_before_there_were_digests_is_used_with_a_warning(self, workdir, caplog):
        for step in ("1", "2"):
            (workdir / checkpoint.FOLDER / step / integrity.MANIFEST).unlink()
        with contextlib.closing(saver(workdir)) as one:
            assert_holds(one, 2)
        assert "checkpoint 2 of " in caplog.text and "is used unverified" in caplog.text
        assert listed(workdir) == ["1", "2"]

    def test_unsealed_step_without_an_item_is_no_checkpoint(self, workdir):
        shutil.rmtree(workdir / checkpoint.FOLDER / "1")
        (newest(workdir) / integrity.MANIFEST).unlink()
        shutil.rmtree(newest(workdir) / "optimizer")
        with pytest.raises(ValueError, match=r"step 2: optimizer/manifest.ocdbt missing"):
            saver(workdir)

    @pytest.mark.faults
    def test_every_flipped_bit_is_detected_and_the_older_step_restored(self, two_steps, tmp_path, caplog):
        done = 0
        for seed, random in faults.trials(500):
            workdir = tmp_path / str(seed)
            shutil.copytree(two_steps, workdir)
            damaged = faults.flip_somewhere(newest(workdir), random)
            try:
                assert_recovers(workdir, damaged, caplog)
            except BaseException as error:
                error.add_note(faults.replay(seed))
                raise
            shutil.rmtree(workdir)
            done += 1
        print(f"{done} flips detected, the older step restored {done} times")

    @pytest.mark.faults
    @pytest.mark.parametrize("how", ["cut", "removed"])
    def test_every_file_cut_or_removed_is_detected(self, two_steps, tmp_path, caplog, how):
        for name in [path.relative_to(newest(two_steps)) for path in faults.files(newest(two_steps))]:
            workdir = tmp_path / str(name).replace("/", "_")
            shutil.copytree(two_steps, workdir)
            path = newest(workdir) / name
            if how == "cut":
                os.truncate(path, path.stat().st_size // 2)
            else:
                path.unlink()
            assert_recovers(workdir, path, caplog)


class TestExportOfDamage:
    def test_newest_falls_back_and_says_so(self, workdir, caplog):
        faults.flip(payload(workdir), 9)
        weights, meta = checkpoint.restore_params(workdir, None)
        np.testing.assert_array_equal(
            np.asarray(weights["layers"]["attn"]), np.asarray(state(1).params["layers"]["attn"])
        )
        assert meta["step"] == 1 and "checkpoint 2 of " in caplog.text and "holds params layers.attn" in caplog.text
        assert listed(workdir) == ["1", "2"], "an export changes nothing: the run may be alive"

    @pytest.mark.parametrize("name", ["meta/metadata", "params/manifest.ocdbt"])
    def test_step_that_was_asked_for_is_an_error(self, workdir, name):
        faults.flip(newest(workdir) / name, 30)
        with pytest.raises(ValueError, match=f"checkpoint 2 of .* is damaged: {name}"):
            checkpoint.restore_params(workdir, 2)
        assert checkpoint.restore_params(workdir, 1)[1]["step"] == 1

    def test_damaged_optimizer_is_no_matter(self, workdir):
        faults.flip(payload(workdir, "optimizer"), 9)
        assert checkpoint.restore_params(workdir, 2)[1]["step"] == 2

    def test_best_step_is_an_error(self, tmp_path):
        (tmp_path / checkpoint.SOURCE_FOLDER).mkdir()
        (tmp_path / checkpoint.SOURCE_FOLDER / "config.json").write_text("{}")
        with contextlib.closing(saver(tmp_path, keep_best=True)) as one:
            one.save(1, state(1), {}, score=0.5)
            one.save(2, state(2), {}, score=0.7)
        assert checkpoint.restore_params(tmp_path, checkpoint.BEST)[1]["step"] == 2
        faults.flip(payload(tmp_path), 9)
        with pytest.raises(ValueError, match="checkpoint 2 of .* is damaged: params/"):
            checkpoint.restore_params(tmp_path, checkpoint.BEST)
