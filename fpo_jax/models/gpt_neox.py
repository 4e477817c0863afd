"""The layer of GPT-NeoX and Pythia: LayerNorm, fused query-key-value, partial rotary embedding, biases.

parallel residual    y = x + attention(norm1(x)) + mlp(norm2(x))
sequential residual  h = x + attention(norm1(x));  y = h + mlp(norm2(h))
"""

import jax
from flax import nnx
from jaxtyping import Float

from fpo_jax.models import activations, config, layers


class Attention(nnx.Module):
    """Multi-head attention; query, key and value are one matmul, as on disk."""

    def __call__(self, x_NTD: Float[jax.Array, "N T D"], context: layers.Context) -> Float[jax.Array, "N T D"]:
        """Attend and project back."""
        qkv_NTH3C = context.project("NTD,DHSC->NTHSC", x_NTD, self, "qkv")
        q_NTHC, k_NTHC, v_NTHC = (context.constrain_heads(qkv_NTH3C[..., part, :]) for part in range(3))
        out_NTHC = context.constrain_heads(context.attend(q_NTHC, k_NTHC, v_NTHC))
        return context.project("NTHC,HCD->NTD", out_NTHC, self, "out")


class MLP(nnx.Module):
    """Two matmuls with biases around the activation."""

    def __init__(self, config: config.ModelConfig):
        self.activation = config.activation

    def __call__(self, x_NTD: Float[jax.Array, "N T D"], context: layers.Context) -> Float[jax.Array, "N T D"]:
        """Apply down(act(up(x)))."""
        up_NTF = context.project("NTD,DF->NTF", x_NTD, self, "up")
        active_NTF = context.constrain_mlp(activations.activate(self.activation, up_NTF))
        return context.project("NTF,FD->NTD", active_NTF, self, "down")


class Layer(nnx.Module):
    """One decoder layer."""

    def __init__(self, config: config.ModelConfig):
        self.parallel_residual = config.parallel_residual
        self.attention_norm = layers.LayerNorm(config.norm_eps)
        self.attention = Attention()
        self.mlp_norm = layers.LayerNorm(config.norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x_NTD: Float[jax.Array, "N T D"], context: layers.Context) -> Float[jax.Array, "N T D"]:
        """Apply attention and the MLP; with the parallel residual both read the layer's input."""
        with jax.named_scope("attention"):
            after_NTD = context.constrain_stream(x_NTD + self.attention(self.attention_norm(x_NTD), context))
        with jax.named_scope("mlp"):
            read_NTD = x_NTD if self.parallel_residual else after_NTD
            return context.constrain_stream(after_NTD + self.mlp(self.mlp_norm(read_NTD), context))
