"""Drop-out that a config.json names is not built: training refuses it by name, or leaves it out and says so."""

import json

import pytest

from fpo_jax import config as configuration
from fpo_jax import hf, models
from fpo_jax.trainer import run_inputs
from tests import tiny

GPT2 = {"family": "gpt2", "kv_heads": 4, "head_dim": 4, "activation": "gelu_new", "tied_head": True}
NEOX = {"family": "gpt_neox", "kv_heads": 4, "head_dim": 4, "activation": "gelu"}


@pytest.fixture
def folder(tmp_path):
    """Write a tiny model whose config.json has these keys changed (None: absent)."""

    def write(changed, **options):
        tiny.write_model(tmp_path / "model", **({"layers": 1} | options))
        path = tmp_path / "model" / "config.json"
        keys = json.loads(path.read_text()) | changed
        absent = {key for key, value in changed.items() if value is None}
        path.write_text(json.dumps({key: value for key, value in keys.items() if key not in absent}))
        return tmp_path / "model"

    return write


def run_config(source, **changed):
    return tiny.config(source, tiny.write_pairs(source.parent / "pairs.jsonl", count=8), **changed)


@pytest.mark.parametrize(
    ("options", "changed", "named"),
    [
        (GPT2, {"embd_pdrop": 0.1, "resid_pdrop": 0.2, "attn_pdrop": 0}, "embd_pdrop=0.1, resid_pdrop=0.2"),
        (
            GPT2,
            {"embd_pdrop": None, "resid_pdrop": None, "attn_pdrop": None},
            "embd_pdrop=0.1, resid_pdrop=0.1, attn_pdrop=0.1",
        ),
        (NEOX, {"attention_dropout": 0.1, "hidden_dropout": 0.3}, "attention_dropout=0.1, hidden_dropout=0.3"),
        ({}, {"attention_dropout": 0.05}, "attention_dropout=0.05"),
        ({"family": "mistral", "sliding_window": 8}, {"attention_dropout": 0.05}, "attention_dropout=0.05"),
        ({"family": "qwen2"}, {"attention_dropout": 0.05}, "attention_dropout=0.05"),
        ({"family": "qwen3"}, {"attention_dropout": 0.05}, "attention_dropout=0.05"),
        ({"family": "gemma2", "layers": 2}, {"attention_dropout": 0.05}, "attention_dropout=0.05"),
    ],
    ids=["gpt2", "gpt2 by default", "neox", "llama", "mistral", "qwen2", "qwen3", "gemma2"],
)
def test_training_refuses_by_name_or_leaves_it_out(folder, options, changed, named):
    source = folder(changed, **options)
    for stage in configuration.fields.STAGES:
        with pytest.raises(
            ValueError, match=rf"names drop-out \({named}\), and nothing is dropped .*model.dropout=off"
        ):
            run_inputs.read_model(run_config(source, stage=stage), source)
        found = run_inputs.read_model(run_config(source, stage=stage, model__dropout="off"), source)
        assert ", ".join(f"{key}={share:g}" for key, share in found.dropout) == named
    assert run_inputs.read_reference(run_config(source), source).dropout  # a reference never drops
    assert models.from_hf_config(models.to_hf_config(hf.read_config(source))) == hf.read_config(source)


@pytest.mark.parametrize("stage", ["align", "reward"])
def test_the_first_lines_say_what_is_left_out(folder, stage):
    options = {"model__dropout": "off", "mesh__fsdp": 1, "mesh__data": 1}
    if stage == "reward":
        options |= {"stage": stage, "loss__name": "bradley_terry", "loss__alpha": None, "loss__beta_pi": None}
    source = folder({"attn_pdrop": 0.25}, **GPT2)
    line = "drop-out: none, by model.dropout=off; config.json names attn_pdrop=0.25"
    assert line in tiny.built(run_config(source, **options))[2].choices
    source = folder({}, **GPT2)
    assert not any("drop-out" in choice for choice in tiny.built(run_config(source, **options))[2].choices)


def test_a_model_born_here_names_none_and_unknown_kinds_pass(folder):
    """The default of GPT-2's keys is 0.1, so that a config.json must say 0; classifiers of tokens are none of ours."""
    keys = json.loads((folder({}, **GPT2) / "config.json").read_text())
    assert {keys[name] for name in ("embd_pdrop", "resid_pdrop", "attn_pdrop")} == {0.0}
    others = {"summary_first_dropout": 0.1, "classifier_dropout": 0.1, "attention_dropout": None}
    assert models.from_hf_config(keys | others).dropout == ()


def test_a_run_goes_on_whatever_it_says_of_drop_out():
    assert "model.dropout" in configuration.RESUMABLE
