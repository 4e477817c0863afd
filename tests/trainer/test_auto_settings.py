"""What a run settles for itself: layout, remat, micro-batch; by time and memory, recorded, and nothing else changed."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest

import fpo_jax
from fpo_jax import attention, models, plan, sharding
from fpo_jax.perf import hardware
from fpo_jax.trainer import auto_settings, run_inputs
from tests import tiny

AUTO = {"data__layout": "auto", "model__remat": "auto", "train__micro_batch_per_device": None}
DEVICE = hardware.Capacity(memory=2**40, flops=1e12, bandwidth=1e11, link=1e11, network=1e10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("auto")
    tiny.write_model(root / "model", layers=2)
    tiny.write_pairs(root / "pairs.jsonl", count=48)
    return root


def configured(folder, **changed):
    return tiny.config(folder / "model", folder / "pairs.jsonl", **(AUTO | {"train__batch_size": 16} | changed))


def settled(config, *, limit=2**40, capacity=DEVICE, devices=1):
    config = config.copy_and_resolve_references()
    config.mesh.data, config.mesh.fsdp = 1, devices
    inputs = run_inputs.prepare(config)
    layout = sharding.make_layout(**config.mesh, devices=jax.devices()[:devices])
    facts = auto_settings.measured(inputs, ways=devices)
    return auto_settings.settle(config, facts, layout, limit=limit, capacity=capacity), facts, layout


LAYOUTS = {
    "pairs": ({}, "shared", "a prompt stands once"),
    "one completion": ({"data__group_size": 1, "stage": "sft", "loss__name": "sft"}, "packed", "whole groups"),
    "packing": (
        {"data__group_size": 1, "stage": "sft", "loss__name": "sft", "data__packing": True}, "padded", "data.packing",
    ),
    "buckets": ({"data__buckets": (20, 40)}, "padded", "data.buckets"),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYOUTS)
def test_layout_follows_from_the_stage_and_what_was_asked_for(folder, case):
    changed, layout, reason = LAYOUTS[case]
    if changed.get("stage") == "sft":
        changed = changed | {"loss__alpha": None, "loss__beta_pi": None}
    found = settled(configured(folder, **changed))[0]
    assert found.config.data.layout == layout
    assert reason in found.choices[0] and found.choices[0].startswith(f"layout: {layout}; ")


def test_a_length_that_no_sequence_has_is_refused(folder):
    with pytest.raises(ValueError, match=r"data.row_length=64 is not used: data.layout=auto is padded here"):
        settled(configured(folder, data__row_length=64, data__buckets=(20, 40)))


def test_sequences_that_no_kernel_takes_are_padded_to_one_of_a_few_lengths(folder):
    """The frequencies of dynamic rope, and the kernels of a device that is not here."""
    config = configured(folder, data__max_length=1024)
    described = models.from_hf_config(json.loads((folder / "model" / "config.json").read_text()))
    dynamic = dataclasses.replace(described, rope=dataclasses.replace(described.rope, type="dynamic", factor=2.0))
    facts = auto_settings.Facts(None, dynamic, None, lambda config: 2048)
    layout, reason = auto_settings._layout(config, facts, sharding.ONE_DEVICE)
    assert layout == "padded" and "rotary frequencies" in reason
    assert auto_settings._buckets(1024) == (256, 512, 1024) and auto_settings._buckets(200) == (200,)


@pytest.mark.parametrize("lengths", [{"padded": True}, {"padded": True, "packed": True}, {}])
def test_flash_attention_comes_before_fewer_tokens(folder, monkeypatch, lengths):
    monkeypatch.setattr(
        auto_settings.forward,
        "attention_of",
        lambda config, *_: attention.Selection("splash" if config.data.layout in lengths else "chunked", ""),
    )
    facts = auto_settings.Facts(None, run_inputs.prepare(configured(folder)).model_config, None, lambda config: 99)
    found, _ = auto_settings._layout(configured(folder), facts, sharding.ONE_DEVICE)
    assert found == ("packed" if "packed" in lengths else "padded" if lengths else "shared")


def test_the_fastest_is_taken_and_less_memory_takes_a_slower_one(folder):
    found, _, _ = settled(configured(folder))
    times = [one.seconds for one in found.candidates]
    assert times[0] <= 1.01 * min(times) and times[1:] == sorted(times[1:])
    assert found.config.model.remat == found.candidates[0].remat
    assert found.config.train.micro_batch_per_device == found.candidates[0].micro_batch
    assert "next best: " in found.choices[-1]
    most = max(one.needed for one in found.candidates)
    for share in (0.9, 0.6, 0.4):
        tight, _, _ = settled(configured(folder), limit=round(share * most / auto_settings._NEAR))
        assert tight.candidates[0].needed <= share * most


def test_what_comes_near_the_limit_is_compiled(folder):
    found, facts, layout = settled(configured(folder))
    limit = round(found.candidates[0].needed / 0.9)
    near, _, _ = settled(configured(folder), limit=limit)
    chosen = near.candidates[0]
    if chosen.peak is None:  # all that was compiled did not fit
        assert chosen.needed < auto_settings._NEAR * limit
    config = near.config.copy_and_resolve_references()
    search = auto_settings._Search(configured(folder, data__layout="shared"), facts, layout, limit, DEVICE)
    list(search._candidates())
    for one in found.candidates[:2]:
        assert search._peak(one) >= one.needed  # from below
    outcome = plan.compilation.compile_all(config, jax.devices()[:1])
    assert outcome.programs[0].peak == search._peak(chosen)


@pytest.mark.parametrize("peaks", [(9, 9, 5), (5,), (9,) * 99])
def test_search_among_those_near_the_limit(folder, monkeypatch, peaks):
    """Of steps that all need 4, on a device that holds 5: what the compiler says is believed."""
    search = auto_settings._Search(configured(folder), settled(configured(folder))[1], sharding.ONE_DEVICE, 5, DEVICE)
    of_micro_batch = [
        10 ** (len(peaks) - number) for number in range(len(peaks))
    ]  # so that none rules out the next one
    candidates = [auto_settings.Candidate("none", size, 1.0, 4) for size in of_micro_batch]
    asked = []
    monkeypatch.setattr(search, "_peak", lambda one: asked.append(one) or peaks[len(asked) - 1])
    chosen = search._first_that_fits(candidates, 5)
    if len(peaks) == 1:
        assert chosen == candidates[0] and not asked, "there is no choice"
    elif peaks[-1] == 5:
        assert chosen == candidates[2]._replace(peak=5)
    else:
        assert len(asked) == auto_settings._COMPILATIONS and chosen == candidates[0]


def test_a_setting_that_is_given_stays(folder):
    found = settled(configured(folder, model__remat="full"))[0]
    assert {one.remat for one in found.candidates} == {"full"} and len(found.candidates) > 1
    found = settled(configured(folder, train__micro_batch_per_device=2))[0]
    assert {one.micro_batch for one in found.candidates} == {2} and len(found.candidates) == 4
    found = settled(configured(folder, model__remat="dots", train__micro_batch_per_device=2))[0]
    assert found.candidates == [] and found.config.train.micro_batch_per_device == 2


def test_kept_bytes_are_those_of_the_layers(folder):
    described = models.from_hf_config(json.loads((folder / "model" / "config.json").read_text()))
    kept = {
        remat: auto_settings._residual_bytes(described, None, remat, "float32", False, 512, "chunked")
        for remat in ("none", "dots_and_attention", "dots", "full")
    }
    assert sorted(kept.values(), reverse=True) == list(kept.values())
    inputs = 4 * described.layers * 512 * described.width
    outside = 4 * 4 * 512 * described.width  # what embedding and final norm keep
    assert inputs <= kept["full"] < inputs + outside
    of_attention = 4 * described.layers * 512 * described.heads * (described.head_dim + 1)  # its result, log-sum-exp
    assert kept["dots_and_attention"] - kept["dots"] == of_attention


def test_the_groups_of_every_step_are_the_same_and_so_are_its_losses(folder, tmp_path):
    lines = {}
    for name, changed in {"auto": {}, "padded": {"data__layout": "padded", "train__micro_batch_per_device": 2}}.items():
        config = configured(folder, train__max_steps=3, train__eval_every=0, **changed)
        config.mesh.data, config.mesh.fsdp = 1, 2
        trainer = fpo_jax.Trainer(config, tmp_path / name, devices=jax.devices()[:2])
        trainer.train()
        lines[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        groups = [
            sorted(
                group for group in fpo_jax.data.group_ids(trainer._run.schedule.schedule, step).tolist() if group >= 0
            )
            for step in range(3)
        ]
        lines[name + " groups"] = groups
    assert lines["auto groups"] == lines["padded groups"]
    losses = [[line["loss"] for line in lines[name] if "loss" in line] for name in ("auto", "padded")]
    assert len(losses[0]) == 3
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_what_was_settled_is_recorded_and_another_value_is_said(folder, tmp_path, caplog):
    config = configured(folder, train__max_steps=1, train__eval_every=0, data__eval="")
    config.mesh.data, config.mesh.fsdp = 1, 1
    fpo_jax.Trainer(config, tmp_path / "run", devices=jax.devices()[:1]).train()
    path = tmp_path / "run" / "config.json"
    recorded = json.loads(path.read_text())
    assert recorded["data"]["layout"] == recorded["model"]["remat"] == "auto"
    assert set(recorded["settled"]) == set(auto_settings.FIELDS)
    assert recorded["settled"]["data.layout"] == "shared"
    recorded["settled"]["train.micro_batch_per_device"] += 1
    path.write_text(json.dumps(recorded))
    with caplog.at_level(logging.INFO, "fpo_jax"):
        fpo_jax.Trainer(config, tmp_path / "run", devices=jax.devices()[:1]).train()
    said = [record.getMessage() for record in caplog.records]
    assert any("train.micro_batch_per_device: " in line and "both automatic" in line for line in said)
