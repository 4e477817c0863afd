"""Rows in memory in the place of files: the same run, resumed by their content."""

import json

import jax
import pytest

import fpo_jax
from fpo_jax.trainer import run_inputs
from tests import tiny

ONE = {"mesh__data": 1, "mesh__fsdp": 1, "train__batch_size": 4, "train__save_every": 2, "train__epochs": 1.0}
ONE |= {"data__format": "auto", "train__eval_every": 0, "loss__name": "sigmoid", "loss__alpha": None}
ONE |= {"loss__beta_pi": None, "train__max_steps": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    tiny.write_model(folder / "model", layers=1)
    tiny.write_pairs(folder / "pairs.jsonl", count=16)
    return folder


def trainer(*args, **rows):
    return fpo_jax.Trainer(*args, devices=jax.devices()[:1], **rows)


def rows_of(place):
    return [json.loads(line) for line in (place / "pairs.jsonl").read_text().split("\n") if line]


def configured(place, **changed):
    return tiny.config(place / "model", "", **ONE, **changed)


def test_rows_in_memory_train_as_their_file_does_and_resume_by_content(place, caplog):
    caplog.set_level("INFO", "fpo_jax")
    rows, c = rows_of(place), configured(place, data__eval="")
    file = run_inputs.prepare(tiny.config(place / "model", place / "pairs.jsonl", **ONE))
    run = trainer(c, place / "run", train_dataset=rows, eval_dataset=iter(rows))
    found = run._run.inputs
    assert found.train.fingerprint() == file.train.fingerprint()
    assert found.evaluation.fingerprint() == file.evaluation.fingerprint()
    assert found.train.audit.format == "json: the columns prompt, chosen, rejected hold a prompt with two completions"
    assert c.data.train == "", "the caller's configuration is his own"
    run = trainer(c, place / "run", train_dataset=rows)
    run.train()
    trainer(c, place / "run", train_dataset=rows).train()
    assert f"finished: {place / 'run'} holds step 2 of 2" in caplog.text
    with pytest.raises(ValueError, match="train data changed since step 2"):
        trainer(c, place / "run", train_dataset=rows[::-1]).train()


def test_a_source_beside_rows_and_rows_that_are_not_there_are_refused(place):
    c = configured(place, data__eval="")
    with pytest.raises(ValueError, match=r"train_dataset is given, and so is data.mixer=\('a=1',\); unset one"):
        run_inputs.with_rows(configured(place, data__eval="", data__mixer=("a=1",)), {"train": []})
    with pytest.raises(ValueError, match="data.train='<rows in memory>' stands for train_dataset of fpo_jax.Trainer"):
        trainer(run_inputs.with_rows(c, {"train": []}), place / "never")
