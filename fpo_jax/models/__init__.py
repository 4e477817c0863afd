"""Decoders: architectures, their parameters, and the functions that run them. Hugging Face checkpoints load into all.

config       `ModelConfig`, what one checkpoint says; hf_config reads it from a `config.json` and writes it
families     a record per family: what its layers are made of, its tensors' names, its config.json
decoder_layer  the layer of every family, on layers, activations and rope; transformer stacks the layers
mixture      a mixture of experts as its MLP; dispatch sends rows to the devices of their experts, routing is where the
             tokens went, with the load-balancing loss
causal_lm    hidden states, prefill and decode, logits, a reward model's scores: functions of plain parameter trees
param_table  an entry per parameter: shape, axes, initialiser, Hugging Face name; params and lora read it
kv_cache     what sampling keeps
"""

from fpo_jax.models.causal_lm import (
    COMPUTE_DTYPES,
    decode,
    head,
    hidden_states,
    hidden_states_and_routing,
    logits,
    prefill,
    scores,
)
from fpo_jax.models.config import FAMILIES, Adapter, ModelConfig
from fpo_jax.models.hf_config import (
    from_hf_config,
    head_keys,
    left_out,
    pad_token_id,
    text_config,
    text_tensor,
    to_hf_config,
)
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
    "hidden_states_and_routing",
    "left_out",
    "logits",
    "pad_token_id",
    "prefill",
    "scores",
    "text_config",
    "text_tensor",
    "to_hf_config",
]
