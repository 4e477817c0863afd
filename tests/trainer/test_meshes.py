"""The same run on every mesh and with every way to save memory: equal losses over twenty steps."""

import jax
import numpy as np
import pytest

from fpo_jax import checkpoint
from fpo_jax.trainer import metric_logger, trainer
from tests import tiny, tolerances

STEPS = 20
MESHES = {
    "fsdp": {"optim__offload": True, "model__remat": "full"},
    "fsdp x tensor": {"mesh__fsdp": 2, "mesh__tensor": 4, "model__remat": "dots"},  # 2 key/value heads
    "data x fsdp x tensor": {"mesh__data": 2, "mesh__tensor": 2, "model__remat": "offload"},
    "zero2 x tensor": {"mesh__preset": "zero2", "mesh__tensor": 2},
    "multi_gpu": {"mesh__preset": "multi_gpu"},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("meshes")
    tiny.write_model(root / "model", vocab_size=264)
    tiny.write_pairs(root / "pairs.jsonl", count=32)
    return root


def config(inputs, **changed):
    """Twenty steps of eight pairs in rows of 40 positions, which eight devices divide."""
    options = {"mesh__data": None, "mesh__fsdp": None, "data__eval": "", "train__epochs": STEPS * 8 / 32}
    options |= {"train__save_every": STEPS, "train__batch_size": 8}
    return tiny.config(inputs / "model", inputs / "pairs.jsonl", **(options | changed))


def trained(c, workdir, devices=None):
    """Losses [20] and the final parameters."""
    trainer.run(c, workdir, devices=devices)
    lines = metric_logger.read(workdir / metric_logger.METRICS_FILE)
    weights, _ = checkpoint.restore_params(workdir, None)
    return np.array([line["loss"] for line in lines]), jax.tree.map(np.asarray, weights)


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    return trained(config(inputs), tmp_path_factory.mktemp("alone"), jax.devices()[:1])


@pytest.mark.sampled(4)
@pytest.mark.slow  # compiles for eight devices
@pytest.mark.parametrize("name", MESHES)
def test_twenty_updates_are_those_of_one_device(inputs, alone, tmp_path, name):
    losses, weights = trained(config(inputs, **MESHES[name]), tmp_path)
    assert len(losses) == STEPS and losses[-1] < losses[0]
    np.testing.assert_allclose(losses, alone[0], rtol=0, atol=tolerances.TRAJECTORY_LOSS)
    for found, expected in zip(jax.tree.leaves(weights), jax.tree.leaves(alone[1]), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerances.TRAJECTORY_WEIGHTS * np.abs(expected).max())
