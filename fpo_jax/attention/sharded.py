"""Attention on a mesh: each device attends its own rows and query heads, with the key/value heads that they read.

A Pallas kernel cannot be partitioned by XLA and cuDNN's only under conditions, so every implementation runs inside
`shard_map` and sees one device's arrays. Where the mesh divides the query heads but not the fewer key/value heads, the
latter are whole on every device, which takes those it reads; their gradients are summed over the devices.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fpo_jax import sharding, types
from fpo_jax.kernels.lm_head import spec as specs


def on_each_device(
    attend: Callable[..., jax.Array],
    q_NTHC: jax.Array,
    k_NTGC: jax.Array,
    v_NTGC: jax.Array,
    segments: types.Segments | None,
    sinks_H: jax.Array | None = None,
    *,
    layout: sharding.Layout,
) -> jax.Array:
    """Call `attend(q, k, v, segments)` on every device's rows and heads; directly where there is one device.

    Rows and heads that the mesh does not divide stay whole. Sinks, if there are any, are given as `sinks_H`.
    """

    def call(q_NTHC, k_NTGC, v_NTGC, segments, sinks_H):
        own = {} if sinks_H is None else {"sinks_H": sinks_H}
        return attend(q_NTHC, k_NTGC, v_NTGC, segments, **own)

    mesh = layout.mesh
    if mesh is None or mesh.size == 1:
        return call(q_NTHC, k_NTGC, v_NTGC, segments, sinks_H)
    N, _, H, _ = q_NTHC.shape
    G = k_NTGC.shape[2]
    rows, heads, kv_heads = layout.place("rows", N), layout.place("heads", H), layout.place("kv_heads", G)

    def on_device(q_NTHC, k_NTGC, v_NTGC, segments, sinks_H):
        if heads and not kv_heads:
            first = jax.lax.axis_index(heads) * q_NTHC.shape[2]
            k_NTGC, v_NTGC = (_read_by(x, first, q_NTHC.shape[2], H // G) for x in (k_NTGC, v_NTGC))
        return call(q_NTHC, k_NTGC, v_NTGC, segments, sinks_H)

    q_spec, kv_spec = PartitionSpec(rows, None, heads, None), PartitionSpec(rows, None, kv_heads, None)
    # Values that differ between devices are told apart here, by in_specs and out_specs, not by the type system.
    sharded = jax.shard_map(
        on_device,
        **specs.mesh_or_rest(mesh),
        in_specs=(q_spec, kv_spec, kv_spec, PartitionSpec(rows, None), PartitionSpec(heads)),
        out_specs=q_spec,
        check_vma=False,
    )
    return sharded(q_NTHC, k_NTGC, v_NTGC, segments, sinks_H)


def _read_by(x_NTGC: jax.Array, first: jax.Array, heads: int, group: int) -> jax.Array:
    """Take the key/value heads that the query heads `first` to `first + heads - 1` read, `group` of them each one."""
    count = 1 if group % heads == 0 else heads  # one for all of them, or one for each
    return jnp.take(x_NTGC, (first + jnp.arange(count) * (heads // count)) // group, axis=2)
