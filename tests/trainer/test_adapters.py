"""Runs of every kind of adapter: what they say, meshes, resumption, what they start from and export."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from fpo_jax import checkpoint, hf
from fpo_jax.models import params
from fpo_jax.perf import flops
from fpo_jax.trainer import adapters, export, metric_logger, run_inputs, run_summary, trainer
from tests import resuming, tiny, tolerances
from tests.models import test_lora

SAVED = ("norm", "lm_head", "embed_tokens")
EVERY = {
    "lora__use_rslora": True,
    "lora__loraplus_lr_ratio": 4.0,
    "lora__use_dora": True,
    "lora__modules_to_save": SAVED,
}
ONE = {"mesh__data": 1, "mesh__fsdp": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    tiny.write_model(root / "model", layers=2)
    tiny.write_pairs(root / "pairs.jsonl", count=16)
    return root


def lines_of(workdir):
    return [line for line in metric_logger.read(workdir / metric_logger.METRICS_FILE) if "loss" in line]


@pytest.fixture(scope="module")
def every_kind(base, tmp_path_factory):
    """A run with every kind at once over all devices."""
    workdir = tmp_path_factory.mktemp("run") / "w"
    trainer.run(test_lora.config(base, **EVERY), workdir)
    return workdir


def test_a_run_says_its_scale_and_both_rates(every_kind):
    first, *_ = lines_of(every_kind)
    assert first["learning_rate_b"] == pytest.approx(4 * first["learning_rate"]) and first["learning_rate"] > 0


def summary(config):
    """Return what a run says first, in one line."""
    return " ".join(" ".join(run_summary.summary(config, *tiny.built(config))).split())


def test_the_summary_has_scale_and_rate(base):
    said = summary(test_lora.config(base, **ONE, **EVERY))
    assert (
        "adapter: DoRA of rank 3 over 7 matrices, scale 3.4641 (alpha/sqrt(rank), rsLoRA); trained whole beside it:"
        in said
    )
    assert "B learns at 4 times the rate of A (LoRA+)" in said


# --- lora.path


@pytest.fixture(scope="module")
def adapter(every_kind, tmp_path_factory):
    """The adapter of the run as a directory of PEFT."""
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    export.export(every_kind, folder, step=None, dtype=None, lora="adapter")
    return folder


def further(base, adapter, **changed):
    unset = {"lora__rank": 0, "lora__alpha": None, "lora__path": str(adapter)}
    return test_lora.config(base, **(unset | changed))


@pytest.fixture(scope="module")
def second(base, adapter, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("second") / "w"
    trainer.run(further(base, adapter), workdir)
    return workdir


def test_a_run_starts_where_the_adapter_ended_and_takes_it_as_its_reference(every_kind, second):
    before = metric_logger.read(every_kind / metric_logger.METRICS_FILE)[-1]
    first, *_ = metric_logger.read(second / metric_logger.METRICS_FILE)
    assert abs(before["eval_reference_kl"]) > 1e-4
    assert first["eval_reference_kl"] == pytest.approx(0.0, abs=1e-5)
    assert first["eval_logps/chosen"] == pytest.approx(before["eval_logps/chosen"], rel=1e-5)


def test_the_reference_without_the_adapter_is_the_base(base, every_kind, adapter, tmp_path):
    first = trainer.Trainer(further(base, adapter, reference__adapter="off"), tmp_path / "w").evaluate()
    before = metric_logger.read(every_kind / metric_logger.METRICS_FILE)[-1]
    for name in ("eval_reference_kl", "eval_loss"):
        assert first[name] == pytest.approx(before[name], rel=1e-4), name


def test_its_checkpoints_say_all_without_the_directory(second, adapter, tmp_path):
    _, meta = checkpoint.restore_params(second, None)
    lora = meta["config"]["lora"]
    assert (lora["rank"], lora["alpha"], lora["use_rslora"], lora["dropout"]) == (3, 6.0, True, 0.0)
    assert lora["use_dora"] and len(lora["modules_to_save"]) == 5
    moved = adapter.rename(tmp_path / "elsewhere")
    try:
        said = export.export(second, tmp_path / "out", step=None, dtype=None, lora="adapter")
    finally:
        moved.rename(adapter)
    assert "adapter of rank 3 over 7 matrices, step 3" in said


def test_the_summary_says_where_it_starts_and_what_the_reference_is(base, adapter):
    said = summary(further(base, adapter, **ONE))
    assert "final_norm/scale, head; starts from" in said and "whose alpha is 6; " in said
    assert "the reference is the base with that adapter, by reference.adapter=start" in said
    assert "the reference is the base without that adapter" in summary(
        further(base, adapter, reference__adapter="off", **ONE)
    )


@pytest.mark.parametrize("written", ["there", "other"])
def test_a_base_of_another_name_is_told_and_another_path_to_it_is_not(adapter, tmp_path, monkeypatch, caplog, written):
    (tmp_path / "there").mkdir()
    (tmp_path / "here").symlink_to("there")
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "adapter"
    shutil.copytree(adapter, own)
    said = json.loads((own / "adapter_config.json").read_text())
    base = {"base_model_name_or_path": str(tmp_path / written)}
    (own / "adapter_config.json").write_text(json.dumps(said | base))
    adapters.directory_of(tiny.config(Path("here"), tmp_path / "unread", lora__path=str(own)))
    assert ("lora.path was trained on" in caplog.text) == (written == "other")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora__rank": 4}, r"lora.rank=4, and the adapter in lora.path=.* has 3; unset lora.rank"),
        ({"lora__alpha": 3.0}, r"lora.alpha=3.0, and .* has 6.0"),
        ({"lora__use_rslora": False}, r"lora.use_rslora=False, and .* has True"),
        ({"lora__modules": "q_proj"}, r"lora.modules='q_proj', and .* has '.*q_proj"),
    ],
)
def test_what_contradicts_the_adapter_is_refused_by_name(base, adapter, changed, message):
    with pytest.raises(ValueError, match=message):
        run_inputs.prepare(further(base, adapter, **changed))


def test_what_agrees_with_the_adapter_is_taken_and_dropout_may_differ(base, adapter):
    agreeing = {"lora__rank": 3, "lora__alpha": 6.0, "lora__modules": "all-linear", "lora__dropout": 0.5}
    inputs, _, made = tiny.built(further(base, adapter, **ONE, **agreeing))
    assert inputs.adapter == adapter and made.forward_fn.adapter.dropout == 0.5


def test_a_directory_without_an_adapter_is_refused(base):
    with pytest.raises(ValueError, match="has no adapter_config.json; give a directory that PEFT's save_pretrained"):
        run_inputs.prepare(further(base, base / "model"))


def test_a_run_that_is_stopped_on_one_device_is_that_of_eight(base, adapter, second, tmp_path, monkeypatch):
    check_stopped(further(base, adapter), second, tmp_path / "w", monkeypatch)


def check_stopped(config, whole, workdir, monkeypatch):
    """Compare a run on one device that is stopped after its second step and resumed with one on all devices."""
    resuming.stopped(config, workdir, monkeypatch, after=2)
    assert [line["step"] for line in lines_of(workdir)] == [line["step"] for line in lines_of(whole)]
    ours, theirs = (params.flatten(checkpoint.restore_params(w, None)[0]) for w in (workdir, whole))
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        assert_allclose(ours[path], value, rtol=0, atol=tolerances.ADAPTER_ON_A_MESH, err_msg=path)


# --- DoRA, and modules that are trained whole


def test_a_fresh_dora_changes_nothing(every_kind):
    first, *_, last = metric_logger.read(every_kind / metric_logger.METRICS_FILE)
    assert first["eval_reference_kl"] == pytest.approx(0.0, abs=1e-5)
    assert abs(last["eval_reference_kl"]) > 1e-4


def test_all_that_is_trained_moves_and_is_in_the_checkpoint_and_nothing_else(base, every_kind):
    found = params.flatten(checkpoint.restore_params(every_kind, None)[0])
    before = params.flatten(hf.load_params(base / "model", hf.read_config(base / "model"), dtype="float32"))
    names = {path for path in found if "_lora_" not in path}
    assert names == {"embed", "head", "final_norm/scale", "layers/attention_norm/scale", "layers/mlp_norm/scale"}
    for path in names:
        assert np.abs(found[path] - np.asarray(before[path])).max() > 1e-3, path
    assert len(found) == 5 + 3 * 7


@pytest.mark.slow  # a second set of compilations
def test_weights_gathered_once_a_step_and_the_whole_head_give_the_same(base, every_kind, tmp_path):
    changed = {"mesh__data": 1, "mesh__fsdp": 8, "mesh__preset": "zero2", "kernel__implementation": "reference"}
    trainer.run(test_lora.config(base, **EVERY, **changed, train__max_steps=1, data__eval=""), tmp_path / "w")
    ours, theirs = lines_of(tmp_path / "w")[0], lines_of(every_kind)[0]
    for name in ("loss", "grad_norm"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


def test_the_state_is_counted_with_what_is_trained_whole(base):
    _, _, made = tiny.built(test_lora.config(base, mesh__data=1, mesh__fsdp=1, **EVERY))
    c, adapter = made.forward_fn.config, made.forward_fn.adapter
    trained = sum(entry.size for entry in params.trained_entries(c, adapter))
    frozen = sum(entry.size for entry in params.frozen_entries(c, adapter))
    assert made.state.gradient_bytes() == 4 * trained
    assert 0 <= made.state.bytes_on_device() - 4 * (3 * trained + frozen) < 64, "counters apart"
    assert frozen + trained == params.count(c) + sum(e.size for e in params.adapter_entries(c, adapter))
    done = flops.Work(100, 10, 7)
    plain = dataclasses.replace(adapter, saved=())
    more = flops.train_step(c, done, adapter=adapter) - flops.train_step(c, done, adapter=plain)
    assert more == 2 * c.width * c.vocab_size * 7, "the gradient of the head; that of the embedding is a sum of rows"
    assert not params.trains_head(c, plain) and params.trains_head(c, adapter)
