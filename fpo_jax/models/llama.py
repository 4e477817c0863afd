"""The layer of Llama, Mistral and Qwen: RMSNorm, grouped-query attention, gated MLP.

h = x + attention(norm(x))
y = h + down(act(gate(norm(h))) * up(norm(h)))

Qwen-2 and 2.5 add biases to queries, keys and values; Qwen-3 normalises each head's queries and keys.
"""

import jax
from flax import nnx
from jaxtyping import Float

from fpo_jax.models import activations, config, layers


class Attention(nnx.Module):
    """Grouped-query attention: H query heads share G key/value heads."""

    def __init__(self, config: config.ModelConfig):
        self.normalizes_heads = config.family == "qwen3"
        if self.normalizes_heads:
            self.query_norm = layers.RMSNorm(config.norm_eps)
            self.key_norm = layers.RMSNorm(config.norm_eps)

    def __call__(self, x_NTD: Float[jax.Array, "N T D"], context: layers.Context) -> Float[jax.Array, "N T D"]:
        """Attend and project back."""
        q_NTHC = context.constrain_heads(context.project("NTD,DHC->NTHC", x_NTD, self, "query"))
        k_NTGC = context.project("NTD,DGC->NTGC", x_NTD, self, "key")
        v_NTGC = context.project("NTD,DGC->NTGC", x_NTD, self, "value")
        if self.normalizes_heads:
            q_NTHC, k_NTGC = self.query_norm(q_NTHC), self.key_norm(k_NTGC)
        out_NTHC = context.constrain_heads(context.attend(q_NTHC, k_NTGC, v_NTGC))
        return context.project("NTHC,HCD->NTD", out_NTHC, self, "out")


class MLP(nnx.Module):
    """Gated MLP of width F."""

    def __init__(self, config: config.ModelConfig):
        self.activation = config.activation

    def __call__(self, x_NTD: Float[jax.Array, "N T D"], context: layers.Context) -> Float[jax.Array, "N T D"]:
        """Apply down(act(gate(x)) * up(x))."""
        gate_NTF = context.project("NTD,DF->NTF", x_NTD, self, "gate")
        up_NTF = context.project("NTD,DF->NTF", x_NTD, self, "up")
        gated_NTF = context.constrain_mlp(activations.activate(self.activation, gate_NTF, up_NTF))
        return context.project("NTF,FD->NTD", gated_NTF, self, "down")


class Layer(nnx.Module):
    """One decoder layer."""

    def __init__(self, config: config.ModelConfig):
        self.attention_norm = layers.RMSNorm(config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = layers.RMSNorm(config.norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x_NTD: Float[jax.Array, "N T D"], context: layers.Context) -> Float[jax.Array, "N T D"]:
        """Apply attention, then the MLP, each on the normalised residual stream."""
        with jax.named_scope("attention"):
            x_NTD = context.constrain_stream(x_NTD + self.attention(self.attention_norm(x_NTD), context))
        with jax.named_scope("mlp"):
            return context.constrain_stream(x_NTD + self.mlp(self.mlp_norm(x_NTD), context))
