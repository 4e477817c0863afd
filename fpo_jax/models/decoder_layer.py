"""The layer of every decoder family, put together as the family's record says.

one after the other   h = x + s out_norm(attention(norm(x)));  y = h + s mlp_out_norm(mlp(mlp_norm(h)))
parallel              y = x + s attention(norm(x)) + s mlp(mlp_norm(x)), or with the same norm(x) for both

Norms that a family does not have are left out; s is the factor on what is added, mostly 1. Windows, rotation, soft-caps
and the scale of the logits come with the context.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from fpo_jax.models import activations, config, layers, mixture

_LATENT_EPS = 1e-6  # of the norms of latents, whatever rms_norm_eps is


class Attention(nnx.Module):
    """Grouped-query attention: H query heads share G key/value heads. Their matrices are three or one."""

    sinks: nnx.Param

    def __init__(self, config: config.ModelConfig):
        family = config.of_family
        self.fused, self.groups = family.qkv, (config.heads, config.kv_heads)
        self.has_sinks = family.sinks
        self.normalizes = family.query_key_norm is not None and config.query_key_norm
        if self.normalizes:
            axes = (-2, -1) if family.query_key_norm == "HC" else (-1,)
            self.query_norm, self.key_norm = (layers.NORMS[family.norm](config.norm_eps, axes) for _ in range(2))

    def __call__(self, x_NTD: Float[jax.Array, "N T D"], context: layers.Context) -> Float[jax.Array, "N T D"]:
        """Attend and project back."""
        q_NTHC, k_NTGC, v_NTGC = self._projected(x_NTD, context)
        if self.normalizes:
            q_NTHC, k_NTGC = self.query_norm(q_NTHC), self.key_norm(k_NTGC)
        sinks_H = self.sinks[...] if self.has_sinks else None
        out_NTHC = context.constrain_heads(context.attend(q_NTHC, k_NTGC, v_NTGC, sinks_H))
        return context.project("NTHC,HCD->NTD", out_NTHC, self, "out")

    def _projected(self, x_NTD: jax.Array, context: layers.Context) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries, keys and values. A fused matrix holds them as on disk: by head, by part, or in a row."""
        heads, kv_heads = self.groups
        if self.fused == "H3C":
            qkv_NTH3C = context.project("NTD,DHSC->NTHSC", x_NTD, self, "qkv")
            q, k, v = (context.constrain_heads(qkv_NTH3C[..., part, :]) for part in range(3))
        elif self.fused == "3HC":
            qkv_NT3HC = context.project("NTD,DSHC->NTSHC", x_NTD, self, "qkv")
            q, k, v = (context.constrain_heads(qkv_NT3HC[:, :, part]) for part in range(3))
        elif self.fused == "JC":
            qkv_NTJC = context.project("NTD,DJC->NTJC", x_NTD, self, "qkv")
            q, k, v = (
                context.constrain_heads(qkv_NTJC[:, :, start : start + count])
                for start, count in ((0, heads), (heads, kv_heads), (heads + kv_heads, kv_heads))
            )
        else:
            q = context.constrain_heads(context.project("NTD,DHC->NTHC", x_NTD, self, "query"))
            k = context.project("NTD,DGC->NTGC", x_NTD, self, "key")
            v = context.project("NTD,DGC->NTGC", x_NTD, self, "value")
        return q, k, v


class LatentAttention(nnx.Module):
    """Multi-head latent attention (MLA): DeepSeek-V2, arXiv 2405.04434, section 2.1.

    [c | k_r] = x W_kv_down;  [k_n | v] = norm(c) W_kv_up of every head;  k = [rotated k_r | k_n], k_r of all heads

    Queries have the same two parts, from x or from norm(x W_query_down). On disk the rotated part stands last, here it
    is first in queries and keys, whose products are the same. Values are padded with zeros to the size of the keys,
    which every implementation of attention takes; a cache holds keys and values and not the latent.
    """

    def __init__(self, config: config.ModelConfig):
        norm = layers.NORMS[config.of_family.norm]
        self.compresses_queries = config.query_rank is not None
        if self.compresses_queries:
            self.query_norm = norm(_LATENT_EPS)
        self.kv_norm = norm(_LATENT_EPS)
        self.rank, self.plain_dim = config.kv_rank, config.head_dim - config.rope_dim
        self.value_dim, self.padding = config.value_dim, config.head_dim - config.value_dim

    def __call__(self, x_NTD: Float[jax.Array, "N T D"], context: layers.Context) -> Float[jax.Array, "N T D"]:
        """Attend and project back."""
        if self.compresses_queries:
            low_NTQ = self.query_norm(context.project("NTD,DQ->NTQ", x_NTD, self, "query_down"))
            q_NTHC = context.project("NTQ,QHC->NTHC", low_NTQ, self, "query_up")
        else:
            q_NTHC = context.project("NTD,DHC->NTHC", x_NTD, self, "query")
        q_NTHC = jnp.concatenate([q_NTHC[..., self.plain_dim :], q_NTHC[..., : self.plain_dim]], axis=-1)
        both_NTW = context.project("NTD,DW->NTW", x_NTD, self, "kv_down")
        latent_NTZ, rotated_NT1P = self.kv_norm(both_NTW[..., : self.rank]), both_NTW[:, :, None, self.rank :]
        kv_NTHY = context.constrain_heads(context.project("NTZ,ZHY->NTHY", latent_NTZ, self, "kv_up"))
        rotated_NTHP = jnp.broadcast_to(rotated_NT1P, (*kv_NTHY.shape[:3], rotated_NT1P.shape[-1]))
        k_NTHC = jnp.concatenate([rotated_NTHP, kv_NTHY[..., : self.plain_dim]], axis=-1)
        v_NTHC = jnp.pad(kv_NTHY[..., self.plain_dim :], ((0, 0), (0, 0), (0, 0), (0, self.padding)))
        out_NTHC = context.constrain_heads(context.attend(context.constrain_heads(q_NTHC), k_NTHC, v_NTHC))
        return context.project("NTHM,HMD->NTD", out_NTHC[..., : self.value_dim], self, "out")


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x)) of width F."""

    def __init__(self, config: config.ModelConfig):
        self.activation = config.activation
        self.fused = "gate_up" in config.of_family.matrices

    def __call__(self, x_NTD: Float[jax.Array, "N T D"], context: layers.Context) -> Float[jax.Array, "N T D"]:
        """Apply the MLP."""
        if self.fused:
            both_NT2F = context.project("NTD,DSF->NTSF", x_NTD, self, "gate_up")
            gate_NTF, up_NTF = both_NT2F[:, :, 0], both_NT2F[:, :, 1]
        else:
            gate_NTF = context.project("NTD,DF->NTF", x_NTD, self, "gate")
            up_NTF = context.project("NTD,DF->NTF", x_NTD, self, "up")
        gated_NTF = context.constrain_mlp(activations.activate(self.activation, gate_NTF, up_NTF))
        return context.project("NTF,FD->NTD", gated_NTF, self, "down")


class PlainMLP(nnx.Module):
    """down(act(up(x))) of width F."""

    def __init__(self, config: config.ModelConfig):
        self.activation = config.activation

    def __call__(self, x_NTD: Float[jax.Array, "N T D"], context: layers.Context) -> Float[jax.Array, "N T D"]:
        """Apply the MLP."""
        up_NTF = context.project("NTD,DF->NTF", x_NTD, self, "up")
        active_NTF = context.constrain_mlp(activations.activate(self.activation, up_NTF))
        return context.project("NTF,FD->NTD", active_NTF, self, "down")


# Family.mlp -> module
MLPS: dict[str, Callable] = {"gated": GatedMLP, "plain": PlainMLP, "moe": mixture.MixtureMLP}


class Layer(nnx.Module):
    """One decoder layer; of those without experts where a family has both, `dense`."""

    def __init__(self, config: config.ModelConfig, *, dense: bool = False):
        family = config.of_family
        self.parallel, self.residual_scale = config.parallel, config.residual_scale
        self.shares_norm = config.parallel and "mlp_norm" not in family.norms
        self.attention = LatentAttention(config) if family.latent else Attention(config)
        self.mlp = MLPS["gated" if dense else family.mlp](config)
        for name in family.norms:
            setattr(self, name, layers.NORMS[family.norm](config.norm_eps))

    def __call__(self, x_NTD: Float[jax.Array, "N T D"], context: layers.Context) -> Float[jax.Array, "N T D"]:
        """Apply attention and the MLP."""
        with jax.named_scope("attention"):
            read_NTD = self._norm("attention_norm", x_NTD)
            added_NTD = self._norm("attention_out_norm", self.attention(read_NTD, context))
            after_NTD = context.constrain_stream(x_NTD + self._scaled(added_NTD))
        with jax.named_scope("mlp"):
            if not self.shares_norm:
                read_NTD = self._norm("mlp_norm", x_NTD if self.parallel else after_NTD)
            added_NTD = self._norm("mlp_out_norm", self.mlp(read_NTD, context))
            return context.constrain_stream(after_NTD + self._scaled(added_NTD))

    def _norm(self, name: str, x_NTD: jax.Array) -> jax.Array:
        """Normalise where the family does."""
        return getattr(self, name)(x_NTD) if hasattr(self, name) else x_NTD

    def _scaled(self, added_NTD: jax.Array) -> jax.Array:
        return added_NTD if self.residual_scale is None else added_NTD * self.residual_scale
