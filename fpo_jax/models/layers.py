"""What the layers of all decoders share: norms, and the context of one forward pass.

No module here or in decoder_layer states the shape of a parameter: the entries of `param_table` do, and
`transformer.Decoder` hangs each at its path.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from fpo_jax import attention, sharding, types
from fpo_jax.models import config, fp8, kv_cache, rope, routing


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axes, float32 inside, dtype kept."""

    scale: nnx.Param

    def __init__(self, eps: float, axes: tuple[int, ...] = (-1,)):
        self.eps, self.axes = eps, axes

    def __call__(self, x: Float[jax.Array, "*batch D"]) -> Float[jax.Array, "*batch D"]:
        """Normalise."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=self.axes, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + self.eps) * self._factor()).astype(x.dtype)

    def _factor(self) -> jax.Array:
        return self.scale[...].astype(jnp.float32)


class OffsetRMSNorm(RMSNorm):
    """Gemma's: the scale counts from one, so that weight 0 leaves a normalised value as it is."""

    def _factor(self) -> jax.Array:
        return 1.0 + self.scale[...].astype(jnp.float32)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * scale + bias over the last axes, float32 inside, dtype kept."""

    scale: nnx.Param
    bias: nnx.Param

    def __init__(self, eps: float, axes: tuple[int, ...] = (-1,)):
        self.eps, self.axes = eps, axes

    def __call__(self, x: Float[jax.Array, "*batch D"]) -> Float[jax.Array, "*batch D"]:
        """Normalise."""
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=self.axes, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=self.axes, keepdims=True)
        scaled = centred * jax.lax.rsqrt(variance + self.eps) * self.scale[...].astype(jnp.float32)
        bias = getattr(self, "bias", None)
        return (scaled if bias is None else scaled + bias[...].astype(jnp.float32)).astype(x.dtype)


# Family.norm -> module; which of them have a bias and where scales start, says param_table
NORMS: dict[str, Callable] = {
    "rms": RMSNorm,
    "offset_rms": OffsetRMSNorm,
    "layer": LayerNorm,
    "layer_scale": LayerNorm,  # without a bias
}


class Context(NamedTuple):
    """What every layer of one forward pass sees besides its input."""

    valid_NT: jax.Array  # bool
    rotation: tuple[jax.Array, jax.Array] | None  # cos and sin [X, T, P], float32, X is N or 1; None = no rotation
    scale: float  # factor on the attention logits
    sliding_window: int | None  # of the layer
    soft_cap: float | None
    attention: attention.Selection
    layout: sharding.Layout
    adapter: config.Adapter | None = None
    dropout_key: jax.Array | None = None  # of the layer; None = nothing is dropped
    segments: types.Segments | None = None  # of packed rows
    slot: kv_cache.Recorder | kv_cache.Slot | None = None  # the layer's place in a cache, where there is one
    fp8: bool = False  # products with weights in 8 bits, see models.fp8
    interleaved: bool = False  # rotary pairs are neighbours
    divisor: jax.Array | None = None  # of the layer's attention logits
    routes: routing.Recorder | None = None  # what a mixture of experts writes into; None = nobody reads it

    def attend(
        self, q_NTHC: jax.Array, k_NTGC: jax.Array, v_NTGC: jax.Array, sinks_H: jax.Array | None = None
    ) -> jax.Array:
        """Rotate queries and keys, then attend."""
        if self.rotation is not None:
            q_NTHC, k_NTGC = (rope.rotate(x, *self.rotation, interleaved=self.interleaved) for x in (q_NTHC, k_NTGC))
        if self.divisor is not None:
            q_NTHC = (q_NTHC / self.divisor).astype(q_NTHC.dtype)
        options: dict[str, Any] = {"scale": self.scale, "sliding_window": self.sliding_window}
        options |= {"soft_cap": self.soft_cap, "sinks_H": sinks_H}
        if isinstance(self.slot, kv_cache.Slot):
            return self.slot.attend(q_NTHC, k_NTGC, v_NTGC, **options)
        if self.slot is not None:
            self.slot.keys_NTGC, self.slot.values_NTGC = k_NTGC, v_NTGC
        return attention.attend(
            q_NTHC,
            k_NTGC,
            v_NTGC,
            valid_NT=self.valid_NT,
            segments=self.segments,
            choice=self.attention,
            layout=self.layout,
            **options,
        )

    def project(self, equation: str, x: jax.Array, module: nnx.Module, name: str) -> jax.Array:
        """Apply a matrix of a module, and its bias where it has one under the name `{name}_bias`.

        Every matmul with a weight of a layer goes through here; so does what an adapter adds to it.
        """
        multiply = fp8.einsum if self.fp8 else jnp.einsum
        out = multiply(equation, x, getattr(module, name)[...].astype(x.dtype))
        if self.adapter is not None and hasattr(module, f"{name}_lora_a"):
            out += self._adapted(equation, x, module, name)
            if self.adapter.dora:
                out *= self._magnified(equation, module, name).astype(x.dtype)
        bias = getattr(module, f"{name}_bias", None)
        return out if bias is None else out + bias[...].astype(x.dtype)

    def _adapted(self, equation: str, x: jax.Array, module: nnx.Module, name: str) -> jax.Array:
        """Return scale dropout(x) A B, through the rank: no matrix of the size of W is made."""
        assert self.adapter is not None
        given, result = equation.split("->")
        read, weight = given.split(",")
        inside = "".join(letter for letter in weight if letter not in result)
        outside = "".join(letter for letter in weight if letter in result)
        kept = "".join(letter for letter in read if letter not in inside)
        a, b = (getattr(module, f"{name}_lora_{part}")[...].astype(x.dtype) for part in "ab")
        if self.dropout_key is not None:
            own = jax.random.fold_in(self.dropout_key, zlib.crc32(name.encode()))
            keep = jax.random.bernoulli(own, 1.0 - self.adapter.dropout, x.shape)
            x = jnp.where(keep, x / (1.0 - self.adapter.dropout), 0).astype(x.dtype)
        low = jnp.einsum(f"{read},{inside}r->{kept}r", x, a)
        return self.adapter.scale * jnp.einsum(f"{kept}r,r{outside}->{result}", low, b)

    def _magnified(self, equation: str, module: nnx.Module, name: str) -> jax.Array:
        """Return m / |W + scale A B| of each output, float32; the norm over the inputs has no gradient.

        DoRA, arXiv 2402.09353, eq. 5 and section 4.3. By |W|^2 + 2 scale (A'W) B + scale^2 B'(A'A) B no matrix of the
        size of W is made.
        """
        assert self.adapter is not None
        weight_letters, result = equation.partition(",")[2].split("->")
        inside = "".join(letter for letter in weight_letters if letter not in result)
        outside = weight_letters.removeprefix(inside)
        weight, a, b = (
            jax.lax.stop_gradient(getattr(module, part)[...]) for part in (name, f"{name}_lora_a", f"{name}_lora_b")
        )
        einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        squares = jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=tuple(range(len(inside))))
        of_weight = einsum(f"{inside}r,{inside}{outside}->r{outside}", a.astype(weight.dtype), weight)
        of_a = einsum(f"{inside}r,{inside}s->rs", a, a)
        scale = self.adapter.scale
        added = scale * (2 * of_weight + scale * einsum(f"rs,s{outside}->r{outside}", of_a, b))
        squares += jnp.sum(b * added, axis=0)
        norm = jnp.sqrt(jnp.where(squares > 0, squares, 1))  # an output without weights stays 0
        return getattr(module, f"{name}_lora_m")[...] / norm

    def constrain_stream(self, x_NTD: jax.Array) -> jax.Array:
        """State where the residual stream lives."""
        return self.layout.constrain(x_NTD, "rows", "stream", "width")

    def constrain_heads(self, x_NTHC: jax.Array) -> jax.Array:
        """State where queries and attended values live."""
        return self.layout.constrain(x_NTHC, "rows", "positions", "heads", "head_dim")

    def constrain_mlp(self, x_NTF: jax.Array) -> jax.Array:
        """State where the hidden units of an MLP live."""
        return self.layout.constrain(x_NTF, "rows", "positions", "mlp")
