"""Passes over whole sets, of evaluations and of the reference: their own rows, their own attention, their own model."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fpo_jax import attention, data, hf, models, types
from fpo_jax.data import group_packing
from fpo_jax.plan import compilation
from fpo_jax.trainer import metric_logger, reference_logprobs, run_inputs, run_schedule, run_summary, trainer
from tests import batches, tiny, tolerances

ONE = {"mesh__data": 1, "mesh__fsdp": 1, "train__max_steps": 1, "train__eval_every": 0}
GEMMA2 = {"sliding_window": 6, "attention_soft_cap": 20.0, "final_soft_cap": 15.0, "query_scale": 0.3, "layers": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("passes")
    tiny.write_model(path / "model", layers=1, max_positions=1024)
    tiny.write_pairs(path / "pairs.jsonl", count=32)
    long = {"prompt": "ab " * 150, "chosen": " f!", "rejected": " gh."}
    tiny.write_model(path / "worse", layers=1, seed=3, initializer_range=0.6)  # than the model, so that KTO's z > 0
    (path / "long.jsonl").write_text((path / "pairs.jsonl").read_text() + json.dumps(long) + "\n")
    return path


def run_config(root, **changed):
    return tiny.config(root / "model", root / "pairs.jsonl", **(ONE | changed))


def evaluated(workdir):
    """Numbers of the evaluations of a run."""
    return [line for line in metric_logger.read(workdir / metric_logger.METRICS_FILE) if "eval_loss" in line]


# --- rows and attention


def test_a_pass_with_longer_rows_has_an_attention_of_its_own(root):
    short = {"data__layout": "shared", "data__max_length": 512}
    _, _, usual = tiny.built(run_config(root, **short))
    assert [line.split()[1] for line in usual.choices if "attention" in line] == ["xla"]
    _, plan, made = tiny.built(run_config(root, **short, data__eval=str(root / "long.jsonl")))
    assert plan.schedule.buckets[-1] <= 384 < plan.evaluation.buckets[-1] == plan.references[1].buckets[-1]
    attends = {line.partition("attention: ")[0]: line for line in made.choices if "attention" in line}
    assert attends.keys() == {"", "evaluations: ", "reference pass: "}
    assert " xla " in attends[""] and all(" chunked " in attends[of] for of in attends if of), attends
    assert "rows of 512 positions, more than 384" in attends["evaluations: "]
    for kept, whole in ((usual, True), (made, False)):
        for program, first in (
            (kept.evaluate, kept.state.abstract_evaluated()),
            (kept.logprobs, kept.state.abstract_reference()),
        ):
            batch = kept.batches.abstract(2, group_size=2, length=512, scored=64, places=2)
            logits = "512x512xf32" in program.jitted.lower(first, batch).as_text()
            assert logits == whole, program.name  # all logits of a row at once, or blocks of them


def test_both_passes_over_a_set_measure_its_groups_once(root, monkeypatch):
    measured, measure = [], group_packing.sizes
    monkeypatch.setattr(group_packing, "sizes", lambda *of, **how: measured.append(of) or measure(*of, **how))
    inputs = run_inputs.prepare(run_config(root, data__layout="shared", reference__batch_per_device=3))
    plan = run_schedule.build(run_config(root, data__layout="shared", reference__batch_per_device=3), inputs, devices=1)
    assert len(measured) == 2  # train and eval
    assert plan.references[0].parts == plan.references[1].parts == 3 and plan.evaluation.parts == 1


def test_sets_whose_rows_have_room_for_other_numbers_of_groups_share_no_program(root, tmp_path):
    """The shapes of tokens and scored positions alone do not tell the batches of two sets apart."""
    config = run_config(root, data__layout="packed", data__row_length=256, data__eval=str(tmp_path / "other.jsonl"))
    for seed in range(1, 30):
        tiny.write_pairs(tmp_path / "other.jsonl", count=20, seed=seed)
        inputs = run_inputs.prepare(config)
        passes = run_schedule.build(config, inputs, devices=1).references
        shape, other = ((one.buckets, one.scored, one.rows.packing.places) for one in passes)
        if shape[:2] == other[:2] and shape[2] != other[2]:
            break
    else:
        pytest.fail("no such set among 29")
    trainer.run(config, tmp_path / "w", devices=jax.devices()[:1])
    config.data.layout, config.data.row_length = "padded", None
    trainer.run(config, tmp_path / "padded", devices=jax.devices()[:1])
    kept = [next((tmp_path / name / "reference").glob("eval-*.safetensors")) for name in ("w", "padded")]
    assert_allclose(*map(reference_logprobs.load, kept), rtol=tolerances.SHARED_RUN)


def test_rows_too_short_for_the_evaluation_data_are_told_before_the_workdir_is_taken(root, tmp_path):
    changed = {"data__layout": "shared", "data__row_length": 128, "data__max_length": 512}
    config = run_config(root, **changed, data__eval=str(root / "long.jsonl"))
    with pytest.raises(ValueError, match=r"^data.eval: data.row_length=128 is shorter than the longest group of 4\d\d"):
        trainer.run(config, tmp_path / "w", devices=jax.devices()[:1])
    assert not (tmp_path / "w").exists()


def test_a_plan_has_the_reference_pass_over_longer_evaluation_data_too(root):
    config = run_config(root, data__layout="shared", data__max_length=512)
    names = [program.name for program in compilation.compile_all(config, jax.devices()[:1]).programs]
    assert names == [compilation.TRAIN_STEP, compilation.EVALUATION, compilation.REFERENCE]
    config.data.eval = str(root / "long.jsonl")
    programs_ = {program.name: program for program in compilation.compile_all(config, jax.devices()[:1]).programs}
    assert programs_[compilation.REFERENCE_EVAL].temporaries > 2 * programs_[compilation.REFERENCE].temporaries


def test_a_mesh_that_does_not_divide_the_policy_is_no_fault_of_a_reference(root):
    config = run_config(root, mesh__tensor=2, stage="sft", loss__name="sft", data__group_size=1)
    config.loss.alpha = config.loss.beta_pi = None
    with pytest.raises(ValueError, match="^the mesh does not divide"):
        tiny.built(config, devices=2)


def test_rows_without_a_group_are_told_with_what_leaves_fewer(root):
    described = {}
    for per_device in (1, 2, 16):
        config = run_config(root, data__layout="shared", train__micro_batch_per_device=per_device)
        config.data.row_length, config.train.max_steps = 128, 4
        inputs = run_inputs.prepare(config)
        plan = run_schedule.build(config, inputs, devices=2)
        described[per_device] = run_summary.rows_in_words(config, plan, devices=2)
        used = np.mean([len(rows) for rows in plan.schedule.rows.groups])
        if per_device == 16:
            empty = f"; {1 - used / 32:.0%} of the rows hold no group, as they come in blocks of 32 (16 on each"
            assert f"{empty} of 2 devices): " in described[16], described
    assert "a smaller data.row_length makes more rows" in described[1], described
    (better,) = re.findall(r"micro_batch_per_device=(\d+) would leave about (\d+)%", described[16])
    smaller = described.get(int(better[0]), "")
    assert int(better[0]) < 16 and int(better[1]) < 40, described
    assert "hold no group" not in smaller or f"{better[1]}% of the rows" in smaller, described


# --- evaluations


def kto(root):
    return {"loss__name": "kto", "loss__alpha": None, "loss__beta_pi": 0.1, "reference__path": str(root / "worse")}


@pytest.mark.slow  # three runs
def test_an_evaluation_is_that_of_its_groups_whatever_batches_they_come_in(root, tmp_path):
    """KTO's loss reads a mean over the whole evaluation, which no batch knows."""
    changed = kto(root) | {"train__eval_groups": 21}
    runs = {
        "padded": {"train__eval_batch_per_device": 2},
        "shared": {"data__layout": "shared", "train__eval_batch_per_device": 3},
        "mesh": {"mesh__data": 2, "mesh__fsdp": 2, "train__eval_batch_per_device": 3},
    }
    found = {}
    for name, of in runs.items():
        trainer.run(
            run_config(root, **(changed | of)), tmp_path / name, devices=jax.devices()[: 4 if name == "mesh" else 1]
        )
        found[name] = evaluated(tmp_path / name)[-1]
    padded = found.pop("padded")
    assert padded["eval_reference_kl"] > tolerances.DIFFERENT
    for numbers in found.values():
        assert numbers.keys() == padded.keys()
        for key, value in padded.items():
            assert_allclose(numbers[key], value, rtol=tolerances.SHARED_RUN, atol=tolerances.SHARED_RUN, err_msg=key)


def test_groups_of_an_evaluation_are_spread_over_its_data(root):
    whole = run_inputs.prepare(run_config(root)).evaluation.prepared
    some = run_inputs.prepare(run_config(root, train__eval_groups=7)).evaluation.prepared
    expected = [number * whole.groups // 7 for number in range(7)]
    assert expected[:3] == [0, 4, 9] and expected[-1] > whole.groups - 6
    assert list(some.sources) == [whole.sources[group] for group in expected]
    assert_array_equal(some.rewards_BK, whole.rewards_BK[expected])
    for number, group in enumerate(expected):
        for k in range(2):
            assert_array_equal(some.row(2 * number + k)[0], whole.row(2 * group + k)[0])
            assert some.row(2 * number + k)[1] == whole.row(2 * group + k)[1]
    assert (
        run_inputs.prepare(run_config(root, train__eval_groups=99)).evaluation.prepared.fingerprint()
        == whole.fingerprint()
    )


def test_the_audit_is_that_of_the_groups_of_an_evaluation(root):
    changed = {"stage": "sft", "loss__name": "sft", "loss__alpha": None, "loss__beta_pi": None, "data__group_size": 1}
    found = run_inputs.prepare(run_config(root, **changed, data__packing=True, train__eval_groups=7)).evaluation
    assert (found.audit.groups, found.audit.left_out) == (7, 25)
    assert "32 rows read, 7 groups of 1 kept of 32, at equal distances," in found.audit.text()
    positions = found.prepared.groups * 40
    assert found.audit.packed.padding == 1 - found.prepared.lengths_N.sum() / positions
    assert found.audit.tokens == found.prepared.lengths_N.sum()


@pytest.mark.slow  # one run
def test_the_loss_of_an_evaluation_by_kto_is_its_equation(root, tmp_path):
    """λ_w (1 - σ(βΔ_w - z)) + λ_l (1 - σ(z - βΔ_l)), z = β max(0, mean Δ of the evaluation): arXiv 2402.01306."""
    config = run_config(root, **kto(root))
    inputs, plan, made = tiny.built(config)
    policy, other = made.state.load(root / "model"), made.state.load_reference(root / "worse")
    ratios = []
    for number in range(plan.evaluation.steps_per_epoch):
        batch = made.batches.place(data.batch_at(plan.evaluation, number), stacked=False)
        ratios.append(np.float64(made.logprobs(policy, batch)) - np.float64(made.logprobs(other, batch)))
    ratios_BK, best_BK = np.concatenate(ratios), np.asarray(inputs.evaluation.prepared.rewards_BK) > 0
    beta, rate = config.loss.beta_pi, lambda x: 1 / (1 + np.exp(-x))
    z = max(0.0, beta * ratios_BK.mean())
    win, lose = beta * ratios_BK[best_BK], beta * ratios_BK[~best_BK]
    expected = np.mean((1 - rate(win - z)) + (1 - rate(z - lose)))
    trainer.run(config, tmp_path / "w", devices=jax.devices()[:1])
    first = evaluated(tmp_path / "w")[0]
    assert z > tolerances.DIFFERENT
    assert_allclose(first["eval_loss"], expected, rtol=tolerances.SHARED_RUN)


# --- a reference of its own


def as_reference(folder, **changed):
    """A reference that no policy's check has seen."""
    tiny.write_model(folder, **({"layers": 1, "seed": 3} | changed))
    return {"reference__path": str(folder), "loss__name": "dpo", "loss__alpha": None}


REFUSED = {
    "window": ({"max_positions": 32}, {}, r"data.max_length=40 exceeds the model's window of 32 tokens \(.*other\)"),
    "vocabulary": ({"vocab_size": 40}, {}, r"reference.path: the data hold token \d+, and .*other has 40 embeddings"),
    "rope": (
        {"rope": models.Rope(type="dynamic", factor=2.0)},
        {"data__layout": "shared"},
        "the rotary frequencies of .*other depend on a row's length",
    ),
    "reward model": ({"reward_head": True}, {}, "reference.path: .*other is a reward model; give a language model"),
    "heads": ({"heads": 3, "kv_heads": 3}, {"mesh__tensor": 2}, "reference.path: 3 attention heads are not divisible"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_reference_that_cannot_score_the_rows_is_refused_before_anything_starts(root, tmp_path, case):
    described, changed, message = REFUSED[case]
    config = run_config(root, **(as_reference(tmp_path / "other", **described) | changed))
    with pytest.raises(ValueError, match=message):
        trainer.run(config, tmp_path / "w", devices=jax.devices()[: config.mesh.tensor or 1])
    assert not (tmp_path / "w").exists()


def test_damaged_weights_of_a_reference_are_told_before_anything_starts(root, tmp_path):
    config = run_config(root, **as_reference(tmp_path / "other"))
    (tmp_path / "other" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="^reference.path: .*other"):
        trainer.run(config, tmp_path / "w", devices=jax.devices()[:1])
    shutil.rmtree(tmp_path / "other")
    with pytest.raises(ValueError, match="^reference.path: .*other is not a directory"):
        trainer.run(config, tmp_path / "w", devices=jax.devices()[:1])
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_a_reference_of_another_family_scores_with_its_own_attention_and_head(root, tmp_path, layout):
    config = run_config(root, **as_reference(tmp_path / "other", family="gemma2", **GEMMA2), data__layout=layout)
    inputs, plan, made = tiny.built(config)
    attends = {line.partition("attention: ")[0]: line for line in made.choices if "attention" in line}
    assert " xla " in attends[""] and " chunked " in attends["reference pass: "], made.choices
    weights = made.state.load_reference(tmp_path / "other")
    scored = (
        (data.group_ids(plan.references[0], number), made.logprobs(weights, data.batch_at(plan.references[0], number)))
        for number in range(plan.references[0].steps_per_epoch)
    )
    found = reference_logprobs.compute(
        ((ids, np.asarray(logps)) for ids, logps in scored), groups=inputs.train.prepared.groups
    )
    in_blocks = attention.Selection("chunked", "for the test")
    alone = batches.forward_fn(hf.read_config(tmp_path / "other"), attention=in_blocks)
    for group in (0, 7):
        schedule = data.schedule(inputs.train.prepared, batch_size=1, buckets=(40,), seed=0, shuffle=False)
        expected = alone(weights, types.Batch(*data.batch_at(schedule, group))).sum_N
        assert_allclose(found[group], expected, rtol=tolerances.SHARED_RUN)


@pytest.mark.slow  # two starts of a run
def test_another_content_of_the_reference_is_refused_on_resumption(root, tmp_path):
    config = run_config(root, **as_reference(tmp_path / "other"), train__max_steps=2)
    trainer.run(config, tmp_path / "w", devices=jax.devices()[:1])
    shutil.rmtree(tmp_path / "other")
    as_reference(tmp_path / "other")
    trainer.run(config, tmp_path / "w", devices=jax.devices()[:1])  # the same content
    tiny.write_model(tmp_path / "other", layers=1, seed=4)
    with pytest.raises(ValueError, match=r"^reference changed since step 2 of"):
        trainer.run(config, tmp_path / "w", devices=jax.devices()[:1])
