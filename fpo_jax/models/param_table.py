"""ONE ENTRY PER PARAMETER: path, shape, logical axes, Hugging Face name, layout on disk, initialisation, weight decay.

Nothing else in the project names a parameter of a model. Layouts are spelled in the letters of types.py, a digit being
a literal size. `letters` is our array, stacked: "LDHC" = [L, D, H, C]. `hf_letters` is one layer's tensor on disk,
parentheses joining axes: "(HC)D" = [H*C, D].
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

from fpo_jax.models.config import ModelConfig

AXES = {
    "L": "layers",
    "D": "embed",
    "H": "heads",
    "G": "kv_heads",
    "C": "head_dim",
    "F": "mlp",
    "V": "vocab",
}  # P, learned positions, is whole on every device
_NO_PARENTHESES = str.maketrans("", "", "()")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter."""

    path: str  # "layers/attention/query": keys of the nested dict
    letters: str  # layout here
    hf_name: str  # "{layer}" stands for the layer's number
    hf_letters: str  # layout of one layer on disk
    # "normal" (standard deviation config.initializer_range), "uniform" (1/sqrt(its inputs)), "ones" or "zeros"
    init: str
    decay: bool  # whether weight decay applies: matrices yes, norms and biases no
    shape: tuple[int, ...] = ()
    axes: tuple[str | None, ...] = ()  # logical axes for sharding.py, None = every device holds all of it

    @property
    def stacked(self) -> bool:
        """Whether the parameter has a leading L axis."""
        return self.letters.startswith("L")

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape of the tensor on disk (of one layer where stacked)."""
        sizes = dict(zip(self.letters, self.shape, strict=True))
        return tuple(math.prod(sizes[letter] for letter in group) for group in groups(self.hf_letters))

    @property
    def disk_letters(self) -> str:
        """Axes of the tensor on disk, taken apart: "HCD" of "(HC)D"."""
        return self.hf_letters.translate(_NO_PARENTHESES)

    @property
    def disk_shape(self) -> tuple[int, ...]:
        """Shape of the tensor on disk, with joined axes taken apart."""
        sizes = dict(zip(self.letters, self.shape, strict=True))
        return tuple(sizes[letter] for letter in self.disk_letters)

    @property
    def size(self) -> int:
        """Number of values, of all layers."""
        return math.prod(self.shape)

    def hf_names(self) -> list[str]:
        """Names on disk: one, or one per layer."""
        return [self.hf_name.format(layer=layer) for layer in range(self.shape[0])] if self.stacked else [self.hf_name]


def entries(config: ModelConfig) -> tuple[Entry, ...]:
    """Return the entries of a model, from the embedding to the head."""
    return _entries(config)


@functools.lru_cache(maxsize=32)
def _entries(config: ModelConfig) -> tuple[Entry, ...]:
    sizes = {
        "L": config.layers,
        "D": config.width,
        "H": config.heads,
        "G": config.kv_heads,
        "C": config.head_dim,
        "F": config.ffn,
        "V": config.vocab_size,
        "P": config.max_positions,
    }
    table = _FAMILIES[config.family](config)
    return tuple(
        dataclasses.replace(
            entry, shape=tuple(sizes.get(letter) or int(letter) for letter in entry.letters), axes=_logical_axes(entry)
        )
        for entry in table
    )


def ignored_hf_names(config: ModelConfig) -> frozenset[str]:
    """Return tensor names that published files hold and that carry no weights: rotary tables and causal masks."""
    return frozenset(
        template.format(layer=layer) for template in _BUFFERS[config.family] for layer in range(config.layers)
    )


def hf_head_name(config: ModelConfig) -> str:
    """Return the head's name on disk; files of tied models may hold it as a copy of the embedding."""
    return "embed_out.weight" if config.family == "gpt_neox" else "lm_head.weight"


def full_hf_name(name: str, config: ModelConfig) -> str:
    """Return a tensor's name with the prefix that the files of the first GPT-2 models leave out."""
    bare = config.family == "gpt2" and name.split(".")[0] in ("wte", "wpe", "h", "ln_f")
    return f"transformer.{name}" if bare else name


def groups(letters: str) -> Iterator[str]:
    """Split "(HC)D" into "HC" and "D"."""
    while letters:
        group, letters = letters[1:].split(")", 1) if letters[0] == "(" else (letters[0], letters[1:])
        yield group


def _matrix(path: str, letters: str, hf_name: str, hf_letters: str) -> Entry:
    return Entry(path, letters, hf_name, hf_letters, init="normal", decay=True)


def _bias(path: str, letters: str, hf_name: str, hf_letters: str) -> Entry:
    return Entry(path, letters, hf_name, hf_letters, init="zeros", decay=False)


def _scale(path: str, letters: str, hf_name: str) -> Entry:
    return Entry(path, letters, hf_name, "D", init="ones", decay=False)


def _llama(config: ModelConfig) -> list[Entry]:
    at = "model.layers.{layer}."
    table = [
        _matrix("embed", "VD", "model.embed_tokens.weight", "VD"),
        _scale("layers/attention_norm/scale", "LD", at + "input_layernorm.weight"),
        _matrix("layers/attention/query", "LDHC", at + "self_attn.q_proj.weight", "(HC)D"),
        _matrix("layers/attention/key", "LDGC", at + "self_attn.k_proj.weight", "(GC)D"),
        _matrix("layers/attention/value", "LDGC", at + "self_attn.v_proj.weight", "(GC)D"),
        _matrix("layers/attention/out", "LHCD", at + "self_attn.o_proj.weight", "D(HC)"),
        _scale("layers/mlp_norm/scale", "LD", at + "post_attention_layernorm.weight"),
        _matrix("layers/mlp/gate", "LDF", at + "mlp.gate_proj.weight", "FD"),
        _matrix("layers/mlp/up", "LDF", at + "mlp.up_proj.weight", "FD"),
        _matrix("layers/mlp/down", "LFD", at + "mlp.down_proj.weight", "DF"),
        _scale("final_norm/scale", "D", "model.norm.weight"),
    ]
    return [*table, *_head(config)]


def _qwen2(config: ModelConfig) -> list[Entry]:
    at = "model.layers.{layer}.self_attn."
    biases = [
        _bias("layers/attention/query_bias", "LHC", at + "q_proj.bias", "(HC)"),
        _bias("layers/attention/key_bias", "LGC", at + "k_proj.bias", "(GC)"),
        _bias("layers/attention/value_bias", "LGC", at + "v_proj.bias", "(GC)"),
    ]
    return [*_llama(config), *biases]


def _qwen3(config: ModelConfig) -> list[Entry]:
    at = "model.layers.{layer}.self_attn."
    norms = [
        Entry("layers/attention/query_norm/scale", "LC", at + "q_norm.weight", "C", init="ones", decay=False),
        Entry("layers/attention/key_norm/scale", "LC", at + "k_norm.weight", "C", init="ones", decay=False),
    ]
    return [*_llama(config), *norms]


def _gemma2(config: ModelConfig) -> list[Entry]:
    """Scales count from one, so that they start at zero."""
    at = "model.layers.{layer}."
    names = {
        "layers/attention_norm/scale": at + "input_layernorm.weight",
        "layers/attention_out_norm/scale": at + "post_attention_layernorm.weight",
        "layers/mlp_norm/scale": at + "pre_feedforward_layernorm.weight",
        "layers/mlp_out_norm/scale": at + "post_feedforward_layernorm.weight",
        "final_norm/scale": "model.norm.weight",
    }
    norms = [_bias(path, "LD" if path.startswith("layers") else "D", name, "D") for path, name in names.items()]
    return [*(entry for entry in _llama(config) if entry.path not in names), *norms]


def _gpt2(config: ModelConfig) -> list[Entry]:
    """Matrices lie on disk as they are multiplied: input axis first."""
    at = "transformer.h.{layer}."
    table = [
        _matrix("embed", "VD", "transformer.wte.weight", "VD"),
        _matrix("positions", "PD", "transformer.wpe.weight", "PD"),
        _scale("layers/attention_norm/scale", "LD", at + "ln_1.weight"),
        _bias("layers/attention_norm/bias", "LD", at + "ln_1.bias", "D"),
        _matrix("layers/attention/qkv", "LD3HC", at + "attn.c_attn.weight", "D(3HC)"),
        _bias("layers/attention/qkv_bias", "L3HC", at + "attn.c_attn.bias", "(3HC)"),
        _matrix("layers/attention/out", "LHCD", at + "attn.c_proj.weight", "(HC)D"),
        _bias("layers/attention/out_bias", "LD", at + "attn.c_proj.bias", "D"),
        _scale("layers/mlp_norm/scale", "LD", at + "ln_2.weight"),
        _bias("layers/mlp_norm/bias", "LD", at + "ln_2.bias", "D"),
        _matrix("layers/mlp/up", "LDF", at + "mlp.c_fc.weight", "DF"),
        _bias("layers/mlp/up_bias", "LF", at + "mlp.c_fc.bias", "F"),
        _matrix("layers/mlp/down", "LFD", at + "mlp.c_proj.weight", "FD"),
        _bias("layers/mlp/down_bias", "LD", at + "mlp.c_proj.bias", "D"),
        _scale("final_norm/scale", "D", "transformer.ln_f.weight"),
        _bias("final_norm/bias", "D", "transformer.ln_f.bias", "D"),
    ]
    return [*table, *_head(config)]


def _gpt_neox(config: ModelConfig) -> list[Entry]:
    at = "gpt_neox.layers.{layer}."
    table = [
        _matrix("embed", "VD", "gpt_neox.embed_in.weight", "VD"),
        _scale("layers/attention_norm/scale", "LD", at + "input_layernorm.weight"),
        _bias("layers/attention_norm/bias", "LD", at + "input_layernorm.bias", "D"),
        _matrix("layers/attention/qkv", "LDH3C", at + "attention.query_key_value.weight", "(H3C)D"),
        _bias("layers/attention/qkv_bias", "LH3C", at + "attention.query_key_value.bias", "(H3C)"),
        _matrix("layers/attention/out", "LHCD", at + "attention.dense.weight", "D(HC)"),
        _bias("layers/attention/out_bias", "LD", at + "attention.dense.bias", "D"),
        _scale("layers/mlp_norm/scale", "LD", at + "post_attention_layernorm.weight"),
        _bias("layers/mlp_norm/bias", "LD", at + "post_attention_layernorm.bias", "D"),
        _matrix("layers/mlp/up", "LDF", at + "mlp.dense_h_to_4h.weight", "FD"),
        _bias("layers/mlp/up_bias", "LF", at + "mlp.dense_h_to_4h.bias", "F"),
        _matrix("layers/mlp/down", "LFD", at + "mlp.dense_4h_to_h.weight", "DF"),
        _bias("layers/mlp/down_bias", "LD", at + "mlp.dense_4h_to_h.bias", "D"),
        _scale("final_norm/scale", "D", "gpt_neox.final_layer_norm.weight"),
        _bias("final_norm/bias", "D", "gpt_neox.final_layer_norm.bias", "D"),
    ]
    return [*table, *_head(config)]


def _head(config: ModelConfig) -> list[Entry]:
    """What turns hidden states into what the model says, where that is not the embedding again."""
    if config.reward_head:  # starts as torch starts a linear layer
        return [Entry("score", "1D", "score.weight", "1D", init="uniform", decay=True)]
    return [] if config.tied_head else [_matrix("head", "VD", hf_head_name(config), "VD")]


_FAMILIES: dict[str, Callable[[ModelConfig], list[Entry]]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gpt_neox": _gpt_neox,
    "gpt2": _gpt2,
}
_LLAMA_BUFFERS = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq",)
_BUFFERS = {
    "llama": _LLAMA_BUFFERS,
    "mistral": _LLAMA_BUFFERS,
    "qwen2": _LLAMA_BUFFERS,
    "qwen3": _LLAMA_BUFFERS,
    "gemma2": _LLAMA_BUFFERS,
    "gpt2": ("transformer.h.{layer}.attn.bias", "transformer.h.{layer}.attn.masked_bias"),
    "gpt_neox": (
        "gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq",
        "gpt_neox.layers.{layer}.attention.bias",
        "gpt_neox.layers.{layer}.attention.masked_bias",
    ),
}


def _logical_axes(entry: Entry) -> tuple[str | None, ...]:
    """Name the axes; a vector over D stays whole, since cutting a few KiB saves nothing and costs a collective."""
    vector = len(entry.letters.removeprefix("L")) == 1
    return tuple(None if vector and letter == "D" else AXES.get(letter) for letter in entry.letters)
