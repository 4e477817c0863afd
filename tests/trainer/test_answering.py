"""Answers during training: what is written and measured, the best checkpoint by it, resumption, and refusals."""

import json
import shutil

import numpy as np
import pytest

from fpo_jax import checkpoint, losses
from fpo_jax.cli import generate
from fpo_jax.eval.report import report
from fpo_jax.io import jsonl
from fpo_jax.trainer import export, metric_logger, run_inputs, sample_completions
from tests import resuming, tiny
from tests.inference.test_rewarding import base, run  # noqa: F401  fixtures


@pytest.fixture(scope="module")
def judge(run, tmp_path_factory):  # noqa: F811
    """A reward model that prefers answers that end in an exclamation mark."""
    out = tmp_path_factory.mktemp("judge") / "rm"
    export.export(run, out, step="best", dtype=None)
    return out


def config(base, **changed):  # noqa: F811
    given = {
        "data__eval": str(base / "held_out.jsonl"),
        "train__max_steps": 6,
        "train__eval_every": 2,
        "train__batch_size": 4,
        "optim__learning_rate": 1e-2,
        "completions__count": 6,
        "completions__max_new_tokens": 5,
        "completions__batch_per_device": 8,
    }
    return tiny.config(base / "model", base / "train.jsonl", **(given | changed))


def numbers(workdir):
    lines = metric_logger.read(workdir / metric_logger.METRICS_FILE)
    return {line["step"]: line for line in lines if "eval_completions/length" in line}


@pytest.fixture(scope="module")
def trained(base, judge, tmp_path_factory):  # noqa: F811
    workdir = tmp_path_factory.mktemp("trained") / "w"
    resuming.whole(
        config(base, completions__reward_model=str(judge), train__keep_best="eval_completions/win_rate"), workdir
    )
    return workdir


def test_the_metrics_are_those_of_the_lines(trained):
    found = numbers(trained)
    assert list(found) == [0, 2, 4, 6] and found[0]["eval_completions/win_rate"] == 0.5
    start = sample_completions.read(trained / "completions", 0)
    for number, line in found.items():
        lines = sample_completions.read(trained / "completions", number)
        assert [one["prompt"] for one in lines] == [one["prompt"] for one in start] and len(lines) == 6
        rewards = np.array([one["reward"] for one in lines])
        first = np.array([one["reward"] for one in start])
        assert line["eval_completions/reward"] == pytest.approx(rewards.mean(), abs=1e-12)
        assert line["eval_completions/win_rate"] == (np.sum(rewards > first) + 0.5 * np.sum(rewards == first)) / 6
        assert line["eval_completions/length"] == np.mean([one["tokens"] for one in lines])
        assert line["eval_completions/ended"] == np.mean([one["finish"] == "stop" for one in lines])
    assert sample_completions.read(trained / "completions", 6) != start


def test_the_best_checkpoint_is_the_one_that_wins_most(trained):
    found = numbers(trained)
    _, meta = checkpoint.restore_params(trained, checkpoint.BEST)
    best = max(found[number]["eval_completions/win_rate"] for number in (2, 4, 6))
    assert found[meta["step"]]["eval_completions/win_rate"] == best


def test_the_answers_of_the_start_are_the_samplers(trained, base, tmp_path):  # noqa: F811
    prompts = [line["prompt"] for line in jsonl.read(base / "held_out.jsonl")][:6]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    given = {"max_new_tokens": 5, "temperature": 0.8, "seed": 42, "max_length": 40, "compute_dtype": "float32"}
    given["rule"] = "raw"
    options = generate.Options(
        out=tmp_path / "a.jsonl", data=str(tmp_path / "p.jsonl"), model=str(base / "model"), batch_size=1, **given
    )
    generate.run(options)
    ours = sample_completions.read(trained / "completions", 0)
    assert [[line["completion"]] for line in ours] == [line["completions"] for line in jsonl.read(options.out)]


def test_a_stopped_run_writes_the_same(base, judge, tmp_path, monkeypatch, trained):  # noqa: F811
    c = config(base, completions__reward_model=str(judge), train__keep_best="eval_completions/win_rate")
    resuming.stopped(c, tmp_path / "w", monkeypatch, after=3)
    assert resuming.outcome(tmp_path / "w") == resuming.outcome(trained)
    for number in (0, 2, 4, 6):
        name = f"completions/{number}.jsonl"
        assert (tmp_path / "w" / name).read_bytes() == (trained / name).read_bytes()


def test_answers_without_a_judge_and_without_evaluation_data_on_a_mesh(base, tmp_path):  # noqa: F811
    from fpo_jax.trainer import trainer

    (tmp_path / "p.jsonl").write_text('{"prompt": "a?"}\n{"prompt": "a?"}\n{"prompt": "b?"}\n')
    c = config(
        base, data__eval="", completions__prompts=str(tmp_path / "p.jsonl"), train__max_steps=1, train__batch_size=8
    )
    trainer.run(c, tmp_path / "w")
    assert [line["prompt"] for line in sample_completions.read(tmp_path / "w" / "completions", 1)] == ["a?", "b?"]
    assert set(numbers(tmp_path / "w")[1]) == {"step", "eval_completions/length", "eval_completions/ended"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"completions__count": 0}, "completions.max_new_tokens=5 is not used while completions.count is 0"),
        ({"data__eval": ""}, "completions.count=6 needs prompts; set completions.prompts or data.eval"),
        ({"lora__rank": 2}, "lora.rank=2 trains an adapter"),
        ({"completions__count": -1}, "completions.count=-1 must"),
        ({"completions__temperature": -1.0}, "completions.temperature=-1"),
    ],
)
def test_settings_that_are_refused(base, changed, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        run_inputs.check(config(base, **changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"completions__max_new_tokens": 40},
            "completions.max_new_tokens=40 leaves no room for a prompt in data.max_length=40",
        ),
        ({"completions__reward_model": "the base"}, "is a language model; give a reward model"),
        ({"completions__prompts": "nothing/here.jsonl"}, "no file or directory"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(base, tmp_path, changed, message):  # noqa: F811
    if "completions__reward_model" in changed:
        changed = {"completions__reward_model": str(base / "model")}
    with pytest.raises(ValueError, match=message):
        resuming.whole(config(base, **changed), tmp_path / "w")
    assert not (tmp_path / "w").exists()


# --- the report of the run


@pytest.fixture(scope="module")
def reported(trained, tmp_path_factory):
    out, judged = tmp_path_factory.mktemp("report"), tmp_path_factory.mktemp("judged")
    one = {"mean": 0.625, "low": 0.5, "high": 0.75}
    summary = {
        "candidate": "/somewhere/ours.jsonl", "baseline": "theirs.jsonl", "judge": {"model": "org/judge"}, "wins": 4,
        "ties": 2, "losses": 2, "failures": 1, "steering": {"candidate": 3, "baseline": 0}, "win_rate": one,
        "length_controlled_win_rate": one,
    }  # fmt: skip
    (judged / "summary.json").write_text(json.dumps(summary))
    report.run(report.Options(workdir=trained, out=str(out), winrate=(str(judged),), samples=2))
    return out


def test_the_page_has_what_the_files_say(trained, reported):
    text = (reported / "report.md").read_text()
    found = numbers(trained)
    first, last = (found[step]["eval_completions/reward"] for step in (0, 6))
    assert f"| completions/reward | {first:.4g} | {last:.4g} |" in text
    assert "| ours.jsonl against theirs.jsonl | judge | 62.5% (50.0%, 75.0%) |" in text and "4 / 2 / 2 / 1" in text
    assert "3 answers speak to the judge" in text and "| `completions.count` | `0` | `6` |" in text
    audit = json.loads((trained / "audit.json").read_text())
    assert f"| scored tokens | {audit['train']['scored_tokens']:,} | {audit['eval']['scored_tokens']:,} |" in text
    assert "a step, median" in text and "| prompt | step 0 | step 6 |" in text


def test_the_page_needs_no_other_file_and_no_model_s_text_is_markup(trained, tmp_path):
    import shutil

    shutil.copytree(trained, tmp_path / "w", ignore=shutil.ignore_patterns("checkpoints"))
    for number in (0, 6):
        path = tmp_path / "w" / "completions" / f"{number}.jsonl"
        lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        for line in lines:
            line["completion"] = "<script>alert(1)</script> | **bold** `code`\nnext"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report.run(report.Options(workdir=tmp_path / "w"))
    text = page.read_text()
    assert "<script" not in text and "&lt;script&gt;alert(1)&lt;/script&gt; | **bold** `code`\nnext" in text
    assert "src=" in text and all(part.startswith('"data:image/png;base64,') for part in text.split("src=")[1:])
    assert "&lt;script&gt;alert(1)&lt;/script&gt; \\| \\*\\*bold" in (page.parent / "report.md").read_text()


def test_the_model_card_shows_the_loss_with_every_option(trained, reported, tmp_path):
    resolved = json.loads((trained / "config.json").read_text())["resolved_loss"]
    for name in ("model_card.md", "report.md"):
        text = (reported / name).read_text()
        assert f"is `{resolved['name']}`, with a reference" in text and "## Loss" in text
        for key, value in resolved["options"].items():
            assert f"| `{key}` | `{value}` |" in text, (name, key)
        assert "(absent)" not in text
    (block, *_) = report._loss("sigmoid", None)[1:]
    assert "did not record" in block.text
    simpo = losses.described(losses.resolve("sigmoid"))
    assert "with no reference" in report._loss("sigmoid", simpo)[1].text
    assert "Not what TRL calls `sigmoid`: there DPO" in report._loss("sigmoid", simpo)[1].text


def test_the_model_card_names_no_path_of_this_machine(reported, base):  # noqa: F811
    card = (reported / "model_card.md").read_text()
    assert card.startswith('---\nlibrary_name: transformers\nbase_model: "model"\ntags:\n- "f-po"')
    assert str(base) not in card and "| `model.path` | (empty) | `model` |" in card and "win rate" in card


def test_what_is_no_run_is_refused(tmp_path, trained):
    with pytest.raises(ValueError, match="holds neither metrics.jsonl of a run nor stages.json of a pipeline"):
        report.run(report.Options(workdir=tmp_path))
    with pytest.raises(ValueError, match="summary.json is missing"):
        report.run(report.Options(workdir=trained, winrate=(str(tmp_path),)))


def test_an_export_may_carry_its_card(trained, reported, tmp_path):
    """That of the report where the run has one, else a short one."""
    export.export(trained, tmp_path / "bare", step=None, dtype=None)
    assert not (tmp_path / "bare" / "README.md").exists()
    export.export(trained, tmp_path / "short", step=None, dtype=None, card=True)
    card = (tmp_path / "short" / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: transformers\nbase_model: "model"\ntags:\n- "f-po"')
    assert "`model` after align with the loss `alpha`, β: `beta_pi` = 0.5; trained with fpo_jax" in card
    assert ", step 6.\n" in card and "@article{han2024fpo" in card and str(trained.parent) not in card
    shutil.copytree(trained, tmp_path / "w")
    shutil.copytree(reported, tmp_path / "w" / "report")
    export.export(tmp_path / "w", tmp_path / "long", step=None, dtype=None, card=True)
    assert (tmp_path / "long" / "README.md").read_text() == (reported / "model_card.md").read_text()
