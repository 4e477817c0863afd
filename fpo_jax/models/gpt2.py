"""The layer of GPT-2: LayerNorm, fused query-key-value, biases; positions are embedded, not rotated.

h = x + attention(norm1(x));  y = h + mlp(norm2(h))
"""

import jax
from flax import nnx
from jaxtyping import Float

from fpo_jax.models import config, gpt_neox, layers


class Attention(nnx.Module):
    """Multi-head attention; query, key and value are one matmul, one after the other as on disk."""

    def __call__(self, x_NTD: Float[jax.Array, "N T D"], context: layers.Context) -> Float[jax.Array, "N T D"]:
        """Attend and project back."""
        qkv_NT3HC = context.project("NTD,DSHC->NTSHC", x_NTD, self, "qkv")
        q_NTHC, k_NTHC, v_NTHC = (context.constrain_heads(qkv_NT3HC[:, :, part]) for part in range(3))
        out_NTHC = context.constrain_heads(context.attend(q_NTHC, k_NTHC, v_NTHC))
        return context.project("NTHC,HCD->NTD", out_NTHC, self, "out")


class Layer(nnx.Module):
    """One decoder layer."""

    def __init__(self, config: config.ModelConfig):
        self.attention_norm = layers.LayerNorm(config.norm_eps)
        self.attention = Attention()
        self.mlp_norm = layers.LayerNorm(config.norm_eps)
        self.mlp = gpt_neox.MLP(config)

    def __call__(self, x_NTD: Float[jax.Array, "N T D"], context: layers.Context) -> Float[jax.Array, "N T D"]:
        """Apply attention, then the MLP, each on the normalised residual stream."""
        with jax.named_scope("attention"):
            x_NTD = context.constrain_stream(x_NTD + self.attention(self.attention_norm(x_NTD), context))
        with jax.named_scope("mlp"):
            return context.constrain_stream(x_NTD + self.mlp(self.mlp_norm(x_NTD), context))
