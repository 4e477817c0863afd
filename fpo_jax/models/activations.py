"""The activations of the MLPs, by the names that Hugging Face configs have for them."""

import functools
from collections.abc import Callable

import jax

# hidden_act of a Hugging Face config -> function; gelu_new, gelu_fast and gelu_pytorch_tanh are one formula
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jax.numpy.square(jax.nn.relu(x)),
}


def _clamped_swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Return g sigmoid(1.702 g) (u + 1), g = min(gate, 7) and u = up cut to [-7, 7] (gpt-oss, arXiv 2508.10925)."""
    gate, up = jax.numpy.minimum(gate, SWIGLU_LIMIT), jax.numpy.clip(up, -SWIGLU_LIMIT, SWIGLU_LIMIT)
    return gate * jax.nn.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)


SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0
# Family.gating -> function of gate and up, where the second is not a mere factor
GATINGS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {"clamped_swiglu": _clamped_swiglu}


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=0)  # all layers are in a scan
def activate(name: str, x: jax.Array, factor: jax.Array | None = None) -> jax.Array:
    """Return act(x), act(x) * factor, or a function of GATINGS of both.

    The backward pass keeps the arguments and computes what is between anew.

    Without it, it would keep four more arrays of the width of the MLP for each layer.
    """
    if name in GATINGS:
        assert factor is not None
        return GATINGS[name](x, factor)
    active = ACTIVATIONS[name](x)
    return active if factor is None else active * factor
