"""Experts in MXFP4: every code by its definition and by transformers, directories in and out, what is no MXFP4."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from fpo_jax import hf, models, sharding
from fpo_jax.hf import load, mxfp4
from fpo_jax.models import params
from fpo_jax.trainer import export
from tests.hf import test_hf

CONFIG = models.ModelConfig(
    family="gpt_oss", vocab_size=12, width=64, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=32, max_positions=32,
    experts=3, experts_per_token=2, sliding_window=4, eos_ids=(2,),
)  # fmt: skip
EXPERTS = ("gate_up_proj", "down_proj")
QUANTISED = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def value(code, scale):
    """Return what four bits and a scale are, by the definitions of E2M1 and E8M0."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = mantissa * 0.5 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa * 0.5)
    return (-1) ** sign * magnitude * 2.0 ** (scale - 127)


def quantised(seed=0):
    """Tensors of a model as published, by name: experts as blocks and scales, the rest bfloat16."""
    random, tensors = np.random.default_rng(seed), test_hf.tensors_of(CONFIG, "bfloat16")
    for name in [name for name in tensors if name.endswith(EXPERTS)]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // mxfp4.BLOCK, 16)
        tensors[f"{name}_blocks"] = random.integers(0, 256, shape, np.uint8)
        tensors[f"{name}_scales"] = random.integers(118, 126, shape[:-1], np.uint8)
    return tensors


def dense(tensors):
    """The same with experts in bfloat16, value by value."""
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith(("_blocks", "_scales"))}
    table = np.array([[value(code, scale) for code in range(16)] for scale in range(256)])
    for name in [name for name in tensors if name.endswith("_blocks")]:
        blocks, scales = tensors[name], tensors[name.removesuffix("_blocks") + "_scales"]
        codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, mxfp4.BLOCK)
        values = table[scales[..., None], codes].reshape(*scales.shape[:2], -1)
        found[name.removesuffix("_blocks")] = np.ascontiguousarray(np.swapaxes(values, 1, 2)).astype(jnp.bfloat16)
    return found


def write(directory, tensors):
    test_hf.write(directory, CONFIG, tensors)
    config = json.loads((directory / "config.json").read_text())
    config.pop("torch_dtype")
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTISED}))
    return directory


def test_every_code_and_scale_is_what_the_format_says():
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (255, 16, 16))
    scales = np.broadcast_to(np.arange(255, dtype=np.uint8)[:, None], (255, 16))
    found = mxfp4.decoded(blocks, scales).astype(np.float64).reshape(255, 256, 2)
    expected = np.array([[[value(byte & 15, s), value(byte >> 4, s)] for byte in range(256)] for s in range(255)])
    expected[np.abs(expected) >= 2.0**128] *= np.inf  # bfloat16 ends there
    assert_array_equal(found, expected)
    assert np.isnan(mxfp4.decoded(blocks[:1], np.full((1, 16), 255, np.uint8)).astype(np.float32)).all()


@pytest.mark.parity
def test_experts_are_those_of_transformers():
    torch = pytest.importorskip("torch", reason="torch, the other side of the parity tests, is not installed")
    theirs = pytest.importorskip("transformers.integrations.mxfp4")
    tensors = quantised()
    for name, tensor in dense(tensors).items():
        if name.endswith(EXPERTS):
            blocks, scales = (torch.tensor(tensors[f"{name}_{part}"]) for part in ("blocks", "scales"))
            found = theirs.convert_moe_packed_tensors(blocks, scales)
            assert_array_equal(found.float().numpy(), tensor.astype(np.float32))


@pytest.mark.parametrize("at_once_bytes", [0, 2**26], ids=["layers", "whole"])
def test_a_directory_is_read_an_expert_at_a_time_and_exported_as_bfloat16(tmp_path, monkeypatch, caplog, at_once_bytes):
    monkeypatch.setattr(load, "_STACKED_ON_HOST_BYTES", at_once_bytes)
    monkeypatch.setattr(load, "_PIECE_BYTES", 2**10)
    counts, read = [], mxfp4.Tensor.read
    monkeypatch.setattr(
        mxfp4.Tensor,
        "read",
        lambda self, shape, start, stop: counts.append(stop - start) or read(self, shape, start, stop),
    )
    tensors = quantised()
    source, plain = write(tmp_path / "source", tensors), dense(tensors)
    assert hf.read_config(source) == CONFIG
    hf.check_weights(source, CONFIG)
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    tree = hf.load_params(source, CONFIG, dtype="bfloat16", shardings=params.shardings(CONFIG, mesh=mesh))
    assert set(counts) == {1}
    assert (
        "holds its experts in MXFP4: they are read as bfloat16, and exports hold them without quantisation"
        in caplog.text
    )
    test_hf.write(tmp_path / "plain", CONFIG, plain)
    jax.tree.map(assert_array_equal, tree, hf.load_params(tmp_path / "plain", CONFIG, dtype="bfloat16"))

    dtype = export._source_dtype(json.loads((source / "config.json").read_text()))
    assert dtype == "bfloat16"
    hf.export(tree, CONFIG, out_dir=tmp_path / "out", source_dir=source, dtype=dtype)
    found = test_hf.read_all(tmp_path / "out")
    assert found.keys() == plain.keys()
    for name, tensor in plain.items():
        assert found[name].tobytes() == tensor.tobytes(), name
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in written and written["torch_dtype"] == "bfloat16"


def test_an_adapter_beside_it_is_merged_into_bfloat16(tmp_path):
    tensors = quantised()
    source = write(tmp_path / "source", tensors)
    adapter = params.adapter(CONFIG, rank=1, alpha=1.0, dropout=0.0, modules="q_proj")
    added = {entry.path: np.ones(entry.shape, np.float32) for entry in params.adapter_entries(CONFIG, adapter)}
    whole = hf.merged(params.nest(added), source, CONFIG, adapter)
    hf.export(whole, CONFIG, out_dir=tmp_path / "merged", source_dir=source, dtype="bfloat16")
    found = test_hf.read_all(tmp_path / "merged")
    for name, tensor in dense(tensors).items():
        assert (found[name].tobytes() == tensor.tobytes()) == ("q_proj.weight" not in name), name


NAME = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{NAME}_scales": None}, rf"{NAME}_blocks has no {NAME}_scales"),
        ({f"{NAME}_blocks": None}, rf"{NAME}_scales is unexpected"),
        ({NAME: np.zeros((3, 32, 64), np.float32)}, rf"{NAME} stands in the files twice, once as blocks and scales"),
        (
            {f"{NAME}_scales": np.zeros((3, 64, 2), np.uint8)},
            r"its scales are U8 \(3, 64, 2\), MXFP4 is U8 \[E, outputs",
        ),
        ({f"{NAME}_scales": np.zeros((3, 64, 1), np.float32)}, r"its scales are F32 \(3, 64, 1\), MXFP4 is U8"),
        (
            {f"{NAME}_blocks": np.zeros((64, 1, 16), np.uint8), f"{NAME}_scales": np.zeros((64, 1), np.uint8)},
            rf"{NAME}_blocks has 3 axes, and MXFP4 experts have 4",
        ),
        (
            {f"{NAME}_blocks": np.zeros((3, 64, 2, 16), np.uint8), f"{NAME}_scales": np.zeros((3, 64, 2), np.uint8)},
            rf"{NAME} has shape \(3, 64, 64\), the config asks for \(3, 32, 64\)",
        ),
    ],
)
def test_what_is_no_mxfp4_is_refused_by_name(tmp_path, change, message):
    tensors = {name: tensor for name, tensor in (quantised() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        hf.check_weights(write(tmp_path / "source", tensors), CONFIG)


@pytest.mark.parametrize(
    ("family", "quantisation", "supported"),
    [
        ("gpt_oss", {"quant_method": "bitsandbytes"}, "None, quant_method mxfp4"),
        ("gpt_oss", "mxfp4", "None, quant_method mxfp4"),
        ("mixtral", {"quant_method": "mxfp4"}, "None"),
    ],
)
def test_other_quantisations_are_refused(family, quantisation, supported):
    described = models.to_hf_config(dataclasses.replace(CONFIG, family=family))
    with pytest.raises(ValueError, match=rf"quantization_config=.* is not supported \(supported: {supported}\)"):
        models.from_hf_config(described | {"quantization_config": quantisation})
