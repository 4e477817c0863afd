"""The IMDB track end to end on a tiny GPT-2: reviews in, an oracle, an alignment, its reward against its divergence."""

import json

import numpy as np
import pytest

from fpo_jax import hf
from fpo_jax.configs.pipelines import imdb
from fpo_jax.eval.pipeline import pipeline
from fpo_jax.eval.stats import kl
from fpo_jax.io import jsonl
from tests import tiny


def write_reviews(path, *, count, seed):
    """Rows in the schema of the hub's set, sorted by label as there."""
    random, words = np.random.default_rng(seed), {0: ["bad", "dull"], 1: ["good", "fine"]}
    rows = [
        {"text": f"film {index:02}, {' '.join(random.choice(words[label], 4))}<br /><br />{label}", "label": label}
        for label in (0, 1)
        for index in range(count // 2)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The recipe with two steps a stage; the oracle has reviews of its own, of the fine-tuning's none."""
    root = tmp_path_factory.mktemp("imdb")
    tiny.write_model(
        root / "model", family="gpt2", layers=1, kv_heads=4, head_dim=4, activation="gelu_new", tied_head=True
    )
    for name, seed in (("train", 0), ("eval", 1), ("oracle", 2)):
        write_reviews(root / f"{name}.jsonl", count=16, seed=seed)
    c = imdb.get_config("exo-rw")
    c.base = str(root / "model")
    c.data.update({"train": str(root / "train.jsonl"), "eval": str(root / "eval.jsonl")})
    c.data.update({"train_split": "", "eval_split": "", "max_length": 40})
    c.data.max_completion_length = 16
    c.judgements.update({"format": "imdb", "train": str(root / "oracle.jsonl"), "eval": str(root / "eval.jsonl")})
    for section in ("sft", "reward", "align"):
        c[section].model.update({"compute_dtype": "float32", "remat": "none"})
        c[section].optim.learning_rate = 1e-2
        c[section].train.update({"batch_size": 8, "micro_batch_per_device": 1, "eval_every": 2, "save_every": 2})
        c[section].train.max_steps = 2
        c[section].logging.tensorboard = False
    c.sample.update({"max_new_tokens": 8, "batch_size": 4})
    c.generate.update({"max_new_tokens": 8, "num_prompts": 4, "num_return": 2, "batch_size": 4})
    return root, pipeline.Pipeline(c, root / "w").run()


@pytest.mark.slow  # three trainings, each with its compilations
def test_the_track_ends_in_a_reward_and_a_divergence(finished, capsys):
    root, report = finished
    (name,) = set(report) - {"start"}
    assert name == "exo-rw-seed1234" and "kl" not in report["start"]
    (measured,) = (root / "w").glob("kl-*/kl.jsonl")
    found = kl.summary(measured)
    assert report[name]["kl"] == {"mean": found.mean, "low": found.low, "high": found.high}
    assert (found.prompts, found.samples) == (4, 8) and found.mean != 0.0
    row = f"| {found.mean:.3f} ({found.low:.3f}, {found.high:.3f}) |"
    assert row in (root / "w" / "report" / "table.md").read_text() and "KL from start" in pipeline_table(report)


def pipeline_table(report):
    return pipeline.pipeline_report.table(report)


@pytest.mark.slow
def test_the_oracle_learns_from_its_own_reviews_and_scores_prompts_of_ten_tokens(finished):
    root, _ = finished
    (oracle,) = (root / "w").glob("reward-*")
    settings = json.loads((oracle / "run" / "config.json").read_text())
    assert (settings["data"]["train"], settings["loss"]["name"]) == (str(root / "oracle.jsonl"), "binary_cross_entropy")
    assert hf.read_config(oracle / "model").reward_head and hf.read_config(oracle / "model").family == "gpt2"
    lines = [json.loads(line) for line in (oracle / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_rewards/accuracies" in line for line in lines)
    (labelled,) = (root / "w").glob("label-*/train.jsonl")
    rows = jsonl.read(labelled)
    assert len(rows) == 16 and all(len(row["prompt"].encode()) == 10 and len(row["rewards"]) == 2 for row in rows)
