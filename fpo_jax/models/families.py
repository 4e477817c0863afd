"""ONE RECORD PER DECODER FAMILY: what its layers are made of, its tensors' names, and what its config.json may say.

`transformer` and `decoder_layer` build every family from these records, `param_table` names its tensors by them, and
`hf_config` reads and writes its config.json. No code asks which family it has; docs/models.md says how to add one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fpo_jax.models import activations

FULL, SLIDING, FULL_UNROTATED, SLIDING_UNROTATED = "full", "sliding", "full_unrotated", "sliding_unrotated"
LAYER_TYPES = (FULL, SLIDING, FULL_UNROTATED, SLIDING_UNROTATED)  # of attention; unrotated = without rotary embedding

# matrix -> (letters of its input axes, of its output axes); what a family's `qkv` is, says its record
MATRICES = {
    "query": ("D", "HC"),
    "key": ("D", "GC"),
    "value": ("D", "GC"),
    "out": ("HC", "D"),
    "gate": ("D", "F"),
    "up": ("D", "F"),
    "gate_up": ("D", "2F"),
    "down": ("F", "D"),
    # of a mixture of experts; gate, up and down are there one per expert, where "{expert}" stands in their names or
    # `stacked_experts` says so
    "router": ("D", "E"),
    "shared_gate": ("D", "S"),
    "shared_up": ("D", "S"),
    "shared_down": ("S", "D"),
    "shared_share": ("D", "1"),
    # of multi-head latent attention, whose letters param_table explains; its `out` reads heads of the values' size
    "query_down": ("D", "Q"),
    "query_up": ("Q", "HC"),
    "kv_down": ("D", "W"),
    "kv_up": ("Z", "HY"),
}
_LATENT_OUT = ("HM", "D")
_QKV = ("query", "key", "value")
_ATTENTION = (*_QKV, "out")
_SEPARATE = {name: f"self_attn.{letter}_proj" for name, letter in zip(_ATTENTION, "qkvo", strict=True)}
_GATED = {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
_PLAIN = {name: f"mlp.{name}_proj" for name in ("up", "down")}
_ROUTED = {"router": "mlp.gate"} | {name: f"mlp.experts.{{expert}}.{name}_proj" for name in ("gate", "up", "down")}
_LATENT = {
    "query": "self_attn.q_proj",  # where queries are not compressed
    "query_down": "self_attn.q_a_proj",
    "query_up": "self_attn.q_b_proj",
    "kv_down": "self_attn.kv_a_proj_with_mqa",
    "kv_up": "self_attn.kv_b_proj",
    "out": "self_attn.o_proj",
}
_SHARED_EXPERTS = {f"shared_{name}": f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")}
_SHARED_EXPERT = {f"shared_{name}": f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}

# field of ModelConfig -> key of config.json, for the fields that are copied as they are
_SHARED_KEYS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "activation": "hidden_act",
    "tied_head": "tie_word_embeddings",
    "initializer_range": "initializer_range",
    "bos_id": "bos_token_id",
    "pad_id": "pad_token_id",
}
_KEYS = _SHARED_KEYS | {"norm_eps": "rms_norm_eps", "kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
_WINDOW = {"sliding_window": "sliding_window"}
_CAPS = {"attention_soft_cap": "attn_logit_softcapping", "final_soft_cap": "final_logit_softcapping"}
# what an absent key means, as in transformers' config classes; keys that stand in neither table must be present
_SHARED_ABSENT = {"tie_word_embeddings": False, "initializer_range": 0.02, "bos_token_id": None, "pad_token_id": None}
_ABSENT = _SHARED_ABSENT | {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "head_dim": None,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
}
_BUFFERS = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq",)
_ONE_BIAS_KEY = {"attention_bias": _ATTENTION}
_BIAS_KEYS = {"attention_bias": _ATTENTION, "mlp_bias": ("gate", "up", "down")}
_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
_CAUSAL = {"use_bidirectional_attention": (None, False)}


@dataclasses.dataclass(frozen=True)
class Family:
    """One decoder family. The defaults are those of Llama."""

    architecture: str  # transformers' class of the language model
    reward_architecture: str | None = None  # of the classifier; None = transformers has none

    # --- the decoder
    norm: str = "rms"  # a key of layers.NORMS
    # place of a norm in the layer (attention_norm, attention_out_norm, mlp_norm, mlp_out_norm) -> its name on disk
    norms: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    )
    # letters of the axes over which queries and keys are normalised, and of their scales: "C" each head, all heads with
    # one scale; "C HC" each head, with its own scale; "HC" all heads of a token together; None = not at all
    query_key_norm: str | None = None
    parallel: bool = False  # attention and MLP read the layer's input; without an mlp_norm, the same normalised one
    matrices: Mapping[str, str] = dataclasses.field(default_factory=lambda: _SEPARATE | _GATED)  # -> name on disk
    dense_matrices: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of the MLP of layers without experts
    qkv: str = ""  # letters of a fused matrix's outputs: "H3C", "3HC", or "JC" with J = H + 2G; "" = three matrices
    transposed: bool = False  # matrices lie on disk as they are multiplied: input axes first
    stacked_experts: bool = False  # one tensor on disk holds a matrix of all experts, input axes first
    gating: str = ""  # a key of activations.GATINGS, in place of act(gate) * up with the activation of config.json
    unnormalized_top_k: bool = False  # the weights of a token's experts are the router's probabilities, in any case
    peft_has_mlp: bool = True  # whether PEFT reads adapters of MLPs and shared experts as such, not as of the experts
    sinks: bool = False  # every query head has a logit of its own, see attention.attend
    biases: tuple[str, ...] = ()  # matrices that always have one, unless a key of bias_keys says otherwise
    learned_positions: bool = False  # positions are embedded and nothing is rotated
    interleaved: bool = False  # rotary pairs are neighbours (2p, 2p + 1), not (p, p + P)
    sqrt_width_embedding: bool = False  # embeddings are multiplied by sqrt(D)
    layer_types: tuple[str, ...] = (FULL,)  # of the first layers; they repeat. Sliding ones without a window are full

    # --- its tensors
    layer: str = "model.layers.{layer}."
    embed: str = "model.embed_tokens"
    positions: str = ""
    final_norm: str = "model.norm"
    head: str = "lm_head"
    buffers: tuple[str, ...] = _BUFFERS  # tensors of published files that carry no weights
    bare_prefix: str = ""  # that some published files leave out of every name

    # --- its config.json
    keys: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(_KEYS))
    absent: Mapping[str, Any] = dataclasses.field(default_factory=lambda: dict(_ABSENT))
    bias_keys: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # key -> matrices it gives one
    # key of bias_keys -> what an absent one means, where that is not False
    absent_biases: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    neutral: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)  # key -> values without effect
    consumed: tuple[str, ...] = ()  # keys that hf_config reads itself: query_pre_attn_scalar, window patterns, ...
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)  # other name of a key -> the key
    activation_names: Mapping[str, str] = dataclasses.field(default_factory=dict)  # name there -> what it means there
    hf_layer_types: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of layer_types -> ours; {} = not read
    extra: tuple[str, ...] = ()  # fields of ModelConfig with a meaning, beside those of `keys`
    theta: float = 10000.0  # base of the rotary frequencies where config.json names none
    sliding_theta: float | None = None  # of sliding layers, which then have a rotary embedding of their own
    absent_rope: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # scaling where config.json has none
    rotary_share: float = 1.0  # where config.json names none
    partial_rotary: bool = False  # whether transformers reads a rotated share
    theta_key: str = "rope_theta"  # to write them under
    share_key: str = "partial_rotary_factor"
    original_positions: int | None = None  # original_max_position_embeddings where config.json names none
    rope_types: tuple[str, ...] = ()  # that transformers allows; () = all
    rope_names: Mapping[str, str] = dataclasses.field(default_factory=dict)  # other name of a rope type -> the type
    quantised: tuple[str, ...] = ()  # quant_method of quantization_config that is read, as bfloat16
    square_heads: bool = False  # heads * head_dim is the width
    dropout: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict(_DROPOUT))  # key -> absent

    @property
    def mlp(self) -> str:
        """The kind of the MLP: "moe", "gated" or "plain"."""
        if "router" in self.matrices:
            return "moe"
        return "gated" if {"gate", "gate_up"} & {*self.matrices} else "plain"

    @property
    def latent(self) -> bool:
        """Whether keys and values are made from a compressed latent (MLA, arXiv 2405.04434)."""
        return "kv_down" in self.matrices

    @property
    def kv_heads_are_heads(self) -> bool:
        """Whether every query head has keys and values of its own."""
        return self.qkv in ("H3C", "3HC")

    def matrix(self, name: str) -> tuple[str, str]:
        """Return the letters of a matrix's input and output axes."""
        if name == "out" and self.latent:
            return _LATENT_OUT
        return ("D", self.qkv) if name == "qkv" else MATRICES[name]


def _llama(name: str, **changed: Any) -> Family:
    """Describe a family by what differs from Llama, under the names that transformers gives the classes of `name`."""
    options: dict[str, Any] = {"architecture": f"{name}ForCausalLM"}
    options["reward_architecture"] = f"{name}ForSequenceClassification"
    return Family(**(options | changed))


_SANDWICH = {
    "attention_norm": "input_layernorm",
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
_AFTER = {"attention_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"}
_FUSED = {
    "qkv": "self_attn.qkv_proj",
    "out": "self_attn.o_proj",
    "gate_up": "mlp.gate_up_proj",
    "down": "mlp.down_proj",
}
# of a mixture; `router_aux_weight` is read, and used where the key after it or a config field says so
_MIXTURE_KEYS = {
    "experts_per_token": "num_experts_per_tok",
    "router_aux_weight": "router_aux_loss_coef",
    "router_aux_loss": "output_router_logits",
    "router_z_weight": "router_z_loss_coef",  # as in ST-MoE and Switch; most mixtures name none
}
_MIXTURE_ABSENT = {"router_aux_loss_coef": 0.001, "output_router_logits": False, "router_z_loss_coef": 0.0}
_QWEN_MIXTURE = {
    "keys": _KEYS
    | _MIXTURE_KEYS
    | {"ffn": "moe_intermediate_size", "experts": "num_experts", "normalize_top_k": "norm_topk_prob"},
    # every layer has experts: `intermediate_size`, of layers without, is read by none
    "neutral": {
        "decoder_sparse_step": (1,),
        "mlp_only_layers": (None, []),
        "use_sliding_window": (None, False),
    },
    "consumed": ("intermediate_size", "sliding_window", "max_window_layers"),
}
_QWEN_MIXTURE_ABSENT = _ABSENT | _MIXTURE_ABSENT | {"max_position_embeddings": 32768, "norm_topk_prob": False}
_MIXED = {"full_attention": FULL, "sliding_attention": SLIDING}
_MIXED_UNROTATED = {"full_attention": FULL_UNROTATED, "sliding_attention": SLIDING}
_QWEN = {
    "keys": _KEYS | _WINDOW,
    "absent": _ABSENT | {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "consumed": ("use_sliding_window", "max_window_layers"),
    "hf_layer_types": _MIXED,
}
_GEMMA_ABSENT = _ABSENT | {"max_position_embeddings": 8192, "head_dim": 256, "tie_word_embeddings": True}
_GEMMA = {"norm": "offset_rms", "sqrt_width_embedding": True, "bias_keys": _ONE_BIAS_KEY, "neutral": _CAUSAL}
_GEMMA_CAPPED = _GEMMA | {
    "norms": _SANDWICH,
    "keys": _KEYS | _WINDOW | _CAPS | {"activation": "hidden_activation"},
    "hf_layer_types": _MIXED,
    "extra": ("query_scale",),
}
_LAYER_NORM_KEYS = {key: value for key, value in _KEYS.items() if key != "norm_eps"}
_LAYER_NORM_ABSENT = {key: value for key, value in _ABSENT.items() if key != "rms_norm_eps"}
_COHERE = {
    "reward_architecture": None,
    "norm": "layer_scale",
    "norms": {"attention_norm": "input_layernorm"},
    "parallel": True,
    "interleaved": True,
    "bias_keys": _ONE_BIAS_KEY,
}
_COHERE_KEYS = _LAYER_NORM_KEYS | {"norm_eps": "layer_norm_eps", "logit_scale": "logit_scale"}
_COHERE_ABSENT = _LAYER_NORM_ABSENT | {
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "logit_scale": 0.0625,
}
_GLM_ABSENT = _ABSENT | {"max_position_embeddings": 131072, "head_dim": 128, "rms_norm_eps": 1.5625e-7}
_GLM = {
    "matrices": _SEPARATE | {"gate_up": "mlp.gate_up_proj", "down": "mlp.down_proj"},
    "interleaved": True,
    "partial_rotary": True,
    "rotary_share": 0.5,
    "bias_keys": {"attention_bias": _QKV},
    "absent_biases": {"attention_bias": True},
    "absent": _GLM_ABSENT | {"num_key_value_heads": 2},
}

FAMILIES: dict[str, Family] = {
    "llama": _llama("Llama", bias_keys=_BIAS_KEYS),
    "mistral": _llama(
        "Mistral",
        layer_types=(SLIDING,),
        keys=_KEYS | _WINDOW,
        absent=_ABSENT | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "ministral": _llama(
        "Ministral",
        layer_types=(SLIDING,),
        keys=_KEYS | _WINDOW,
        absent=_ABSENT | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        hf_layer_types=_MIXED,
    ),
    "qwen2": _llama("Qwen2", biases=_QKV, **_QWEN),
    "qwen3": _llama(
        "Qwen3",
        query_key_norm="C",
        bias_keys=_ONE_BIAS_KEY,
        **_QWEN | {"absent": _QWEN["absent"] | {"head_dim": 128}},
    ),
    "mixtral": _llama(
        "Mixtral",
        matrices=_SEPARATE
        | {"router": "block_sparse_moe.gate"}
        | {
            name: f"block_sparse_moe.experts.{{expert}}.w{number}"
            for name, number in (("gate", 1), ("up", 3), ("down", 2))
        },
        layer_types=(SLIDING,),
        keys=_KEYS | _WINDOW | _MIXTURE_KEYS | {"experts": "num_local_experts"},
        absent=_ABSENT
        | _MIXTURE_ABSENT
        | {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
            "bos_token_id": 1,
        },
        neutral={"router_jitter_noise": (None, 0.0)},
        aliases={"num_experts": "num_local_experts"},
        theta=1e6,
    ),
    "qwen2_moe": _llama(
        "Qwen2Moe",
        matrices=_SEPARATE | _ROUTED | _SHARED_EXPERT | {"shared_share": "mlp.shared_expert_gate"},
        bias_keys={"qkv_bias": _QKV},
        absent_biases={"qkv_bias": True},
        **_QWEN_MIXTURE | {"keys": _QWEN_MIXTURE["keys"] | {"shared_ffn": "shared_expert_intermediate_size"}},
        absent=_QWEN_MIXTURE_ABSENT
        | {
            "num_key_value_heads": 16,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts_per_tok": 4,
            "num_experts": 60,
        },
    ),
    "qwen3_moe": _llama(
        "Qwen3Moe",
        matrices=_SEPARATE | _ROUTED,
        query_key_norm="C",
        bias_keys=_ONE_BIAS_KEY,
        aliases={"num_local_experts": "num_experts"},  # as transformers 5 writes it
        **_QWEN_MIXTURE,
        absent=_QWEN_MIXTURE_ABSENT
        | {"num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_experts": 128},
    ),
    "gpt_oss": _llama(
        "GptOss",
        matrices=_SEPARATE
        | {"router": "mlp.router", "gate_up": "mlp.experts.gate_up_proj", "down": "mlp.experts.down_proj"},
        stacked_experts=True,
        gating="clamped_swiglu",
        sinks=True,
        biases=("router", "gate_up", "down"),
        bias_keys=_ONE_BIAS_KEY,
        absent_biases={"attention_bias": True},
        layer_types=(SLIDING, FULL),
        hf_layer_types=_MIXED,
        keys={key: name for key, name in _KEYS.items() if key != "activation"}
        | _WINDOW
        | _MIXTURE_KEYS
        | {"experts": "num_local_experts"},
        absent=_ABSENT
        | _MIXTURE_ABSENT
        | {
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 36,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "sliding_window": 128,
            "num_experts_per_tok": 4,
            "num_local_experts": 128,
        },
        neutral={
            "hidden_act": (None, "silu"),  # transformers reads it nowhere
            "swiglu_alpha": (activations.SWIGLU_ALPHA,),
            "swiglu_limit": (activations.SWIGLU_LIMIT,),
        },
        aliases={"num_experts": "num_local_experts"},
        theta=150000.0,
        absent_rope={
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        quantised=("mxfp4",),
    ),
    "deepseek_v2": _llama(
        "DeepseekV2",
        matrices=_LATENT | _ROUTED | _SHARED_EXPERTS,
        dense_matrices=_GATED,
        interleaved=True,
        unnormalized_top_k=True,
        peft_has_mlp=False,
        bias_keys={"attention_bias": ("query_down", "kv_down", "out")},
        keys={field: key for field, key in _KEYS.items() if field != "head_dim"}
        | {
            "ffn": "moe_intermediate_size",
            "dense_ffn": "intermediate_size",
            "dense_layers": "first_k_dense_replace",
            "experts": "n_routed_experts",
            "experts_per_token": "num_experts_per_tok",
            "routed_scale": "routed_scaling_factor",
            "rope_dim": "qk_rope_head_dim",
            "value_dim": "v_head_dim",
            "kv_rank": "kv_lora_rank",
            "query_rank": "q_lora_rank",
        },
        absent=_ABSENT
        | {
            "vocab_size": 102400,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "moe_intermediate_size": 1407,
            "first_k_dense_replace": 0,
            "n_routed_experts": 64,
            "routed_scaling_factor": 1.0,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "bos_token_id": 1,
        },
        # transformers reads neither of the first three; DeepSeek's own code normalises by the first and has no other
        # values of the next two in what is published
        neutral={"norm_topk_prob": (None, False), "scoring_func": (None, "softmax"), "moe_layer_freq": (None, 1)},
        # transformers overwrites the first two; its class has no load-balancing loss for the third to switch on
        consumed=(
            "head_dim",
            "qk_head_dim",
            "output_router_logits",
            "qk_nope_head_dim",
            "n_shared_experts",
            "topk_method",
            "n_group",
            "topk_group",
        ),
        extra=("shared_ffn", "expert_groups", "groups_per_token"),
        aliases={"num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts"},
    ),
    "gemma": _llama(
        "Gemma",
        **_GEMMA | {"neutral": _CAUSAL | {"hidden_activation": (None, "gelu_pytorch_tanh")}},
        absent=_GEMMA_ABSENT | {"num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"},
        activation_names={"gelu": "gelu_pytorch_tanh"},  # a mistake of the first release, read so everywhere
    ),
    "gemma2": _llama(
        "Gemma2",
        **_GEMMA_CAPPED,
        layer_types=(SLIDING, FULL),
        consumed=("query_pre_attn_scalar",),
        absent=_GEMMA_ABSENT
        | {
            "num_key_value_heads": 4,
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3_text": _llama(
        "Gemma3",
        **_GEMMA_CAPPED
        | {
            "keys": {key: name for key, name in _GEMMA_CAPPED["keys"].items() if key != "attention_soft_cap"},
            "neutral": _CAUSAL | {"attn_logit_softcapping": (None,)},  # transformers reads it and caps nothing
        },
        reward_architecture="Gemma3TextForSequenceClassification",
        query_key_norm="C",
        layer_types=(*(SLIDING,) * 5, FULL),
        consumed=("query_pre_attn_scalar", "sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq"),
        theta=1e6,
        sliding_theta=10000.0,
        absent=_GEMMA_ABSENT
        | {
            "max_position_embeddings": 131072,
            "vocab_size": 262208,  # published configs leave out what is as the class has it
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": 4096,
            "final_logit_softcapping": None,
        },
    ),
    "phi3": _llama(
        "Phi3",
        matrices=_FUSED,
        qkv="JC",
        layer_types=(SLIDING,),
        keys=_KEYS | _WINDOW,
        absent=_ABSENT | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "sliding_window": None},
        partial_rotary=True,
        original_positions=4096,
        rope_types=("default", "longrope"),
        rope_names={"su": "longrope", "yarn": "longrope"},
        dropout={"attention_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    ),
    "olmo2": _llama(
        "Olmo2",
        norms=_AFTER,
        query_key_norm="HC",
        bias_keys=_ONE_BIAS_KEY,
        absent=_ABSENT | {"rms_norm_eps": 1e-5},
    ),
    "olmo3": _llama(
        "Olmo3",
        norms=_AFTER,
        query_key_norm="HC",
        bias_keys=_ONE_BIAS_KEY,
        keys=_KEYS | _WINDOW,
        absent=_ABSENT | {"rms_norm_eps": 1e-5, "sliding_window": 4096},
        layer_types=(SLIDING, SLIDING, SLIDING, FULL),
        hf_layer_types=_MIXED,
        theta=500000.0,
        sliding_theta=500000.0,
    ),
    "granite": _llama(
        "Granite",
        reward_architecture=None,
        bias_keys=_BIAS_KEYS,
        keys=_KEYS
        | {
            "query_scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
        },
        absent=_ABSENT | {"attention_multiplier": 1.0, "embedding_multiplier": 1.0, "residual_multiplier": 1.0},
        consumed=("logits_scaling",),
        extra=("logit_scale",),
    ),
    "smollm3": _llama(
        "SmolLM3",
        bias_keys=_BIAS_KEYS,
        keys=_KEYS | _WINDOW,
        absent=_ABSENT
        | {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "sliding_window": None,
        },
        layer_types=(FULL, FULL, FULL, FULL_UNROTATED),
        hf_layer_types=_MIXED,
        consumed=("no_rope_layers", "no_rope_layer_interval", "use_sliding_window"),
        theta=2e6,
    ),
    "arcee": _llama(
        "Arcee",
        matrices=_SEPARATE | _PLAIN,
        bias_keys={"attention_bias": _ATTENTION, "mlp_bias": ("up", "down")},
        absent=_ABSENT | {"hidden_act": "relu2", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    ),
    "internlm3": _llama(
        "Llama",
        bias_keys=_BIAS_KEYS,
        aliases={"qkv_bias": "attention_bias", "bias": "mlp_bias"},
        absent=_ABSENT
        | {"max_position_embeddings": 32768, "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5},
    ),
    "seed_oss": _llama(
        "SeedOss",
        bias_keys={"attention_bias": _QKV, "attention_out_bias": ("out",), "mlp_bias": ("gate", "up", "down")},
        absent_biases={"attention_bias": True},
        absent=_ABSENT | {"max_position_embeddings": 524288, "num_key_value_heads": 8, "head_dim": 128},
        dropout={"attention_dropout": 0.1, "residual_dropout": 0.1},
    ),
    "exaone4": _llama(
        "Exaone4",
        norms=_AFTER,
        query_key_norm="C",
        keys=_KEYS | _WINDOW,
        absent=_ABSENT | {"num_key_value_heads": 32, "rms_norm_eps": 1e-5, "sliding_window": 4096},
        layer_types=(SLIDING, SLIDING, SLIDING, FULL_UNROTATED),
        hf_layer_types=_MIXED_UNROTATED,
        consumed=("sliding_window_pattern",),
    ),
    "helium": _llama(
        "Helium",
        interleaved=True,
        square_heads=True,
        bias_keys={"attention_bias": _QKV, "mlp_bias": ("gate", "up", "down")},
        absent=_ABSENT
        | {"max_position_embeddings": 4096, "num_key_value_heads": 20, "head_dim": 128, "rms_norm_eps": 1e-8},
        theta=100000.0,
    ),
    "glm": _llama("Glm", **_GLM),
    "glm4": _llama(
        "Glm4",
        **_GLM,
        norms={
            "attention_norm": "input_layernorm",
            "attention_out_norm": "post_self_attn_layernorm",
            "mlp_norm": "post_attention_layernorm",
            "mlp_out_norm": "post_mlp_layernorm",
        },
    ),
    "cohere": _llama(
        "Cohere",
        **_COHERE,
        query_key_norm="C HC",
        keys=_COHERE_KEYS | {"query_key_norm": "use_qk_norm"},
        absent=_COHERE_ABSENT | {"use_qk_norm": False},
        theta=500000.0,
    ),
    "cohere2": _llama(
        "Cohere2",
        **_COHERE,
        keys=_COHERE_KEYS | _WINDOW,
        absent=_COHERE_ABSENT | {"sliding_window": 4096},
        layer_types=(SLIDING, SLIDING, SLIDING, FULL_UNROTATED),
        hf_layer_types=_MIXED_UNROTATED,
        consumed=("sliding_window_pattern",),
        square_heads=True,
    ),
    "starcoder2": _llama(
        "Starcoder2",
        norm="layer",
        matrices=_SEPARATE | {"up": "mlp.c_fc", "down": "mlp.c_proj"},
        bias_keys={"use_bias": (*_ATTENTION, "up", "down")},
        absent_biases={"use_bias": True},
        layer_types=(SLIDING,),
        keys=_LAYER_NORM_KEYS | _WINDOW | {"norm_eps": "norm_epsilon"},
        absent=_LAYER_NORM_ABSENT
        | {
            "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 4096,
            "initializer_range": 0.018042,
            "num_key_value_heads": 2,
            "norm_epsilon": 1e-5,
            "sliding_window": None,
            "tie_word_embeddings": True,
        },
        dropout={"attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    ),
    "gpt_neox": _llama(
        "GPTNeoX",
        norm="layer",
        matrices={
            "qkv": "attention.query_key_value",
            "out": "attention.dense",
            "up": "mlp.dense_h_to_4h",
            "down": "mlp.dense_4h_to_h",
        },
        qkv="H3C",
        biases=("up", "down"),
        bias_keys={"attention_bias": ("qkv", "out")},
        absent_biases={"attention_bias": True},
        layer="gpt_neox.layers.{layer}.",
        embed="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        head="embed_out",
        buffers=tuple(
            "gpt_neox.layers.{layer}.attention." + name for name in ("rotary_emb.inv_freq", "bias", "masked_bias")
        ),
        keys=_SHARED_KEYS | {"norm_eps": "layer_norm_eps", "parallel_residual": "use_parallel_residual"},
        absent=_SHARED_ABSENT
        | {
            "max_position_embeddings": 2048,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "use_parallel_residual": True,
        },
        rotary_share=0.25,
        partial_rotary=True,
        theta_key="rotary_emb_base",
        share_key="rotary_pct",
        square_heads=True,
    ),
    "gpt2": _llama(
        "GPT2",
        architecture="GPT2LMHeadModel",
        norm="layer",
        norms={"attention_norm": "ln_1", "mlp_norm": "ln_2"},
        matrices={"qkv": "attn.c_attn", "out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
        qkv="3HC",
        transposed=True,
        biases=("qkv", "out", "up", "down"),
        learned_positions=True,
        layer="transformer.h.{layer}.",
        embed="transformer.wte",
        positions="transformer.wpe",
        final_norm="transformer.ln_f",
        buffers=("transformer.h.{layer}.attn.bias", "transformer.h.{layer}.attn.masked_bias"),
        bare_prefix="transformer.",
        keys=_SHARED_KEYS
        | {
            "width": "n_embd",
            "layers": "n_layer",
            "heads": "n_head",
            "ffn": "n_inner",
            "max_positions": "n_positions",
            "activation": "activation_function",
            "norm_eps": "layer_norm_epsilon",
            "inverse_layer_scale": "scale_attn_by_inverse_layer_idx",
        },
        absent=_SHARED_ABSENT
        | {
            "n_inner": None,
            "n_positions": 1024,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "scale_attn_by_inverse_layer_idx": False,
        },
        # the second asks for float32 attention, which is the only one here
        neutral={"scale_attn_weights": (None, True), "reorder_and_upcast_attn": (None, False, True)},
        square_heads=True,
        # what transformers gives other classes only is passed over: summary_first_dropout (GPT2DoubleHeadsModel)
        dropout=_DROPOUT | {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1},
    ),
}
# model_type of a checkpoint with a text tower -> what else it holds, which is left out
WITH_TEXT_TOWER = {"gemma3": "the vision tower and its projector", "mistral3": "the vision tower and its projector"}
