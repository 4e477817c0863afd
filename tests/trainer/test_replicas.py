"""Replicas along `data` add their gradients once a step: the same step as with one sum per micro-batch."""

import jax
import numpy as np
import pytest

from fpo_jax import data
from fpo_jax.plan import compilation
from fpo_jax.trainer import steps, train_step
from tests import tiny, tolerances


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    tiny.write_model(folder / "model", vocab_size=264)
    tiny.write_pairs(folder / "pairs.jsonl", count=32)
    return folder


def config(root, **changed):
    """Two replicas over four devices each."""
    options = {"mesh__data": 2, "mesh__fsdp": 4, "data__eval": "", "train__batch_size": 16}
    options |= {"optim__warmup_fraction": 0.0}
    return tiny.config(root / "model", root / "pairs.jsonl", **(options | changed))


def one_step(c):
    """State and metrics after the first step."""
    inputs, plan, made = tiny.built(c, devices=8)
    state = made.state.init(made.state.load(inputs.source))
    batch = train_step.stack_micro_batches(data.batch_at(plan.schedule, 0), accumulation=plan.accumulation)
    assert plan.accumulation > 1
    return jax.device_get(made.train(state, made.batches.place(batch, stacked=True)))


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"mesh__preset": "zero2", "model__remat": "full"},
        {"data__layout": "shared", "data__row_length": 64},
        {"loss__name": "kto", "loss__alpha": None, "loss__beta_pi": None},
        {"lora__rank": 2},
        {"stage": "reward", "loss__name": "bradley_terry", "loss__alpha": None, "loss__beta_pi": None},
    ],
    ids=str,
)
def test_the_step_is_the_one_without_replicas(root, changed, monkeypatch):
    state, metrics = one_step(config(root, **changed))
    monkeypatch.setattr(steps, "_replicas", lambda *_: None)
    expected_state, expected = one_step(config(root, **changed))
    assert metrics.keys() == expected.keys()
    for name, pair in metrics.items():
        np.testing.assert_allclose(pair, expected[name], err_msg=name, **tolerances.SAME_UPDATE)
    for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
        np.testing.assert_allclose(found, wanted, **tolerances.SAME_UPDATE)


def test_gradients_go_between_replicas_once_whatever_the_micro_batches(root):
    sent = {}
    for batch_size in (16, 32):
        outcome = compilation.compile_all(config(root, train__batch_size=batch_size), jax.devices(), limit=1)
        rows = [row for row in outcome.collectives if "data" in row.axes]
        sent[outcome.accumulation] = sum(row.payload for row in rows)
    assert list(sent) == [2, 4]
    assert outcome.gradients < sent[2] < sent[4] < 1.1 * outcome.gradients  # the rest are counts of tokens and groups
    assert sent[4] - sent[2] < 0.01 * outcome.gradients


def test_where_the_gradients_are_summed_is_said(root):
    once = "gradients: summed over data once a step"
    for changed, said in (
        ({}, [once]),
        ({"mesh__preset": "multi_gpu", "mesh__data": None, "mesh__fsdp": None}, [once]),
        (
            {"mesh__fsdp": 2, "mesh__tensor": 2},
            [once.replace("once a step", "after every micro-batch, as mesh.tensor is not 1")],
        ),
        ({"mesh__data": 1, "mesh__fsdp": 8}, []),
    ):
        _, _, made = tiny.built(config(root, **changed), devices=8)
        assert [choice for choice in made.choices if choice.startswith("gradients: ")] == said
