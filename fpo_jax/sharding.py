"""One mesh with named axes, and one table from logical axes to mesh axes.

Every parameter row names its logical axes (params.py); this table alone decides where they live. The batch is cut over
(data, fsdp), weights over fsdp and tensor. The same code runs on one CPU device and on many accelerators.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fpo_jax import shapes
from fpo_jax.kernels import spec as specs

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# logical axis -> mesh axis; every logical axis must stand here
RULES: dict[str, str | None] = {
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
}


def make_mesh(*, data: int, fsdp: int, tensor: int, devices: Sequence) -> Mesh:
    """Arrange the devices as (data, fsdp, tensor); one axis may be -1, meaning all devices that remain.

    Raises:
        ValueError: the axes do not multiply to the number of devices.
    """
    sizes = [data, fsdp, tensor]
    known = int(np.prod([size for size in sizes if size != -1]))
    count = len(devices)
    if -1 in sizes:
        if count % known:
            raise ValueError(
                f"mesh data={data} fsdp={fsdp} tensor={tensor}: {count} devices are not divisible by {known}; choose"
                f" axes whose product divides {count}."
            )
        sizes[sizes.index(-1)] = count // known
    elif known != count:
        raise ValueError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} needs {known} devices, {count} are present; set one axis to"
            " -1 to use all that remain."
        )
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES)


def batch_devices(mesh: Mesh) -> int:
    """Return how many ways a batch is cut."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def head_placement(mesh: Mesh) -> specs.Placement | None:
    """Return where the rows of a batch and the LM head live; None on one device."""
    if mesh.size == 1:
        return None
    return specs.Placement(mesh, tokens=BATCH_AXES, vocab=RULES["vocab"], width=RULES["embed"])


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, *, stacked: bool) -> NamedSharding:
    """Return the sharding of a Batch leaf: rows (or groups) over (data, fsdp); `stacked` leaves have A in front."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES) if stacked else PartitionSpec(BATCH_AXES))


def param_shardings(logical_axes: shapes.PyTree, abstract: shapes.PyTree, *, mesh: Mesh) -> shapes.PyTree:
    """Map the logical axes of every parameter to a NamedSharding.

    Args:
        logical_axes: nested dict of tuples, one name or None per dimension.
        abstract: the same tree of jax.ShapeDtypeStruct.
        mesh: from make_mesh.

    Raises:
        ValueError: dimensions that the mesh does not divide, all at once.
    """
    problems: list[str] = []

    def place(path, shape, axes):
        mesh_axes = [None if axis is None else RULES[axis] for axis in axes]
        for size, logical, axis in zip(shape.shape, axes, mesh_axes, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                problems.append(
                    f"{jax.tree_util.keystr(path)}: {logical} has {size} entries, mesh axis {axis} has"
                    f" {mesh.shape[axis]} devices; choose a divisor of {size}."
                )
        return NamedSharding(mesh, PartitionSpec(*mesh_axes))

    shardings = jax.tree_util.tree_map_with_path(place, abstract, logical_axes)
    if problems:
        raise ValueError("the mesh does not divide these parameters:\n  " + "\n  ".join(problems))
    return shardings
