"""Keys and values of earlier positions, so that one more token costs one position.

A layer sees its part through `layers.Context.slot`: a `Recorder` keeps what a forward pass over whole rows computes, a
`Slot` adds one position to the cache and attends to all of it.

Letter used only here: S positions that a cache has room for.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

# Update n goes to row n. Said like this, rows stay on their devices; with `.at[layer, rows, positions]` XLA gathers the
# updates of all rows on every device, in every layer and for every token.
_ROW_BY_ROW = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(1, 2),
    inserted_window_dims=(0, 2),
    scatter_dims_to_operand_dims=(0, 2),
    operand_batching_dims=(1,),
    scatter_indices_batching_dims=(0,),
)


class Cache(NamedTuple):
    """Keys (rotated) and values of all layers; positions that a row has not reached hold anything."""

    keys_LNSGC: jax.Array
    values_LNSGC: jax.Array


class Recorder:
    """Keeps the keys and values of one layer."""

    keys_NTGC: jax.Array
    values_NTGC: jax.Array


class Slot:
    """One layer's place in a cache, and the position that each row adds; `cache` is the new one afterwards."""

    def __init__(self, cache: Cache, layer: jax.Array, positions_N: Int[jax.Array, " N"]):
        self.cache, self._layer, self._positions_N = cache, layer, positions_N

    def attend(
        self,
        q_NTHC: Float[jax.Array, "N 1 H C"],
        k_NTGC: Float[jax.Array, "N 1 G C"],
        v_NTGC: Float[jax.Array, "N 1 G C"],
        *,
        scale: float,
        sliding_window: int | None,
        soft_cap: float | None,
        sinks_H: Float[jax.Array, " H"] | None = None,
    ) -> Float[jax.Array, "N 1 H C"]:
        """Add the new position and attend to it and those before it; logits and softmax are float32."""
        self.cache = Cache(
            self._written(self.cache.keys_LNSGC, k_NTGC),
            self._written(self.cache.values_LNSGC, v_NTGC),
        )
        keys_NSGC, values_NSGC = (
            jax.lax.dynamic_index_in_dim(array, self._layer, keepdims=False).astype(q_NTHC.dtype)
            for array in self.cache
        )
        N, S, G, C = keys_NSGC.shape
        q_NGMC = q_NTHC.reshape(N, G, -1, C)
        logits_NGMS = jnp.einsum("NGMC,NSGC->NGMS", q_NGMC, keys_NSGC, preferred_element_type=jnp.float32) * scale
        if soft_cap is not None:
            logits_NGMS = soft_cap * jnp.tanh(logits_NGMS / soft_cap)
        back_NS = self._positions_N[:, None] - jnp.arange(S)
        seen_NS = (back_NS >= 0) & (back_NS < (S if sliding_window is None else sliding_window))
        logits_NGMS = jnp.where(seen_NS[:, None, None], logits_NGMS, -jnp.inf)
        if sinks_H is not None:  # one more place, whose value is zero
            sinks_NGM1 = jnp.broadcast_to(sinks_H.astype(jnp.float32).reshape(G, -1, 1), (*logits_NGMS.shape[:3], 1))
            logits_NGMS = jnp.concatenate([logits_NGMS, sinks_NGM1], axis=-1)
        weights_NGMS = jax.nn.softmax(logits_NGMS, axis=-1)[..., :S]
        values_NSGC = jnp.where(seen_NS[:, :, None, None], values_NSGC, 0)  # 0 * NaN of an unused place is NaN
        out_NGMC = jnp.einsum("NGMS,NSGC->NGMC", weights_NGMS.astype(q_NTHC.dtype), values_NSGC)
        return out_NGMC.reshape(q_NTHC.shape)

    def _written(self, array_LNSGC: jax.Array, new_NTGC: jax.Array) -> jax.Array:
        """Put the new position of every row into the layer; beyond the room nothing is kept."""
        layers_N = jnp.full_like(self._positions_N, self._layer)
        return jax.lax.scatter(
            array_LNSGC,
            jnp.stack([layers_N, self._positions_N], axis=1),
            new_NTGC[:, 0].astype(array_LNSGC.dtype),
            _ROW_BY_ROW,
            mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
        )


def with_room(cache: Cache, *, positions: int, returns: int) -> Cache:
    """Repeat every row `returns` times, neighbours, and give each row room for `positions`."""

    def one(array: jax.Array) -> jax.Array:
        array = jnp.repeat(array, returns, axis=1)
        return jnp.pad(array, ((0, 0), (0, 0), (0, positions - array.shape[2]), (0, 0), (0, 0)))

    return Cache(*map(one, cache))
