"""How fast a device sends in a collective: over its host's links, over the network, over the ports of a TPU slice.

A ring over several hosts with m of its members in each crosses a host's boundary on m network adapters, one per
device; the other rings of the host have the other adapters. What goes from one device to one other has its own
adapter alone. On a TPU slice a collective has the ports along the slice's axes that its groups lie along.
"""

import numpy as np
from jax.sharding import Mesh

from fpo_jax.perf import hardware
from fpo_jax.plan.collectives import SLICES, Collective

# ICI ports of a chip, whose sum `Capacity.link` is. A slice wires two of them along an axis that wraps around, else
# one: the chips at the ends of the axis have no second neighbour, and a collective is as slow as they are. Slices of
# v5p from a cube of 4x4x4 on are full tori (cloud.google.com/tpu/docs/v5p). Assumed: TPU7x alike, and an axis of v5e or
# v6e wraps around where it is as long as a pod's, 16.
PORTS = {"TPU v5 lite": 4, "TPU v5": 6, "TPU v6 lite": 4, "TPU7x": 6}


def rate(row: Collective, mesh: Mesh, capacity: hardware.Capacity) -> float:
    """Return the bytes/s at which each device sends what `row.sent` counts.

    Args:
        row: the collective.
        mesh: of one TPU slice, or all GPUs.
        capacity: of a device.
    """
    if SLICES in row.axes:
        return capacity.network
    groups = _groups(row, mesh)
    hosts = np.vectorize(hardware.linked)(groups)
    if (hosts == hosts[:, :1]).all():
        return capacity.link * _share_of_ports(groups, mesh)
    members = min(_fewest(row_hosts) for row_hosts in hosts)
    if row.kind == "collective-permute" or "?" in row.axes:
        return capacity.network
    if row.kind.endswith("all-to-all"):  # all but what stays in the host goes over the device's own adapter
        size = groups.shape[1]
        return min(capacity.link, capacity.network * (size - 1) / (size - members))
    return min(capacity.link, capacity.network * members)


def _groups(row: Collective, mesh: Mesh) -> np.ndarray:
    """The devices of each group; all in one where the groups follow no axes."""
    axes = [place for place, axis in enumerate(mesh.axis_names) if axis in row.axes or "?" in row.axes]
    moved = np.moveaxis(mesh.devices, axes, range(-len(axes), 0))
    return moved.reshape(-1, int(np.prod([mesh.devices.shape[axis] for axis in axes])))


def _fewest(hosts: np.ndarray) -> int:
    """Members of a group in the host that has fewest of them."""
    return int(np.unique(hosts, return_counts=True)[1].min())


def _share_of_ports(groups: np.ndarray, mesh: Mesh) -> float:
    """The share of a device's links that a collective has: 1 on GPUs, whose links end in one switch."""
    kind = mesh.devices.flat[0].device_kind
    if kind not in PORTS:
        return 1.0
    slice_lengths = _lengths(mesh.devices.reshape(-1))
    wired = [
        0 if length == 1 else 1 + wraps
        for length, wraps in zip(slice_lengths, _wraps(kind, slice_lengths), strict=True)
    ]
    along = [_ports_along(group, slice_lengths, wired) for group in groups]
    return (min(along) or PORTS[kind]) / PORTS[kind]  # the two devices of one chip have a link of their own


def _ports_along(group: np.ndarray, slice_lengths: list[int], wired: list[int]) -> int:
    """Ports of a chip along the axes of a group, if that is a block of the slice without holes; else all wired ones."""
    lengths = _lengths(group)
    if len({tuple(device.coords) for device in group}) != np.prod(lengths):
        return sum(wired)
    return sum(
        ports if length == whole else min(length - 1, 1)
        for length, whole, ports in zip(lengths, slice_lengths, wired, strict=True)
    )


def _lengths(devices: np.ndarray) -> list[int]:
    """Chips along each axis of the smallest block that holds some devices."""
    return (np.ptp([device.coords for device in devices], axis=0) + 1).tolist()


def _wraps(kind: str, slice_lengths: list[int]) -> list[bool]:
    """Which axes of a slice end where they begin."""
    if PORTS[kind] == 4:
        return [length == 16 for length in slice_lengths]
    return [all(length % 4 == 0 for length in slice_lengths)] * len(slice_lengths)
