"""A best checkpoint is told by a metric that the run's evaluations write and that has a better and a worse."""

import math
import types

import numpy as np
import pytest

from fpo_jax import config, losses
from fpo_jax.trainer import best_checkpoint, metrics, run_inputs

WITH_ANSWERS = {"completions.count": 3, "completions.prompts": "p"}
OF_SCORES = {"stage": "reward"}


def configured(changed):
    c = config.default()
    c.model.path, c.data.train, c.data.eval = "model", "train.jsonl", "eval.jsonl"
    for path, value in changed.items():
        parent, _, last = path.rpartition(".")
        (c[parent] if parent else c)[last] = value
    return c


def written(c, loss):
    """The names of what an evaluation observes, from the functions that observe it."""
    size = c.data.group_size
    shape = (2, size)
    rewards_BK = np.arange(2 * size, dtype=np.float32).reshape(shape) % 3
    batch = types.SimpleNamespace(weight_B=np.ones(2, np.float32), segments=None, slots_NR=None)
    completion = types.SimpleNamespace(mean_logit_N=np.ones(2 * size, np.float32))
    ones_BK = np.ones(shape, np.float32)
    completions = losses.Completions(-ones_BK, -ones_BK, ones_BK, rewards_BK, np.float32(0))
    found = {"loss", *metrics.pairs(batch, completion, completions, np.ones(2, np.float32), loss)}
    if c.stage == "sft":  # evaluator.py adds it
        found.add("perplexity")
    return {f"eval_{name}" for name in found}


@pytest.mark.parametrize(
    "changed",
    [
        {"loss.name": "dpo"},
        {"loss.name": "dpo-pref"},  # hard labels: no KL to them
        {"loss.name": "alphapo-rw", "loss.alpha": 0.1, "data.group_size": 4},
        {"loss.name": "sigmoid"},
        {"loss.name": "orpo"},
        {"loss.name": "kto"},
        {"loss.name": "sft"},
        {"loss.name": "sft", "stage": "sft", "data.group_size": 1},
        {"loss.name": "bradley_terry", **OF_SCORES},
        {"loss.name": "binary_cross_entropy", "data.group_size": 1, **OF_SCORES},
    ],
    ids=lambda changed: "-".join(str(value) for value in changed.values()),
)
def test_the_names_are_those_that_an_evaluation_writes(changed):
    c = configured(changed)
    loss = losses.resolve(c.loss.name, **config.loss_options(c))
    assert set(best_checkpoint.names(c, loss)) == written(c, loss)
    assert set(best_checkpoint.names(c, loss)) <= {*best_checkpoint.DIRECTIONS, *best_checkpoint.UNDIRECTED}


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        (
            "eval_completions/length",
            WITH_ANSWERS,
            "is neither better for being more nor for being less; choose from eval_l",
        ),
        ("eval_completions/ended", WITH_ANSWERS, "is neither"),
        ("eval_reference_kl", {}, "is neither"),
        ("eval_rewards/rejected", {}, "is neither"),
        ("eval_lengths/chosen", {}, "is neither"),
        ("eval_completions/win_rate", WITH_ANSWERS, "is no metric of this run; choose from eval_loss, "),
        ("eval_perplexity", {}, "is no metric of this run; choose from eval_loss, eval_sft_loss, eval_f_divergence,"),
        (
            "eval_rewards/accuracies",
            {"loss.name": "sft", "stage": "sft", "data.group_size": 1},
            "choose from eval_loss, eval_sft_loss, eval_perplexity.",
        ),
        ("eval_group_kl", {"loss.name": "dpo-pref"}, "is no metric of this run"),
        (
            "eval_rewards/chosen",
            {"loss.name": "bradley_terry", **OF_SCORES},
            "choose from eval_loss, eval_rewards/accuracies, eval_rewards/margins.",
        ),
        ("eval_accuracy", {}, "is no metric of this run"),
    ],
)
def test_what_tells_no_best_checkpoint_is_refused_with_what_does(name, changed, message):
    c = configured({"loss.name": "dpo", **changed, "train.keep_best": name})
    with pytest.raises(ValueError, match="1 problem:") as raised:
        run_inputs.check(c)
    assert f"train.keep_best={name!r} is n" in str(raised.value) and message in str(raised.value)


@pytest.mark.parametrize(
    ("name", "better", "worse"),
    [
        ("eval_loss", 0.5, 0.7),
        ("eval_perplexity", 3.0, 9.0),
        ("eval_group_kl", 0.1, 0.2),
        ("eval_rewards/accuracies", 0.9, 0.6),
        ("eval_completions/win_rate", 0.7, 0.5),
    ],
)
def test_the_better_number_has_the_higher_score(name, better, worse):
    c = configured({"train.keep_best": name})
    scores = [best_checkpoint.score(c, {name: number}) for number in (better, worse)]
    assert scores[0] > scores[1] > -math.inf
