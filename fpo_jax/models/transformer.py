"""Embedding, stacked layers under one scan, final norm: the same for every family. Hidden states, never logits.

The module tree of `Decoder` is the tree of parameters: `layers` is one layer whose parameters carry a leading L axis.
Where a family's first layers have no experts, `dense_layers` is another such layer and comes first.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from fpo_jax import attention, sharding, types
from fpo_jax.kernels.experts import grouped_product
from fpo_jax.models import config, decoder_layer, kv_cache, layers, lora, param_table, rope, routing

_LAYER_INPUT = "layer_input"
_CACHED = attention.Selection("cached", "one query against the cache")
_LONGEST_PERIOD = 16  # of kinds of layers that is looked for
_checkpoint = functools.partial(jax.checkpoint, prevent_cse=False)  # scan already keeps the recomputation apart


_of_weights = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(grouped_product.RESULT),
)


def _keeps_products(primitive, *operands, **parameters) -> bool:
    """Keep the results of matmuls with weights, those of experts among them."""
    return primitive.name == "ragged_dot_general" or bool(_of_weights(primitive, *operands, **parameters))


# What the backward pass keeps of a layer, from most memory and fewest FLOPs to the least memory.
REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda layer: layer,  # everything
    "dots_and_attention": functools.partial(  # as dots, and of flash attention what its backward pass reads
        _checkpoint,
        policy=jax.checkpoint_policies.save_from_both_policies(_keeps_products, attention.keeps_results),
    ),
    "dots": functools.partial(  # the results of its matmuls with weights; attention, norms and activations run again
        _checkpoint, policy=_keeps_products
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
        self.config, self.adapter = config, adapter
        for stack in config.stacks:
            setattr(self, stack, decoder_layer.Layer(config, dense=stack == "dense_layers"))
        self.final_norm = layers.NORMS[config.of_family.norm](config.norm_eps)
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
    ) -> tuple[Float[jax.Array, "N T D"], routing.Routing | None]:
        """Return the hidden states after the final norm, in compute_dtype, and where the router sent the tokens."""
        positions_XT = jnp.arange(tokens_NT.shape[1])[None] if segments is None else jnp.asarray(segments.positions_NT)
        context_of = self._contexts(positions_XT, valid_NT, choice, layout, segments, fp8=fp8)

        def apply_layer(x_NTD, layer, *, kind, graphdef):
            layer, number = layer
            own = context_of(kind, number)
            if dropout_key is not None:
                own = own._replace(dropout_key=jax.random.fold_in(dropout_key, number))
            routes = routing.Recorder()
            own = own._replace(routes=routes)
            return nnx.merge(graphdef, layer)(checkpoint_name(x_NTD, _LAYER_INPUT), own), routes.found

        # Padding reads row 0, so that a pad id added beyond the vocabulary is harmless.
        x_NTD = self._embedded(jnp.where(valid_NT, tokens_NT, 0), positions_XT, layout, compute_dtype)
        x_NTD, routes = self._scan(lambda **of: REMAT[remat](functools.partial(apply_layer, **of)), x_NTD)
        return layout.constrain(self._normed(x_NTD), "rows", "positions", "width"), routes

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
        context_of = self._contexts(positions_XT, valid_NT, choice, layout)

        def apply_layer(x_NTD, layer, *, kind, graphdef):
            layer, number = layer
            recorder = kv_cache.Recorder()
            x_NTD = nnx.merge(graphdef, layer)(x_NTD, context_of(kind, number)._replace(slot=recorder))
            return x_NTD, (recorder.keys_NTGC, recorder.values_NTGC)

        x_NTD = self._embedded(jnp.where(valid_NT, tokens_NT, 0), positions_XT, layout, compute_dtype)
        x_NTD, recorded = self._scan(lambda **of: functools.partial(apply_layer, **of), x_NTD)
        assert recorded is not None  # every layer returns its keys and values
        keys_LNTGC, values_LNTGC = recorded
        return self._normed(x_NTD), kv_cache.Cache(keys_LNTGC, values_LNTGC)

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
        context_of = self._contexts(positions_N[:, None], valid_NT, _CACHED, layout)

        def apply_layer(carry, layer, *, kind, graphdef):
            (x_NTD, cache), (layer, number) = carry, layer
            slot = kv_cache.Slot(cache, number, positions_N)
            x_NTD = nnx.merge(graphdef, layer)(x_NTD, context_of(kind, number)._replace(slot=slot))
            return (x_NTD, slot.cache), None

        x_NTD = self._embedded(tokens_N[:, None], positions_N[:, None], layout, compute_dtype)
        (x_NTD, cache), _ = self._scan(lambda **of: functools.partial(apply_layer, **of), (x_NTD, cache))
        return self._normed(x_NTD)[:, 0], cache

    def _scan(self, layer_of: Callable, carry):
        """Scan over the layers, stack by stack; where their kinds alternate, over groups of one of each, run by run.

        `layer_of(kind=, graphdef=)` gives the body of a layer, which is handed the layer and its number. What the
        bodies return is joined along the layers; those of a stack may return nothing.
        """
        found = []
        for stack, numbers in self.config.stacks.items():
            graphdef, layers = nnx.split(getattr(self, stack))
            layers = (layers, jnp.arange(numbers.start, numbers.stop))
            for run in runs(self.config.kinds[numbers.start : numbers.stop]):
                whole = run.period * run.repeats == len(numbers)
                part = layers if whole else jax.tree.map(lambda leaf: leaf[run.start : run.stop], layers)  # noqa: B023
                bodies = [layer_of(kind=kind, graphdef=graphdef) for kind in run.kinds]
                carry, one = _scan_run(bodies, carry, part)
                found += [] if one is None else [one]
        if len(found) < 2:
            return carry, found[0] if found else None
        return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)

    def _contexts(
        self, positions_XT, valid_NT, choice: attention.Selection, layout: sharding.Layout, segments=None, *, fp8=False
    ) -> Callable[[config.LayerKind, jax.Array], layers.Context]:
        """Return the context of a layer by its kind and its number."""
        config = self.config
        if segments is None:
            lengths_N = jnp.sum(valid_NT, axis=1, dtype=jnp.int32)
        else:
            lengths_N = jnp.max(positions_XT, axis=1) + 1  # of the longest text in the row
        rotations = {
            one: rope.rotation(
                one,
                head_dim=config.rotary_dim,
                max_positions=config.max_positions,
                lengths_N=lengths_N,
                positions_XT=positions_XT,
            )
            for one in config.ropes
        }
        shared = layers.Context(
            valid_NT,
            None,
            config.attention_scale,
            None,
            config.attention_soft_cap,
            choice,
            layout,
            self.adapter,
            segments=segments,
            fp8=fp8,
            interleaved=config.of_family.interleaved,
        )

        def of(kind, number: jax.Array) -> layers.Context:
            divisor = (number + 1).astype(jnp.float32) if config.inverse_layer_scale else None
            rotation = None if kind.rope is None else rotations[kind.rope]
            return shared._replace(rotation=rotation, sliding_window=kind.window, divisor=divisor)

        return of

    def _embedded(self, tokens_NT, positions_XT, layout: sharding.Layout, compute_dtype) -> jax.Array:
        """The cast follows the gather: its gradient, a scatter-add, then sums in the parameters' own dtype.

        Ids outside the vocabulary give NaN.
        """
        x_NTD = jnp.take(self.embed[...], tokens_NT, axis=0, mode="fill").astype(compute_dtype)
        if self.adapter is not None and hasattr(self, "embed_lora_a"):
            a_Vr, b_rD = (getattr(self, f"embed_lora_{part}")[...] for part in "ab")
            low_NTr = jnp.take(a_Vr, tokens_NT, axis=0, mode="clip").astype(compute_dtype)
            x_NTD += self.adapter.scale * jnp.einsum("NTr,rD->NTD", low_NTr, b_rD.astype(compute_dtype))
        scale = self.config.width**0.5 if self.config.of_family.sqrt_width_embedding else self.config.embedding_scale
        if scale is not None:
            x_NTD *= jnp.asarray(scale, compute_dtype)
        if self.config.learned_positions:
            x_NTD += jnp.take(self.positions[...], positions_XT, axis=0, mode="clip").astype(compute_dtype)
        return layout.constrain(x_NTD, "rows", "stream", "width")

    def _normed(self, x_NTD: jax.Array) -> jax.Array:
        """Apply the final norm, and the factor that the LM head's logits have; a reward model's scores have none."""
        hidden_NTD = self.final_norm(x_NTD)
        scale = None if self.config.reward_head else self.config.logit_scale
        return hidden_NTD if scale is None else hidden_NTD * jnp.asarray(scale, hidden_NTD.dtype)


class Run(NamedTuple):
    """Layers in a row whose kinds repeat with a period."""

    start: int
    period: int
    repeats: int
    kinds: tuple[config.LayerKind, ...]  # of one period

    @property
    def stop(self) -> int:
        """Number of the layer after the last."""
        return self.start + self.period * self.repeats


@functools.lru_cache(maxsize=32)
def runs(kinds: tuple[config.LayerKind, ...]) -> tuple[Run, ...]:
    """Cut layers into runs, so that as few layers as possible are compiled: their kinds stand once per period.

    >>> a, b = config.LayerKind(4, None), config.LayerKind(None, None)
    >>> [(run.start, run.period, run.repeats) for run in runs((a, a, b, a, a, b, a, a))]
    [(0, 1, 2), (2, 3, 2)]
    """
    count, longest = len(kinds), min(len(kinds), _LONGEST_PERIOD)
    if len(set(kinds)) == 1:
        return (Run(0, 1, count, kinds[:1]),)
    same = {period: [0] * (count + 1) for period in range(1, longest + 1)}  # layers from here on that repeat
    best: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)] * (count + 1)  # compiled layers, runs, period, repeats
    for start in reversed(range(count)):
        options = []
        for period in range(1, min(longest, count - start) + 1):
            again = start + period < count and kinds[start] == kinds[start + period]
            same[period][start] = same[period][start + 1] + 1 if again else 0
            repeats = 1 + same[period][start] // period
            compiled, cuts, *_ = best[start + period * repeats]
            options.append((period + compiled, 1 + cuts, period, repeats))
        best[start] = min(options)
    found, start = [], 0
    while start < count:
        _, _, period, repeats = best[start]
        found.append(Run(start, period, repeats, kinds[start : start + period]))
        start = found[-1].stop
    return tuple(found)


def _scan_run(bodies: list[Callable], carry, layers):
    """Scan over layers of one kind, or over groups of one layer of each kind."""
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


@functools.lru_cache(maxsize=32)
def graph(config: config.ModelConfig, adapter: config.Adapter | None = None) -> nnx.GraphDef:
    """Return the static half of the decoder; merging it with a nested dict of arrays gives a callable module."""
    return nnx.split(Decoder(config, adapter))[0]
