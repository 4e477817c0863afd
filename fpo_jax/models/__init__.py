"""Decoders: architectures, their parameters, and the functions that run them. Hugging Face checkpoints load into all.

config       `ModelConfig`, from and to a `config.json`
llama, gemma2, gpt2, gpt_neox  one file per family, on layers, activations and rope; transformer stacks the layers
causal_lm    hidden states, prefill and decode, logits, a reward model's scores: functions of plain parameter trees
param_table  an entry per parameter: shape, axes, initialiser, Hugging Face name; params and lora read it
kv_cache     what sampling keeps
"""

from fpo_jax.models.causal_lm import COMPUTE_DTYPES, decode, head, hidden_states, logits, prefill, scores
from fpo_jax.models.config import FAMILIES, Adapter, ModelConfig, from_hf_config, head_keys, pad_token_id, to_hf_config
from fpo_jax.models.rope import Rope

__all__ = [
    "COMPUTE_DTYPES",
    "FAMILIES",
    "Adapter",
    "ModelConfig",
    "Rope",
    "decode",
    "from_hf_config",
    "head",
    "head_keys",
    "hidden_states",
    "logits",
    "pad_token_id",
    "prefill",
    "scores",
    "to_hf_config",
]
