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

from fpo_jax import attention, sharding, types
from fpo_jax.models import config, gemma2, gpt2, gpt_neox, kv_cache, layers, llama, lora, param_table, rope

# family -> (one layer, the norm after the last layer)
_FAMILIES: dict[str, tuple[Callable, Callable]] = {
    "llama": (llama.Layer, layers.RMSNorm),
    "mistral": (llama.Layer, layers.RMSNorm),
    "qwen2": (llama.Layer, layers.RMSNorm),
    "qwen3": (llama.Layer, layers.RMSNorm),
    "gemma2": (gemma2.Layer, layers.OffsetRMSNorm),
    "gpt_neox": (gpt_neox.Layer, layers.LayerNorm),
    "gpt2": (gpt2.Layer, layers.LayerNorm),
}
_LAYER_INPUT = "layer_input"
_CACHED = attention.Selection("cached", "one query against the cache")
_checkpoint = functools.partial(jax.checkpoint, prevent_cse=False)  # scan already keeps the recomputation apart
# What the backward pass keeps of a layer, from most memory and fewest FLOPs to the least memory.
REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda layer: layer,  # everything
    "dots_and_attention": functools.partial(  # as dots, and of flash attention what its backward pass reads
        _checkpoint,
        policy=jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable, attention.keeps_results
        ),
    ),
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
    """A causal decoder without its LM head's matmul; its parameters are shapes until arrays take their place."""

    embed: nnx.Param
    positions: nnx.Param

    def __init__(self, config: config.ModelConfig, adapter: config.Adapter | None = None):
        layer, norm = _FAMILIES[config.family]
        self.config, self.adapter = config, adapter
        self.layers = layer(config)
        self.final_norm = norm(config.norm_eps)
        for entry in param_table.entries(config) + lora.adapter_entries(config, adapter):
            *parents, name = entry.path.split("/")
            module = functools.reduce(getattr, parents, self)
            setattr(module, name, nnx.Param(jax.ShapeDtypeStruct(entry.shape, jnp.float32)))

    def __call__(
        self,
        tokens_NT: Int[jax.Array, "N T"],
        valid_NT: Bool[jax.Array, "N T"],
        *,
        compute_dtype: jax.typing.DTypeLike,
        remat: str,
        choice: attention.Selection,
        layout: sharding.Layout,
        dropout_key: jax.Array | None = None,
        segments: types.Segments | None = None,
        fp8: bool = False,
    ) -> Float[jax.Array, "N T D"]:
        """Return the hidden states after the final norm, in compute_dtype."""
        positions_XT = jnp.arange(tokens_NT.shape[1])[None] if segments is None else jnp.asarray(segments.positions_NT)
        context = self._context(positions_XT, valid_NT, choice, layout)._replace(segments=segments, fp8=fp8)
        graphdef, layers = nnx.split(self.layers)

        def apply_layer(x_NTD, layer, *, window):
            own = context._replace(sliding_window=window)
            if dropout_key is not None:
                layer, number = layer
                own = own._replace(dropout_key=jax.random.fold_in(dropout_key, number))
            return nnx.merge(graphdef, layer)(checkpoint_name(x_NTD, _LAYER_INPUT), own), None

        # Padding reads row 0, so that a pad id added beyond the vocabulary is harmless.
        x_NTD = self._embedded(jnp.where(valid_NT, tokens_NT, 0), positions_XT, context, compute_dtype)
        if dropout_key is not None:
            layers = (layers, jnp.arange(self.config.layers))
        x_NTD, _ = self._scan(lambda window: REMAT[remat](functools.partial(apply_layer, window=window)), x_NTD, layers)
        return layout.constrain(self.final_norm(x_NTD), "rows", "positions", "width")

    def prefill(
        self,
        tokens_NT: Int[jax.Array, "N T"],
        valid_NT: Bool[jax.Array, "N T"],
        *,
        compute_dtype: jax.typing.DTypeLike,
        choice: attention.Selection,
        layout: sharding.Layout,
    ) -> tuple[Float[jax.Array, "N T D"], kv_cache.Cache]:
        """Return the hidden states and the keys and values of all positions."""
        positions_XT = jnp.arange(tokens_NT.shape[1])[None]
        context = self._context(positions_XT, valid_NT, choice, layout)
        graphdef, layers = nnx.split(self.layers)

        def apply_layer(x_NTD, layer, *, window):
            recorder = kv_cache.Recorder()
            x_NTD = nnx.merge(graphdef, layer)(x_NTD, context._replace(slot=recorder, sliding_window=window))
            return x_NTD, (recorder.keys_NTGC, recorder.values_NTGC)

        x_NTD = self._embedded(jnp.where(valid_NT, tokens_NT, 0), positions_XT, context, compute_dtype)
        x_NTD, (keys_LNTGC, values_LNTGC) = self._scan(
            lambda window: functools.partial(apply_layer, window=window), x_NTD, layers
        )
        return self.final_norm(x_NTD), kv_cache.Cache(keys_LNTGC, values_LNTGC)

    def decode(
        self,
        tokens_N: Int[jax.Array, " N"],
        positions_N: Int[jax.Array, " N"],
        cache: kv_cache.Cache,
        *,
        compute_dtype: jax.typing.DTypeLike,
        layout: sharding.Layout,
    ) -> tuple[Float[jax.Array, "N D"], kv_cache.Cache]:
        """Return the hidden state of one more token of each row, and the cache with it."""
        valid_NT = jnp.ones((tokens_N.shape[0], 1), bool)
        context = self._context(positions_N[:, None], valid_NT, _CACHED, layout)
        graphdef, layers = nnx.split(self.layers)

        def apply_layer(carry, layer, *, window):
            x_NTD, cache, number = carry
            slot = kv_cache.Slot(cache, number, positions_N)
            x_NTD = nnx.merge(graphdef, layer)(x_NTD, context._replace(slot=slot, sliding_window=window))
            return (x_NTD, slot.cache, number + 1), None

        x_NTD = self._embedded(tokens_N[:, None], positions_N[:, None], context, compute_dtype)
        (x_NTD, cache, _), _ = self._scan(
            lambda window: functools.partial(apply_layer, window=window), (x_NTD, cache, jnp.int32(0)), layers
        )
        return self.final_norm(x_NTD)[:, 0], cache

    def _scan(self, layer_of: Callable, carry, layers):
        """Scan over the layers; where kinds of them alternate, over groups of one of each kind.

        `layer_of(window)` gives the body of a layer with that sliding window.
        """
        bodies = [layer_of(window) for window in self.config.windows]
        if len(bodies) == 1:
            return jax.lax.scan(bodies[0], carry, layers)
        grouped = jax.tree.map(lambda leaf: leaf.reshape(-1, len(bodies), *leaf.shape[1:]), layers)

        def apply_group(carry, group):
            found = []
            for index, body in enumerate(bodies):
                carry, one = body(carry, jax.tree.map(lambda leaf: leaf[index], group))  # noqa: B023
                found.append(one)
            return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *found)

        carry, found = jax.lax.scan(apply_group, carry, grouped)
        return carry, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found)

    def _context(self, positions_XT, valid_NT, choice: attention.Selection, layout: sharding.Layout) -> layers.Context:
        config, rotation = self.config, None
        if not config.learned_positions:
            rotation = rope.rotation(
                config.rope,
                head_dim=config.head_dim,
                max_positions=config.max_positions,
                lengths_N=jnp.sum(valid_NT, axis=1, dtype=jnp.int32),
                positions_XT=positions_XT,
            )
        scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
        return layers.Context(valid_NT, rotation, scale, None, config.attention_soft_cap, choice, layout, self.adapter)

    def _embedded(self, tokens_NT, positions_XT, context: layers.Context, compute_dtype) -> jax.Array:
        """The cast follows the gather: its gradient, a scatter-add, then sums in the parameters' own dtype.

        Ids outside the vocabulary give NaN.
        """
        x_NTD = jnp.take(self.embed[...], tokens_NT, axis=0, mode="fill").astype(compute_dtype)
        if self.config.family == "gemma2":
            x_NTD *= jnp.asarray(self.config.width**0.5, compute_dtype)
        if self.config.learned_positions:
            x_NTD += jnp.take(self.positions[...], positions_XT, axis=0, mode="clip").astype(compute_dtype)
        return context.constrain_stream(x_NTD)


@functools.lru_cache(maxsize=32)
def graph(config: config.ModelConfig, adapter: config.Adapter | None = None) -> nnx.GraphDef:
    """Return the static half of the decoder; merging it with a nested dict of arrays gives a callable module."""
    return nnx.split(Decoder(config, adapter))[0]
