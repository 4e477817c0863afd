"""The parameter rows: they cover the module tree, and everything read off them is consistent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from fpo_jax import models, sharding
from fpo_jax.models import params, transformer
from tests import tolerances

LLAMA = models.ModelConfig(
    family="llama", vocab_size=11, width=12, layers=2, heads=6, kv_heads=3, head_dim=4, ffn=20, max_positions=32
)
CONFIGS = {
    "llama": LLAMA,
    "llama tied": dataclasses.replace(LLAMA, tied_head=True),
    "mistral": dataclasses.replace(LLAMA, family="mistral", sliding_window=3, head_dim=10),
    "gpt_neox": dataclasses.replace(
        LLAMA, family="gpt_neox", heads=3, kv_heads=3, head_dim=4, parallel_residual=True, activation="gelu"
    ),
    "mixtral": dataclasses.replace(LLAMA, family="mixtral", experts=5, experts_per_token=2),
    "gpt_oss": dataclasses.replace(LLAMA, family="gpt_oss", experts=5, experts_per_token=2, sliding_window=3),
    "qwen2_moe": dataclasses.replace(LLAMA, family="qwen2_moe", experts=5, experts_per_token=2, shared_ffn=14),
    "deepseek_v2": dataclasses.replace(
        LLAMA,
        family="deepseek_v2",
        kv_heads=LLAMA.heads,
        rope_dim=2,
        value_dim=3,
        kv_rank=7,
        query_rank=9,
        experts=6,
        experts_per_token=2,
        shared_ffn=LLAMA.ffn,
        dense_layers=1,
        dense_ffn=19,
    ),
    "gpt_neox tied": dataclasses.replace(LLAMA, family="gpt_neox", heads=3, kv_heads=3, head_dim=4, tied_head=True),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def initialised(config, dtype):
    return jax.eval_shape(lambda key: params.init(config, key, dtype), jax.random.key(0))


@each_config
def test_rows_cover_the_module_tree_exactly(config):
    declared = nnx.to_pure_dict(nnx.split(transformer.Decoder(config))[1])
    assert params.flatten(params.abstract(config, "float32")) == params.flatten(declared)


@each_config
def test_every_tree_has_the_same_paths(config):
    paths = [entry.path for entry in params.entries(config)]
    assert len(set(paths)) == len(paths)
    for tree in (
        params.logical_axes(config),
        params.decay_mask(config),
        params.abstract(config, "bfloat16"),
        initialised(config, "bfloat16"),
    ):
        assert sorted(params.flatten(tree)) == sorted(paths)


@each_config
def test_count_is_the_number_of_initialised_values(config):
    assert params.count(config) == sum(x.size for x in jax.tree.leaves(initialised(config, "float32")))


def test_count_of_llama_by_hand():
    # embed and head 2*11*12; a layer: 2 norms of 12, q and o 12*24, k and v 12*12, three MLP matrices 12*20
    assert params.count(LLAMA) == 264 + 2 * (24 + 2 * 288 + 2 * 144 + 3 * 240) + 12
    assert params.count(CONFIGS["llama tied"]) == params.count(LLAMA) - 132


@each_config
def test_axes_are_known_to_sharding_and_vectors_over_width_stay_whole(config):
    for entry in params.entries(config):
        assert len(entry.axes) == len(entry.shape)
        assert set(entry.axes) <= {*sharding.RULES, None}
        if entry.letters in ("D", "LD"):
            assert entry.axes[-1] is None
        else:
            assert [axis for axis, letter in zip(entry.axes, entry.letters, strict=True) if letter == "D"] in (
                [],
                ["expert_embed" if entry.routed else "embed"],
            )


def test_attention_kernels_name_their_heads():
    axes = params.logical_axes(LLAMA)["layers"]["attention"]
    assert axes["query"] == ("layers", "embed", "heads", "head_dim")
    assert axes["key"] == ("layers", "embed", "kv_heads", "head_dim")
    assert axes["out"] == ("layers", "heads", "head_dim", "embed")
    neox = params.logical_axes(CONFIGS["gpt_neox"])["layers"]["attention"]
    assert neox["qkv"] == ("layers", "embed", "heads", None, "head_dim")
    assert neox["qkv_bias"] == ("layers", "heads", None, "head_dim")


@each_config
def test_decay_is_for_matrices_only(config):
    for entry in params.entries(config):
        is_matrix = not entry.path.endswith(("/scale", "bias"))
        assert entry.decay == (is_matrix and not entry.path.endswith("/sinks"))
        assert entry.init == ("normal" if is_matrix else "ones" if entry.path.endswith("/scale") else "zeros")


@each_config
def test_import_after_export_is_the_identity(config):
    rng = np.random.default_rng(0)
    for entry in params.entries(config):
        ours = rng.normal(size=entry.shape[len(entry.shape) - len(entry.inner_letters) :])
        disk = params.to_hf(entry, ours)
        assert disk.shape == entry.hf_shape
        assert disk.flags.c_contiguous
        assert_array_equal(params.from_hf(entry, disk), ours)
        assert_array_equal(params.to_hf(entry, params.from_hf(entry, disk)), disk)


def test_layouts_against_indices_drawn_by_hand():
    by_path = {entry.path: entry for entry in params.entries(LLAMA)}
    disk = np.arange(24 * 12).reshape(24, 12)  # [H*C, D]
    assert params.from_hf(by_path["layers/attention/query"], disk)[7, 5, 2] == disk[5 * 4 + 2, 7]
    disk = np.arange(12 * 24).reshape(12, 24)  # [D, H*C]
    assert params.from_hf(by_path["layers/attention/out"], disk)[5, 2, 7] == disk[7, 5 * 4 + 2]
    neox = {entry.path: entry for entry in params.entries(CONFIGS["gpt_neox"])}
    disk = np.arange(36 * 12).reshape(36, 12)  # [H, (q, k, v), C] x D
    assert params.from_hf(neox["layers/attention/qkv"], disk)[7, 2, 1, 3] == disk[2 * 12 + 1 * 4 + 3, 7]


@each_config
def test_hf_names_are_unique_and_disjoint_from_the_ignored_buffers(config):
    names = [name for entry in params.entries(config) for name in entry.hf_names()]
    assert len(set(names)) == len(names)
    assert not set(names) & params.ignored_hf_names(config)
    assert (params.hf_head_name(config) in names) is not config.tied_head


def test_init_has_the_asked_deviation_and_is_stable():
    wide = dataclasses.replace(LLAMA, width=96, heads=8, kv_heads=4, head_dim=12, ffn=200, initializer_range=0.05)
    draw = jax.jit(params.init, static_argnums=(0, 2))
    tree = draw(wide, jax.random.key(3), "float32")
    for entry in params.entries(wide):
        values = np.asarray(params.flatten(tree)[entry.path])
        if entry.init == "normal":
            assert_allclose(values.std(), 0.05, rtol=tolerances.INIT_DEVIATION)
        else:
            assert np.all(values == (entry.init == "ones"))
    again = params.flatten(draw(dataclasses.replace(wide, tied_head=True), jax.random.key(3), "float32"))
    for path, values in again.items():  # without the head's entry, every other parameter is what it was
        assert_allclose(values, params.flatten(tree)[path], rtol=tolerances.FLOAT32)
    other = draw(wide, jax.random.key(4), "float32")
    assert not np.array_equal(other["embed"], tree["embed"])
    assert not np.array_equal(tree["embed"], tree["head"])


def test_init_casts():
    assert {x.dtype for x in jax.tree.leaves(initialised(LLAMA, "bfloat16"))} == {jnp.dtype("bfloat16")}


def test_nest_and_flatten_are_inverse():
    flat = {"a": 1, "b/c": 2, "b/d/e": 3}
    assert params.nest(flat) == {"a": 1, "b": {"c": 2, "d": {"e": 3}}}
    assert params.flatten(params.nest(flat)) == flat


def test_check_names_every_problem():
    tree = params.flatten(params.abstract(LLAMA, "float32"))
    params.check(params.nest(tree), LLAMA)
    del tree["final_norm/scale"]
    tree["layers/mlp/bias"] = np.zeros(3)
    tree["head"] = np.zeros((11, 13))
    with pytest.raises(
        ValueError,
        match=r"final_norm/scale is missing; layers/mlp/bias is unexpected; head has shape \(11, 13\), expected",
    ):
        params.check(params.nest(tree), LLAMA)
