"""The quickstart: its task, its statistics, its stages, and one miniature run from nothing to the report."""

import collections
import importlib.util
import json
import math
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from absl import flags

from fpo_jax import checkpoint, losses, tokenization
from fpo_jax import config as configuration
from fpo_jax.cli import init, train
from fpo_jax.config import overrides
from fpo_jax.configs import quickstart as recipe
from fpo_jax.eval.pipeline.stages import StageError
from fpo_jax.eval.quickstart import (
    quickstart,
    quickstart_configs,
    quickstart_model,
    quickstart_report,
    quickstart_summary,
)
from fpo_jax.eval.quickstart import quickstart_task as task
from fpo_jax.eval.report import html
from fpo_jax.eval.stats import confidence_intervals
from fpo_jax.io import jsonl
from fpo_jax.models import params
from fpo_jax.perf import hardware
from fpo_jax.trainer import run_inputs, trainer
from tests import paths, tolerances

TINY = quickstart_configs.Scale(
    demonstrated_prompts=64,
    aligned_prompts=64,
    held_out_prompts=30,
    held_out_groups=20,
    pretraining_steps=5,
    alignment_steps=3,
    sampling_rows=32,
)


def prompts(count, seed=0):
    return task.make_prompts(train=count, held_out=1, random=np.random.default_rng(seed)).train


# --- the task


def test_only_the_sorted_digits_are_rewarded():
    for prompt in prompts(200):
        right = task.answer(prompt)
        assert collections.Counter(right) == collections.Counter(prompt[:-1])
        assert list(right) == sorted(right)
        assert task.reward(prompt, right) == 1.0
        for wrong in (right + "0", right[1:], right[::-1] + "9", "", right + ">", f" {right}", prompt):
            assert task.reward(prompt, wrong) == 0.0


def test_every_mistake_is_wrong_and_has_one_kind():
    for prompt in ["5555>", "10>2345>", *prompts(100)]:
        right = task.answer(prompt)
        seen = set()
        for name, results in task.MISTAKES.items():
            made = results(right)
            assert right not in made
            assert not made & seen
            assert {task.outcome(prompt, text) for text in made} <= {name}
            seen |= made
        assert task.outcome(prompt, right) == task.CORRECT
        assert task.outcome(prompt, right + right) == task.OTHER
    literal = {name: sorted(results("112")) for name, results in task.MISTAKES.items()}
    assert literal["two neighbours swapped"] == ["121"]
    assert literal["a digit left out"] == ["11", "12"]
    assert literal["a digit written twice"] == ["1112", "1122"]
    assert len(literal["a digit replaced"]) == 27


def test_demonstrations_err_at_the_stated_rate_in_all_kinds_evenly():
    count, rate, random = 4000, 0.5, np.random.default_rng(3)
    outcomes = collections.Counter(
        task.outcome(prompt, task.demonstrate(prompt, mistake_rate=rate, random=random)) for prompt in prompts(count)
    )
    wrong = count - outcomes[task.CORRECT]
    assert abs(wrong - count * rate) < 4 * math.sqrt(count * rate * (1 - rate))
    assert outcomes[task.OTHER] == 0
    for name in task.MISTAKES:  # a quarter of the mistakes each; four standard deviations
        assert abs(outcomes[name] - wrong / 4) < 4 * math.sqrt(wrong * 3 / 16)
    random = np.random.default_rng(0)
    for prompt in prompts(50):
        assert task.demonstrate(prompt, mistake_rate=0.0, random=random) == task.answer(prompt)
        assert task.demonstrate(prompt, mistake_rate=1.0, random=random) != task.answer(prompt)
    assert task.demonstrate("5555>", mistake_rate=1.0, random=random) != "5555"  # cannot be swapped


def test_prompts_are_distinct_and_held_out_answers_are_never_trained_on():
    made = task.make_prompts(train=3000, held_out=500, random=np.random.default_rng(1))
    assert (len(set(made.train)), len(set(made.held_out))) == (3000, 500)
    assert not {task.answer(prompt) for prompt in made.train} & {task.answer(prompt) for prompt in made.held_out}
    for prompt in made.train + made.held_out:
        assert re.fullmatch(rf"[0-9]{{{task.SHORTEST},{task.LONGEST}}}>", prompt)
    assert {len(prompt) - 1 for prompt in made.held_out} == set(range(task.SHORTEST, task.LONGEST + 1))


def test_the_task_is_a_function_of_the_seed():
    first, again, other = (
        task.make_prompts(train=30, held_out=7, random=np.random.default_rng(seed)) for seed in (5, 5, 6)
    )
    assert first == again
    assert not set(first.held_out) & set(other.held_out)


def test_too_many_prompts_are_refused():
    with pytest.raises(ValueError, match="25000 \\+ 1 prompts are more than 25000"):
        task.make_prompts(train=25_000, held_out=1, random=np.random.default_rng(0))


# --- the statistics


@pytest.mark.parametrize(("successes", "count"), [(0, 7), (3, 7), (7, 7), (591, 1000)])
def test_wilson_agrees_with_scipy(successes, count):
    expected = scipy.stats.binomtest(successes, count).proportion_ci(method="wilson")
    low, high = confidence_intervals.wilson(successes, count)
    np.testing.assert_allclose((low, high), expected, rtol=tolerances.INTERVAL, atol=tolerances.INTERVAL)
    assert 0 <= low <= successes / count <= high <= 1


def test_paired_difference_agrees_with_numpy():
    random = np.random.default_rng(0)
    before, after = random.random(50) < 0.4, random.random(50) < 0.7
    changes = after.astype(float) - before
    spread = 1.959963984540054 * changes.std(ddof=1) / math.sqrt(50)
    expected = (changes.mean(), changes.mean() - spread, changes.mean() + spread)
    np.testing.assert_allclose(
        confidence_intervals.paired_difference(before.tolist(), after.tolist()), expected, rtol=tolerances.INTERVAL
    )


def test_intervals_refuse_what_is_no_sample():
    with pytest.raises(ValueError, match="8 successes of 7 trials"):
        confidence_intervals.wilson(8, 7)
    with pytest.raises(ValueError, match="0 successes of 0 trials"):
        confidence_intervals.wilson(0, 0)
    with pytest.raises(ValueError, match="3 outcomes before and 2 after"):
        confidence_intervals.paired_difference([True] * 3, [True] * 2)


def test_answers_to_different_prompts_are_not_compared():
    row = {"prompt": "4321>", "completion": "1234", "outcome": task.CORRECT, "greedy": "1234"}
    with pytest.raises(ValueError, match="to different prompts"):
        quickstart_summary.compare([row, row], [row, row | {"prompt": "4320>"}])


# --- the page


def test_a_page_is_written_in_both_formats(tmp_path):
    (tmp_path / "p.png").write_bytes(b"PNG")
    blocks = [
        html.Heading("A & B", 1),
        html.Text("`x<y>` is **so**"),
        html.Table(["", "n"], [["a", "1"]]),
        html.Plot("p.png", "curve"),
        html.Code("run <it>"),
    ]
    assert html.markdown(blocks) == (
        "# A & B\n\n`x<y>` is **so**\n\n|  | n |\n| :-- | --: |\n| a | 1 |\n\n![curve](p.png)\n\n```\nrun <it>\n```\n"
    )
    text = html.html(blocks, tmp_path)
    for part in (
        "<title>A &amp; B</title>",
        "<p><code>x&lt;y&gt;</code> is <strong>so</strong></p>",
        "<tr><td>a</td><td>1</td></tr>",
        '<img alt="curve" src="data:image/png;base64,UE5H">',
        "<pre>run &lt;it&gt;</pre>",
    ):
        assert part in text


def test_nothing_that_a_page_shows_is_markup(tmp_path):
    """Texts of models and data, wherever they stand."""
    (tmp_path / "p.png").write_bytes(b"PNG")
    evil = """<script>alert("x")</script>&'{{ 7 * 7 }}"""
    blocks = [
        html.Heading(evil, 1),
        html.Text(evil),
        html.Table([evil, evil], [[evil, evil]]),
        html.Texts([evil], [[evil]]),
        html.Plot("p.png", evil),
        html.Code(evil),
    ]
    text = html.html(blocks, tmp_path)
    assert text.count("<script") == 0 and text.count("&lt;script&gt;") == 11 and text.count("{{ 7 * 7 }}") == 11


# --- the tokenizer and the configurations


def test_the_tokenizer_gives_the_rows_the_trainer_builds():
    tokenizer = quickstart_model.make_tokenizer(max_length=64)
    ids = tokenizer("9081>")["input_ids"]
    assert ids == [1, 13, 4, 12, 5, 14]
    assert tokenizer.decode(ids[1:]) == "9081>"
    ((row,),) = tokenization.raw_rows(
        tokenization.encoder(tokenizer), ["9081>"], [["0189"]], max_length=24, max_completion_length=12
    )
    assert row.ids == [*ids, 4, 5, 12, 13, tokenizer.eos_token_id]
    assert (row.prompt_length, row.merged) == (len(ids), False)


@pytest.mark.parametrize("name", [*losses.DIVERGENCES, "exo-rw", "dpo-rw"])
def test_every_divergence_can_be_asked_for(name):
    c = recipe.get_config(name)
    assert configuration.problems(c) == []
    loss = losses.resolve(c.loss.name, **configuration.loss_options(c))
    assert loss.options["target"] == "rewards"


def test_the_longest_answer_fits_the_window():
    c = recipe.get_config()
    longest = 1 + task.LONGEST + 1 + recipe.MAX_COMPLETION_LENGTH  # BOS, digits, ">", completion
    assert longest <= c.data.max_length <= quickstart_model.ARCHITECTURE.max_positions
    assert (
        recipe.MAX_COMPLETION_LENGTH > task.LONGEST + 2
    )  # a mistake's extra digit and EOS fit, an answer never fills it
    pretraining = recipe.pretraining()
    assert configuration.problems(pretraining) == []
    assert losses.resolve(pretraining.loss.name, **configuration.loss_options(pretraining)).name == "sft"


# --- the whole program, in miniature


def odd_length(prompt, completion):
    """A reward that five steps can earn; they are too few to sort."""
    return float(len(completion) % 2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished miniature quickstart: (workdir, summary)."""
    workdir = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "reward", odd_length)
        return workdir, quickstart.run(workdir, seed=3, divergence="alpha", scale=TINY)


@pytest.mark.slow  # 44 CPU-seconds for the fixture: two training runs of a few steps, each compiled for 8 devices
def test_every_artefact_is_there(finished):
    workdir, summary = finished
    c = quickstart_configs.alignment(workdir, seed=3, divergence="alpha", scale=TINY)
    for path in (c.model.path, c.data.train, c.data.eval):
        assert json.dumps(path)[1:-1].startswith(str(workdir))
    groups = jsonl.read(workdir / "data" / "groups.jsonl")
    assert len(groups) == TINY.aligned_prompts
    for group in groups:
        assert group["rewards"] == [odd_length(group["prompt"], text) for text in group["completions"]]
    demonstrations = jsonl.read(workdir / "data" / "demonstrations.jsonl")
    assert [group["prompt"] for group in groups] == [row["prompt"] for row in demonstrations[: len(groups)]]
    held_out = {row["prompt"] for row in jsonl.read(workdir / "data" / "held_out.jsonl")}
    assert not held_out & {row["prompt"] for row in demonstrations}
    for folder in ("start", "sft_model", "export-alpha"):
        names = {path.name for path in (workdir / folder).iterdir()}
        assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    for name in ("report.md", "report.html", "summary.json", "success.png", "alignment.png", "pretraining.png"):
        assert (workdir / "report" / name).stat().st_size > 0
    assert json.loads((workdir / "report" / "summary.json").read_text()) == json.loads(json.dumps(summary))


@pytest.mark.slow
def test_the_summary_has_its_fields_and_they_are_what_the_files_say(finished):
    workdir, summary = finished
    assert summary["seed"] == 3
    assert summary["divergence"] == "alpha"
    assert summary["loss"] | {"name": "alpha", "target": "rewards"} == summary["loss"]
    assert (summary["mistake_rate"], summary["candidates"], summary["temperature"]) == (0.5, 4, 1.0)
    assert summary["parameters"] == sum(
        array.size for array in params.flatten(quickstart_model.load(workdir / "start").weights).values()
    )
    correct = {}
    for moment in ("before", "after"):
        rows = jsonl.read(workdir / summary["paths"][moment])
        right = ["".join(sorted(row["prompt"][:-1])) for row in rows]
        correct[moment] = np.array([row["completion"] == text for row, text in zip(rows, right, strict=True)])
        found = summary["success"][moment]
        assert (found["correct"], found["count"]) == (correct[moment].sum(), TINY.held_out_prompts)
        assert found["rate"] == correct[moment].mean()
        assert found["low"] <= found["rate"] <= found["high"]
        assert found["greedy_rate"] == np.mean([row["greedy"] == text for row, text in zip(rows, right, strict=True)])
        assert sum(found["outcomes"].values()) == TINY.held_out_prompts
        assert sum(part["correct"] for part in found["by_digits"].values()) == found["correct"]
    change = 100 * (correct["after"].astype(float) - correct["before"]).mean()
    assert summary["difference"]["points"] == pytest.approx(change)
    names = ["task", "pretrain", "sample", "align-alpha", "export-alpha", "before", "after-alpha"]
    assert list(summary["stages"]) == names
    assert summary["seconds"] == pytest.approx(sum(stage["seconds"] for stage in summary["stages"].values()))
    assert summary["peak_rss_bytes"] == max(stage["peak_rss_bytes"] for stage in summary["stages"].values())
    assert any("train 1, eval 1, reference 1" in line for line in summary["stages"]["align-alpha"]["compiled"])


@pytest.mark.slow
def test_the_report_shows_the_numbers_of_the_files(finished):
    workdir, summary = finished
    text = (workdir / "report" / "report.md").read_text()
    before, after = (
        quickstart_summary.success(jsonl.read(workdir / summary["paths"][moment])) for moment in ("before", "after")
    )
    assert f"**{100 * before['rate']:.1f} % → {100 * after['rate']:.1f} %** of 30 held-out prompts" in text
    assert f"| correct | {before['correct']} of 30 | {after['correct']} of 30 |" in text
    held_out = [line for line in jsonl.read(workdir / "align-alpha" / "metrics.jsonl") if "eval_loss" in line]
    assert (held_out[0]["step"], held_out[-1]["step"]) == (0, TINY.alignment_steps)
    assert f"| loss | {held_out[0]['eval_loss']:.4f} | {held_out[-1]['eval_loss']:.4f} |" in text
    audit = json.loads((workdir / "align-alpha" / "audit.json").read_text())
    assert f"| groups kept | {audit['train']['groups']} | {audit['eval']['groups']} |" in text
    rows = jsonl.read(workdir / summary["paths"]["after"])
    assert all(f"| `{row['prompt']}` |" in text for row in rows[: quickstart_report.SAMPLES_SHOWN])
    page = (workdir / "report" / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert f"<strong>{100 * before['rate']:.1f} %" in page


@pytest.mark.slow
def test_finished_stages_are_not_done_again(finished, monkeypatch, capsys):
    workdir, summary = finished
    monkeypatch.setattr(trainer, "run", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(quickstart.sampler, "sample", lambda *_, **__: pytest.fail("sampled again"))
    other = workdir / "answers-after-other.jsonl"
    other.write_text((workdir / "answers-before.jsonl").read_text())
    again = quickstart.run(workdir, seed=3, divergence="alpha", scale=TINY)
    other.unlink()
    assert again.pop("after_by_divergence") == {
        "alpha": summary["success"]["after"],
        "other": summary["success"]["before"],
    }
    assert again == {key: value for key, value in summary.items() if key != "after_by_divergence"}
    assert capsys.readouterr().out.count("done before") == 7
    rate = 100 * summary["success"]["before"]["rate"]
    assert f"| other | {rate:.1f} % |" in (workdir / "report" / "report.md").read_text()


@pytest.mark.slow
def test_another_seed_is_refused_in_the_same_workdir(finished, capsys):
    workdir, _ = finished
    with pytest.raises(StageError, match=r"seed: 3 -> 4\nuse another --workdir"):
        quickstart.run(workdir, seed=4, divergence="alpha", scale=TINY)


@pytest.mark.slow
def test_the_training_command_of_the_report_gives_the_configuration_that_was_used(finished):
    workdir, _ = finished
    text = (workdir / "report" / "report.md").read_text()
    (command,) = re.findall(r"```\n(python train.py --config configs/quickstart.py:alpha .*?)\n```", text, re.DOTALL)
    words = shlex.split(command.replace("\\\n", " "))
    at = words.index("--config")
    words[at + 1] = str(paths.REPO / words[at + 1])
    values = overrides.flag_values(words[2:])
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    config = overrides.parse(values, words[2:], keys="", about=None)
    used = json.loads((workdir / "align-alpha" / "config.json").read_text())
    assert used.pop("resolved_loss")["name"] == "alpha"
    assert configuration.difference(json.loads(config.to_json()), used) == []


@pytest.mark.slow
def test_the_last_lines_are_commands_that_lead_to_own_data(finished, monkeypatch):
    workdir, summary = finished
    monkeypatch.chdir(workdir.parent)
    lines = quickstart_report.closing_lines(summary, workdir).split("\n")
    again, look, train_on = (shlex.split(line) for line in lines if line.startswith("  "))
    assert Path(again[0]).exists() and again[0] == look[0] == train_on[0], "the command of this environment"
    assert [command[1] for command in (again, look, train_on)] == ["quickstart", "init", "train"]
    assert workdir.name + "/data/groups.jsonl" in look, "below the current folder, without that"
    assert init.main(look[2:]) == 0
    config, options, _ = train._parse(train_on[2:])
    assert options.workdir == f"{workdir.name}/own"
    assert run_inputs.prepare(config).train.audit.groups > 0


@pytest.mark.slow
def test_the_export_is_the_checkpoint_and_the_start_is_another_model(finished):
    workdir, _ = finished
    trained, _ = checkpoint.restore_params(workdir / "align-alpha", None)
    exported = params.flatten(quickstart_model.load(workdir / "export-alpha").weights)
    before = params.flatten(quickstart_model.load(workdir / "sft_model").weights)
    for name, array in params.flatten(trained).items():
        np.testing.assert_array_equal(exported[name], array)
        assert np.any(np.asarray(before[name]) != array)


@pytest.mark.slow
@pytest.mark.parity
def test_transformers_reads_the_export_and_answers_the_same(finished):
    torch = pytest.importorskip("torch", reason="torch is absent: transformers cannot run a model here")
    transformers = pytest.importorskip("transformers")
    workdir, summary = finished
    theirs = transformers.AutoModelForCausalLM.from_pretrained(workdir / "export-alpha", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(workdir / "export-alpha")
    for row in jsonl.read(workdir / summary["paths"]["after"])[:4]:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        written = theirs.generate(ids, do_sample=False, temperature=None, max_new_tokens=recipe.MAX_COMPLETION_LENGTH)
        completion = [token for token in written[0, ids.shape[1] :].tolist() if token != tokenizer.eos_token_id]
        assert tokenizer.decode(completion) == row["greedy"]


@pytest.mark.slow
def test_before_and_after_differ_in_nothing_but_the_model(finished, tmp_path):
    workdir, _ = finished
    program = quickstart._Quickstart(workdir, 3, "alpha", TINY)
    program.answer(workdir / "sft_model", tmp_path / program.after.name)
    assert (tmp_path / program.after.name).read_bytes() == program.before.read_bytes()
    assert program.after.read_bytes() != program.before.read_bytes()


@pytest.mark.slow
def test_samples_without_a_preference_are_refused(finished, monkeypatch, tmp_path):
    workdir, _ = finished
    program = quickstart._Quickstart(tmp_path, 3, "alpha", TINY)
    program.sft_model, program.demonstrations = workdir / "sft_model", workdir / "data" / "demonstrations.jsonl"
    monkeypatch.setattr(task, "reward", lambda prompt, completion: 0.0)
    with pytest.raises(ValueError, match="in each of 64 groups all 4 completions have the same reward"):
        program.sample_groups()
    assert not program.groups.exists()


# --- bad input


def test_it_runs_on_the_devices_that_jax_finds_and_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quickstart, "run", lambda *_, **__: None)
    monkeypatch.setenv(hardware.MEMORY_VARIABLE, "0.5")
    monkeypatch.delenv(hardware.MEMORY_VARIABLE)
    assert quickstart.main(["--workdir", str(tmp_path / "w")]) == 0
    assert capsys.readouterr().out == "on 8 cpu device(s)\n"
    assert float(os.environ[hardware.MEMORY_VARIABLE]) == hardware.GPU_SHARE, "as fpo train has it"

    def none():
        raise ValueError("JAX_PLATFORMS=cuda names what JAX finds no device of.")

    monkeypatch.setattr(hardware, "require_devices", none)
    assert quickstart.main(["--workdir", str(tmp_path / "w")]) == 2
    assert capsys.readouterr().err == "quickstart: JAX_PLATFORMS=cuda names what JAX finds no device of.\n"


def test_bad_options_are_refused_before_anything_is_written(tmp_path, capsys, monkeypatch):
    workdir = tmp_path / "w"
    assert quickstart.main(["--workdir", str(workdir), "--divergence", "jeffries"]) == 2
    assert re.search(r"quickstart: unknown loss 'jeffries'; nearest: .*jeffreys", capsys.readouterr().err)
    assert quickstart.main(["--workdir", str(workdir), "--divergence", "simpo"]) == 2
    assert "contradicts 'simpo'" in capsys.readouterr().err
    assert quickstart.main(["--workdir", str(workdir), "--seed", "-1"]) == 2
    assert "--seed=-1 must lie in" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert quickstart.main(["--workdir", str(workdir)]) == 2
    assert "plots need matplotlib" in capsys.readouterr().err
    assert not workdir.exists()
