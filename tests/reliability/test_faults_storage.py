"""Faults of disks and of other runs: flipped bits, lost files, full disks, failing writers, two runs in one folder."""

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax import checkpoint, hf, types
from fpo_jax.checkpoint import disk_space, integrity, sealing
from fpo_jax.distributed import workdir_lock
from fpo_jax.hf import __main__ as checker
from fpo_jax.hf import digests
from fpo_jax.models import params
from fpo_jax.trainer import trainer
from tests import compiling, damage, forgetful_disk, resuming, tiny
from tests.paths import REPO


def state(step, rows=64):
    """Values that differ between steps and compress little."""
    draw = lambda number, *shape: jax.random.normal(jax.random.key(10 * step + number), shape)  # noqa: E731
    weights = {"layers": {"attn": draw(0, 2, rows, 48)}, "embed": draw(1, rows, 32).astype(jnp.bfloat16)}
    return types.TrainState(weights, (draw(2, rows, 24), jnp.int32(step)), jnp.int32(0))


def saver(workdir, **options):
    return checkpoint.Checkpointer(workdir, **({"keep": 3} | options))


def listed(workdir):
    """What lies in the folder of checkpoints; old steps on their way out only where they are still there."""
    folder = workdir / checkpoint.FOLDER
    return sorted(path.name for path in [*folder.glob("[!.]*"), *folder.glob(".*/*")])


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
        damage.flip(path, 8 * 100)
        assert_recovers(workdir, path, caplog, words=["(holds params ", "layers.attn", "does not match its digest"])

    @pytest.mark.parametrize("name", [integrity.MANIFEST, "_CHECKPOINT_METADATA", "meta/metadata", "params/_METADATA"])
    def test_flipped_bit_of_metadata_is_noticed(self, workdir, caplog, name):
        damage.flip(newest(workdir) / name, 8 * 20 + 1)
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

    @pytest.mark.parametrize("kept", ["sealed", "unsealed"])
    def test_a_step_under_another_number_is_set_aside(self, workdir, caplog, kept):
        """A copy is whole, and its digests are right; only its number is not."""
        copy = workdir / checkpoint.FOLDER / "4"
        shutil.copytree(newest(workdir), copy)
        if kept == "unsealed":
            for step in ("1", "2", "4"):
                (workdir / checkpoint.FOLDER / step / integrity.MANIFEST).unlink()
        with contextlib.closing(saver(workdir)) as one:
            assert_holds(one, 2)
        assert "checkpoint 4 of " in caplog.text and "it is step 2 under another number" in caplog.text
        assert "4" not in listed(workdir) and "4.damaged" in listed(workdir)
        (workdir / checkpoint.FOLDER / "4.damaged").rename(copy)
        with pytest.raises(ValueError, match="checkpoint 4 .* is damaged: it is step 2 under another number"):
            checkpoint.restore_params(workdir, 4)

    def test_half_written_step_is_named_and_its_files_counted(self, workdir, caplog):
        shutil.rmtree(newest(workdir) / "optimizer")
        assert_recovers(workdir, newest(workdir) / "optimizer/_METADATA", caplog, words=["more files"])

    def test_run_goes_on_from_there_and_saves_the_same_step_again(self, workdir):
        damage.flip(payload(workdir), 77)
        with contextlib.closing(saver(workdir)) as one:
            one.save(2, state(2), {})
        with contextlib.closing(saver(workdir)) as one:
            assert_holds(one, 2)
        assert listed(workdir) == ["1", "2", "2.damaged"]
        damage.flip(payload(workdir), 78)
        saver(workdir).close()
        assert listed(workdir) == ["1", "2.damaged", "2.damaged-2"], "nothing damaged is deleted"

    def test_no_good_step_lists_what_is_wrong_with_each_and_moves_nothing(self, workdir):
        damage.flip(payload(workdir), 7)
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

    @pytest.mark.parametrize("steps", [(1, 2), (2,)])
    def test_half_written_seal_of_a_killed_run_is_gone_at_the_next_start(self, workdir, steps):
        if 1 not in steps:  # the first save of a run is used unverified, and stays
            shutil.rmtree(workdir / checkpoint.FOLDER / "1")
        (newest(workdir) / integrity.MANIFEST).rename(newest(workdir) / f".{integrity.MANIFEST}.tmp")
        with contextlib.closing(saver(workdir)) as one:
            assert_holds(one, min(steps))
        assert listed(workdir) and not list(workdir.rglob("*.tmp"))

    def test_unsealed_step_without_an_item_is_no_checkpoint(self, workdir):
        shutil.rmtree(workdir / checkpoint.FOLDER / "1")
        (newest(workdir) / integrity.MANIFEST).unlink()
        shutil.rmtree(newest(workdir) / "optimizer")
        with pytest.raises(ValueError, match=r"step 2: optimizer/manifest.ocdbt missing"):
            saver(workdir)

    @pytest.mark.faults
    def test_every_flipped_bit_is_detected_and_the_older_step_restored(self, two_steps, tmp_path, caplog):
        done = 0
        for seed, random in damage.trials(500):
            workdir = tmp_path / str(seed)
            shutil.copytree(two_steps, workdir)
            damaged = damage.flip_somewhere(newest(workdir), random)
            try:
                assert_recovers(workdir, damaged, caplog)
            except BaseException as error:
                error.add_note(damage.replay(seed))
                raise
            shutil.rmtree(workdir)
            done += 1
        print(f"{done} flips detected, the older step restored {done} times")

    @pytest.mark.faults
    @pytest.mark.parametrize("how", ["cut", "removed"])
    def test_every_file_cut_or_removed_is_detected(self, two_steps, tmp_path, caplog, how):
        for name in [path.relative_to(newest(two_steps)) for path in damage.files(newest(two_steps))]:
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
        damage.flip(payload(workdir), 9)
        weights, meta = checkpoint.restore_params(workdir, None)
        np.testing.assert_array_equal(
            np.asarray(weights["layers"]["attn"]), np.asarray(state(1).params["layers"]["attn"])
        )
        assert meta["step"] == 1 and "checkpoint 2 of " in caplog.text and "(holds params " in caplog.text
        assert listed(workdir) == ["1", "2"], "an export changes nothing: the run may be alive"

    @pytest.mark.parametrize("name", ["meta/metadata", "params/manifest.ocdbt"])
    def test_step_that_was_asked_for_is_an_error(self, workdir, name):
        damage.flip(newest(workdir) / name, 30)
        with pytest.raises(ValueError, match=f"checkpoint 2 of .* is damaged: {name}"):
            checkpoint.restore_params(workdir, 2)
        assert checkpoint.restore_params(workdir, 1)[1]["step"] == 1

    def test_damaged_optimizer_is_no_matter(self, workdir):
        damage.flip(payload(workdir, "optimizer"), 9)
        assert checkpoint.restore_params(workdir, 2)[1]["step"] == 2

    def test_best_step_is_an_error(self, tmp_path):
        (tmp_path / checkpoint.SOURCE_FOLDER).mkdir()
        (tmp_path / checkpoint.SOURCE_FOLDER / "config.json").write_text("{}")
        with contextlib.closing(saver(tmp_path, keep_best=True)) as one:
            one.save(1, state(1), {}, score=0.5)
            one.save(2, state(2), {}, score=0.7)
        assert checkpoint.restore_params(tmp_path, checkpoint.BEST)[1]["step"] == 2
        damage.flip(payload(tmp_path), 9)
        with pytest.raises(ValueError, match="checkpoint 2 of .* is damaged: params/"):
            checkpoint.restore_params(tmp_path, checkpoint.BEST)


@contextlib.contextmanager
def files_limited_to(count):
    """Let no file of this process grow beyond `count` bytes: a disk that is full to the writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def breaking(monkeypatch, *, times, place="before"):
    """Let so many commits of a step fail as a disk would, before the rename or in the seal after it."""
    left = [times]
    target, name = (sealing.SealedPath, "finalize") if place == "before" else (integrity, "seal")
    sound = getattr(target, name)

    def fails(path):
        final = path.get_final().name if place == "before" else path.name
        if final.isdigit() and left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "the writer broke")
        return sound(path)

    monkeypatch.setattr(target, name, fails)


def written(checkpointer):
    """Wait for the writer, which steps as short as these would outrun."""
    while checkpointer._manager.is_saving_in_progress():
        time.sleep(0.001)
    return True


def settled(checkpointer):
    """Ask as the steps do, once the writer is done."""
    return written(checkpointer) and checkpointer.failing()


class TestFailedSave:
    @pytest.mark.parametrize("place", ["before", "after"])
    def test_same_step_is_saved_at_the_second_attempt(self, workdir, monkeypatch, caplog, place):
        breaking(monkeypatch, times=1, place=place)
        with contextlib.closing(saver(workdir)) as one:
            one.commit(3, state(3), {})
            assert_holds(one, 3)
        assert "step 3 was not saved, and the run tries again: " in caplog.text and "the writer broke" in caplog.text
        assert listed(workdir) == ["1", "2", "3"]

    @pytest.mark.parametrize("keep", [1, 2])
    def test_next_save_takes_the_place_of_the_failed_one(self, workdir, monkeypatch, keep):
        """Older steps stay until a newer one is committed, and go then."""
        breaking(monkeypatch, times=1)
        with contextlib.closing(saver(workdir, keep=keep)) as one:
            one.save(3, state(3), {})
            assert settled(one)
            assert listed(workdir) == ["1", "2"] and one.latest_step() == 2
            one.save(4, state(4), {})
            assert not settled(one)
        assert listed(workdir) == (["4"] if keep == 1 else ["2", "4"])

    def test_fault_that_stays_ends_the_run_at_the_last_attempt(self, workdir, monkeypatch):
        breaking(monkeypatch, times=checkpoint.ATTEMPTS)
        one = saver(workdir)
        with pytest.raises(
            checkpoint.SaveFailed, match=r"step 3 .* attempt 3 in a row: .*broke; the newest .* is step 2"
        ):
            one.commit(3, state(3), {})
        one.close()
        assert listed(workdir) == ["1", "2"]
        with contextlib.closing(saver(workdir)) as again:
            assert_holds(again, 2)

    @pytest.mark.parametrize("end", ["wait", "close"])
    def test_background_fault_is_never_swallowed(self, workdir, monkeypatch, end):
        breaking(monkeypatch, times=1)
        one = saver(workdir)
        one.save(3, state(3), {})
        with pytest.raises(checkpoint.SaveFailed, match="the newest state was not saved to .*broke"):
            getattr(one, end)()
        one.close()
        assert listed(workdir) == ["1", "2"]

    def test_full_disk_leaves_older_steps_and_nothing_else(self, workdir):
        one = saver(workdir)
        with files_limited_to(5000), pytest.raises(checkpoint.SaveFailed, match=r"step 3 was not saved .*3 in a row"):
            one.commit(3, state(3), {})
        assert listed(workdir) == ["1", "2"], "nothing half-written is left"
        one.commit(3, state(3), {})  # the disk has room again
        assert_holds(one, 3)
        one.close()

    @pytest.mark.parametrize("instead", ["nothing", "a file"])
    def test_vanished_folder_is_an_error_and_not_made_again(self, workdir, instead):
        """Its disk may be unmounted: a folder of that name would lie on another one."""
        one = saver(workdir)
        shutil.rmtree(workdir / checkpoint.FOLDER)
        if instead == "a file":
            (workdir / checkpoint.FOLDER).touch()
        with pytest.raises(checkpoint.SaveFailed, match="step 3 was not saved"):
            one.commit(3, state(3), {})
        assert not (workdir / checkpoint.FOLDER).is_dir()
        one.close()


class TestPower:
    def test_a_power_cut_costs_at_most_what_was_not_committed(self, tmp_path, monkeypatch):
        """After every sync the disk may forget all the rest; a committed step is restored to the bit."""
        (tmp_path / "disk").mkdir()
        committed = {}  # number of syncs -> the step that was safe from then on
        with forgetful_disk.Disk(tmp_path / "disk", monkeypatch) as disk:
            with contextlib.closing(saver(tmp_path / "disk" / "new" / "w", keep=1)) as one:
                for step in (1, 2):
                    one.commit(step, state(step, rows=4), {"note": "x"})
                    committed[len(disk.syncs)] = step
            assert len(disk.syncs) > 30
            for count in range(min(committed), len(disk.syncs) + 1):
                left = disk.rebuild(count, tmp_path / f"left{count}") / "new" / "w"
                promised = max(step for synced, step in committed.items() if synced <= count)
                choice = integrity.newest_good(left / checkpoint.FOLDER)
                assert choice.verified and choice.step in (promised, promised + 1), (count, choice)
        with contextlib.closing(saver(left)) as one:
            assert one.latest_step() == 2 and one.meta(2)["note"] == "x"

    @pytest.mark.faults  # a run
    def test_a_run_goes_on_from_its_last_checkpoint(self, inputs, tmp_path, monkeypatch, caplog):
        """Nothing that the resumption reads was left unsynced: identity, source, metrics, reference log-probs."""
        caplog.set_level("INFO", "fpo_jax")
        (tmp_path / "disk").mkdir()
        with forgetful_disk.Disk(tmp_path / "disk", monkeypatch) as disk:
            run(inputs, tmp_path / "disk" / "w")
            left = disk.rebuild(len(disk.syncs), tmp_path / "left") / "w"
        claim = json.loads((left / workdir_lock.FILE).read_text())  # of a process that the cut ended; this one lives on
        (left / workdir_lock.FILE).write_text(json.dumps(claim | {"started": "before the cut"}))
        assert (left / "metrics.jsonl").read_bytes() == (tmp_path / "disk" / "w" / "metrics.jsonl").read_bytes()
        assert resuming.outcome(left) == resuming.outcome(tmp_path / "disk" / "w")
        run(inputs, left)
        assert f"finished: {left} holds step 4 of 4" in caplog.text and "damaged" not in caplog.text


class TestSpace:
    def test_save_that_does_not_fit_names_both_numbers_and_begins_nothing(self, workdir, monkeypatch):
        needed = disk_space.estimate(workdir / checkpoint.FOLDER, state(3)[:2])
        monkeypatch.setattr(disk_space, "free", lambda folder: needed - 1000)
        one = saver(workdir)
        numbers = f"step 3 needs {disk_space.gb(needed)}, the disk of .* has {disk_space.gb(needed - 1000)} free"
        with pytest.raises(checkpoint.SaveFailed, match=numbers):
            one.commit(3, state(3), {})
        monkeypatch.setattr(disk_space, "free", lambda folder: needed)
        one.commit(3, state(3), {})
        one.close()

    def test_run_is_told_before_it_begins(self, tmp_path, monkeypatch, caplog):
        """Three checkpoints stay and one is written: four have to fit."""
        one, each = saver(tmp_path), disk_space.raw(state(1)[:2])
        for free, says in ((4 * each, ""), (4 * each - 1, "4 more checkpoints (3 kept, one written) need")):
            caplog.clear()
            monkeypatch.setattr(disk_space, "free", lambda folder, free=free: free)
            one.check_space(state(1))
            assert says in caplog.text and bool(says) == bool(caplog.text)
        monkeypatch.setattr(disk_space, "free", lambda folder: each - 1)
        with pytest.raises(ValueError, match="a checkpoint needs .*train.keep_checkpoints"):
            one.check_space(state(1))
        one.close()

    def test_estimate_is_within_five_percent_of_the_disk(self, tmp_path):
        """Of the first save, by samples, and of the next, by the first one."""
        values = state(1, rows=8192)
        zeros = jnp.zeros((8192, 64)).at[:1024].set(values.params["embed"][:1024, :1].astype(jnp.float32))
        values = values._replace(opt_state=(*values.opt_state, zeros))
        folder = tmp_path / checkpoint.FOLDER
        with contextlib.closing(saver(tmp_path)) as one:
            for step in (1, 2):
                described = disk_space.estimate(folder, values[:2])
                one.commit(step, values, {})
                real = sum(path.stat().st_size for path in damage.files(folder / str(step)))
                assert abs(described / real - 1) < 0.05, (step, described, real)


def run(inputs, workdir, **changed):
    """Four steps on one device; a checkpoint after the second and the last."""
    options = {"train__batch_size": 4, "train__max_steps": 4, "train__save_every": 2, "data__eval": ""}
    c = tiny.config(inputs / "model", inputs / "pairs.jsonl", **(options | {"train__eval_every": 0} | changed))
    c.mesh.data = c.mesh.fsdp = c.mesh.tensor = 1
    trainer.run(c, workdir, devices=jax.devices()[:1])


@pytest.mark.faults  # three runs
class TestRun:
    def test_damaged_newest_checkpoint_costs_one_save_interval_and_no_bit(self, inputs, tmp_path, caplog, monkeypatch):
        caplog.set_level("INFO", "fpo_jax")
        run(inputs, tmp_path / "w")
        before = resuming.outcome(tmp_path / "w")
        damage.flip(
            max((tmp_path / "w" / checkpoint.FOLDER / "4").rglob("d/*"), key=lambda path: path.stat().st_size), 99
        )
        breaking(monkeypatch, times=1)  # and the last save fails once
        run(inputs, tmp_path / "w")
        assert "set aside as 4.damaged" in caplog.text and "resumed from step 2 of 4" in caplog.text
        assert "step 4 was not saved, and the run tries again" in caplog.text
        assert before[0] == 4 and resuming.outcome(tmp_path / "w") == before
        assert listed(tmp_path / "w") == ["2", "4", "4.damaged"]

    def test_failed_save_is_made_again_after_the_next_update(self, inputs, tmp_path, monkeypatch, caplog):
        breaking(monkeypatch, times=1)
        failing = checkpoint.Checkpointer.failing
        monkeypatch.setattr(checkpoint.Checkpointer, "failing", lambda self: written(self) and failing(self))
        run(inputs, tmp_path / "w", train__max_steps=5, train__keep_checkpoints=5)
        assert "step 2 was not saved, and the run tries again" in caplog.text
        assert listed(tmp_path / "w") == ["3", "4", "5"]


@pytest.mark.faults
def test_run_on_a_full_disk_ends_with_its_exit_code_and_leaves_nothing_half_written(inputs, tmp_path):
    """A process that may write no file above 64 kB cannot save a wider model."""
    tiny.write_model(tmp_path / "model", layers=1, width=256)
    options = {
        "model.path": tmp_path / "model", "data.format": "json", "data.train": inputs / "pairs.jsonl", "data.eval": "",
        "data.hh_split": "last_turn", "data.subfolder": "", "data.train_split": "", "data.eval_split": "",
        "data.max_length": 40, "data.max_completion_length": 16, "train.batch_size": 4, "train.max_steps": 2,
        "train.micro_batch_per_device": 2, "train.save_every": 1, "logging.tensorboard": False,
    }  # fmt: skip
    flags = [f"--config.{key}={value}" for key, value in options.items()]
    limited = ["prlimit", f"--fsize={2**16}", sys.executable, "train.py", "--config", "configs/pythia_hh_pref.py"]
    limited += ["--workdir", str(tmp_path / "w"), *flags]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_COMPILATION")}
    environment["XLA_FLAGS"] = compiling.flags()
    done = subprocess.run(limited, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "train.py: step 2 was not saved to" in done.stderr and "there is no checkpoint" in done.stderr
    assert listed(tmp_path / "w") == []


def test_loop_refuses_a_workdir_in_use_before_it_reads_or_writes(inputs, tmp_path, monkeypatch):
    with workdir_lock.hold(tmp_path / "w"), pytest.raises(ValueError, match="is in use by process"):
        run(tmp_path, tmp_path / "w")  # where no model is
    monkeypatch.setattr(workdir_lock, "peek", lambda folder: None)  # it began between our look and our claim
    with workdir_lock.hold(tmp_path / "w"), pytest.raises(ValueError, match="is in use by process"):
        run(inputs, tmp_path / "w")
    assert list((tmp_path / "w").iterdir()) == []


@pytest.fixture(scope="module")
def exported(inputs, tmp_path_factory):
    """A sharded export, to be copied."""
    root, config = tmp_path_factory.mktemp("exported"), hf.read_config(inputs / "model")
    hf.export(
        params.init(config, jax.random.key(1), "float32"), config,
        out_dir=root / "out", source_dir=inputs / "model", dtype="float32", max_shard_bytes=20_000,
    )  # fmt: skip
    return root / "out"


class TestExportManifest:
    def test_export_is_as_written(self, exported, capsys):
        assert checker.main([str(exported)]) == 0
        content = json.loads((exported / integrity.MANIFEST).read_text())
        assert len([name for name in content["files"] if name.endswith(".safetensors")]) > 1
        assert content["tensors"]["model.norm.weight"].keys() == {"file", "dtype", "shape", "sha256"}
        assert f"{len(content['tensors'])} tensors" in capsys.readouterr().out

    def test_digests_on_the_way_to_the_disk_are_those_of_what_lies_there(self, exported, tmp_path):
        shutil.copytree(exported, tmp_path / "out")
        (tmp_path / "out" / integrity.MANIFEST).unlink()
        digests.write(tmp_path / "out")
        assert (tmp_path / "out" / integrity.MANIFEST).read_bytes() == (exported / integrity.MANIFEST).read_bytes()

    def test_flipped_bit_of_weights_names_file_and_tensor(self, exported, tmp_path, capsys):
        shutil.copytree(exported, tmp_path / "out")
        path = tmp_path / "out" / json.loads((exported / hf.INDEX).read_text())["weight_map"]["model.norm.weight"]
        damage.flip(path, 8 * path.stat().st_size - 1)
        assert checker.main([str(tmp_path / "out")]) == 1
        last = json.loads((exported / integrity.MANIFEST).read_text())["tensors"]
        assert f"{path.name} is not what was written" in (described := capsys.readouterr().err)
        assert "(tensor " in described and described.partition("(tensor ")[2].partition(")")[0] in last

    def test_cut_removed_and_added_files(self, exported, tmp_path):
        shutil.copytree(exported, tmp_path / "out")
        first, second, *_ = sorted((tmp_path / "out").glob("model-*.safetensors"))
        os.truncate(first, 100)
        second.unlink()
        (tmp_path / "out" / hf.SINGLE).touch()
        described = "\n".join(digests.check(tmp_path / "out"))
        assert f"{first.name} has 100 bytes" in described and f"{second.name} is missing" in described
        assert f"{hf.SINGLE} was not there" in described

    @pytest.mark.parametrize("count", [10, pytest.param(100, marks=pytest.mark.faults)])
    def test_every_flipped_bit_is_detected(self, exported, tmp_path, count):
        shutil.copytree(exported, tmp_path / "out")
        for seed, random in damage.trials(count):
            path = damage.flip_somewhere(tmp_path / "out", random)
            described = digests.check(tmp_path / "out")
            assert len(described) == 1 and described[0].startswith(f"{path.relative_to(tmp_path / 'out')} "), (
                damage.replay(seed)
            )
            shutil.copyfile(exported / path.relative_to(tmp_path / "out"), path)
