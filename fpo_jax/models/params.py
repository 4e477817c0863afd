"""Parameter trees: abstract, fresh, named, and from and to the layout of the disk, as `param_table.py` has the entries.

A tree is a nested dict of arrays, layers stacked on a leading L axis. Abstract shapes, initial values, shardings, decay
masks, counts, and both directions of the Hugging Face translation come from the entries; those of an adapter stand in
`lora.py`. How bytes reach the disk is hf's business.
"""

import zlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fpo_jax import sharding, types
from fpo_jax.models.config import ModelConfig
from fpo_jax.models.lora import (
    adapter,
    adapter_entries,
    four_bit_axis,
    frozen_entries,
    is_b,
    magnitude,
    module_of,
    trained_entries,
    trains_head,
)
from fpo_jax.models.param_table import Entry, entries, full_hf_name, hf_head_name, ignored_hf_names

__all__ = [
    "Entry",
    "abstract",
    "active",
    "adapter",
    "adapter_entries",
    "check",
    "count",
    "decay_mask",
    "entries",
    "flatten",
    "four_bit_axis",
    "from_hf",
    "frozen_entries",
    "full_hf_name",
    "hf_head_name",
    "ignored_hf_names",
    "init",
    "initial",
    "is_b",
    "logical_axes",
    "magnitude",
    "met",
    "module_of",
    "nest",
    "shardings",
    "to_hf",
    "trained_entries",
    "trains_head",
    "union",
]

_Array = TypeVar("_Array", np.ndarray, jax.Array)
_SLAB = 64  # rows that are turned at a time; a wide matrix turned at once misses every cache: three times slower


def abstract(config: ModelConfig, dtype: jax.typing.DTypeLike) -> types.PyTree:
    """Return the parameter tree as jax.ShapeDtypeStruct."""
    return nest({entry.path: jax.ShapeDtypeStruct(entry.shape, jnp.dtype(dtype)) for entry in entries(config)})


def init(config: ModelConfig, key: jax.Array, dtype: jax.typing.DTypeLike) -> types.PyTree:
    """Draw fresh parameters: normal(0, initializer_range) matrices, norms of one, biases of zero.

    Every parameter's key is folded from its path, so that adding an entry changes no other. Jit it with out_shardings
    to create a large model in place.

    Args:
        config: the architecture.
        key: typed key from jax.random.key.
        dtype: of the result; values are drawn in float32.
    """
    return nest({entry.path: initial(entry, config, key).astype(dtype) for entry in entries(config)})


def initial(entry: Entry, config: ModelConfig, key: jax.Array) -> jax.Array:
    """Draw one parameter as `init` does, in float32."""
    own_key = jax.random.fold_in(key, zlib.crc32(entry.path.encode()))
    if entry.init == "normal":
        return config.initializer_range * jax.random.normal(own_key, entry.shape, jnp.float32)
    if entry.init == "uniform":
        bound = entry.hf_shape[-1] ** -0.5
        return jax.random.uniform(own_key, entry.shape, jnp.float32, -bound, bound)
    if entry.init == "unit_normal":
        return jax.random.normal(own_key, entry.shape, jnp.float32)
    return {"ones": jnp.ones, "zeros": jnp.zeros}[entry.init](entry.shape, jnp.float32)


def logical_axes(config: ModelConfig) -> types.PyTree:
    """Return, per parameter, a tuple with one logical axis name or None per dimension."""
    return nest({entry.path: entry.axes for entry in entries(config)})


def shardings(config: ModelConfig, *, mesh: Mesh, rules: sharding.Rules = sharding.RULES) -> types.PyTree:
    """Return, per parameter, its NamedSharding; arguments and errors as those of `sharding.param_shardings`."""
    return sharding.param_shardings(logical_axes(config), abstract(config, "float32"), mesh=mesh, rules=rules)


def decay_mask(config: ModelConfig) -> types.PyTree:
    """Return, per parameter, whether weight decay applies."""
    return nest({entry.path: entry.decay for entry in entries(config)})


def count(config: ModelConfig) -> int:
    """Return the number of parameters; a tied head counts once."""
    return sum(entry.size for entry in entries(config))


def active(config: ModelConfig) -> int:
    """Return the number of parameters that a token meets: all, but of a mixture's experts its own."""
    return sum(met(entry, config) for entry in entries(config))


def met(entry: Entry, config: ModelConfig) -> int:
    """Return the number of an entry's values that a token meets."""
    return entry.size * config.experts_per_token // config.experts if entry.routed else entry.size


def from_hf(entry: Entry, tensor: _Array) -> _Array:
    """Rearrange one tensor of the disk into our layout, without the axes that are stacked; a view of a NumPy array.

    >>> entry = Entry("out", "HCD", "o_proj.weight", "D(HC)", "normal", True, shape=(2, 3, 5))
    >>> from_hf(entry, np.zeros((5, 6))).shape
    (2, 3, 5)
    """
    turn = [entry.disk_letters.index(letter) for letter in entry.inner_letters]
    return tensor.reshape(entry.disk_shape).transpose(turn)


def to_hf(entry: Entry, array: np.ndarray) -> np.ndarray:
    """Rearrange our array, at one of `entry.tensors()`, into the layout of the disk; the inverse of from_hf."""
    disk = np.empty(entry.disk_shape, array.dtype)
    ours = from_hf(entry, disk)
    for start in range(0, len(ours), _SLAB):
        ours[start : start + _SLAB] = array[start : start + _SLAB]
    return disk.reshape(entry.hf_shape)


def union(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Return one nested dict of the leaves of all; trees whose leaves have different paths."""
    return nest({path: leaf for tree in trees for path, leaf in flatten(tree).items()})


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn {"layers/mlp/up": x} into {"layers": {"mlp": {"up": x}}}."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a nested dict into {path: leaf}; the inverse of nest."""
    return dict(_walk(tree, ""))


def check(params: types.PyTree, config: ModelConfig) -> None:
    """Verify that a tree has exactly the entries' paths and shapes.

    Raises:
        ValueError: every missing, unexpected or misshapen parameter.
    """
    found = flatten(params)
    expected = {entry.path: entry.shape for entry in entries(config)}
    problems = [f"{path} is missing" for path in expected if path not in found]
    problems += [f"{path} is unexpected" for path in found if path not in expected]
    problems += [
        f"{path} has shape {tuple(leaf.shape)}, expected {expected[path]}"
        for path, leaf in found.items()
        if path in expected and tuple(leaf.shape) != expected[path]
    ]
    if problems:
        raise ValueError(f"these are not the parameters of this {config.family} model: " + "; ".join(problems) + ".")


def _walk(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, node in tree.items():
        if isinstance(node, Mapping):
            yield from _walk(node, f"{prefix}{name}/")
        else:
            yield prefix + name, node
