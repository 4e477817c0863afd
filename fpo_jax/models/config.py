"""The frozen description of a decoder, and its translation from and to a Hugging Face config.json.

Everything a config can say that would change the numbers is either honoured or refused by name; keys without effect
on the forward pass (use_cache, architectures, ...) are passed over. Drop-out, which changes training alone, is kept by
name, and refusing it is the business of who trains.
"""

import dataclasses
import math
import sys
from typing import Any

from fpo_jax.models import activations, rope
from fpo_jax.models.rope import Rope


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder's architecture; hashable, so that it can be a static argument of a jitted function."""

    family: str  # Hugging Face model_type, one of FAMILIES
    vocab_size: int  # V
    width: int  # D
    layers: int  # L
    heads: int  # H
    kv_heads: int  # G, divides H; equal to H for gpt_neox and gpt2
    head_dim: int  # C; need not be D / H
    ffn: int  # F
    max_positions: int  # longest text the model was trained for; dynamic rope scales beyond it
    activation: str = "silu"  # a key of activations.ACTIVATIONS
    norm_eps: float = 1e-5
    rope: Rope = dataclasses.field(default_factory=Rope)
    sliding_window: int | None = None  # positions a query sees, itself included; in gemma2 of every other layer
    query_scale: float | None = None  # factor on the attention logits; None = head_dim**-0.5
    attention_soft_cap: float | None = None  # bound on the magnitude of the attention logits; gemma2 only
    final_soft_cap: float | None = None  # the same of the head's logits; gemma2 only
    parallel_residual: bool = False  # attention and MLP read the same input; gpt_neox only
    tied_head: bool = False  # the LM head is the embedding
    reward_head: bool = False  # a score of each position instead of an LM head
    initializer_range: float = 0.02  # standard deviation of fresh weights
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    dropout: tuple[tuple[str, float], ...] = ()  # (key of config.json, share) of what training drops there, never here

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Sliding windows of the first layers; they repeat."""
        return (self.sliding_window, None) if self.family == "gemma2" else (self.sliding_window,)

    @property
    def learned_positions(self) -> bool:
        """Whether positions are embedded and nothing is rotated."""
        return self.family == "gpt2"

    def __post_init__(self):
        """Raise ValueError naming every field that is out of range or unsupported."""
        if problems := _problems(self):
            raise ValueError(f"unsupported {self.family} model: " + "; ".join(problems) + ".")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Low-rank additions to a decoder's matrices (LoRA, arXiv 2106.09685): y = x W + alpha/rank dropout(x) A B."""

    rank: int  # r
    alpha: float
    dropout: float
    # paths of the matrices that have one, from params.adapter
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """Factor on A B."""
        return self.alpha / self.rank


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
_LLAMA_KEYS = _SHARED_KEYS | {"norm_eps": "rms_norm_eps", "kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
_KEYS: dict[str, dict[str, str]] = {
    "llama": _LLAMA_KEYS,
    "mistral": _LLAMA_KEYS | {"sliding_window": "sliding_window"},
    "qwen2": _LLAMA_KEYS,
    "qwen3": _LLAMA_KEYS,
    "gemma2": _LLAMA_KEYS
    | {
        "activation": "hidden_activation",
        "sliding_window": "sliding_window",
        "attention_soft_cap": "attn_logit_softcapping",
        "final_soft_cap": "final_logit_softcapping",
    },
    "gpt_neox": _SHARED_KEYS | {"norm_eps": "layer_norm_eps", "parallel_residual": "use_parallel_residual"},
    "gpt2": _SHARED_KEYS
    | {
        "width": "n_embd",
        "layers": "n_layer",
        "heads": "n_head",
        "ffn": "n_inner",
        "max_positions": "n_positions",
        "activation": "activation_function",
        "norm_eps": "layer_norm_epsilon",
    },
}
# What an absent key means, as in transformers' config classes; keys that stand in neither table must be present.
_SHARED_DEFAULTS = {
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "pad_token_id": None,
}
_LLAMA_DEFAULTS = _SHARED_DEFAULTS | {"hidden_act": "silu", "rms_norm_eps": 1e-6, "head_dim": None}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_DEFAULTS | {"max_position_embeddings": 2048, "num_key_value_heads": None},
    "mistral": _LLAMA_DEFAULTS
    | {"max_position_embeddings": 4096 * 32, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _LLAMA_DEFAULTS | {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": _LLAMA_DEFAULTS | {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    "gemma2": _LLAMA_DEFAULTS
    | {
        "max_position_embeddings": 8192,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    "gpt2": _SHARED_DEFAULTS
    | {
        "n_inner": None,
        "n_positions": 1024,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    "gpt_neox": _SHARED_DEFAULTS
    | {"max_position_embeddings": 2048, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "use_parallel_residual": True},
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
_REWARD = "ForSequenceClassification"
LARGEST = 2**31 - 1  # of any size: indices are int32
MOST_LAYERS = 10_000  # each has its own names and rows, so that the count is a length here and no mere number
FAMILIES = tuple(_ARCHITECTURES)

# key of config.json -> values that leave the forward and backward pass as built here; any other value is refused
_DTYPES = (None, "auto", "float64", "float32", "float16", "bfloat16")  # names that a typo would turn into nothing
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "dtype": _DTYPES,
    "torch_dtype": _DTYPES,
    "quantization_config": (None,),
    "mlp_bias": (None, False),
    "is_causal": (None, True),
    "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "original_max_position_embeddings": (None,),
}
_NEUTRAL_OF: dict[str, dict[str, tuple[Any, ...]]] = {
    family: {"attention_bias": (None, True) if family == "gpt_neox" else (None, False)} for family in FAMILIES
}
_NEUTRAL_OF["qwen2"] |= {"use_sliding_window": (None, False)}
_NEUTRAL_OF["qwen3"] |= {"use_sliding_window": (None, False)}
_NEUTRAL_OF["gemma2"] |= {"use_bidirectional_attention": (None, False)}
_NEUTRAL_OF["gpt2"] = {
    "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "reorder_and_upcast_attn": (None, False),
}
# Shares that transformers drops in training, and what an absent key means there. What it gives other classes only is
# passed over: classifier_dropout (token classification), summary_first_dropout (GPT2DoubleHeads).
_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
_DROPOUT_OF = dict.fromkeys(FAMILIES, _DROPOUT) | {
    "gpt2": _DROPOUT | {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1}
}


def from_hf_config(config: dict[str, Any]) -> ModelConfig:
    """Read the dict of a config.json, as transformers 4 or transformers 5 write it.

    Raises:
        ValueError: missing keys and unsupported features, all of them at once.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}.")
    _check_kinds(config)
    problems = _refusals(config, family)
    dropout = {key: config.get(key, absent) for key, absent in _DROPOUT_OF[family].items()}
    dropout = {key: share for key, share in dropout.items() if share is not None}
    problems += [
        f"{key}={share!r} must be a share in [0, 1)"
        for key, share in dropout.items()
        if type(share) not in (int, float) or not 0 <= share < 1
    ]
    values: dict[str, Any] = {}
    for field, key in _KEYS[family].items():
        if key in config or key in _DEFAULTS[family]:
            values[field] = config.get(key, _DEFAULTS[family].get(key))
        else:
            problems.append(f"{key} is missing")
    if family == "gemma2":
        values["query_scale"] = float(config.get("query_pre_attn_scalar", 256)) ** -0.5
    if family == "gpt2" and values.get("ffn") is None and isinstance(values.get("width"), int):
        values["ffn"] = 4 * values["width"]
    problems += _layer_types(config, family, values)
    try:
        values["rope"] = Rope() if family == "gpt2" else _rope_from_hf(config, family, values.get("max_positions"))
    except ValueError as error:
        problems.append(str(error).rstrip("."))
    if values.get("kv_heads") is None:
        values["kv_heads"] = values.get("heads", 1)
    if values.get("head_dim") is None:
        values["head_dim"] = _default_head_dim(values, problems)
    values["reward_head"] = any(str(name).endswith(_REWARD) for name in config.get("architectures") or ())
    if values["reward_head"] and (labels := _labels(config)) != 1:
        problems.append(f"a classifier of {labels} labels is no reward model, which has one (num_labels or id2label)")
    problems += rope.type_problems(ModelConfig, values, names=_KEYS[family])
    eos = config.get("eos_token_id")
    values["eos_ids"] = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    if any(type(token) is not int for token in values["eos_ids"]):
        problems.append(f"eos_token_id={eos!r} must be int, a list of int or null")
    if problems:
        raise ValueError(f"config.json of a {family} model: " + "; ".join(problems) + ".")
    values["dropout"] = tuple((key, share) for key, share in dropout.items() if share)
    return ModelConfig(family=family, **values)


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """Write the config.json of a model that was born here, in the keys that transformers 4 and 5 both read.

    from_hf_config(to_hf_config(config)) == config.
    """
    keys = {key: getattr(config, field) for field, key in _KEYS[config.family].items()}
    eos_ids = config.eos_ids
    keys["eos_token_id"] = None if not eos_ids else eos_ids[0] if len(eos_ids) == 1 else list(eos_ids)
    if config.query_scale is not None:
        scalar = config.query_scale**-2
        keys["query_pre_attn_scalar"] = round(scalar) if math.isclose(scalar, round(scalar)) else scalar
    keys |= {key: 0.0 for key, absent in _DROPOUT_OF[config.family].items() if absent} | dict(config.dropout)
    if config.learned_positions:
        return {"model_type": config.family, **keys, **head_keys(config)}
    theta_key = "rotary_emb_base" if config.family == "gpt_neox" else "rope_theta"
    keys |= {theta_key: config.rope.theta, "rope_scaling": rope.to_hf(config.rope)}
    if config.family == "gpt_neox":
        keys["rotary_pct"] = config.rope.fraction
    return {"model_type": config.family, **keys, **head_keys(config)}


def head_keys(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json that say what stands on top of the decoder."""
    architecture = _ARCHITECTURES[config.family]
    if not config.reward_head:
        return {"architectures": [architecture]}
    label = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    named = architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    return {"architectures": [named + _REWARD], **label}


def pad_token_id(config: ModelConfig) -> int:
    """Return the token that fills up the rows of a reward model in transformers: pad, or EOS where there is none.

    Raises:
        ValueError: the config names neither.
    """
    if config.pad_id is None and not config.eos_ids:
        raise ValueError("config.json names neither pad_token_id nor eos_token_id, and a reward model needs one.")
    return config.eos_ids[0] if config.pad_id is None else config.pad_id


def _labels(config: dict[str, Any]) -> int:
    """Return the number of labels of a classifier; transformers' default is 2."""
    return config["num_labels"] if "num_labels" in config else len(config.get("id2label") or (0, 1))


def _check_kinds(config: dict[str, Any]) -> None:
    """Refuse values of another kind under the keys that are no field of their own."""
    kinds = {"architectures": (list,), "id2label": (dict,), "num_labels": (int,), "query_pre_attn_scalar": (int, float)}
    wrong = [key for key, kind in kinds.items() if config.get(key) is not None and type(config[key]) not in kind]
    scalar = config.get("query_pre_attn_scalar", 256)
    if not wrong and not (scalar is not None and 0 < scalar <= sys.float_info.max):
        wrong.append("query_pre_attn_scalar")
    if wrong:
        raise ValueError("config.json: " + "; ".join(f"{key}={config[key]!s:.80} cannot be" for key in wrong) + ".")


def _refusals(config: dict[str, Any], family: str) -> list[str]:
    neutral = _NEUTRAL | _NEUTRAL_OF[family]
    return [
        f"{key}={config[key]!r} is not supported (supported: {', '.join(map(repr, values))})"
        for key, values in neutral.items()
        if key in config and config[key] not in values
    ]


def _layer_types(config: dict[str, Any], family: str, values: dict[str, Any]) -> list[str]:
    """Check the list that says which layers slide, where there is one, against what the family does."""
    given = config.get("layer_types")
    if given is None or not isinstance(values.get("layers"), int) or values["layers"] > MOST_LAYERS:
        return []
    full, sliding = "full_attention", "sliding_attention"
    window = values.get("sliding_window") is not None
    period = {"gemma2": (sliding, full), "mistral": (sliding if window else full,)}.get(family, (full,))
    expected = [period[layer % len(period)] for layer in range(values["layers"])]
    return [] if given == expected else [f"layer_types={given} is not supported (supported: {period} repeated)"]


def _rope_from_hf(config: dict[str, Any], family: str, max_positions: Any) -> Rope:
    """Gather the rope settings, which stand in up to three places, and refuse places that disagree."""
    places = [config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key)]
    if len(places) == 2 and places[0] != places[1]:
        raise ValueError("rope_parameters and rope_scaling disagree; keep one")
    parameters = places[0] if places else {}
    if not isinstance(parameters, dict):
        raise ValueError(f"rope_scaling must be a dict, not {parameters!r}")

    def one(default: float, *candidates: tuple[str, Any]) -> Any:
        given = [(name, value) for name, value in candidates if value is not None] or [("", default)]
        if any(value != given[0][1] for _, value in given):
            raise ValueError("; ".join(f"{name}={value}" for name, value in given) + " disagree; keep one")
        return given[0][1]

    theta = one(
        10000.0,
        ("rope_theta in the rope dict", parameters.get("rope_theta")),
        ("rope_theta", config.get("rope_theta")),
        ("rotary_emb_base", config.get("rotary_emb_base")),
    )
    fraction = one(
        0.25 if family == "gpt_neox" else 1.0,
        ("partial_rotary_factor in the rope dict", parameters.get("partial_rotary_factor")),
        ("partial_rotary_factor", config.get("partial_rotary_factor")),
        ("rotary_pct", config.get("rotary_pct")),
    )
    return rope.from_hf(parameters, theta=theta, fraction=fraction, max_positions=max_positions)


def _default_head_dim(values: dict[str, Any], problems: list[str]) -> int:
    """Return D / H; where that is not an integer, add a problem and return a placeholder."""
    width, heads = values.get("width"), values.get("heads")
    if not isinstance(width, int) or not isinstance(heads, int) or heads < 1:
        return 2
    if width % heads:
        problems.append(
            f"hidden_size={width} is not a multiple of num_attention_heads={heads} and no head_dim is given"
        )
    return width // heads


def _problems(config: ModelConfig) -> list[str]:
    sizes = ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "ffn", "max_positions")
    problems = [f"{name}={getattr(config, name)} must be positive" for name in sizes if getattr(config, name) < 1]
    problems += [
        f"{name}={getattr(config, name)} is beyond the largest that is supported, {most}"
        for name, most in {**dict.fromkeys(sizes, LARGEST), "layers": MOST_LAYERS}.items()
        if getattr(config, name) > most
    ]
    if config.family not in FAMILIES:
        problems.append(f"family {config.family!r} is none of {', '.join(FAMILIES)}")
    problems += [
        f"{name}={getattr(config, name)} must be 0 or larger, and finite"
        for name in ("norm_eps", "initializer_range")
        if not 0 <= getattr(config, name) < math.inf
    ]
    if config.activation not in activations.ACTIVATIONS:
        problems.append(f"activation {config.activation!r} is none of {', '.join(activations.ACTIVATIONS)}")
    window = config.sliding_window
    if window is not None and window < 1:
        problems.append(f"sliding_window={window} must be positive or None")
    if window is not None and config.family not in ("mistral", "gemma2"):
        problems.append(f"sliding_window={window} has no meaning for {config.family}")
    if config.parallel_residual and config.family != "gpt_neox":
        problems.append(f"parallel_residual has no meaning for {config.family}")
    if config.rope.fraction != 1 and config.family != "gpt_neox":
        problems.append(f"partial_rotary_factor={config.rope.fraction} has no meaning for {config.family}")
    if problems:
        return problems
    for name in ("attention_soft_cap", "final_soft_cap", "query_scale"):
        value = getattr(config, name)
        if value is not None and config.family != "gemma2":
            problems.append(f"{name}={value} has no meaning for {config.family}")
        elif value is not None and not 0 < value < math.inf:
            problems.append(f"{name}={value} must be positive and finite, or None")
    if config.layers % len(config.windows):
        problems.append(f"{config.layers} layers are not a multiple of the {len(config.windows)} kinds that alternate")
    if config.heads % config.kv_heads:
        problems.append(f"{config.heads} query heads are not a multiple of {config.kv_heads} key/value heads")
    if config.family in ("gpt_neox", "gpt2") and (config.kv_heads, config.head_dim * config.heads) != (
        config.heads,
        config.width,
    ):
        problems.append(f"{config.family} has kv_heads = heads and head_dim = width / heads")
    try:
        if not config.learned_positions:
            rope.rotated_pairs(config.rope, head_dim=config.head_dim)
    except ValueError as error:
        problems.append(str(error).rstrip("."))
    return problems
