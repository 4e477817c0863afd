"""Runs of every kind of adapter: what they say, meshes, resumption, what they start from and export."""

import pytest

from fpo_jax.trainer import metric_logger, run_summary, trainer
from tests import tiny
from tests.models import test_lora

RANKED = {"lora__use_rslora": True, "lora__loraplus_lr_ratio": 4.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    tiny.write_model(root / "model", layers=2)
    tiny.write_pairs(root / "pairs.jsonl", count=16)
    return root


def lines_of(workdir):
    return [line for line in metric_logger.read(workdir / metric_logger.METRICS_FILE) if "loss" in line]


@pytest.fixture(scope="module")
def ranked(base, tmp_path_factory):
    """A run with rsLoRA and LoRA+ over all devices."""
    workdir = tmp_path_factory.mktemp("run") / "w"
    trainer.run(test_lora.config(base, **RANKED), workdir)
    return workdir


def test_a_run_says_its_scale_and_both_rates(ranked):
    first, *_ = lines_of(ranked)
    assert first["learning_rate_b"] == pytest.approx(4 * first["learning_rate"]) and first["learning_rate"] > 0


def summary(config):
    """Return what a run says first, in one line."""
    return " ".join(" ".join(run_summary.summary(config, *tiny.built(config))).split())


def test_the_summary_has_scale_and_rate(base):
    said = summary(test_lora.config(base, mesh__data=1, mesh__fsdp=1, **RANKED))
    assert "adapter: LoRA of rank 3 over 7 matrices, scale 3.4641 (alpha/sqrt(rank), rsLoRA)" in said
    assert "B learns at 4 times the rate of A (LoRA+)" in said
