import contextlib
import json
import re
import sys
import types

import numpy as np
import pytest

from fpo_jax.trainer import callbacks, metric_logger


def writers(workdir, resume_step=-1, **options):
    options = {"tensorboard": False, "wandb_project": None, "config": {}} | options
    return metric_logger.Writers(workdir, resume_step=resume_step, **options)


def test_means_and_sums_over_batches():
    total = metric_logger.add(None, {"a": (np.float32(1.0), np.float32(2.0)), "never": (np.float32(0), np.float32(0))})
    total = metric_logger.add(total, {"a": (np.float32(5.0), np.float32(1.0)), "never": (np.float32(0), np.float32(0))})
    assert metric_logger.means(total) == {"a": 2.0}


def test_resume_drops_the_lines_of_updates_that_run_again(tmp_path):
    first = writers(tmp_path)
    for step in range(4):
        first.write(step, {"loss": 0.1 * step})
        first.write(step, {"seconds": 1.0}, timing=True)
    first.close()
    whole = (tmp_path / metric_logger.METRICS_FILE).read_bytes()
    with (tmp_path / metric_logger.METRICS_FILE).open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    again = writers(tmp_path, resume_step=2)
    again.write(3, {"loss": 0.1 * 3})
    again.sync()
    again.close()
    assert (tmp_path / metric_logger.METRICS_FILE).read_bytes() == whole
    assert [line["step"] for line in metric_logger.read(tmp_path / metric_logger.TIMING_FILE)] == [0, 1, 2]


def test_a_damaged_file_refuses_no_run_and_is_kept(tmp_path, caplog):
    path = tmp_path / metric_logger.METRICS_FILE
    first = writers(tmp_path)
    for step in range(1, 5):
        first.write(step, {"loss": 0.5})
    first.write(4, {"eval_loss": 0.5})
    first.close()
    lines = path.read_bytes().split(b"\n")[:-1]
    for damaged in (
        b"\n".join([lines[0], b"\0" * 50, *lines[2:], b""]),
        b"\n".join([lines[0], lines[1][:9] + lines[1][20:], *lines[2:], b""]),
        b"\n".join([lines[0], b"{}", *lines[2:], b""]),
    ):
        path.write_bytes(damaged)
        caplog.clear()
        assert metric_logger.has_evaluation(path, 4) and not metric_logger.has_evaluation(path, 3)
        writers(tmp_path, resume_step=4).close()
        assert path.read_bytes().split(b"\n") == [lines[0], *lines[2:], b""]
        assert (tmp_path / f"{path.name}.damaged").read_bytes() == damaged
        assert f"{path}:2 is no line of a run; it is kept as {path.name}.damaged" in caplog.text
        assert f"{path} lacks 1 of the 4 steps that the checkpoint holds" in caplog.text
    path.write_bytes(b"\n".join(lines)[:30])  # cut off
    caplog.clear()
    assert not metric_logger.has_evaluation(path, 4)
    writers(tmp_path, resume_step=4).close()
    assert "lacks 3 of the 4 steps" in caplog.text and ".damaged" not in caplog.text


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboardX", reason="the tensorboard extra is not installed")
    log = writers(tmp_path, tensorboard=True)
    log.write(1, {"loss": 0.5})
    log.write(1, {"eval_rewards/margins": 0.5})
    log.write(1, {"seconds": 0.5}, timing=True)
    log.close()
    [file] = (tmp_path / "tensorboard").iterdir()
    for name in (b"train/loss", b"eval/rewards/margins", b"timing/seconds"):
        assert name in file.read_bytes()
    lines = (tmp_path / metric_logger.METRICS_FILE).read_text().split("\n")
    assert json.loads(lines[1]) == {"step": 1, "eval_rewards/margins": 0.5}, "the file's names are as before"
    assert json.loads(lines[0]) == {"step": 1, "loss": 0.5}


def test_tensorboard_has_a_page_with_loss_margins_and_accuracies_first(tmp_path):
    pytest.importorskip("tensorboardX", reason="the tensorboard extra is not installed")
    from tensorboardX.proto import layout_pb2

    writers(tmp_path, tensorboard=True).close()
    [file] = (tmp_path / "tensorboard").iterdir()
    assert b"custom_scalars__config__" in file.read_bytes()
    from tensorboardX.summary import custom_scalars

    [value] = custom_scalars(metric_logger.LAYOUT).value
    layout = layout_pb2.Layout.FromString(value.tensor.string_val[0])
    charts = [(chart.title, list(chart.multiline.tag)) for chart in layout.category[0].chart]
    assert [title for title, _ in charts[:3]] == ["loss", "margins", "accuracies"]
    for _, (training, held_out) in charts:
        name = training.removeprefix("^train/").removesuffix("$")
        assert re.fullmatch(training, metric_logger.grouped(name, timing=False))
        assert re.fullmatch(held_out, metric_logger.grouped(f"eval_{name}", timing=False))


def test_a_table_reaches_tensorboard_and_no_text_leaves_its_cell(tmp_path):
    pytest.importorskip("tensorboardX", reason="the tensorboard extra is not installed")
    log = writers(tmp_path, tensorboard=True)
    log.table(3, "answers", ["prompt", "answer"], [["p|q\nr", "<b>x</b>"]])
    log.close()
    [file] = (tmp_path / "tensorboard").iterdir()
    assert b"| p&#124;q<br>r | &lt;b&gt;x&lt;/b&gt; |" in file.read_bytes()
    writers(tmp_path).table(3, "answers", ["a"], [["b"]])  # neither is there: nothing to do


def test_a_number_that_is_not_finite_is_null_and_rows_are_named(tmp_path):
    log = writers(tmp_path)
    log.write(1, {"loss": float("nan"), "grad_norm": float("inf"), "fine": 1.0}, rows=[4, 2])
    log.close()
    line = json.loads((tmp_path / metric_logger.METRICS_FILE).read_text())
    assert line == {"step": 1, "loss": None, "grad_norm": None, "fine": 1.0, "nonfinite_rows": [4, 2]}


class TestWandb:
    @pytest.fixture
    def begun(self, monkeypatch):
        """What W&B is asked for, by a module in its place."""
        asked = []
        run = types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
        module = types.ModuleType("wandb")
        module.init = lambda **options: asked.append(options) or run
        monkeypatch.setitem(sys.modules, "wandb", module)
        return asked

    def begin(self, workdir, **options):
        workdir.mkdir(parents=True, exist_ok=True)
        writers(workdir, wandb_project="p", **options).close()

    def test_runs_in_folders_of_one_name_have_ids_of_their_own(self, tmp_path, begun):
        """Two sweeps, or two stages of a pipeline: one id would make them one run, whose older steps are ignored."""
        for folder in ("sweep_a/run", "sweep_b/run", "sft-0123456789/run"):
            self.begin(tmp_path / folder)
        assert len({options["id"] for options in begun}) == 3
        assert [options["name"] for options in begun] == ["sweep_a/run", "sweep_b/run", "sft-0123456789/run"]
        assert {(options["project"], options["resume"]) for options in begun} == {("p", "allow")}

    def test_a_resumed_run_keeps_its_id_and_a_new_one_in_its_place_has_another(self, tmp_path, begun):
        self.begin(tmp_path / "w")
        self.begin(tmp_path / "w", resume_step=3)
        (tmp_path / "w").rename(tmp_path / "moved")
        self.begin(tmp_path / "moved", resume_step=3)
        self.begin(tmp_path / "w")
        first, again, moved, anew = (options["id"] for options in begun)
        assert first == again == moved != anew
        assert first.isalnum() and (tmp_path / "moved" / metric_logger.WANDB_FILE).read_text() == first + "\n"

    def test_without_a_project_there_is_no_id(self, tmp_path, begun):
        writers(tmp_path).close()
        assert not begun and not (tmp_path / metric_logger.WANDB_FILE).exists()


@pytest.mark.parametrize(("norms", "described"), [([1.0, 0.0, 0.0], "the last 2 of 3 steps"), ([0.0, 1e-30, 1.0], "")])
def test_updates_without_a_gradient_are_told_at_the_end(monkeypatch, caplog, norms, described):
    monkeypatch.setattr(callbacks.data, "row_sizes", lambda *_: None)
    monkeypatch.setattr(callbacks.data, "group_ids", lambda *_: np.array([0]))
    some = types.SimpleNamespace
    run = some(
        steps=some(train=some(compilations=0)),
        clock=some(part=lambda _: contextlib.nullcontext(), lap=lambda: {"seconds": 1.0}),
        schedule=some(schedule=None, steps=3),
        meter=some(step=lambda *_, **__: {}),
        writers=metric_logger.Silent(),
        config=some(train=some(log_every=1)),
        skipped=0,
        recorded=0,
    )
    logging = callbacks.MetricLogging(run)
    for step, norm in enumerate(norms, 1):
        one = {"loss": 1.0, "nonfinite": 0.0, "grad_norm": norm}
        logging.on_step_end(run, step, {name: (np.float32(value), np.float32(1)) for name, value in one.items()})
    logging.on_flush(run)
    logging.on_train_end(run)
    said = "".join(record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert described in said and bool(said) == bool(described)
