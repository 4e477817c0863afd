"""The layer of Gemma-2: Llama's attention and MLP, each between two norms whose scales count from one.

h = x + norm(attention(norm(x)))
y = h + norm(mlp(norm(h)))

Soft-caps, the scale of the queries and the windows of every other layer come with the context.
"""

import jax
from flax import nnx
from jaxtyping import Float

from fpo_jax.models import config, layers, llama


class Layer(nnx.Module):
    """One decoder layer."""

    def __init__(self, config: config.ModelConfig):
        self.attention_norm = layers.OffsetRMSNorm(config.norm_eps)
        self.attention = llama.Attention(config)
        self.attention_out_norm = layers.OffsetRMSNorm(config.norm_eps)
        self.mlp_norm = layers.OffsetRMSNorm(config.norm_eps)
        self.mlp = llama.MLP(config)
        self.mlp_out_norm = layers.OffsetRMSNorm(config.norm_eps)

    def __call__(self, x_NTD: Float[jax.Array, "N T D"], context: layers.Context) -> Float[jax.Array, "N T D"]:
        """Apply attention, then the MLP, each normalised before and after."""
        with jax.named_scope("attention"):
            attended_NTD = self.attention(self.attention_norm(x_NTD), context)
            x_NTD = context.constrain_stream(x_NTD + self.attention_out_norm(attended_NTD))
        with jax.named_scope("mlp"):
            return context.constrain_stream(x_NTD + self.mlp_out_norm(self.mlp(self.mlp_norm(x_NTD), context)))
