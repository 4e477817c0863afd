"""Rewards that a reward model cannot be trained on are refused at the start, by the first example."""

import json

import pytest

from fpo_jax.trainer import run_inputs
from tests import tiny

ONE = {"loss__name": "binary_cross_entropy", "data__group_size": 1}
PAIRS = {"loss__name": "bradley_terry", "data__group_size": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("labels")
    tiny.write_model(root / "model", layers=1)
    return root


def rewarded(path, best, *, other=-9.0):
    """Write a group a number, which the better of two completions has."""
    rows = [
        {"prompt": f"{i}?", "completions": [" a", " b"], "rewards": [other, reward]} for i, reward in enumerate(best)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepare(base, train, evaluation=None, **changed):
    options = {"stage": "reward", "loss__alpha": None, "loss__beta_pi": None, "data__eval": str(evaluation or "")}
    return run_inputs.prepare(tiny.config(base / "model", train, **options, **changed))


def test_labels_are_probabilities(base, tmp_path):
    sound = rewarded(tmp_path / "sound.jsonl", [1, 0, 0.25])
    assert prepare(base, sound, sound, **ONE).train.prepared.rewards_BK[:, 0].tolist() == [1, 0, 0.25]
    raw = rewarded(tmp_path / "raw.jsonl", [1, 0, 3.5, -2])
    message = r"raw.jsonl:3: the label 3.5 is outside \[0, 1\] \(2 of 4 are\), and loss 'binary_cross_entropy' takes"
    with pytest.raises(ValueError, match=f"data.train: .*{message}"):
        prepare(base, raw, **ONE)
    with pytest.raises(ValueError, match=f"data.eval: .*{message}"):
        prepare(base, sound, raw, **ONE)
    assert prepare(base, raw, **PAIRS).train.prepared.groups == 4  # a difference is all that counts there


def test_one_kind_of_label_teaches_nothing(base, tmp_path):
    alike = rewarded(tmp_path / "alike.jsonl", [1, 1, 1])
    sound = rewarded(tmp_path / "sound.jsonl", [1, 0, 1])
    with pytest.raises(
        ValueError, match=r"data.train: all 3 labels are 1, from .*alike.jsonl:1 on; give both kinds, or"
    ):
        prepare(base, alike, **ONE)
    assert prepare(base, sound, alike, **ONE).evaluation.prepared.groups == 3


def test_groups_without_a_preference_teach_a_reward_model_nothing(base, tmp_path):
    ties = rewarded(tmp_path / "ties.jsonl", [2, 2], other=2)
    with pytest.raises(
        ValueError, match=r"data.train: in none of 2 groups, from .*ties.jsonl:1 on, do the rewards differ"
    ):
        prepare(base, ties, **PAIRS)
