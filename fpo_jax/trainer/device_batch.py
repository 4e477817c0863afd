"""Batches of a run as arrays of all its devices: which parts each process builds, and where they live."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fpo_jax import config as configuration
from fpo_jax import sharding, types


class BatchSharding:
    """Where the batches of one run live."""

    def __init__(self, config: configuration.Config, layout: sharding.Layout):
        """Take what decides the leaves of a batch, and the mesh."""
        assert layout.mesh is not None
        self._packed, self._layout = config.data.packing, config.data.layout
        self._mesh, self._ways = layout.mesh, layout.data_parallel_degree
        self._blocks = held_blocks(layout.mesh, process=jax.process_index())

    def positions(self, parts: int, *, accumulation: int = 1) -> np.ndarray:
        """Return which parts of a batch this process builds, in the order in which `place` takes them."""
        places = np.arange(parts).reshape(accumulation, self._ways, -1)
        return places[:, self._blocks].reshape(-1)

    def place(self, batch: types.Batch, *, stacked: bool) -> types.Batch:
        """Make one array over all processes' devices of their parts of a batch; `stacked` batches have A in front."""
        placement, axis = sharding.batch_sharding(self._mesh, stacked=stacked), int(stacked)

        def put(leaf: types.Array) -> jax.Array:
            leaf = np.asarray(leaf)
            size = leaf.shape[axis] // len(self._blocks)  # rows of a block

            def block(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None
                start = self._blocks.index((index[axis].start or 0) // size) * size
                return leaf[(*index[:axis], slice(start, start + size))]

            shape = (*leaf.shape[:axis], size * self._ways, *leaf.shape[axis + 1 :])
            return jax.make_array_from_callback(shape, placement, block)

        return jax.tree.map(put, batch)

    def abstract(
        self, parts: int, *, group_size: int, length: int, scored: int, places: int = 1, accumulation: int | None = None
    ) -> types.Batch:
        """Return shapes, dtypes and shardings of a batch of T = `length`, R = `scored`; A in front.

        Args:
            parts: groups, or rows that hold groups.
            group_size: K.
            length: T.
            scored: R.
            places: groups that a row has places for.
            accumulation: A; None = no axis for it.
        """
        stack = () if accumulation is None else (accumulation,)
        place = sharding.batch_sharding(self._mesh, stacked=accumulation is not None)
        slotted = self._layout != "padded"
        per_row, per_group = (parts if slotted else parts * group_size,), (parts * places,)

        def array(shape, dtype) -> Any:
            return jax.ShapeDtypeStruct((*stack, *shape), jnp.dtype(dtype), sharding=place)

        segments = [array((*per_row, length), jnp.int32)] * (3 if self._layout == "shared" else 2)
        return types.Batch(
            tokens_NT=array((*per_row, length), jnp.int32),
            valid_NT=array((*per_row, length), bool),
            predictors_NR=array((*per_row, scored), jnp.int32),
            targets_NR=array((*per_row, scored), jnp.int32),
            loss_mask_NR=array((*per_row, scored), bool),
            rewards_BK=array((*per_group, group_size), jnp.float32),
            reference_logps_BK=array((*per_group, group_size), jnp.float32),
            weight_B=array(per_group, jnp.float32),
            row_ids_B=array(per_group, jnp.int32),
            segments=types.Segments(*segments) if self._packed or slotted else None,
            slots_NR=array((*per_row, scored), jnp.int32) if slotted else None,
            ends_NP=array((*per_row, places * group_size), jnp.int32) if slotted else None,
        )


def held_blocks(mesh: Mesh, *, process: int) -> list[int]:
    """Return which blocks of a batch's rows live on the devices of a process, ascending.

    The mesh cuts the rows in equal blocks. A process's blocks need not be neighbours (a TPU mesh follows the physical
    links), and processes that differ along `tensor` alone have the same.
    """
    ways = sharding.Layout(mesh).data_parallel_degree
    places = sharding.batch_sharding(mesh, stacked=False).devices_indices_map((ways,))
    return sorted({index[0].start or 0 for device, index in places.items() if device.process_index == process})
