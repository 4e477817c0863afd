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


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=0)  # all layers are in a scan
def activate(name: str, x: jax.Array, factor: jax.Array | None = None) -> jax.Array:
    """Return act(x), or act(x) * factor. The backward pass keeps the arguments and computes what is between anew.

    Without it, it would keep four more arrays of the width of the MLP for each layer.
    """
    active = ACTIVATIONS[name](x)
    return active if factor is None else active * factor
