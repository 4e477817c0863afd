"""What one program writes, the next reads: every writer's file into every reader that takes its kind."""

import json
import shutil

import pytest

from fpo_jax import data
from fpo_jax.cli import generate, label
from fpo_jax.data import decontamination
from fpo_jax.eval.judge import winrate
from fpo_jax.eval.pipeline import pipeline
from fpo_jax.eval.stats import kl
from fpo_jax.io import jsonl
from tests import tiny

PROMPTS = ["one?", [{"role": "user", "content": "two!"}], "six:"]
NEW, SAMPLES = 3, 4


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every file that a program writes for another, really written where that takes no training."""
    root = tmp_path_factory.mktemp("handover")
    tiny.write_model(root / "policy", layers=1)
    tiny.write_model(root / "judge", layers=1, reward_head=True)
    rows = [{"prompt": prompt, "chosen": f" {number}", "rejected": " no"} for number, prompt in enumerate(PROMPTS)]
    jsonl.write(root / "prompts.jsonl", rows)
    drawn = {"model": str(root / "policy"), "data": str(root / "prompts.jsonl"), "rule": "chat", "max_length": 64}
    drawn |= {"num_return": SAMPLES, "max_new_tokens": NEW, "compute_dtype": "float32", "keep_ids": 1, "batch_size": 1}
    for seed in (0, 1):
        generate.run(generate.Options(out=root / f"generate{seed}.jsonl", seed=seed, **drawn))
    scoring = {"model": str(root / "judge"), "rule": "chat", "compute_dtype": "float32"}
    for name, pairing in (("label", ""), ("best_worst", "best_worst")):
        options = label.Options(data=root / "generate0.jsonl", out=root / f"{name}.jsonl", pairing=pairing, **scoring)
        label.run(options)
    pipeline.merge([root / "generate0.jsonl", root / "generate1.jsonl"], root / "merge.jsonl")
    options = kl.Options(
        policy=str(root / "policy"),
        reference=str(root / "policy"),
        data=root / "generate0.jsonl",
        out=root / "kl.jsonl",
    )
    kl.run(options)
    options = winrate.Options(
        candidate=root / "generate0.jsonl", baseline=str(root / "generate1.jsonl"), out=root / "winrate", answers=2,
        reward_model=str(root / "judge"), compute_dtype="float32",
    )  # fmt: skip
    winrate.run(options)
    for name in ("pairs", "scores", "verdicts"):
        shutil.copy(root / "winrate" / f"{name}.jsonl", root / f"winrate_{name}.jsonl")
    answers = [
        {"index": number, "prompt": prompt, "completion": " a", "finish": "stop", "tokens": 2, "reward": 0.5}
        for number, prompt in enumerate(PROMPTS)
    ]  # as fpo_jax/trainer/sample_completions.py writes them
    jsonl.write(root / "answers.jsonl", answers)
    return root


def records_of(path, format):
    return [(row.prompt, row.completions, list(row.rewards)) for row in data.read(path, format=format).rows]


GROUPS = ("label", "winrate_scores")  # that a reward model has scored
SEVERAL = ("generate0", "merge", "label", "kl", "winrate_pairs", "winrate_scores")  # completions a line
EVERY = (*SEVERAL, "best_worst", "winrate_verdicts", "answers", "prompts")


def test_a_merged_line_has_an_entry_for_each_of_its_completions(folder):
    parts, merged = [lines(folder / f"generate{seed}.jsonl") for seed in (0, 1)], lines(folder / "merge.jsonl")
    assert len(merged) == len(PROMPTS)
    for line, *both in zip(merged, *parts, strict=True):
        for key in ("completions", "finish", "tokens", "ids"):
            assert line[key] == both[0][key] + both[1][key] and len(line[key]) == 2 * SAMPLES


@pytest.mark.parametrize("name", EVERY)
def test_prompts_of_every_file(folder, name):
    """Format `prompts`, and the texts that decontamination compares with."""
    path = folder / f"{name}.jsonl"
    found = [row.prompt for row in data.read(path, format="prompts").rows]
    assert found == [line["prompt"] for line in lines(path)] and {json.dumps(p) for p in found} <= {
        json.dumps(p) for p in PROMPTS
    }
    plain = folder / f"{name}_plain.jsonl"
    jsonl.write(plain, (line for line in lines(path) if isinstance(line["prompt"], str)))
    assert set(decontamination.texts(f"{plain}=prompt")) <= {"one?", "six:"}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_are_trained_on(folder, name):
    found = lines(folder / f"{name}.jsonl")
    assert records_of(folder / f"{name}.jsonl", "json") == [
        (line["prompt"], line["completions"], line["rewards"]) for line in found
    ]
    assert len(found) in (len(PROMPTS), 2 * len(PROMPTS))


@pytest.mark.parametrize("name", ["best_worst", "prompts"])
def test_pairs_are_trained_on(folder, name):
    found = lines(folder / f"{name}.jsonl")
    pairs = [(line["prompt"], [line["chosen"], line["rejected"]], [1.0, 0.0]) for line in found]
    assert records_of(folder / f"{name}.jsonl", "json") == pairs and len(pairs) == len(PROMPTS)


@pytest.mark.parametrize(
    ("name", "column"), [("best_worst", "chosen"), ("prompts", "chosen"), ("answers", "completion")]
)
def test_demonstrations_are_trained_on(folder, name, column):
    found = lines(folder / f"{name}.jsonl")
    expected = [(line["prompt"], [line[column]], [1.0]) for line in found]
    assert records_of(folder / f"{name}.jsonl", "demonstrations") == expected and len(expected) == len(PROMPTS)


@pytest.mark.parametrize("name", SEVERAL)
def test_completions_are_scored(folder, name):
    path = folder / f"{name}.jsonl"
    found = label._lines(path)
    assert [(line["prompt"], line["completions"]) for line in found] == [
        (line["prompt"], line["completions"]) for line in jsonl.read(path)
    ]


@pytest.mark.parametrize("name", SEVERAL)
def test_completions_are_compared(folder, tmp_path, name):
    """As completion, as baseline, and with the pairs of the same prompts."""
    path = folder / f"{name}.jsonl"
    first = {json.dumps(line["prompt"]): line["completions"][0] for line in reversed(lines(path))}
    given = {"out": tmp_path, "reward_model": "m"}
    pairs, _ = winrate._pairs(winrate.Options(candidate=path, baseline=str(folder / "generate1.jsonl"), **given))
    assert {json.dumps(pair.prompt): pair.candidate for pair in reversed(pairs)} == first
    pairs, _ = winrate._pairs(winrate.Options(candidate=folder / "generate1.jsonl", baseline=str(path), **given))
    assert {json.dumps(pair.prompt): pair.baseline for pair in pairs} == first
    for pairs_file in ("best_worst", "prompts"):
        chosen = {json.dumps(line["prompt"]): line["chosen"] for line in lines(folder / f"{pairs_file}.jsonl")}
        options = winrate.Options(
            candidate=path, baseline=str(folder / f"{pairs_file}.jsonl"), baseline_format="json", **given
        )
        assert {json.dumps(pair.prompt): pair.baseline for pair in winrate._pairs(options)[0]} == chosen


@pytest.mark.parametrize("name", sorted(set(EVERY) - set(GROUPS) - {"best_worst", "prompts"}))
def test_what_nobody_scored_is_refused_as_preferences(folder, name):
    with pytest.raises(ValueError, match="missing or null: .*rewards|missing or null: chosen, rejected"):
        data.read(folder / f"{name}.jsonl", format="json")


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"generate0"}))
def test_only_samples_with_their_ids_have_a_divergence(folder, tmp_path, name):
    options = kl.Options(
        policy=str(folder / "policy"),
        reference=str(folder / "policy"),
        data=folder / f"{name}.jsonl",
        out=tmp_path / "o",
    )
    with pytest.raises(ValueError, match="job.json is missing|holds texts without token ids"):
        kl.run(options)
