"""The Trainer as a notebook uses it; what a run computes is test_loop's."""

import jax
import pytest

import fpo_jax
from fpo_jax import hf
from fpo_jax.io import run_log
from fpo_jax.trainer import callbacks, metric_logger
from tests import tiny


def config(inputs):
    changed = {"mesh__data": 1, "mesh__fsdp": 1, "train__max_steps": 3, "train__epochs": 4.0, "train__eval_every": 2}
    return tiny.config(inputs / "model", inputs / "pairs.jsonl", **changed, data__eval=str(inputs / "pairs.jsonl"))


def made(inputs, workdir, **options):
    return fpo_jax.Trainer(config(inputs), workdir, devices=jax.devices()[:1], **options)


class Told(callbacks.Callback):
    """Keeps what it is told."""

    def __init__(self):
        self.events = []

    def on_step_end(self, run, step, pairs):
        run.call("on_flush")
        self.events.append(("step", step, run.recorded))

    def on_evaluate(self, run, step, found, check):
        self.events.append(("evaluation", step, "eval_loss" in found))

    def on_save(self, run, step):
        self.events.append(("save", step))

    def on_train_end(self, run):
        self.events.append(("end",))


@pytest.mark.slow  # compiles a run
def test_what_a_trainer_does_and_tells(inputs, tmp_path, caplog):
    caplog.set_level("INFO", "fpo_jax")
    described, trainer = Told(), made(inputs, tmp_path / "w")
    start = trainer.evaluate()
    assert not (tmp_path / "w" / metric_logger.METRICS_FILE).exists(), "nothing is logged by an evaluation alone"
    trainer = made(inputs, tmp_path / "w", extra=[described])
    trainer.train()
    assert described.events == [
        ("evaluation", 0, True), ("step", 1, 1), ("evaluation", 2, True), ("save", 2), ("step", 2, 2),
        ("evaluation", 3, True), ("save", 3), ("step", 3, 3), ("end",),
    ]  # fmt: skip
    lines = [line for line in metric_logger.read(tmp_path / "w" / metric_logger.METRICS_FILE) if "eval_loss" in line]
    assert [line["step"] for line in lines] == [0, 2, 3]
    assert lines[0] == {"step": 0, **start} and lines[-1] == {"step": 3, **trainer.evaluate()}
    said = (tmp_path / "w" / run_log.FILE).read_text()
    assert said.count(" fpo_jax: details: ") == 3, "each start appends its own"
    for text in (" fpo_jax: train: data audit", " fpo_jax: evaluation at step 2  loss "):
        assert text in said
    trainer.save_pretrained(tmp_path / "exported", dtype="bfloat16")
    assert hf.read_config(tmp_path / "exported") == hf.read_config(inputs / "model")
    with pytest.raises(ValueError, match="exists and is not an empty directory"):
        trainer.save_pretrained(tmp_path / "exported")


def test_a_trainer_writes_nothing_before_it_trains(inputs, tmp_path):
    made(inputs, tmp_path / "w")
    assert not (tmp_path / "w").exists()
