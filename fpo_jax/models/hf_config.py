"""A Hugging Face config.json -> ModelConfig and back, by the records of `families`.

Everything a config can say that would change the numbers is either honoured or refused by name. A key that no table
here knows is compared with transformers' config class: a field of that class must be at its default, and what is no
field of it, transformers does not read either. Drop-out, which changes training alone, is kept by name, and refusing it
is the business of who trains.
"""

import dataclasses
import math
import sys
from typing import Any

from fpo_jax.models import families, rope
from fpo_jax.models.config import FAMILIES, MOST_LAYERS, ModelConfig, expanded, family_biases
from fpo_jax.models.rope import Rope

_REWARD = "ForSequenceClassification"
_FULL, _SLIDING = "full_attention", "sliding_attention"
_DTYPES = (None, "auto", "float64", "float32", "float16", "bfloat16")  # names that a typo would turn into nothing
# key of config.json -> values that leave the forward and backward pass as built here; any other value is refused
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "dtype": _DTYPES,
    "torch_dtype": _DTYPES,
    "quantization_config": (None,),
    "mlp_bias": (None, False),
    "attention_bias": (None, False),
    "is_causal": (None, True),
    "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "per_layer_config": (None, {}),
}
# keys that change no number
_PASSED_OVER = {
    "_attn_implementation",
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "auto_map",
    "cache_implementation",
    "chunk_size_feed_forward",
    "classifier_dropout",
    "id2label",
    "is_decoder",
    "label2id",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "tie_last_hidden_states",
    "transformers_version",
    "use_cache",
}
# keys that this file reads of every family
_READ = {
    "eos_token_id",
    "layer_types",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rotary_emb_base",
    "rotary_pct",
}
_OF_TEXT = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype", "torch_dtype")


def from_hf_config(config: dict[str, Any]) -> ModelConfig:
    """Read the dict of a config.json, as transformers 4 or transformers 5 write it.

    Raises:
        ValueError: missing keys and unsupported features, all of them at once.
    """
    config = text_config(config)
    name = config.get("model_type")
    if name not in FAMILIES:
        raise ValueError(f"model_type {name!r} is not supported; supported: {', '.join(FAMILIES)}.")
    family = families.FAMILIES[name]
    config = {family.aliases.get(key, key): value for key, value in config.items()}
    _check_kinds(config)
    problems = _refusals(config, family)
    dropout, wrong = _dropout(config, family)
    values, missing = _copied(config, family)
    problems += wrong + missing
    for read in (_scales, _biases, _layer_types, _ropes, _heads, _latent):
        found, wrong = read(config, family, values)
        values |= found
        problems += wrong
    values["reward_head"] = any(str(name).endswith(_REWARD) for name in config.get("architectures") or ())
    if values["reward_head"] and (labels := _labels(config)) != 1:
        problems.append(f"a classifier of {labels} labels is no reward model, which has one (num_labels or id2label)")
    problems += rope.type_problems(ModelConfig, values, names=family.keys)
    eos = config.get("eos_token_id")
    values["eos_ids"] = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    if any(type(token) is not int for token in values["eos_ids"]):
        problems.append(f"eos_token_id={eos!r} must be int, a list of int or null")
    if problems:
        raise ValueError(f"config.json of a {name} model: " + "; ".join(problems) + ".")
    values["dropout"] = tuple((key, share) for key, share in dropout.items() if share)
    return ModelConfig(family=name, **values)


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """Write the config.json of a model that was born here, in the keys that transformers 4 and 5 both read.

    from_hf_config(to_hf_config(config)) == config.
    """
    family = config.of_family
    keys: dict[str, Any] = {"model_type": config.family}
    keys |= {key: getattr(config, field) for field, key in family.keys.items()}
    keys |= {key: 1.0 for field, key in family.keys.items() if field in _UNIT_FACTORS and keys[key] is None}
    eos_ids = config.eos_ids
    keys["eos_token_id"] = None if not eos_ids else eos_ids[0] if len(eos_ids) == 1 else list(eos_ids)
    if "query_pre_attn_scalar" in family.consumed and config.query_scale is not None:
        scalar = config.query_scale**-2
        keys["query_pre_attn_scalar"] = round(scalar) if math.isclose(scalar, round(scalar)) else scalar
    if "logits_scaling" in family.consumed:
        keys["logits_scaling"] = 1.0 if config.logit_scale is None else 1 / config.logit_scale
    keys |= {key: set(names) <= set(config.biased) for key, names in family.bias_keys.items()}
    keys |= _written_layer_types(config) | _written_latent(config)
    keys |= {key: 0.0 for key, absent in family.dropout.items() if absent} | dict(config.dropout)
    return {**keys, **_written_ropes(config), **head_keys(config)}


def head_keys(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json that say what stands on top of the decoder."""
    if not config.reward_head:
        return {"architectures": [config.of_family.architecture]}
    label = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return {"architectures": [config.of_family.reward_architecture], **label}


def pad_token_id(config: ModelConfig) -> int:
    """Return the token that fills up the rows of a reward model in transformers: pad, or EOS where there is none.

    Raises:
        ValueError: the config names neither.
    """
    if config.pad_id is None and not config.eos_ids:
        raise ValueError("config.json names neither pad_token_id nor eos_token_id, and a reward model needs one.")
    return config.eos_ids[0] if config.pad_id is None else config.pad_id


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of the language model in a multimodal checkpoint; any other as it is.

    What the text tower leaves to the whole checkpoint (tokens, dtype, tied embeddings) is taken from there.

    Raises:
        ValueError: a multimodal model_type without a text_config.
    """
    if not left_out(config):
        return config
    kind = config["model_type"]
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise ValueError(f"config.json of a {kind} model has no text_config; fetch it again.")
    whole = {key: config[key] for key in (*_OF_TEXT, "quantization_config") if config.get(key) is not None}
    own = {key: value for key, value in text.items() if value is not None or key not in whole}
    text = whole | {"model_type": _TOWER_TYPES[kind]} | own
    rewards = any(str(name).endswith(_REWARD) for name in config.get("architectures") or ())
    if text["model_type"] in FAMILIES:
        family = families.FAMILIES[text["model_type"]]
        text["architectures"] = [family.reward_architecture if rewards else family.architecture]
    labels = {key: config[key] for key in ("id2label", "label2id", "num_labels") if rewards and key in config}
    return text | labels


_TOWER_TYPES = {"gemma3": "gemma3_text", "mistral3": "mistral"}  # where text_config names no model_type


def left_out(config: dict[str, Any]) -> str:
    """Say what else a multimodal checkpoint holds than the language model that is read; empty for any other."""
    kind = config.get("model_type")
    return families.WITH_TEXT_TOWER.get(kind, "") if isinstance(kind, str) else ""


def text_tensor(name: str) -> str | None:
    """Return the name that a tensor of a multimodal checkpoint has in the language model's own; None = of a tower.

    >>> [text_tensor(name) for name in ("language_model.model.norm.weight", "model.language_model.norm.weight")]
    ['model.norm.weight', 'model.norm.weight']
    """
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    if name.startswith(("language_model.", "lm_head.", "score.")):
        return name.removeprefix("language_model.")
    return None


def known_keys(name: str) -> set[str]:
    """Return the keys of a family's config.json that are read, checked or passed over as without effect."""
    family = families.FAMILIES[name]
    read = {*family.keys.values(), *family.bias_keys, *family.neutral, *family.consumed, *family.aliases}
    return read | {*family.dropout} | {*_NEUTRAL} | _PASSED_OVER | _READ


# --- reading


def _labels(config: dict[str, Any]) -> int:
    """Return the number of labels of a classifier; transformers' default is 2."""
    return config["num_labels"] if "num_labels" in config else len(config.get("id2label") or (0, 1))


def _check_kinds(config: dict[str, Any]) -> None:
    """Refuse values of another kind under the keys that are no field of their own."""
    number = (int, float)
    kinds: dict[str, tuple[type, ...]] = {
        "architectures": (list,),
        "id2label": (dict,),
        "num_labels": (int,),
        "query_pre_attn_scalar": number,
        "logits_scaling": number,
        "max_window_layers": (int,),
        "no_rope_layers": (list,),
        "no_rope_layer_interval": (int,),
        "layer_types": (list,),
        "sliding_window_pattern": (int, str),
        "_sliding_window_pattern": (int, str),
        "rope_local_base_freq": number,
        "original_max_position_embeddings": (int,),
        "qk_nope_head_dim": (int,),
        "n_shared_experts": (int,),
        "n_group": (int,),
        "topk_group": (int,),
    }
    wrong = [key for key, kind in kinds.items() if config.get(key) is not None and type(config[key]) not in kind]
    elements = {"layer_types": str, "no_rope_layers": int}
    wrong += [key for key, kind in elements.items() if key not in wrong and not _all_are(config.get(key), kind)]
    wrong += [key for key in ("sliding_window_pattern", "_sliding_window_pattern") if config.get(key) == ""]
    for key, default in (("query_pre_attn_scalar", 256), ("logits_scaling", 1), ("rope_local_base_freq", 1)):
        scalar = config.get(key, default)
        if not wrong and not (scalar is not None and 0 < scalar <= sys.float_info.max):
            wrong.append(key)
    if wrong:
        raise ValueError("config.json: " + "; ".join(f"{key}={config[key]!s:.80} cannot be" for key in wrong) + ".")


def _all_are(listed: list[Any] | None, kind: type) -> bool:
    return all(type(one) is kind for one in listed or ())


def _refusals(config: dict[str, Any], family: families.Family) -> list[str]:
    read = {*family.keys.values(), *family.bias_keys, *family.consumed}
    neutral = {key: values for key, values in (_NEUTRAL | dict(family.neutral)).items() if key not in read}
    quantised = config.get("quantization_config")
    if isinstance(quantised, dict) and quantised.get("quant_method") in family.quantised:  # undone as weights are read
        neutral.pop("quantization_config")
    also = {"quantization_config": [f"quant_method {name}" for name in family.quantised]}
    problems = [
        f"{key}={config[key]!r} is not supported (supported: {', '.join([*map(repr, values), *also.get(key, [])])})"
        for key, values in neutral.items()
        if key in config and config[key] not in values
    ]
    return problems + _unknown(config)


def _unknown(config: dict[str, Any]) -> list[str]:
    """Name the fields of transformers' config class that are not known here and not at their default."""
    name = config["model_type"]
    unknown = sorted(config.keys() - known_keys(name))
    if not unknown:
        return []
    import transformers.models.auto.configuration_auto as auto  # takes a second, and most configs have no such key

    if name not in auto.CONFIG_MAPPING:
        return []
    of_class = auto.CONFIG_MAPPING[name]
    fields = {field.name for field in dataclasses.fields(of_class)} if dataclasses.is_dataclass(of_class) else set()
    default = of_class()
    return [
        f"{key}={config[key]!r} is not supported (transformers reads it, and has {getattr(default, key)!r} by default)"
        for key in unknown
        if (key in fields or key in default.to_dict()) and getattr(default, key) != config[key]
    ]


def _dropout(config: dict[str, Any], family: families.Family) -> tuple[dict[str, Any], list[str]]:
    shares = {key: config.get(key, absent) for key, absent in family.dropout.items()}
    shares = {key: share for key, share in shares.items() if share is not None}
    return shares, [
        f"{key}={share!r} must be a share in [0, 1)"
        for key, share in shares.items()
        if type(share) not in (int, float) or not 0 <= share < 1
    ]


def _copied(config: dict[str, Any], family: families.Family) -> tuple[dict[str, Any], list[str]]:
    values, problems = {}, []
    for field, key in family.keys.items():
        if key in config or key in family.absent:
            values[field] = config.get(key, family.absent.get(key))
        else:
            problems.append(f"{key} is missing")
    if values.get("ffn") is None and "n_inner" in family.absent and isinstance(values.get("width"), int):
        values["ffn"] = 4 * values["width"]
    activation = values.get("activation")
    if isinstance(activation, str):
        values["activation"] = family.activation_names.get(activation, activation)
    return values, problems


_Read = tuple[dict[str, Any], list[str]]
_UNIT_FACTORS = ("embedding_scale", "residual_scale", "logit_scale")  # fields for which 1 is as good as none


def _scales(config: dict[str, Any], family: families.Family, values: dict[str, Any]) -> _Read:
    """Factors; one of 1 is none."""
    found: dict[str, Any] = {}
    if "query_pre_attn_scalar" in family.consumed:
        found["query_scale"] = float(config.get("query_pre_attn_scalar", 256)) ** -0.5
    if "logits_scaling" in family.consumed and (divisor := config.get("logits_scaling", 1.0)) != 1:
        found["logit_scale"] = 1 / divisor
    for field in _UNIT_FACTORS:
        if values.get(field) == 1:
            found[field] = None
    if family.keys.get("query_key_norm") and values.get("query_key_norm") is None:
        found["query_key_norm"] = False
    return found, []


def _biases(config: dict[str, Any], family: families.Family, values: dict[str, Any]) -> _Read:
    """Which matrices have a bias, by the keys that say so; None where it is as the family's default."""
    biases, problems = set(family.biases), []
    for key, names in family.bias_keys.items():
        absent = family.absent_biases.get(key, False)
        given = config.get(key)
        given = absent if given is None else given
        if type(given) is not bool:
            problems.append(f"{key}={given!r} must be bool")
        elif given:
            biases |= set(names)
    found = tuple(sorted(biases))
    return {"biases": None if found == family_biases(family) else found}, problems


def _layer_types(config: dict[str, Any], family: families.Family, values: dict[str, Any]) -> _Read:
    """Say which layers slide and which are not rotated, from a list or from the keys that stand for one."""
    count, listed = values.get("layers"), config.get("layer_types")
    if type(count) is not int or not 1 <= count <= MOST_LAYERS:
        return {}, []
    default = expanded(family.layer_types, count)
    if not family.hf_layer_types:
        slides = values.get("sliding_window") is not None
        as_built = [_SLIDING if name == families.SLIDING and slides else _FULL for name in default]
        supported = f"({', '.join(map(repr, dict.fromkeys(as_built)))}) repeated"
        wrong = listed is not None and listed != as_built
        return {}, [f"layer_types={listed} is not supported (supported: {supported})"] if wrong else []
    off = "use_sliding_window" in family.consumed and config.get("use_sliding_window") in (None, False)
    window = None if off else values.get("sliding_window")
    rotates = _rotates(config, count) if "no_rope_layers" in family.consumed else None
    if rotates is not None and (len(rotates) < count or not set(rotates) <= {0, 1}):
        return {}, [f"no_rope_layers={rotates} must be 0 or 1 for each of {count} layers"]
    if listed is None:
        listed = _implied_layer_types(config, family, count, window, rotates)
    elif len(listed) != count or not set(listed) <= {_FULL, _SLIDING}:
        return {}, [f"layer_types={listed} is not supported (supported: {count} of {_FULL} and {_SLIDING})"]
    elif window is None and _SLIDING in listed:
        return {}, [f"layer_types={listed} has layers that slide, and there is no sliding window"]
    types = [family.hf_layer_types[name] for name in listed]
    if rotates is not None:
        types = [name if on else f"{name}_unrotated" for name, on in zip(types, rotates, strict=False)]
    by_window = families.FULL_UNROTATED in family.hf_layer_types.values()  # whether full layers are rotated
    if window is None and by_window:
        types = [families.FULL] * count
    if window is None or not (by_window or any(name.startswith(families.SLIDING) for name in types)):
        window = None  # of no layer
        types, default = (
            [name.replace(families.SLIDING, families.FULL) for name in names] for names in (types, default)
        )
    period = () if tuple(types) == tuple(default) else _period(types)
    return {"layer_types": period, "sliding_window": window}, []


def _rotates(config: dict[str, Any], count: int) -> list[int]:
    """Return 1 for each layer with a rotary embedding and 0 for each without (SmolLM3)."""
    if (listed := config.get("no_rope_layers")) is not None:
        return listed
    every = config.get("no_rope_layer_interval", 4)
    return [int(not every or (layer + 1) % every != 0) for layer in range(count)]


def _implied_layer_types(
    config: dict[str, Any], family: families.Family, count: int, window: Any, rotates: list[int] | None
) -> list[str]:
    """Return the layer_types of transformers where config.json has none."""
    if "max_window_layers" in family.consumed:
        first = config.get("max_window_layers")
        return [
            _SLIDING if window is not None and layer >= (28 if first is None else first) else _FULL
            for layer in range(count)
        ]
    if rotates is not None:
        return [_FULL if on or window is None else _SLIDING for on in rotates[:count]]
    pattern = config.get("sliding_window_pattern", config.get("_sliding_window_pattern"))
    if "sliding_window_pattern" in family.consumed and pattern is not None:
        if isinstance(pattern, str):
            return [_SLIDING if pattern[layer % len(pattern)] == "L" else _FULL for layer in range(count)]
        return [_SLIDING if pattern and (layer + 1) % pattern else _FULL for layer in range(count)]
    return [_SLIDING if name.startswith(families.SLIDING) else _FULL for name in expanded(family.layer_types, count)]


def _period(types: list[str]) -> tuple[str, ...]:
    """Return the shortest beginning that gives the whole list when it is repeated."""
    for length in range(1, len(types)):
        if all(types[layer] == types[layer % length] for layer in range(len(types))):
            return tuple(types[:length])
    return tuple(types)


def _ropes(config: dict[str, Any], family: families.Family, values: dict[str, Any]) -> _Read:
    if family.learned_positions:
        return {}, []
    try:
        if family.sliding_theta is None:
            return {"rope": _rope(config, family, values.get("max_positions"))}, []
        return _two_ropes(config, family, values.get("max_positions")), []
    except ValueError as error:
        return {}, [str(error).rstrip(".")]


def _rope(config: dict[str, Any], family: families.Family, max_positions: Any) -> Rope:
    """Gather the rope settings, which stand in up to three places, and refuse places that disagree."""
    places = [config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key)]
    if len(places) == 2 and places[0] != places[1]:
        raise ValueError("rope_parameters and rope_scaling disagree; keep one")
    parameters = places[0] if places else dict(family.absent_rope)
    if not isinstance(parameters, dict):
        raise ValueError(f"rope_scaling must be a dict, not {parameters!r}")

    def one(default: float | None, *candidates: tuple[str, Any]) -> Any:
        given = [(name, value) for name, value in candidates if value is not None] or [("", default)]
        if any(value != given[0][1] for _, value in given):
            raise ValueError("; ".join(f"{name}={value}" for name, value in given) + " disagree; keep one")
        return given[0][1]

    theta = one(
        family.theta,
        ("rope_theta in the rope dict", parameters.get("rope_theta")),
        ("rope_theta", config.get("rope_theta")),
        ("rotary_emb_base", config.get("rotary_emb_base")),
    )
    fraction = one(
        family.rotary_share,
        ("partial_rotary_factor in the rope dict", parameters.get("partial_rotary_factor")),
        ("partial_rotary_factor", config.get("partial_rotary_factor")),
        ("rotary_pct", config.get("rotary_pct")),
    )
    key = "original_max_position_embeddings"
    original = one(
        max_positions,
        (f"{key} in the rope dict", parameters.get(key)),
        (key, config.get(key, family.original_positions)),
    )
    for name in ("rope_type", "type"):
        if isinstance(kind := parameters.get(name), str):
            parameters = parameters | {name: family.rope_names.get(kind, kind)}
    named = parameters.get("rope_type") or parameters.get("type") or "default"
    if family.rope_types and named not in family.rope_types:
        raise ValueError(f"rope type {named!r} is none of {config['model_type']}'s: {', '.join(family.rope_types)}")
    return rope.from_hf(parameters, theta=theta, fraction=fraction, original=original)


def _two_ropes(config: dict[str, Any], family: families.Family, max_positions: Any) -> dict[str, Rope | None]:
    """Read the rotary embeddings of full and sliding layers: nested in transformers 5, in keys of their own before."""
    nested = config.get("rope_parameters") or {}
    if not isinstance(nested, dict) or not all(
        key in (_FULL, _SLIDING) and isinstance(one, dict | None) for key, one in nested.items()
    ):
        raise ValueError(f"rope_parameters={nested!r} must have {_FULL} and {_SLIDING}, each a dict")
    full, sliding = (nested.get(key) or {} for key in (_FULL, _SLIDING))
    outside = {key: config[key] for key in ("rope_theta", "rope_scaling", "partial_rotary_factor") if key in config}
    one = _rope(outside | {"rope_parameters": full}, family, max_positions)
    own = "rope_local_base_freq" in family.consumed
    theta = config.get("rope_local_base_freq", family.sliding_theta) if own else family.sliding_theta
    other = _rope({"rope_parameters": {"rope_theta": theta} | sliding}, family, max_positions)
    return {"rope": one, "sliding_rope": None if other == one else other}


def _heads(config: dict[str, Any], family: families.Family, values: dict[str, Any]) -> _Read:
    """Fill in what is given by the other sizes."""
    found, problems = {}, []
    if values.get("kv_heads") is None:
        found["kv_heads"] = values.get("heads", 1)
    if values.get("head_dim") is None:
        width, heads = values.get("width"), values.get("heads")
        found["head_dim"] = 2
        if isinstance(width, int) and isinstance(heads, int) and heads >= 1:
            found["head_dim"] = width // heads
            if width % heads:
                problems.append(
                    f"hidden_size={width} is not a multiple of num_attention_heads={heads} and no head_dim is given"
                )
    return found, problems


def _latent(config: dict[str, Any], family: families.Family, values: dict[str, Any]) -> _Read:
    """Add up the parts of a head, say how wide the shared experts are together, and in how many groups the others."""
    rotated, width = values.get("rope_dim"), values.get("ffn")
    if not family.latent or type(rotated) is not int or type(width) is not int:
        return {}, []  # of another type it is refused by name
    plain, shared = config.get("qk_nope_head_dim", 128), config.get("n_shared_experts", 2)
    problems = [
        f"{key}={value} must be positive"
        for key, value in (("qk_nope_head_dim", plain), ("n_shared_experts", shared))
        if value is None or value < 1
    ]
    method, groups, kept = config.get("topk_method", "greedy"), config.get("n_group"), config.get("topk_group")
    if method not in _TOP_K:
        problems.append(f"topk_method={method!r} is not supported (supported: {', '.join(map(repr, _TOP_K))})")
    elif method == "greedy":  # which reads neither
        groups = kept = 1
    elif groups is None or kept is None:
        problems.append(f"topk_method={method} needs n_group and topk_group")
    if problems:
        return {"head_dim": 2}, problems
    return {
        "head_dim": plain + rotated,
        "shared_ffn": shared * width,
        "expert_groups": groups,
        "groups_per_token": kept,
    }, []


_TOP_K = ("greedy", "group_limited_greedy")

# --- writing


def _written_layer_types(config: ModelConfig) -> dict[str, Any]:
    family = config.of_family
    keys: dict[str, Any] = {}
    if not family.hf_layer_types:
        return keys
    types = expanded(config.layer_types or family.layer_types, config.layers)
    slides = config.sliding_window is not None
    if "use_sliding_window" in family.consumed:
        keys["use_sliding_window"] = slides
    if "no_rope_layers" in family.consumed:
        keys["no_rope_layers"] = [int(not name.endswith("_unrotated")) for name in types]
    if config.layer_types or "no_rope_layers" in family.consumed or ("max_window_layers" in family.consumed and slides):
        keys["layer_types"] = [
            "sliding_attention" if slides and name.startswith(families.SLIDING) else "full_attention" for name in types
        ]
    return keys


def _written_latent(config: ModelConfig) -> dict[str, Any]:
    if not config.of_family.latent:
        return {}
    return {
        "qk_nope_head_dim": config.head_dim - config.rope_dim,
        "n_shared_experts": config.shared_ffn // config.ffn,
        "topk_method": _TOP_K[config.expert_groups > 1],
        "n_group": config.expert_groups,
        "topk_group": config.groups_per_token,
    }


def _written_ropes(config: ModelConfig) -> dict[str, Any]:
    """Write the rope settings where transformers 4 reads them too, if it can express them."""
    if config.learned_positions:
        return {}
    family, own = config.of_family, config.rope
    plain = {"rope_type": "default"} if family.absent_rope else None  # said where its absence means another
    keys: dict[str, Any] = {family.theta_key: own.theta, "rope_scaling": rope.to_hf(own) or plain}
    if family.partial_rotary:
        keys[family.share_key] = own.fraction
    if family.original_positions is not None:
        keys["original_max_position_embeddings"] = own.original_max_position_embeddings or family.original_positions
    if family.sliding_theta is None:
        return keys
    sliding = config.sliding_rope or own
    if sliding.type == "default" and "rope_local_base_freq" in family.consumed:
        return keys | {"rope_local_base_freq": sliding.theta}
    if sliding == Rope(theta=family.sliding_theta):
        return keys
    both = {_FULL: own, _SLIDING: sliding}
    nested = {
        key: (rope.to_hf(one) or {"rope_type": "default"}) | {"rope_theta": one.theta} for key, one in both.items()
    }
    return {"rope_parameters": nested}
