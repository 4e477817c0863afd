"""A run that is stopped has, after every step, the very state of the run that is not; a state moves to any mesh."""

import collections
import itertools
import json
import shutil

import jax
import numpy as np
import pytest

from fpo_jax import checkpoint, losses
from fpo_jax.distributed import preemption
from fpo_jax.losses import preference_losses
from fpo_jax.perf import profiler
from fpo_jax.trainer import compiled_step, metric_logger, trainer
from tests import faults, resuming, tiny, tolerances

STEPS, STOPS = 6, (1, 3, 4)
STAGES = {"sft": "sft", "bradley_terry": "reward", "binary_cross_entropy": "reward"}
EVERY = [*losses.DIVERGENCES, *preference_losses.OBJECTIVES]
# What else a state depends on. The alpha-divergence takes all, every other loss the next of them but the last two: what
# draws random numbers takes as long to compile as three other cases. With five times the trials every loss takes all.
WAYS = {
    "full": {},
    "accumulated": {"train__micro_batch_per_device": 2},
    "adapter": {"lora__rank": 2},
    "packed": {"data__layout": "packed"},
    "shared, accumulated": {"data__layout": "shared", "train__micro_batch_per_device": 1},
    "adapter, accumulated, dropout": {"lora__rank": 2, "lora__dropout": 0.1, "train__micro_batch_per_device": 1},
    "bfloat16": {"model__param_dtype": "bfloat16", "optim__state_dtype": "bfloat16"},
}
CASES = [("alpha", way) for way in WAYS]
CASES += [(name, list(WAYS)[i % (len(WAYS) - 2)]) for i, name in enumerate(EVERY) if name != "alpha"]
if faults.trials(1) >= 5:
    CASES = list(itertools.product(EVERY, WAYS))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    tiny.write_model(root / "model", layers=1, vocab_size=264)
    tiny.write_pairs(root / "pairs.jsonl", count=16)
    rows = [{"prompt": f"{i}: ab?", "completion": f" cd {i}", "label": i % 2 == 0} for i in range(16)]
    (root / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def config(inputs, name, **changed):
    """Six steps of four pairs."""
    stage = STAGES.get(name, "align")
    options = {"loss__name": name, "loss__beta_pi": None, "stage": stage, "data__eval": "", "train__eval_every": 0}
    options |= {"loss__alpha": 0.1 if name == "alpha" else None, "train__epochs": STEPS * 4 / 16}
    options |= {"train__batch_size": 4, "train__micro_batch_per_device": 4, "mesh__data": 1, "mesh__fsdp": 1}
    if name in ("sft", "binary_cross_entropy"):
        options["data__group_size"] = 1
        changed = {key: "packed" if value == "shared" else value for key, value in changed.items()}
    if name == "binary_cross_entropy":
        options |= {"data__train": str(inputs / "labels.jsonl"), "data__format": "labelled"}
    return tiny.config(inputs / "model", inputs / "pairs.jsonl", **(options | changed))


class Recorder:
    """The digest of the state after every step, of any number of starts that share their compiled programs."""

    def __init__(self, monkeypatch):
        self.states, self.begun = {}, 0
        self.groups = collections.defaultdict(list)
        self.saved, self.restored = {}, []  # of what a checkpoint holds: after every step; by every start
        call, before = compiled_step.CompiledStep.__call__, profiler.Trace.before
        restore = checkpoint.Checkpointer.restore

        def called(program, first, batch):
            found = call(program, first, batch)
            if program.name == "train_step":
                number = int(found[0].step)
                self.states[number], self.saved[number] = faults.digest(found[0]), faults.digest(found[0][:2])
                self.groups[number] = sorted(np.ravel(batch.row_ids_B)[np.ravel(batch.row_ids_B) >= 0].tolist())
            return found

        def begins(trace, number):
            self.begun = number
            before(trace, number)

        def restoring(checkpointer, number, abstract):
            state = restore(checkpointer, number, abstract)
            self.restored.append(faults.digest(state[:2]))
            return state

        monkeypatch.setattr(checkpoint.Checkpointer, "restore", restoring)
        monkeypatch.setattr(compiled_step.CompiledStep, "__call__", called)
        resuming.compile_once(monkeypatch)
        monkeypatch.setattr(profiler.Trace, "before", begins)

    def run(self, c, workdir, *, until=None, devices=1, monkeypatch=None):
        """Run, and stop as by a signal during step `until`."""
        if until is None:
            trainer.run(c, workdir, devices=jax.devices()[:devices])
            return
        self.begun = 0
        with monkeypatch.context() as patch:
            patch.setattr(preemption.StopRequest, "agreed", lambda _: "SIGTERM" if self.begun >= until else None)
            with pytest.raises(preemption.Stopped, match=f"saved step {until} of"):
                trainer.run(c, workdir, devices=jax.devices()[:devices])


@pytest.mark.faults
@pytest.mark.parametrize(("name", "way"), CASES)
def test_every_update_of_a_run_stopped_three_times_is_that_of_the_whole_run(inputs, tmp_path, monkeypatch, name, way):
    recorder, c = Recorder(monkeypatch), config(inputs, name, **WAYS[way])
    recorder.run(c, tmp_path / "whole")
    expected, recorder.states = recorder.states, {}
    groups = dict(recorder.groups)
    for stop in (*STOPS, None):
        recorder.run(c, tmp_path / "w", until=stop, monkeypatch=monkeypatch)
        if stop:
            assert max(recorder.states) == stop
    assert list(expected) == list(recorder.states) == list(range(1, STEPS + 1))
    assert [number for number in expected if expected[number] != recorder.states[number]] == []
    assert len(set(expected.values())) == STEPS and dict(recorder.groups) == groups
    lines = [(tmp_path / folder / metric_logger.METRICS_FILE).read_bytes() for folder in ("whole", "w")]
    assert lines[0] == lines[1]


# --- another mesh

MESHES = {
    "1": (1, {}),
    "2 fsdp": (2, {"mesh__fsdp": 2}),
    "4 tensor": (4, {"mesh__tensor": 4}),
    "8 fsdp": (8, {"mesh__fsdp": 8}),
    "8 fsdp x tensor": (8, {"mesh__fsdp": 2, "mesh__tensor": 4}),
    "8 data x tensor": (8, {"mesh__data": 4, "mesh__tensor": 2}),
}
MOVES = {  # from, to
    "8 fsdp": ("1", "2 fsdp", "4 tensor", "8 fsdp x tensor"),
    "1": ("8 fsdp",),
    "8 fsdp x tensor": ("8 fsdp",),
    "8 data x tensor": ("1",),
}


def on(inputs, name, **changed):
    devices, mesh = MESHES[name]
    mesh = {"mesh__data": 1, "mesh__fsdp": 1, "mesh__tensor": 1} | mesh
    options = {"train__batch_size": 8, "train__micro_batch_per_device": 1, "train__epochs": 2.0} | mesh
    return devices, config(inputs, "alpha", **(options | changed))


@pytest.mark.faults  # two to five sets of compilations each
@pytest.mark.parametrize("saved", MOVES)
def test_a_state_moves_to_another_mesh_bit_for_bit_and_its_next_loss_is_the_same(inputs, tmp_path, monkeypatch, saved):
    recorder = Recorder(monkeypatch)
    devices, c = on(inputs, saved)
    recorder.run(c, tmp_path / "w", until=2, devices=devices, monkeypatch=monkeypatch)
    saved_state, lines = recorder.saved[2], {}
    for mesh in (saved, *MOVES[saved]):
        target = tmp_path / mesh / "w"
        shutil.copytree(tmp_path / "w", target)
        devices, c = on(inputs, mesh)
        recorder.run(c, target, devices=devices)
        lines[mesh] = metric_logger.read(target / metric_logger.METRICS_FILE)
        assert [line["step"] for line in lines[mesh]] == [1, 2, 3, 4]
        assert recorder.restored == [saved_state] * len(lines), f"on {mesh} the state is not bitwise the same"
        np.testing.assert_allclose(
            lines[mesh][2]["loss"], lines[saved][2]["loss"], rtol=tolerances.OTHER_MESH, err_msg=mesh
        )


@pytest.mark.faults
def test_a_run_on_four_two_one_and_eight_devices_sees_every_example_once_in_the_same_batches(
    inputs, tmp_path, monkeypatch
):
    recorder = Recorder(monkeypatch)
    devices, c = on(inputs, "8 fsdp")
    recorder.run(c, tmp_path / "whole", devices=devices)
    expected, recorder.groups = dict(recorder.groups), collections.defaultdict(list)
    left = []
    for ways, until in ((4, 1), (2, 2), (1, 3), (8, None)):
        _, c = on(inputs, "1", mesh__fsdp=ways)
        recorder.run(c, tmp_path / "w", until=until, devices=ways, monkeypatch=monkeypatch)
        left.append(recorder.saved[until or 4])
    assert recorder.restored == left[:-1], "what a start restores is what the one before it left, to the bit"
    assert dict(recorder.groups) == expected and len(expected) == 4
    for epoch in (1, 3):
        assert sorted(expected[epoch] + expected[epoch + 1]) == list(range(16))
