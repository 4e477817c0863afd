"""Every pipeline recipe from its base model to its report on tiny data, each in the format that it names."""

import importlib
import json

import pytest

from fpo_jax import data, hf
from fpo_jax.eval.pipeline import pipeline
from fpo_jax.io import jsonl
from tests import tiny
from tests.eval.test_imdb_pipeline import write_reviews
from tests.eval.test_pipeline import RECIPES

ELSEWHERE = {"hh_rw": "test_pipeline"}  # runs to its end there
ROW = 16  # rows of a file


def write_rows(root):
    """Write one file of each format that a recipe names."""
    texts = [(f"q{number}", f"yes {number}", f"no {number}") for number in range(ROW)]
    json_rows = [{"prompt": q, "chosen": f" {a}", "rejected": f" {b}"} for q, a, b in texts]
    opened = [(f"\n\nHuman: {q}?\n\nAssistant:", a, b) for q, a, b in texts]
    posts = [{"subreddit": "a", "title": "t", "post": q} for q, _, _ in texts]
    rows = {
        "json": json_rows,
        "hh": [{"chosen": f"{q} {a}", "rejected": f"{q} {b}"} for q, a, b in opened],
        "tldr": [
            {"info": post, "summaries": [{"text": b}, {"text": a}], "choice": 1}
            for post, (_, a, b) in zip(posts, texts, strict=True)
        ],
        "tldr_sft": [post | {"summary": a} for post, (_, a, _) in zip(posts, texts, strict=True)],
        "chat_pairs": [
            {
                name: [{"role": "user", "content": q}, {"role": "assistant", "content": answer}]
                for name, answer in (("chosen", a), ("rejected", b))
            }
            for q, a, b in texts
        ],
    }
    for name, lines in rows.items():
        jsonl.write(root / f"{name}.jsonl", lines)
    write_reviews(root / "imdb.jsonl", count=ROW, seed=0)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipes")
    tiny.write_model(root / "model", layers=1)
    tiny.write_model(root / "judge", layers=1, reward_head=True)
    write_rows(root)
    return root


def small(root, name, *arguments, **changed):
    """The recipe on tiny models, one step a stage, with the formats and losses that are its own."""
    c = importlib.import_module(f"fpo_jax.configs.pipelines.{name}").get_config(*arguments)
    c.base = str(root / "model")
    for section in (c.data, c.demonstrations, c.judgements):
        if section.format:
            section.train = section.eval = str(root / f"{section.format}.jsonl")
            section.train_split = section.eval_split = section.subfolder = ""
    c.data.max_length = 64
    if c.data.rule == "raw":
        c.data.max_completion_length = 12
    else:
        c.data.max_prompt_length, c.tokenizer.chat_template = 48, ""
    for section in (name for name in ("sft", "reward", "align") if name in c):
        c[section].model.update({"compute_dtype": "float32", "remat": "none"})
        c[section].train.update({"batch_size": 8, "micro_batch_per_device": 1, "eval_every": 1, "save_every": 1})
        c[section].train.max_steps = 1
        c[section].logging.tensorboard = False
    for section in (name for name in ("sample", "generate") if name in c):
        c[section].update({"max_new_tokens": 8, "batch_size": 4, "num_prompts": 8})
    c.generate.update({"num_prompts": 2, "num_return": 2})
    for key, value in changed.items():
        c[key] = value
    return c


def finished(root, c):
    """Run a recipe in the folder that all share: what two have in common is done once."""
    report = pipeline.Pipeline(c, root / "w").run()
    assert list(report) == ["start", *(f"{loss}-seed{c.seeds[0]}" for loss in c.losses)]
    assert all(one["prompts"] == 2 and one["answers"] == 4 for one in report.values())
    return report


def newest(root, stage):
    return max((root / "w").glob(f"{stage}-*"), key=lambda folder: folder.stat().st_mtime_ns)


def test_every_recipe_is_run_somewhere():
    assert sorted(RECIPES) == sorted([*ELSEWHERE, "hh_pref", "tldr_pref", "tldr_rw", "on_policy_ultrafeedback", "imdb"])


@pytest.mark.sampled(6)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["hh_pref", "tldr_pref", "tldr_rw"])
def test_recipes_of_pythia_end_in_a_report(root, name):
    c = small(root, name)
    finished(root, c)
    (align,) = [json.loads((newest(root, "align") / "run" / "config.json").read_text())]
    assert align["loss"]["name"] == c.losses[0]
    sampled = "sample" in c
    assert align["data"]["format"] == ("json" if sampled else c.data.format)
    if sampled:
        assert all(len(row.completions) == 4 for row in data.read(align["data"]["train"], format="json").rows)


@pytest.mark.slow
def test_on_policy_ultrafeedback_ends_in_a_report(root):
    """The model samples, a reward model ranks, the best and the worst are the pairs."""
    c = small(root, "on_policy_ultrafeedback", reward_model=str(root / "judge"))
    finished(root, c)
    lines = jsonl.read(newest(root, "label") / "train.jsonl")
    assert lines and all(set(line) >= {"chosen", "rejected", "rewards"} for line in lines)
    assert hf.read_config(newest(root, "align") / "model").family == "llama"


@pytest.mark.slow
def test_imdb_ends_in_a_report_with_pairs_and_without_keep_best(root):
    """As the recipe's docstring says; the oracle keeps no best step, so that its newest is exported."""
    c = small(root, "imdb", pairing="best_worst", losses=("exo-pref",), measure_kl=False)
    c.reward.train.keep_best = ""
    finished(root, c)
    assert hf.read_config(newest(root, "reward") / "model").reward_head
    assert {len(row.completions) for row in data.read(newest(root, "label") / "train.jsonl", format="json").rows} == {2}
