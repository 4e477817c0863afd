"""A finished run that goes on to more steps: the longer run's own steps, where the rate is constant, or with extend."""

import json

import jax
import pytest

import fpo_jax
from tests import tiny

ONE = {"mesh__data": 1, "mesh__fsdp": 1, "train__batch_size": 4, "train__epochs": 2.0, "data__eval": ""}
ONE |= {"loss__name": "sigmoid", "loss__alpha": None, "loss__beta_pi": None, "optim__schedule": "constant"}
ONE |= {"optim__warmup_fraction": 0.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extend")
    tiny.write_model(folder / "model", layers=1)
    tiny.write_pairs(folder / "pairs.jsonl", count=8)
    return folder


def trainer(place, workdir, *, extend=False, **changed):
    c = tiny.config(place / "model", place / "pairs.jsonl", **ONE | changed)
    c.train.compilation_cache = str(place / "compiled")
    return fpo_jax.Trainer(c, place / workdir, devices=jax.devices()[:1], extend=extend)


def losses_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n") if line]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_run_goes_on_to_more_steps(place, caplog):
    caplog.set_level("INFO", "fpo_jax")
    trainer(place, "whole", train__max_steps=3).train()
    trainer(place, "run", train__max_steps=2).train()
    trainer(place, "run", train__max_steps=3).train()
    assert "train.max_steps: 2 -> 3; the run goes on to 3 steps" in caplog.text
    assert losses_of(place / "run") == losses_of(place / "whole") and len(losses_of(place / "run")) == 3
    with pytest.raises(ValueError, match="holds step 3, and this start would end at step 1; raise train.epochs or"):
        trainer(place, "run", train__max_steps=1).train()
    with pytest.raises(ValueError, match=r"another configuration:\n  optim.learning_rate"):
        trainer(place, "run", optim__learning_rate=0.1, extend=True).train()
    assert losses_of(place / "run") == losses_of(place / "whole")


@pytest.mark.slow  # two more runs
def test_learning_rates_that_change_need_extend(place):
    cosine = {"optim__schedule": "cosine"}
    trainer(place, "cosine", **cosine, train__max_steps=1).train()
    with pytest.raises(ValueError, match="--extend goes on to more steps, with the learning rates of the longer run"):
        trainer(place, "cosine", **cosine, train__max_steps=2).train()
    trainer(place, "cosine", **cosine, train__max_steps=2, extend=True).train()
    assert sorted(losses_of(place / "cosine")) == [1, 2]
