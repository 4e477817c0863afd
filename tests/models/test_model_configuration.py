"""Hugging Face configs in and out: published models, both generations of keys, and every refusal."""

import dataclasses
import json

import pytest

from fpo_jax import models
from fpo_jax.models import families, hf_config, params

LLAMA2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float16",
    "use_cache": True,
}
LLAMA3_8B = LLAMA2_7B | {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
LLAMA32_1B = LLAMA3_8B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "eos_token_id": [128001, 128008, 128009],
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
MISTRAL_7B = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PYTHIA_2_8B = {
    "model_type": "gpt_neox",
    "vocab_size": 50304,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-05,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPT_OSS_20B = {  # as published, with two keys that transformers does not read
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
    "eos_token_id": 200002,
    "pad_token_id": 199999,
}
GPT_OSS_120B = GPT_OSS_20B | {
    "num_hidden_layers": 36,
    "num_local_experts": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
}
DEEPSEEK_V2_LITE = {  # as published, with keys of DeepSeek's own code that transformers does not read
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
DEEPSEEK_V2 = DEEPSEEK_V2_LITE | {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
# parameter counts as published with each model
PUBLISHED = {
    "Llama-2-7B": (LLAMA2_7B, 6_738_415_616),
    "Llama-3-8B": (LLAMA3_8B, 8_030_261_248),
    "Llama-3.2-1B": (LLAMA32_1B, 1_235_814_400),
    "Mistral-7B-v0.1": (MISTRAL_7B, 7_241_732_096),
    "Pythia-2.8B": (PYTHIA_2_8B, 2_775_208_960),
    "gpt-oss-20b": (GPT_OSS_20B, 20_914_757_184),
    "gpt-oss-120b": (GPT_OSS_120B, 116_829_156_672),
    "DeepSeek-V2-Lite": (DEEPSEEK_V2_LITE, 15_706_484_224),
    "DeepSeek-V2": (DEEPSEEK_V2, 235_741_434_880),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_size(name):
    config, count = PUBLISHED[name]
    assert params.count(models.from_hf_config(config)) == count


@pytest.mark.parametrize(("described", "billions"), [(GPT_OSS_20B, 3.61), (GPT_OSS_120B, 5.13)])
def test_gpt_oss_has_the_active_parameters_of_its_model_card(described, billions):
    """Which counts the LM head and not the embeddings: arXiv 2508.10925, table 1."""
    config = models.from_hf_config(described)
    assert round((params.active(config) - config.vocab_size * config.width) / 1e9, 2) == billions


@pytest.mark.parametrize(("described", "billions"), [(DEEPSEEK_V2_LITE, 2.4), (DEEPSEEK_V2, 21)])
def test_deepseek_v2_has_the_active_parameters_of_its_report(described, billions):
    """arXiv 2405.04434, section 3.1.2 and appendix B, which say it in two digits: 2.45 and 20.9 without embeddings."""
    config = models.from_hf_config(described)
    assert abs((params.active(config) - config.vocab_size * config.width) / 1e9 / billions - 1) < 0.025


def test_llama32_is_read_to_the_last_field():
    assert models.from_hf_config(LLAMA32_1B) == models.ModelConfig(
        family="llama",
        vocab_size=128256,
        width=2048,
        layers=16,
        heads=32,
        kv_heads=8,
        head_dim=64,
        ffn=8192,
        max_positions=131072,
        activation="silu",
        norm_eps=1e-5,
        rope=models.Rope(
            type="llama3",
            theta=500000.0,
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        tied_head=True,
        bos_id=128000,
        eos_ids=(128001, 128008, 128009),
    )


def test_pythia_is_read_to_the_last_field():
    config = models.from_hf_config(PYTHIA_2_8B)
    assert (config.kv_heads, config.head_dim, config.parallel_residual, config.activation) == (32, 80, True, "gelu")
    assert config.rope == models.Rope(fraction=0.25)
    assert (config.bos_id, config.eos_ids, config.pad_id) == (0, (0,), None)


def test_absent_keys_mean_the_defaults_of_transformers():
    llama = {key: LLAMA2_7B[key] for key in ("model_type", "vocab_size", "hidden_size", "intermediate_size")}
    llama |= {"num_hidden_layers": 2, "num_attention_heads": 8}
    config = models.from_hf_config(llama)
    assert (config.kv_heads, config.head_dim, config.max_positions, config.norm_eps) == (8, 512, 2048, 1e-6)
    assert (config.rope, config.sliding_window, config.tied_head, config.eos_ids) == (models.Rope(), None, False, ())
    mistral = models.from_hf_config(llama | {"model_type": "mistral"})
    assert (mistral.kv_heads, mistral.sliding_window, mistral.max_positions) == (8, 4096, 131072)
    neox = models.from_hf_config(llama | {"model_type": "gpt_neox"})
    assert (neox.parallel_residual, neox.activation, neox.norm_eps) == (True, "gelu", 1e-5)
    assert neox.rope == models.Rope(fraction=0.25)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("config", "class_name"),
    [(LLAMA2_7B, "LlamaConfig"), (MISTRAL_7B, "MistralConfig"), (PYTHIA_2_8B, "GPTNeoXConfig")],
)
def test_defaults_agree_with_transformers(config, class_name):
    transformers = pytest.importorskip("transformers")
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    given = {key: config[key] for key in needed}
    theirs = getattr(transformers, class_name)(**given).to_dict()
    ours = models.from_hf_config(given | {"model_type": config["model_type"]})
    explicit = models.from_hf_config(theirs)
    assert dataclasses.replace(ours, bos_id=explicit.bos_id, eos_ids=explicit.eos_ids) == explicit


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_generations_of_rope_keys_mean_the_same(name):
    old = dict(PUBLISHED[name][0])
    expected = models.from_hf_config(old)
    new = {key: value for key, value in old.items() if key not in ("rope_theta", "rotary_emb_base", "rotary_pct")}
    scaling = new.pop("rope_scaling", None) or {"rope_type": "default"}
    new["rope_parameters"] = scaling | {"rope_theta": expected.rope.theta}
    if expected.family == "gpt_neox":
        new["rope_parameters"]["partial_rotary_factor"] = expected.rope.fraction
    assert models.from_hf_config(new) == expected


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "finetuned": True},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False, "mscale": 0.7},
    ],
)
@pytest.mark.parametrize("base", [LLAMA3_8B, MISTRAL_7B | {"sliding_window": None, "pad_token_id": 3}, PYTHIA_2_8B])
def test_writing_is_the_inverse_of_reading(base, scaling):
    for config in (models.from_hf_config(base), models.from_hf_config(base | {"rope_scaling": scaling})):
        assert models.from_hf_config(models.to_hf_config(config)) == config


def test_an_absent_original_context_is_the_whole_context():
    yarn = {"rope_type": "yarn", "factor": 4.0}
    config = models.from_hf_config(LLAMA3_8B | {"rope_scaling": yarn})
    assert config.rope.original_max_position_embeddings == 8192


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, r"model_type 'bert' is not supported; supported: llama, mistral, ministral"),
        ({"hidden_act": "xielu"}, r"activation 'xielu' is none of silu, swish, gelu"),
        ({"attention_bias": 1}, r"attention_bias=1 must be bool"),
        ({"is_encoder_decoder": True}, r"is_encoder_decoder=True is not supported \(supported: None, False\)"),
        ({"layer_types": [["full_attention"]]}, r"layer_types=\[\['full_attention'\]\] cannot be"),
        ({"attention_dropout": 1.5}, r"attention_dropout=1\.5 must be a share in \[0, 1\)"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config=\{'bits': 4\} is not supported"),
        ({"layer_types": ["full_attention"]}, r"layer_types=\['full_attention'\] is not supported"),
        ({"is_causal": False}, r"is_causal=False is not supported"),
        (
            {"rope_scaling": {"type": "proportional", "factor": 2.0}},
            r"rope type 'proportional' is not supported; supported: def",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}},
            r"original_max_position_embeddings=0 must be at least 2",
        ),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, r"short_factor is missing; long_factor is missing"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1, 2], "long_factor": [1, 0]}},
            r"long_factor must be a list of positive numbers",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1, 2], "long_factor": [1, 2]}},
            r"short_factor has 2 entries, and 64 pairs of dimensions are rotated",
        ),
        (
            {
                "original_max_position_embeddings": 32,
                "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
            },
            r"original_max_position_embeddings in the rope dict=64; original_max_position_embeddings=32 disagree",
        ),
        ({"rope_scaling": {"type": "linear"}}, r"rope type 'linear': factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, r"factor=0\.5 must be at least 1"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.0}}, r"'linear': mscale has no meaning"),
        ({"rope_scaling": {"type": "linear", "factr": 2.0}}, r"rope type 'linear': factr is not supported"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0}},
            r"low_freq_factor is missing; high_freq_factor is missing",
        ),
        ({"rope_scaling": "linear"}, r"rope_scaling must be a dict, not 'linear'"),
        (
            {"rope_parameters": {"rope_theta": 1e6}},
            r"rope_theta in the rope dict=1000000\.0; rope_theta=500000\.0 disagree",
        ),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            r"rope_parameters and rope_scaling disagree; keep one",
        ),
        ({"rope_theta": -1.0}, r"rope_theta=-1\.0 must be positive"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5 has no meaning for llama: transformers"),
        ({"num_key_value_heads": 5}, r"32 query heads are not a multiple of 5 key/value heads"),
        ({"hidden_size": 4097}, r"hidden_size=4097 is not a multiple of num_attention_heads=32 and no head_dim"),
        ({"hidden_size": "4096"}, r"hidden_size='4096' must be int"),
        ({"vocab_size": 32000.0}, r"vocab_size=32000\.0 must be int"),
        ({"num_hidden_layers": True}, r"num_hidden_layers=True must be int"),
        ({"rms_norm_eps": None}, r"rms_norm_eps=None must be float"),
        ({"rms_norm_eps": -1}, r"norm_eps=-1 must be 0 or larger"),
        ({"tie_word_embeddings": "no"}, r"tie_word_embeddings='no' must be bool"),
        ({"pad_token_id": "0"}, r"pad_token_id='0' must be int or null"),
        ({"eos_token_id": [2, "3"]}, r"eos_token_id=\[2, '3'\] must be int, a list of int or null"),
        ({"rope_theta": "1e6"}, r"rope_theta='1e6' must be float"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, r"factor='2' must be float or null"),
        ({"num_hidden_layers": 0}, r"layers=0 must be positive"),
        ({"head_dim": 33}, r"rope rotates int\(head_dim=33 \* 1\.0\) = 33 dimensions; it must be even"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        models.from_hf_config({"head_dim": None} | LLAMA3_8B | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_bias": True}, r"mlp_bias=True is not supported \(supported: None, False\)"),
        ({"hidden_dropout": "0.1"}, r"hidden_dropout='0\.1' must be a share in \[0, 1\)"),
        ({"rotary_pct": 0.0}, r"rotated share of the head dimension is 0\.0"),
        ({"rotary_pct": 0.03}, r"= 2 dimensions|dynamic rope needs more than 2 rotated"),
    ],
)
def test_refusals_of_gpt_neox(change, message):
    dynamic = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    with pytest.raises(ValueError, match=message):
        models.from_hf_config(PYTHIA_2_8B | dynamic | change)


def test_all_problems_come_at_once():
    broken = {key: value for key, value in LLAMA3_8B.items() if key not in ("vocab_size", "hidden_size")}
    with pytest.raises(ValueError, match=r"is_causal=False .*; vocab_size is missing; hidden_size is missing; rope"):
        models.from_hf_config(broken | {"is_causal": False, "rope_scaling": {"type": "longrope"}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": 0}, r"sliding_window=0 must be positive or None"),
        ({"family": "llama", "sliding_window": 4}, r"sliding_window=4 has no meaning for llama"),
        ({"parallel_residual": True}, r"parallel_residual has no meaning for mistral"),
        ({"family": "bert"}, r"family 'bert' is none of llama, mistral, ministral"),
        ({"family": "gpt_neox", "sliding_window": None}, r"gpt_neox has kv_heads = heads and head_dim = width / heads"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(models.from_hf_config(MISTRAL_7B), **change)


def test_configs_are_hashable_and_compare_by_value():
    first, second = models.from_hf_config(LLAMA32_1B), models.from_hf_config(LLAMA32_1B)
    assert first == second and hash(first) == hash(second)
    assert dataclasses.replace(first, norm_eps=1e-4) != second


# --- every family

MIXED = {
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2, "layer_types": None},
    "smollm3": {"no_rope_layers": [1, 0, 0, 1, 1], "use_sliding_window": True, "sliding_window": 5},
    "exaone4": {"sliding_window_pattern": "LLG"},
    "gemma3_text": {"layer_types": ["full_attention"] * 4 + ["sliding_attention"]},
    "gpt_oss": {"rope_scaling": {"rope_type": "default"}, "layer_types": ["full_attention"] * 5},
}


_ALSO = {"deepseek_v2": {"num_experts_per_tok": 6}}  # what the class of transformers leaves unset


def least(family, **changed):
    """The config.json of a family with the sizes alone."""
    keys = families.FAMILIES[family].keys
    sizes = {"vocab_size": 64, "width": 32, "ffn": 48, "layers": 5, "heads": 4, "kv_heads": 4, "head_dim": 8}
    return (
        {"model_type": family}
        | {keys[field]: size for field, size in sizes.items() if field in keys}
        | _ALSO.get(family, {})
        | changed
    )


@pytest.mark.parametrize("family", models.FAMILIES)
def test_writing_is_the_inverse_of_reading_in_every_family(family):
    for changed in ({}, MIXED.get(family, {})):
        config = models.from_hf_config(least(family, **changed))
        assert models.from_hf_config(models.to_hf_config(config)) == config


@pytest.mark.parity
@pytest.mark.parametrize("family", models.FAMILIES)
def test_absent_keys_mean_in_every_family_what_they_mean_in_transformers(family):
    """And what transformers writes is read back: every field that it knows stands in the tables."""
    auto = pytest.importorskip("transformers").models.auto.configuration_auto
    given = least(family)
    theirs = auto.CONFIG_MAPPING[family](**{key: value for key, value in given.items() if key != "model_type"})
    written = json.loads(theirs.to_json_string(use_diff=False))
    unknown = {key for key in written if key not in hf_config.known_keys(family)}
    assert not unknown
    explicit, ours = models.from_hf_config(written), models.from_hf_config(given)
    tokens = {name: getattr(explicit, name) for name in ("bos_id", "eos_ids", "pad_id")}
    assert dataclasses.replace(ours, **tokens) == explicit


def test_a_field_of_transformers_that_is_not_known_here_is_refused_by_name(monkeypatch):
    """As of a later version: a field of the config class that stands in no table."""
    known = hf_config.known_keys
    monkeypatch.setattr(hf_config, "known_keys", lambda family: known(family) - {"mlp_bias", "residual_multiplier"})
    config = least("granite")
    assert models.from_hf_config(config | {"a_note_of_the_author": 7}) == models.from_hf_config(config)
    assert models.from_hf_config(config | {"mlp_bias": False}).biases is None
    with pytest.raises(
        ValueError, match=r"mlp_bias=True is not supported \(transformers reads it, and has False by def"
    ):
        models.from_hf_config(config | {"mlp_bias": True})
    with pytest.raises(
        ValueError, match=r"residual_multiplier=0\.5 is not supported \(transformers reads it, and has 1"
    ):
        models.from_hf_config(config | {"residual_multiplier": 0.5})


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("gemma2", {"use_bidirectional_attention": True}, r"use_bidirectional_attention=True is not supported"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping=50\.0 is not supported"),
        (
            "gemma3_text",
            {"rope_parameters": {"rope_type": "linear"}},
            r"must have full_attention and sliding_attention",
        ),
        ("qwen2", {"layer_types": ["sliding_attention"] * 5}, r"layers that slide, and there is no sliding window"),
        ("qwen3", {"layer_types": ["full_attention"] * 4}, r"supported: 5 of full_attention and sliding_attention"),
        ("smollm3", {"no_rope_layers": [1, 1]}, r"no_rope_layers=\[1, 1\] must be 0 or 1 for each of 5 layers"),
        ("granite", {"embedding_multiplier": -1.0}, r"embedding_scale=-1\.0 must be positive and finite"),
        ("granite", {"architectures": ["GraniteForSequenceClassification"], "num_labels": 1}, r"no class of granite"),
        ("cohere2", {"head_dim": 16}, r"cohere2 has head_dim = width / heads"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope type 'linear' is none of phi3's"),
        ("gpt_oss", {"swiglu_limit": 5.0}, r"swiglu_limit=5\.0 is not supported \(supported: 7\.0\)"),
        ("gpt_oss", {"swiglu_alpha": 1.0}, r"swiglu_alpha=1\.0 is not supported \(supported: 1\.702\)"),
        (
            "gpt_oss",
            {"layer_types": ["chunked_attention"] * 5},
            r"supported: 5 of full_attention and sliding_attention",
        ),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, r"topk_method='noaux_tc' is not supported \(supported: 'greedy'"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, r"needs n_group and topk_group"),
        (
            "deepseek_v2",
            {"topk_method": "group_limited_greedy", "n_group": 32, "topk_group": 2},
            r"groups_per_token=2 of 32 groups of 2 experts do not hold 6 experts of a token",
        ),
        ("deepseek_v2", {"norm_topk_prob": True}, r"norm_topk_prob=True is not supported"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, r"scoring_func='sigmoid' is not supported"),
        ("deepseek_v2", {"moe_layer_freq": 2}, r"moe_layer_freq=2 is not supported"),
        ("deepseek_v2", {"mlp_bias": True}, r"mlp_bias=True is not supported"),
        ("deepseek_v2", {"num_key_value_heads": 2}, r"as many key/value heads as heads, 4, not 2"),
        ("deepseek_v2", {"v_head_dim": 200}, r"value_dim=200 is more than the head_dim of queries and keys, 192"),
        ("deepseek_v2", {"first_k_dense_replace": 5}, r"dense_layers=5 must be at least 0 and less than layers=5"),
        ("deepseek_v2", {"n_shared_experts": 0}, r"n_shared_experts=0 must be positive"),
    ],
)
def test_refusals_of_other_families(family, change, message):
    with pytest.raises(ValueError, match=message):
        models.from_hf_config(least(family, **change))


def test_a_gating_of_its_own_leaves_no_choice_of_the_activation():
    config = models.from_hf_config(least("gpt_oss"))
    with pytest.raises(ValueError, match="activation=gelu has no meaning for gpt_oss"):
        dataclasses.replace(config, activation="gelu")


def test_layers_of_several_kinds_are_told_from_the_config():
    config = models.from_hf_config(least("gemma3_text", num_hidden_layers=8, sliding_window=9))
    assert config.windows == (9, 9, 9, 9, 9, None, 9, 9)
    assert [kind.rope.theta for kind in config.kinds] == [1e4] * 5 + [1e6] + [1e4] * 2
    config = models.from_hf_config(least("smollm3"))
    assert [kind.rope is not None for kind in config.kinds] == [True, True, True, False, True]
    config = models.from_hf_config(least("qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=3))
    assert config.windows == (None, None, None, 3, 3)
    assert models.from_hf_config(least("qwen2", use_sliding_window=True, max_window_layers=5)).sliding_window is None


def test_the_text_tower_of_a_multimodal_checkpoint_is_the_language_model():
    text = least("gemma3_text")
    whole = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {key: value for key, value in text.items() if key != "vocab_size"},
        "vision_config": {"hidden_size": 1152},
        "eos_token_id": [1, 106],
    }
    config = models.from_hf_config(whole)
    assert config == models.from_hf_config(text | {"vocab_size": 262208, "eos_token_id": [1, 106]})
    assert models.text_config(whole)["architectures"] == ["Gemma3ForCausalLM"]
    assert "vision tower" in models.left_out(whole) and not models.left_out(text)
    with pytest.raises(ValueError, match=r"a gemma3 model has no text_config"):
        models.from_hf_config({"model_type": "gemma3"})
