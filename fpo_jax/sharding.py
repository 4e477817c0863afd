"""One mesh with named axes, and one table from logical axes to mesh axes.

Weights (`models/param_table.py`), batches and activations name their logical axes; `RULES` alone decides where they
live. Rows are cut over (data, fsdp, expert); weights over (fsdp, expert) and tensor, those of experts over expert by
expert. Between the matmuls of a tensor-parallel layer the residual stream is cut along its positions. The same code
runs on one CPU device and on many accelerators.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from fpo_jax import types
from fpo_jax.config import choices
from fpo_jax.kernels.lm_head import spec as specs

log = logging.getLogger("fpo_jax")

MESH_AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")
HOST = "pinned_host"  # memory kind of what is kept in the host's memory

Rules = Mapping[str, str | tuple[str, ...] | None]

# logical axis -> mesh axis; every logical axis must stand here
RULES: Rules = {
    # weights
    "layers": None,
    "embed": ("fsdp", "expert"),  # D of a weight
    "expert_embed": "fsdp",  # of a weight of experts
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "experts": "expert",
    "vocab": "tensor",
    # batches and activations, which also have heads, kv_heads, head_dim and mlp
    "rows": BATCH_AXES,
    "positions": None,
    "stream": "tensor",  # positions of the residual stream: norms and what remat keeps are cut (sequence parallelism)
    "width": None,  # D of an activation
}

# Key/value heads may be fewer than the ways heads are cut; all of them are then on every device (attention says so).
WHOLE_WHERE_INDIVISIBLE = frozenset({"kv_heads"})


class Preset(NamedTuple):
    """A common arrangement of the devices."""

    data: int
    fsdp: int
    tensor: int
    gather: str  # a key of GATHER
    expert: int = 1


GATHER = {
    "layer": "weights gathered over fsdp layer by layer, in every pass (ZeRO-3, FSDP)",
    "step": "the layers' weights gathered over fsdp once a step, in the compute dtype (ZeRO-2)",
}
PER_HOST = 0  # as `data`: one replica per host, or per TPU slice where there are several

PRESETS = {
    "fsdp": Preset(1, -1, 1, "layer"),  # everything cut over all devices: PyTorch FSDP's FULL_SHARD
    "zero3": Preset(1, -1, 1, "layer"),  # the same, under DeepSpeed's name
    "zero2": Preset(1, -1, 1, "step"),  # less traffic where batches are accumulated, for the layers' weights whole
    "multi_gpu": Preset(-1, 1, 1, "layer"),  # replicas: everything whole on every device
    "hybrid": Preset(PER_HOST, -1, 1, "layer"),  # FSDP within a host or slice, replicas across the slower network
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where weights, batches and activations live on a mesh; hashable. Without a mesh everything is on one device."""

    mesh: Mesh | None = None
    gather: str = "layer"  # a key of GATHER
    within_replica: bool = False  # inside a `shard_map` over `data`, where rows are those of one replica

    @property
    def rules(self) -> Rules:
        """Where logical axes live: RULES, within a replica without `data`."""
        return {**RULES, "rows": self._batch_axes} if self.within_replica else RULES

    @property
    def _batch_axes(self) -> tuple[str, ...]:
        return BATCH_AXES[1:] if self.within_replica else BATCH_AXES

    @property
    def on_one_device(self) -> bool:
        """Whether everything is on one device."""
        return self.mesh is None or self.mesh.size == 1

    @property
    def data_parallel_degree(self) -> int:
        """Ways that the rows of a batch are cut."""
        return self.ways("rows")

    def constrain(self, x: jax.Array, *axes: str) -> jax.Array:
        """State where an activation with these logical axes lives; one that the mesh does not divide stays whole."""
        if self.mesh is None or self.on_one_device:
            return x
        spec = PartitionSpec(*(self.place(axis, size) for axis, size in zip(axes, x.shape, strict=True)))
        # Within a replica the mesh is that of the surrounding `shard_map`.
        return jax.lax.with_sharding_constraint(x, spec if self.within_replica else NamedSharding(self.mesh, spec))

    def ways(self, axis: str) -> int:
        """Ways that a logical axis is cut."""
        return 1 if self.mesh is None else ways(self.mesh, self.rules[axis])

    def place(self, axis: str, size: int) -> str | tuple[str, ...] | None:
        """Mesh axes that a logical axis of an activation is cut over; None where they do not divide its size."""
        return None if size % self.ways(axis) else self.rules[axis]

    @property
    def head(self) -> specs.Placement | None:
        """Where the rows of a batch and the LM head live; None on one device."""
        if self.mesh is None or self.on_one_device:
            return None
        return specs.Placement(self.mesh, tokens=self._batch_axes, vocab="tensor", width=("fsdp", "expert"))


ONE_DEVICE = Layout()
# What `Layout.gather` = "step" makes of the layers' weights: whole over fsdp, still cut over tensor, and by expert.
GATHERED_RULES: Rules = {**RULES, "embed": None, "expert_embed": None}


def make_layout(
    *,
    preset: str,
    data: int | None,
    fsdp: int | None,
    tensor: int | None,
    expert: int | None = None,
    devices: Sequence,
) -> Layout:
    """Arrange the devices as a preset says; an axis that is given replaces the preset's.

    Args:
        preset: a key of PRESETS.
        data: devices along the axis, -1 = all that remain, None = as the preset.
        fsdp: the same.
        tensor: the same.
        expert: the same.
        devices: all of them, in the order of jax.devices().

    Raises:
        ValueError: unknown preset, or axes that do not fit the devices.
    """
    choices.check("mesh.preset", preset, PRESETS)
    base = PRESETS[preset]
    given = {"data": data, "fsdp": fsdp, "expert": expert, "tensor": tensor}
    sizes = {axis: getattr(base, axis) if size is None else size for axis, size in given.items()}
    if list(sizes.values()).count(-1) > 1:  # the axis that the user gave takes what remains
        sizes |= {axis: 1 for axis, size in given.items() if size is None and sizes[axis] == -1}
    return Layout(make_mesh(**sizes, devices=devices), base.gather)


def make_mesh(*, data: int, fsdp: int, tensor: int, expert: int = 1, devices: Sequence) -> Mesh:
    """Arrange the devices as (data, fsdp, expert, tensor); one axis may be -1, meaning all devices that remain.

    Neighbours along `tensor` are the closest devices, then along `expert`, then `fsdp`: on a TPU slice by its physical
    links, elsewhere in the order of the devices, which go host by host. TPU slices joined by a network split `data`,
    or `fsdp` where data does not divide.

    Args:
        data: replicas; PER_HOST = one per host, or per slice where there are several slices.
        fsdp: ways that weights and rows are cut.
        tensor: ways that heads, MLP and vocabulary are cut.
        expert: ways that the experts of a mixture are spread.
        devices: all of them, in the order of jax.devices().

    Raises:
        ValueError: the axes do not multiply to the number of devices, or do not fit the slices.
    """
    if data == PER_HOST:
        slices = {getattr(device, "slice_index", 0) for device in devices}
        data = len(slices) if len(slices) > 1 else len({device.process_index for device in devices})
    sizes = [data, fsdp, expert, tensor]
    asked = _named(sizes)
    known = int(np.prod([size for size in sizes if size != -1]))
    count = len(devices)
    if -1 in sizes:
        if count % known:
            raise ValueError(
                f"mesh {asked}: {count} devices are not divisible by {known}; choose"
                f" axes whose product divides {count}."
            )
        sizes[sizes.index(-1)] = count // known
    elif known != count:
        raise ValueError(
            f"mesh {asked} needs {known} devices, {count} are present; set one axis to -1 to use all that remain."
        )
    return Mesh(_arranged(sizes, devices), MESH_AXES)


def described(mesh: Mesh) -> str:
    """Return the axes with their sizes, for people; `expert` where experts are spread."""
    return ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if axis != "expert" or size > 1)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, *, stacked: bool) -> NamedSharding:
    """Return the sharding of a Batch leaf: rows (or groups) over BATCH_AXES; `stacked` leaves have A in front."""
    return NamedSharding(mesh, PartitionSpec(None, RULES["rows"]) if stacked else PartitionSpec(RULES["rows"]))


def fitted(place: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """Return a sharding for another shape: along axes that the mesh does not divide the array is whole."""
    axes = [*place.spec, *[None] * (len(shape) - len(place.spec))]
    spec = (axis if size % ways(place.mesh, axis) == 0 else None for size, axis in zip(shape, axes, strict=True))
    return NamedSharding(place.mesh, PartitionSpec(*spec), memory_kind=place.memory_kind)


def param_shardings(
    logical_axes: types.PyTree, abstract: types.PyTree, *, mesh: Mesh, rules: Rules = RULES
) -> types.PyTree:
    """Map the logical axes of every parameter to a NamedSharding.

    Args:
        logical_axes: nested dict of tuples, one name or None per dimension.
        abstract: the same tree of jax.ShapeDtypeStruct.
        mesh: from make_mesh.
        rules: logical axis -> mesh axis.

    Raises:
        ValueError: dimensions that the mesh does not divide, all at once.
    """
    problems: list[str] = []

    def place(path, shape, axes):
        mesh_axes = [None if axis is None else rules[axis] for axis in axes]
        for index, (size, logical, axis) in enumerate(zip(shape.shape, axes, mesh_axes, strict=True)):
            if size % ways(mesh, axis) == 0:
                continue
            if logical in WHOLE_WHERE_INDIVISIBLE:
                mesh_axes[index] = None
            else:
                problems.append(
                    f"{jax.tree_util.keystr(path)}: {logical} has {size} entries, mesh axis {axis} has"
                    f" {ways(mesh, axis)} devices; choose a divisor of {size}."
                )
        return NamedSharding(mesh, PartitionSpec(*mesh_axes))

    shardings = jax.tree_util.tree_map_with_path(place, abstract, logical_axes)
    if problems:
        raise ValueError("the mesh does not divide these parameters:\n  " + "\n  ".join(problems))
    return shardings


def _arranged(sizes: Sequence[int], devices: Sequence) -> np.ndarray:
    """Lay the devices out by their physical neighbourhood where they have one."""
    plain = np.asarray(devices).reshape(sizes)
    if devices[0].platform != "tpu" or len(devices) == 1:
        return plain
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        across = (slices, 1, 1, 1) if sizes[0] % slices == 0 else (1, slices, 1, 1)
        if sizes[across.index(slices)] % slices:
            raise ValueError(
                f"mesh {_named(sizes)} over {slices} TPU slices: neither data nor fsdp is a"
                f" multiple of {slices}; set mesh.data={slices}."
            )
        within = [size // ways for size, ways in zip(sizes, across, strict=True)]
        return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    try:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    except (NotImplementedError, AssertionError, ValueError) as error:  # part of a slice has no torus
        log.info("mesh: devices in their given order, not by physical links (%s)", str(error).split("\n")[0])
        return plain


def _named(sizes: Sequence[int]) -> str:
    """Write the axes as a user gives them; `expert` where it is given."""
    return " ".join(
        f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True) if axis != "expert" or size != 1
    )


def ways(mesh: Mesh | AbstractMesh, axes: str | tuple[str, ...] | None) -> int:
    """Return the number of parts that mesh axes cut an array's axis into."""
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return int(np.prod([mesh.shape[name] for name in names], dtype=int))
