"""Decoders: parity with transformers per config variant, padding, depth, precision, and the reading of configs."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from fpo_jax import attention, hf, models, sharding
from fpo_jax.models import params, rope
from tests import tolerances

V, T = 37, 44
LENGTHS = (44, 29, 3)
VALID_NT = np.arange(T)[None] < np.array(LENGTHS)[:, None]
TOKENS_NT = np.where(VALID_NT, np.random.default_rng(0).integers(0, V, VALID_NT.shape), 0)

# halves the time LLVM takes for programs that run once; XLA's own passes, and with them the maths, stay as they are
QUICK = {"xla_backend_optimization_level": 0}

LLAMA = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / heads
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 7}
NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "layer_norm_eps": 1e-5,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "use_parallel_residual": True,
    "hidden_act": "gelu",
}
QWEN2 = {key: value for key, value in LLAMA.items() if key != "head_dim"}
QWEN2 |= {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 8}
QWEN3 = LLAMA | {"model_type": "qwen3"}
GEMMA2 = LLAMA | {
    "model_type": "gemma2",
    "num_hidden_layers": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 24,
    "sliding_window": 7,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": True,
    "pad_token_id": None,  # transformers gives the default one, 0, no gradient
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": V,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "n_inner": 40,
    "layer_norm_epsilon": 1e-5,
    "attn_pdrop": 0.1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.8, 2.2, 2.5],
    "long_factor": [1.2, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
}
PHI3 = {key: value for key, value in LLAMA.items() if key != "head_dim"}
PHI3 |= {"model_type": "phi3", "hidden_size": 64, "rope_scaling": {**LONGROPE, "type": "longrope"}}
PHI3 |= {"original_max_position_embeddings": 16, "pad_token_id": None}
SANS_HEAD_DIM = {key: value for key, value in LLAMA.items() if key != "head_dim"} | {"pad_token_id": None}
GEMMA = LLAMA | {"model_type": "gemma", "hidden_act": "gelu", "tie_word_embeddings": True, "pad_token_id": None}
GEMMA3 = GEMMA2 | {
    "model_type": "gemma3_text",
    "num_hidden_layers": 5,
    "sliding_window_pattern": 3,
    "rope_theta": 1e6,
    "rope_local_base_freq": 500.0,
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
OLMO2 = SANS_HEAD_DIM | {"model_type": "olmo2"}
OLMO3 = OLMO2 | {
    "model_type": "olmo3",
    "num_hidden_layers": 5,
    "sliding_window": 7,
    "rope_theta": 500000.0,
    "rope_scaling": YARN | {"rope_type": "yarn"},
}
GRANITE = SANS_HEAD_DIM | {
    "model_type": "granite",
    "attention_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 0.5,
}
SMOLLM3 = SANS_HEAD_DIM | {"model_type": "smollm3", "num_hidden_layers": 5, "tie_word_embeddings": False}
MINISTRAL = LLAMA | {
    "model_type": "ministral",
    "num_hidden_layers": 3,
    "sliding_window": 7,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
}
ARCEE = LLAMA | {"model_type": "arcee"}
INTERNLM3 = LLAMA | {"model_type": "internlm3", "qkv_bias": True, "bias": True, "pad_token_id": None}
SEED_OSS = LLAMA | {"model_type": "seed_oss", "attention_dropout": 0.0, "residual_dropout": 0.0, "pad_token_id": None}
EXAONE4 = SANS_HEAD_DIM | {"model_type": "exaone4", "num_hidden_layers": 5, "sliding_window": 7}
HELIUM = LLAMA | {"model_type": "helium", "hidden_size": 64, "pad_token_id": None}
GLM = LLAMA | {"model_type": "glm", "pad_token_id": None, "eos_token_id": 2}
COHERE = SANS_HEAD_DIM | {"model_type": "cohere", "layer_norm_eps": 1e-5, "logit_scale": 0.7, "use_qk_norm": True}
COHERE2 = SANS_HEAD_DIM | {"model_type": "cohere2", "num_hidden_layers": 5, "sliding_window": 7, "logit_scale": 0.7}
STARCODER2 = SANS_HEAD_DIM | {"model_type": "starcoder2", "sliding_window": 7, "norm_epsilon": 1e-5}
MIXTURE = {
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.02,
}
MIXTRAL = LLAMA | MIXTURE | {"model_type": "mixtral", "num_local_experts": 5, "rope_theta": 1e6}
QWEN3_MOE = LLAMA | MIXTURE | {"model_type": "qwen3_moe", "num_experts": 5, "moe_intermediate_size": 16}
QWEN2_MOE = SANS_HEAD_DIM | MIXTURE
QWEN2_MOE |= {
    "model_type": "qwen2_moe",
    "num_experts": 5,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 20,
}
GPT_OSS = (
    LLAMA | MIXTURE | {"model_type": "gpt_oss", "num_hidden_layers": 4, "num_local_experts": 5, "sliding_window": 7}
)
GPT_OSS |= {"rope_theta": 150000.0, "rope_scaling": YARN | {"rope_type": "yarn", "truncate": False, "beta_fast": 2.0}}
GPT_OSS |= {"swiglu_limit": 7.0, "pad_token_id": None, "router_aux_loss_coef": 0.9}
DEEPSEEK_V2 = LLAMA | {
    "model_type": "deepseek_v2",
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
    "moe_intermediate_size": 16,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.7,
    "topk_method": "greedy",
    "pad_token_id": None,
    "rope_scaling": YARN | {"mscale": 0.9, "mscale_all_dim": 0.7, "beta_fast": 2.0},
}
DEEPSEEK_V2_GROUPS = {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2, "num_experts_per_tok": 3}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 7, "num_hidden_layers": 4, "max_window_layers": 3}
VARIANTS = {
    "llama MHA": LLAMA | {"num_key_value_heads": 4, "head_dim": None},
    "llama GQA": LLAMA,
    "llama MQA": LLAMA | {"num_key_value_heads": 1},
    "llama tied": LLAMA | {"tie_word_embeddings": True},
    "llama theta": LLAMA | {"rope_theta": 500000.0},
    "llama eps": LLAMA | {"rms_norm_eps": 0.3},
    "llama linear": LLAMA | {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "llama dynamic": LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 20},
    "llama3 scaling": LLAMA | {"rope_scaling": LLAMA3_ROPE},
    "llama yarn": LLAMA | {"rope_scaling": YARN},
    "llama yarn factor": LLAMA | {"rope_scaling": YARN | {"attention_factor": 1.4, "beta_fast": 2.0, "beta_slow": 0.2}},
    "llama yarn mscale": LLAMA
    | {"rope_scaling": YARN | {"mscale": 1.5, "mscale_all_dim": 0.5, "truncate": False, "beta_fast": 2.0}},
    "mistral window": MISTRAL,
    "mistral no window": MISTRAL | {"sliding_window": None},
    "qwen2": QWEN2,
    "qwen2 tied theta": QWEN2 | {"tie_word_embeddings": True, "rope_theta": 1e6, "num_key_value_heads": 1},
    "qwen3": QWEN3,
    "qwen3 tied eps": QWEN3 | {"tie_word_embeddings": True, "rms_norm_eps": 0.3},
    "gemma2": GEMMA2,
    "gemma2 without caps": GEMMA2 | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gpt2": GPT2,
    "gpt2 untied relu": GPT2 | {"tie_word_embeddings": False, "activation_function": "relu", "n_inner": None},
    "neox parallel": NEOX,
    "neox sequential": NEOX | {"use_parallel_residual": False, "rotary_pct": 1.0},
    "neox tied gelu_new": NEOX | {"tie_word_embeddings": True, "hidden_act": "gelu_new", "rotary_emb_base": 500},
    "neox linear eps": NEOX | {"rope_scaling": {"type": "linear", "factor": 3.0}, "layer_norm_eps": 0.3},
}
# keys and families that came later
LATER = {
    "llama biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama longrope": LLAMA | {"rope_scaling": LONGROPE | {"original_max_position_embeddings": 32, "factor": 3.0}},
    "qwen2 window": QWEN2 | QWEN_WINDOW,
    "qwen2 window of no layer": QWEN2 | QWEN_WINDOW | {"max_window_layers": 4},
    "qwen3 mixed biases": QWEN3
    | {
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 7,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "neox without attention bias": NEOX | {"attention_bias": False},
    "gpt2 inverse scale": GPT2 | {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "gemma": GEMMA,
    "gemma3": GEMMA3,
    "gemma3 cap, wide window": GEMMA3 | {"final_logit_softcapping": 3.0, "sliding_window": 64, "attention_bias": True},
    "phi3": PHI3,
    "phi3 partial": PHI3
    | {
        "partial_rotary_factor": 0.5,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": LONGROPE["short_factor"][:4],
            "long_factor": LONGROPE["long_factor"][:4],
        },
    },
    "phi3 window": PHI3 | {"rope_scaling": None, "sliding_window": 7, "tie_word_embeddings": True},
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "granite": GRANITE,
    "granite tied": GRANITE | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "smollm3": SMOLLM3,
    "smollm3 sliding": SMOLLM3
    | {
        "no_rope_layers": [1, 0, 1, 1, 0],
        "use_sliding_window": True,
        "sliding_window": 7,
        "attention_bias": True,
    },
    "ministral": MINISTRAL,
    "arcee": ARCEE,
    "internlm3": INTERNLM3,
    "seed_oss": SEED_OSS,
    "seed_oss other biases": SEED_OSS | {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
    "exaone4": EXAONE4,
    "exaone4 full": EXAONE4 | {"sliding_window": None, "layer_types": ["full_attention"] * 5},
    "helium": HELIUM,
    "glm": GLM,
    "glm4": GLM | {"model_type": "glm4", "attention_bias": False},
    "cohere": COHERE,
    "cohere without norms": COHERE | {"use_qk_norm": False, "attention_bias": True, "tie_word_embeddings": False},
    "cohere2": COHERE2,
    "starcoder2": STARCODER2,
    "mixtral": MIXTRAL,
    "mixtral window": MIXTRAL | {"sliding_window": 7, "num_experts_per_tok": 3, "tie_word_embeddings": True},
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe normalized": QWEN3_MOE | {"norm_topk_prob": True, "attention_bias": True},
    "qwen2_moe": QWEN2_MOE,
    "qwen2_moe without biases": QWEN2_MOE | {"norm_topk_prob": True, "qkv_bias": False},
    "gpt_oss": GPT_OSS,
    "gpt_oss full, without attention biases": GPT_OSS
    | {"attention_bias": False, "layer_types": ["full_attention"] * 4, "rope_scaling": {"rope_type": "default"}},
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v2 groups": DEEPSEEK_V2
    | DEEPSEEK_V2_GROUPS
    | {"q_lora_rank": 24, "attention_bias": True, "first_k_dense_replace": 2, "rope_scaling": None, "v_head_dim": 16},
    "starcoder2 without biases": STARCODER2 | {"use_bias": False, "tie_word_embeddings": False},
}
VARIANTS |= LATER
# variants whose gradients are compared too, with the remat mode used for it
WITH_GRADIENT = {
    "llama tied": "none",
    "mistral window": "full",
    "qwen2": "none",
    "qwen3": "full",
    "gemma2": "dots_and_attention",
    "gpt2": "none",
    "neox parallel": "none",
    "neox sequential": "full",
    "llama biases": "none",
    "llama longrope": "full",
    "qwen2 window": "full",
    "gpt2 inverse scale": "none",
    "gemma": "none",
    "gemma3": "full",
    "phi3": "none",
    "olmo2": "none",
    "olmo3": "dots_and_attention",
    "granite tied": "full",
    "smollm3 sliding": "none",
    "ministral": "full",
    "arcee": "none",
    "seed_oss": "full",
    "exaone4": "none",
    "helium": "full",
    "glm": "none",
    "glm4": "full",
    "cohere": "none",
    "cohere2": "full",
    "starcoder2": "none",
    "mixtral": "dots_and_attention",
    "qwen3_moe": "full",
    "qwen2_moe": "none",
    "gpt_oss": "dots_and_attention",
    "deepseek_v2": "dots_and_attention",
    "deepseek_v2 groups": "full",
}


def random_params(config, seed=0, dtype="float32"):
    """Weights large enough that every part of the model shows in the logits; norms and biases are random too."""
    rng = np.random.default_rng(seed)
    flat = {}
    for entry in params.entries(config):
        if entry.init == "normal":
            fan_in = config.width if entry.path in ("embed", "head") else np.prod(entry.hf_shape[1:])
            flat[entry.path] = rng.normal(size=entry.shape) * (1.0 if entry.path == "embed" else 1.5 / np.sqrt(fan_in))
        else:
            flat[entry.path] = (entry.init == "ones") + 0.3 * rng.normal(size=entry.shape)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params.nest(flat))


@functools.partial(jax.jit, static_argnames=("config", "layout", "compute_dtype"), compiler_options=QUICK)
def forward(tree, tokens_NT, valid_NT, *, config, compute_dtype="float32", layout=sharding.ONE_DEVICE):
    return models.hidden_states(
        tree,
        tokens_NT,
        valid_NT,
        config=config,
        compute_dtype=compute_dtype,
        attention=attention.Selection(
            "chunked" if config.attention_soft_cap or config.of_family.sinks else "xla", "for the test"
        ),
        layout=layout,
    )


def logits_of(tree, config, tokens_NT=TOKENS_NT, valid_NT=VALID_NT):
    hidden_NTD = forward(tree, jnp.asarray(tokens_NT), jnp.asarray(valid_NT), config=config)
    flat_ND = jnp.asarray(hidden_NTD).reshape(-1, config.width)
    return np.asarray(models.logits(tree, flat_ND, config=config)).reshape(*hidden_NTD.shape[:2], -1)


def next_token_logps(tree, config, remat):
    """Sum of the log-probs of every valid token given the ones before it."""
    hidden_NTD = models.hidden_states(
        tree, jnp.asarray(TOKENS_NT), jnp.asarray(VALID_NT), config=config, compute_dtype="float32", remat=remat
    )
    logits_NTV = jax.vmap(lambda hidden_ND: models.logits(tree, hidden_ND, config=config))(hidden_NTD)
    logps_NTV = jax.nn.log_softmax(logits_NTV)
    chosen_NT = jnp.take_along_axis(logps_NTV[:, :-1], jnp.asarray(TOKENS_NT)[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(chosen_NT, where=jnp.asarray(VALID_NT)[:, 1:])


def torch_twin(tmp_path, config_dict, tree, config):
    """The transformers model with the same weights, through an exported directory."""
    pytest.importorskip("torch", reason="torch, the other side of the parity tests, is not installed")
    transformers = pytest.importorskip("transformers")
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config_dict))
    hf.export(tree, config, out_dir=tmp_path / "model", source_dir=source, dtype="float32")
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", attn_implementation="eager", dtype="float32", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return loaded.eval()


def torch_logits(twin, config):
    """Logits [N, T, V] and a differentiable total of next-token log-probs.

    One row at a time without padding where the rope depends on the length of the batch, see rope.rotation.
    """
    import torch

    tokens, valid = torch.tensor(TOKENS_NT), torch.tensor(VALID_NT)
    if not config.rotation_depends_on_length(T):
        logits = twin(input_ids=tokens, attention_mask=valid.long(), use_cache=False).logits
    else:
        rows = []
        for row, length in zip(tokens, LENGTHS, strict=True):
            if config.rope.type == "dynamic":
                twin.model.rotary_emb = type(twin.model.rotary_emb)(twin.config)
            alone = twin(input_ids=row[None, :length], use_cache=False).logits[0]
            rows.append(torch.nn.functional.pad(alone, (0, 0, 0, T - length)))
        logits = torch.stack(rows)
    logps = torch.log_softmax(logits[:, :-1], -1).gather(-1, tokens[:, 1:, None])[..., 0]
    return logits, logps[valid[:, 1:]].sum()


@pytest.mark.parity
@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in LATER])
def test_parity_with_transformers(tmp_path, name):
    check_parity(tmp_path, name)


@pytest.mark.sampled(10)
@pytest.mark.parity
@pytest.mark.parametrize("name", LATER)
def test_parity_of_later_families_with_transformers(tmp_path, name):
    check_parity(tmp_path, name)


def one_by_one(theirs, config):
    """Take apart what transformers 5 holds of all experts together, into tensors as on disk."""
    found = {}
    on_disk = {entry.path.rpartition("/")[2]: entry.hf_name for entry in params.entries(config)}
    for name, array in theirs.items():
        layer = name.removeprefix("model.layers.").partition(".")[0]
        if name.endswith(".mlp.gate.weight") and config.experts:
            found[on_disk["router"].format(layer=layer)] = array
        elif name.endswith(("experts.gate_up_proj", "experts.down_proj")) and not config.of_family.stacked_experts:
            parts = (
                {"down": array}
                if "down" in name
                else dict(zip(("gate", "up"), np.split(array, 2, axis=1), strict=True))
            )
            for part, stacked in parts.items():
                for expert, matrix in enumerate(stacked):
                    found[on_disk[part].format(layer=layer, expert=expert)] = matrix
        else:
            found[name] = array
    return found


def check_parity(tmp_path, name):
    """Compare logits, and of some variants the gradient of the log-probs of all tokens."""
    config = models.from_hf_config(VARIANTS[name])
    tree = random_params(config)
    twin = torch_twin(tmp_path, VARIANTS[name], tree, config)
    expected, total = torch_logits(twin, config)
    found = logits_of(tree, config)
    expected = expected.detach().numpy()
    assert np.abs(expected[VALID_NT]).max() > 1  # otherwise the tolerance would mean little
    assert_allclose(found[VALID_NT], expected[VALID_NT], rtol=0, atol=tolerances.PARITY_LOGITS)
    if name not in WITH_GRADIENT:
        return
    total.backward()
    theirs = {name: tensor.grad.numpy() for name, tensor in twin.named_parameters()}
    theirs = one_by_one(theirs, config)
    if "lm_head.weight" in theirs and config.family == "gpt_neox":
        theirs["embed_out.weight"] = theirs.pop("lm_head.weight")  # transformers 5 renames it in memory, not on disk
    differentiate = jax.jit(jax.value_and_grad(next_token_logps), static_argnums=(1, 2), compiler_options=QUICK)
    value, grads = differentiate(tree, config, WITH_GRADIENT[name])
    assert_allclose(value, total.item(), rtol=tolerances.PARITY_GRADIENT)
    for entry in params.entries(config):
        expected_grad = np.empty(entry.shape, np.float32)
        for hf_name, place in entry.tensors():
            expected_grad[place] = params.from_hf(entry, theirs.pop(hf_name))
        found_grad = np.asarray(params.flatten(grads)[entry.path])
        scale = np.abs(expected_grad).max()
        assert scale > 0
        assert_allclose(found_grad / scale, expected_grad / scale, rtol=0, atol=tolerances.PARITY_GRADIENT)
    assert not theirs


@pytest.mark.parity
@pytest.mark.parametrize("name", ["llama linear", "llama3 scaling", "llama yarn", "llama yarn mscale", "llama theta"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_inverse_frequencies_agree_to_the_last_bits(name, head_dim):
    pytest.importorskip("torch", reason="torch, the other side of the parity tests, is not installed")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    variant = VARIANTS[name] | {"head_dim": head_dim}
    theirs = LlamaRotaryEmbedding(LlamaConfig(**variant))
    ours, magnitude = rope.inverse_frequencies(models.from_hf_config(variant).rope, pairs=head_dim // 2)
    assert ours.dtype == np.float32
    np.testing.assert_array_max_ulp(ours, theirs.inv_freq.numpy(), maxulp=tolerances.ROPE_ULP)
    assert_allclose(magnitude, theirs.attention_scaling, rtol=1e-15)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama GQA", {"rope": models.Rope(theta=5e5)}),
        ("llama GQA", {"rope": models.Rope(type="linear", factor=2.0)}),
        ("llama linear", {"rope": models.Rope(type="linear", factor=4.0)}),
        ("llama dynamic", {"rope": models.Rope(type="dynamic", factor=3.0)}),
        ("llama dynamic", {"max_positions": 30}),
        ("llama GQA", {"norm_eps": 1e-2}),
        ("llama GQA", {"activation": "gelu"}),
        ("mistral window", {"sliding_window": 8}),
        ("mistral window", {"sliding_window": None}),
        ("neox parallel", {"parallel_residual": False}),
        ("neox parallel", {"rope": models.Rope(fraction=0.5)}),
        ("neox parallel", {"activation": "gelu_new"}),
    ],
)
def test_every_knob_changes_the_logits(name, change):
    config = models.from_hf_config(VARIANTS[name])
    tree = random_params(config)
    changed = logits_of(tree, dataclasses.replace(config, **change))
    assert np.abs(changed - logits_of(tree, config))[VALID_NT].max() > tolerances.DIFFERENT


@pytest.mark.parametrize(
    ("base", "field", "values"),
    [
        (LLAMA3_ROPE, "factor", (8.0, 4.0)),
        (LLAMA3_ROPE, "low_freq_factor", (1.0, 2.0)),
        (LLAMA3_ROPE, "high_freq_factor", (4.0, 5.0)),
        (LLAMA3_ROPE, "original_max_position_embeddings", (32, 40)),
        (YARN, "factor", (4.0, 2.0)),
        (YARN, "original_max_position_embeddings", (64, 32)),
        (YARN, "attention_factor", (None, 1.5)),
        (YARN, "beta_fast", (None, 2.0)),
        (YARN, "beta_slow", (None, 0.2)),
        (YARN | {"beta_fast": 2.0}, "truncate", (None, False)),
        (YARN | {"mscale_all_dim": 0.5}, "mscale", (1.0, 1.5)),
        (YARN | {"mscale": 0.5}, "mscale_all_dim", (1.0, 1.5)),
    ],
)
def test_every_scaling_knob_changes_the_rotation(base, field, values):
    tables = []
    for value in values:
        config = models.from_hf_config(LLAMA | {"rope_scaling": base | {field: value}})
        tables.append(
            rope.rotation(
                config.rope,
                head_dim=16,
                max_positions=64,
                lengths_N=jnp.asarray([T], jnp.int32),
                positions_XT=jnp.arange(T)[None],
            )
        )
    assert np.abs(np.asarray(tables[0]) - np.asarray(tables[1])).max() > tolerances.DIFFERENT


MORE_PADDING = ((0, 1), (0, 6))  # a row of nothing but padding, and six positions on every row
MORE_VALID_NT = np.pad(VALID_NT, MORE_PADDING)
# a pad id beyond the vocabulary, as tokenizers with an added pad token have
MORE_TOKENS_NT = np.where(MORE_VALID_NT, np.pad(TOKENS_NT, MORE_PADDING), V + 1000)


@pytest.mark.parametrize("name", ["llama dynamic", "mistral window", "neox parallel"])
def test_padding_does_not_change_hidden_states(name):
    config = models.from_hf_config(VARIANTS[name])
    tree = random_params(config)
    expected = np.asarray(forward(tree, jnp.asarray(TOKENS_NT), jnp.asarray(VALID_NT), config=config))
    found = np.asarray(forward(tree, jnp.asarray(MORE_TOKENS_NT), jnp.asarray(MORE_VALID_NT), config=config))
    assert np.isfinite(found).all()
    assert_allclose(found[MORE_VALID_NT], expected[VALID_NT], rtol=0, atol=tolerances.SAME_MATHS)


def test_rows_and_padding_are_apart_in_the_gradient():
    config = models.from_hf_config(VARIANTS["llama dynamic"] | {"tie_word_embeddings": True})
    tree = random_params(config)

    def total(tree, valid_NT):
        hidden_NTD = models.hidden_states(
            tree, jnp.asarray(MORE_TOKENS_NT), valid_NT, config=config, compute_dtype="float32"
        )
        return jnp.sum(jnp.where(valid_NT[..., None], jnp.sin(hidden_NTD), 0))

    run = jax.jit(jax.grad(total), compiler_options=QUICK)
    together = params.flatten(run(tree, jnp.asarray(MORE_VALID_NT)))
    # one row at a time, every other row nothing but padding
    alone = [params.flatten(run(tree, jnp.asarray(MORE_VALID_NT & (np.arange(4) == n)[:, None]))) for n in range(4)]
    for path, grad in together.items():
        scale = np.abs(grad).max()
        assert scale > 0
        assert not np.any(alone[3][path])
        found = sum(grads[path] for grads in alone)
        assert_allclose(found / scale, grad / scale, rtol=0, atol=tolerances.SAME_MATHS, err_msg=path)


def test_dynamic_rope_ignores_the_other_rows():
    config = models.from_hf_config(VARIANTS["llama dynamic"])
    tree = random_params(config)
    alone = forward(tree, jnp.asarray(TOKENS_NT[1:2]), jnp.asarray(VALID_NT[1:2]), config=config)
    together = forward(tree, jnp.asarray(TOKENS_NT), jnp.asarray(VALID_NT), config=config)
    assert_allclose(alone[0, :29], together[1, :29], rtol=0, atol=tolerances.SAME_MATHS)


def test_a_token_outside_the_vocabulary_is_loud():
    config = models.from_hf_config(LLAMA)
    tokens_NT = TOKENS_NT.copy()
    tokens_NT[1, 2] = V
    assert np.isnan(logits_of(random_params(config), config, tokens_NT)[1, 2]).all()


def equations(jaxpr):
    """All equations, inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def gradient_jaxpr(config, compute_dtype="float32", **options):
    def total(tree, tokens_NT, valid_NT):
        call = functools.partial(models.hidden_states, config=config, compute_dtype=compute_dtype, **options)
        return jnp.sum(call(tree, tokens_NT, valid_NT).astype(jnp.float32))

    tokens_NT = jax.ShapeDtypeStruct((3, T), jnp.int32)
    valid_NT = jax.ShapeDtypeStruct((3, T), jnp.bool)
    return jax.make_jaxpr(jax.grad(total))(params.abstract(config, "float32"), tokens_NT, valid_NT).jaxpr


@pytest.mark.parametrize("remat", ["none", "full"])
def test_program_size_is_independent_of_depth(remat):
    sizes = [
        sum(
            1
            for _ in equations(
                gradient_jaxpr(models.from_hf_config(LLAMA | {"num_hidden_layers": layers}), remat=remat)
            )
        )
        for layers in (2, 6)
    ]
    assert sizes[0] == sizes[1] > 50


def kept_for_the_backward_pass(config, remat):
    """Shapes of what the forward scan stacks for every token."""
    return [
        output.aval.shape
        for equation in equations(gradient_jaxpr(config, remat=remat))
        if equation.primitive.name == "scan"
        for output in equation.outvars
        if output.aval.shape[:3] == (config.layers, 3, T)
    ]


def test_full_remat_keeps_one_hidden_state_per_layer():
    config = models.from_hf_config(LLAMA)
    assert kept_for_the_backward_pass(config, "full") == [(config.layers, 3, T, config.width)]
    assert len(kept_for_the_backward_pass(config, "none")) > 5


@pytest.mark.parametrize(
    ("implementation", "kernel"), [("chunked", "chunked_attention_fwd"), ("splash", "splash_mha_fwd")]
)
def test_remat_runs_attention_again_unless_it_keeps_the_results(implementation, kernel):
    config = models.from_hf_config(LLAMA)
    choice = attention.Selection(implementation, "for the test", interpret=implementation == "splash")

    def forward_passes(remat):
        return sum(
            str(equation.params.get("name", "")).startswith(kernel)
            and bool(equation.invars and equation.outvars)  # else it is a part of constants, or of nothing
            for equation in equations(gradient_jaxpr(config, remat=remat, attention=choice))
        )

    once = forward_passes("none")
    assert forward_passes("dots_and_attention") == once
    assert forward_passes("dots") == forward_passes("full") == once + 1


@pytest.mark.parametrize(("described", "most"), [(LLAMA, 3), (NEOX, 2)])
def test_of_an_mlp_its_matmuls_arguments_alone_are_kept(described, most):
    """Gate, up and their product; up and its activation."""
    config = models.from_hf_config(described)
    kept = kept_for_the_backward_pass(config, "none")
    assert sum(shape[3:] == (config.ffn,) for shape in kept) == most


def test_never_makes_logits():
    config = models.from_hf_config(LLAMA)
    shapes = {output.aval.shape for equation in equations(gradient_jaxpr(config)) for output in equation.outvars}
    assert any(shape[-1:] == (config.width,) for shape in shapes)
    assert not [shape for shape in shapes if shape[-1:] == (V,)]


@pytest.mark.parametrize(("compute_dtype", "highest"), [("float32", True), ("bfloat16", False)])
def test_float32_means_float32_on_every_device(compute_dtype, highest):
    matmuls = [
        equation
        for equation in equations(gradient_jaxpr(models.from_hf_config(LLAMA), compute_dtype))
        if equation.primitive.name == "dot_general"
    ]
    assert len(matmuls) > 20
    precisions = {str(equation.params["precision"]) for equation in matmuls}
    assert ("HIGHEST" in "".join(precisions)) is highest
    if highest:
        assert len(precisions) == 1


@pytest.mark.parametrize("name", ["llama GQA", "neox parallel"])
def test_bfloat16_compute(name):
    config = models.from_hf_config(VARIANTS[name])
    tree = random_params(config)
    exact = np.asarray(forward(tree, jnp.asarray(TOKENS_NT), jnp.asarray(VALID_NT), config=config))
    rounded = forward(tree, jnp.asarray(TOKENS_NT), jnp.asarray(VALID_NT), config=config, compute_dtype="bfloat16")
    assert rounded.dtype == jnp.bfloat16
    error = (np.asarray(rounded, np.float32) - exact)[VALID_NT]
    assert_allclose(np.sqrt(np.mean(error**2)), 0, atol=tolerances.BFLOAT16_HIDDEN * np.sqrt(np.mean(exact**2)))
    assert models.head(tree, config=config).dtype == jnp.float32


def test_a_mesh_gives_the_same_hidden_states_cut_by_rows():
    config = models.from_hf_config(LLAMA | {"hidden_size": 32, "vocab_size": 40})
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, devices=jax.devices()[:8])
    places = params.shardings(config, mesh=mesh)
    rows = sharding.batch_sharding(mesh, stacked=False)
    tree = random_params(config)
    batch = jnp.asarray(MORE_TOKENS_NT), jnp.asarray(MORE_VALID_NT)
    expected = forward(tree, *batch, config=config)
    found = forward(
        jax.device_put(tree, places), *jax.device_put(batch, rows), config=config, layout=sharding.Layout(mesh)
    )
    assert found.sharding.is_equivalent_to(rows, 3)
    assert_allclose(found, expected, rtol=0, atol=tolerances.SAME_MATHS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_dtype": "float64"}, r"compute_dtype float64 is not one of float32, bfloat16, float16"),
        ({"remat": "some"}, r"remat 'some' is not one of none, dots_and_attention, dots, full, offload"),
        (
            {"attention": attention.Selection("flash", "for the test")},
            r"'flash' is not one of xla, chunked, cudnn, mosaic, splash",
        ),
    ],
)
def test_unknown_options_are_refused(options, message):
    config = models.from_hf_config(LLAMA)
    with pytest.raises(ValueError, match=message), jax.enable_x64(True):
        models.hidden_states(
            random_params(config),
            jnp.asarray(TOKENS_NT),
            jnp.asarray(VALID_NT),
            **({"config": config, "compute_dtype": "float32"} | options),
        )
