"""Matrices in four bits: the published levels and rounding, the layout of the disk, a run of an adapter over them."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from numpy.testing import assert_allclose, assert_array_equal

import fpo_jax
from fpo_jax import config as configuration
from fpo_jax import hf, models
from fpo_jax.models import nf4, params
from fpo_jax.trainer import export, metric_logger, run_summary
from tests import tiny
from tests.models import test_lora, test_model

ONE = {"mesh__data": 1, "mesh__fsdp": 1}


def published_levels():
    """QLoRA's appendix E: eight quantiles of a normal distribution on one side of 0, nine on the other."""
    inverse, offset = statistics.NormalDist().inv_cdf, 0.9677083
    above = [inverse(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-inverse(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.sort([*above, 0.0, *below])
    return levels / levels.max()


def test_levels_are_the_published_quantiles():
    assert_allclose(nf4.LEVELS, published_levels(), rtol=0, atol=1e-6)


def rounded(tensor):
    """Return a matrix [outputs, inputs] in blocks of 64 along the inputs, each weight at the nearest level."""
    blocks = np.asarray(tensor, np.float32).reshape(-1, 64)
    scales = np.abs(blocks).max(axis=1, keepdims=True)
    levels = np.asarray(nf4.LEVELS, np.float32)
    nearest = np.abs((blocks / scales)[..., None] - levels).argmin(axis=-1)
    return (levels[nearest] * scales).reshape(tensor.shape)


SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 64, "num_attention_heads": 2}
FAMILIES = {
    "llama": test_model.LLAMA | SIZES,
    "gpt2": test_model.GPT2 | {"n_embd": 64, "n_inner": 128, "n_head": 1},
    "mixture": test_model.QWEN3_MOE | SIZES | {"moe_intermediate_size": 64},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_lie_along_the_inputs_of_the_matrices_on_disk(name):
    config = models.from_hf_config(FAMILIES[name])
    random, found = np.random.default_rng(0), 0
    for entry in params.entries(config):
        if (axis := params.four_bit_axis(entry, config)) is None:
            assert not (entry.stacked and entry.decay) or entry.path.endswith("/router")
            continue
        tensor = random.normal(size=entry.hf_shape).astype(np.float32)  # of one layer, of one expert
        ours = nf4.quantise(jnp.asarray(params.from_hf(entry, tensor)), axis)[...]
        by_hand = rounded(tensor.T if config.of_family.transposed else tensor)
        expected = params.from_hf(entry, by_hand.T if config.of_family.transposed else by_hand)
        assert_array_equal(ours, expected)
        found += 1
    assert found >= 4


def test_a_block_of_zeros_stays_and_the_largest_is_exact():
    weight = jnp.zeros((128, 3)).at[70, 1].set(-0.3)
    held = nf4.quantise(weight, -2)
    assert_array_equal(held[...], weight)
    assert held.codes.nbytes + held.scales.nbytes == 128 * 3 * 4.5 / 8
    with pytest.raises(IndexError, match="are read whole"):
        held[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model, and beside it the one whose matrices have the values that four bits hold."""
    root = tmp_path_factory.mktemp("nf4")
    sizes = {"layers": 2, "width": 64, "ffn": 128, "heads": 2, "kv_heads": 1, "head_dim": 64}
    tiny.write_model(root / "model", **sizes)
    tiny.write_pairs(root / "pairs.jsonl", count=16)
    config = hf.read_config(root / "model")
    flat = params.flatten(hf.load_params(root / "model", config, dtype="float32"))
    for entry in params.entries(config):
        if (axis := params.four_bit_axis(entry, config)) is not None:
            flat[entry.path] = nf4.quantise(flat[entry.path], axis)[...]
    hf.export(params.nest(flat), config, out_dir=root / "rounded", source_dir=root / "model", dtype="float32")
    return root


def run(base, workdir, *, model="model", devices=1, **changed):
    changed = {"model__remat": "full"} | changed
    config = test_lora.config(base, **(ONE if devices == 1 else {"mesh__data": 1, "mesh__fsdp": devices}), **changed)
    config.model.path = str(base / model)
    trainer = fpo_jax.Trainer(config, workdir, devices=jax.devices()[:devices])
    trainer.train()
    lines = metric_logger.read(workdir / metric_logger.METRICS_FILE)
    return trainer, [line["loss"] for line in lines if "loss" in line]


def test_a_run_over_four_bits_is_that_over_the_values_they_stand_for(base, tmp_path):
    """Reference and all, cut over two devices; DoRA reads the matrices too."""
    trainer, four = run(base, tmp_path / "four", devices=2, lora__base_dtype="nf4", lora__use_dora=True)
    _, whole = run(base, tmp_path / "whole", model="rounded", lora__use_dora=True)
    assert_allclose(four, whole, rtol=1e-5)
    assert len(set(four)) == len(four) > 2
    exported = {}
    for name in ("four", "whole"):
        export.export(tmp_path / name, tmp_path / f"{name} exported", step=None, dtype="float32")
        exported[name] = safetensors.numpy.load_file(tmp_path / f"{name} exported" / "model.safetensors")
    for name, tensor in exported["whole"].items():
        assert_allclose(exported["four"][name], tensor, rtol=0, atol=2e-5, err_msg=name)
    frozen = params.flatten(trainer._run.steps.state.abstract().frozen)
    held = [leaf for leaf in frozen.values() if isinstance(leaf, nf4.NF4)]
    assert len(held) == 7 and all(not leaf.codes.sharding.is_fully_replicated for leaf in held)


def test_a_run_says_so_and_none_keeps_whole_matrices(base):
    config = test_lora.config(base, **ONE, lora__base_dtype="nf4", model__remat="full")
    said = " ".join(" ".join(run_summary.summary(config, *tiny.built(config))).split())
    assert "7 frozen matrices in four bits (NF4), the reference's too" in said
    config.model.remat = "none"
    with pytest.raises(ValueError, match="model.remat=none keeps every matrix as it is multiplied by"):
        configuration.validate(config)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="blocks of 64 inputs, and no matrix of this model has a multiple of them"):
        test_lora.adapter_of(test_model.LLAMA, base_dtype="nf4")
