"""Embedding, stacked layers under one scan, final norm: the same for every family. Hidden states, never logits.

The module tree of `Decoder` is the tree of parameters: `layers` is one layer whose parameters carry a leading L axis.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from fpo_jax import attention, sharding
from fpo_jax.model import configuration, gpt_neox, llama, parts, rope

# family -> (one layer, the norm after the last layer)
_FAMILIES: dict[str, tuple[Callable, Callable]] = {
    "llama": (llama.Layer, parts.RMSNorm),
    "mistral": (llama.Layer, parts.RMSNorm),
    "gpt_neox": (gpt_neox.Layer, parts.LayerNorm),
}
_LAYER_INPUT = "layer_input"
_checkpoint = functools.partial(jax.checkpoint, prevent_cse=False)  # scan already keeps the recomputation apart
# What the backward pass keeps of a layer, from most memory and fewest FLOPs to the least memory.
REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda layer: layer,  # everything
    "dots": functools.partial(  # the results of its matmuls with weights; attention, norms and activations run again
        _checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
    "full": _checkpoint,  # the layer's input alone
    "offload": functools.partial(  # the layer's input, in the host's memory
        _checkpoint,
        policy=jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[_LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    ),
}


class Decoder(nnx.Module):
    """A causal decoder without its LM head's matmul; declares parameters by shape, holds none."""

    def __init__(self, config: configuration.ModelConfig):
        layer, norm = _FAMILIES[config.family]
        self.config = config
        self.embed = parts.parameter(config.vocab_size, config.width)
        self.layers = _stacked(layer(config), config.layers)
        self.final_norm = norm(config.width, config.norm_eps)
        if config.reward_head:
            self.score = parts.parameter(1, config.width)
        elif not config.tied_head:
            self.head = parts.parameter(config.vocab_size, config.width)

    def __call__(
        self,
        tokens_NT: Int[jax.Array, "N T"],
        valid_NT: Bool[jax.Array, "N T"],
        *,
        compute_dtype: jax.typing.DTypeLike,
        remat: str,
        choice: attention.Choice,
        layout: sharding.Layout,
    ) -> Float[jax.Array, "N T D"]:
        """Return the hidden states after the final norm, in compute_dtype."""
        config = self.config
        cos_XTP, sin_XTP = rope.rotation(
            config.rope,
            head_dim=config.head_dim,
            max_positions=config.max_positions,
            lengths_N=jnp.sum(valid_NT, axis=1, dtype=jnp.int32),
            positions=tokens_NT.shape[1],
        )
        context = parts.Context(valid_NT, cos_XTP, sin_XTP, config.sliding_window, choice, layout)
        graphdef, layers = nnx.split(self.layers)

        def apply_layer(x_NTD, layer):
            return nnx.merge(graphdef, layer)(checkpoint_name(x_NTD, _LAYER_INPUT), context), None

        # Padding reads row 0, so that a pad id added beyond the vocabulary is harmless. The cast follows the gather:
        # its gradient, a scatter-add, then sums in the parameters' own dtype. Ids outside the vocabulary give NaN.
        tokens_NT = jnp.where(valid_NT, tokens_NT, 0)
        x_NTD = context.pin_stream(jnp.take(self.embed[...], tokens_NT, axis=0, mode="fill").astype(compute_dtype))
        x_NTD, _ = jax.lax.scan(REMAT[remat](apply_layer), x_NTD, layers)
        return layout.pin(self.final_norm(x_NTD), "rows", "positions", "width")


@functools.lru_cache(maxsize=32)
def graph(config: configuration.ModelConfig) -> nnx.GraphDef:
    """Return the static half of the decoder; merging it with a nested dict of arrays gives a callable module."""
    return nnx.split(Decoder(config))[0]


def _stacked(layer: nnx.Module, count: int) -> nnx.Module:
    """Give every parameter of a declared layer a leading axis of `count`."""
    graphdef, state = nnx.split(layer)
    return nnx.merge(graphdef, jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), state))
