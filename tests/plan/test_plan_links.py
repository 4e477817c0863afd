"""How fast devices send in a collective: over hosts, and over the ports of TPU slices."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from fpo_jax.perf import hardware
from fpo_jax.plan import links
from fpo_jax.plan.collectives import Collective

HELD = hardware.Capacity(2**32, 1e12, 1e11, 450e9, 50e9)
AXES = ("data", "fsdp", "tensor")


def mesh(devices, shape):
    array = np.empty(len(devices), object)
    array[:] = devices
    return SimpleNamespace(devices=array.reshape(shape), axis_names=AXES, size=len(devices))


def gpus(hosts, of_host):
    kind = {"platform": "gpu", "device_kind": "NVIDIA H100 80GB HBM3"}
    return [SimpleNamespace(**kind, process_index=number // of_host) for number in range(hosts * of_host)]


def tpus(kind, lengths, cores=1):
    """The devices of a slice, in the order of their places."""
    places = itertools.product(*map(range, lengths))
    return [SimpleNamespace(platform="tpu", device_kind=kind, coords=place) for place in places for _ in range(cores)]


def rate(devices, shape, axes, kind="all-gather"):
    return links.rate(Collective(kind, axes, 1, 1, 1), mesh(devices, shape), HELD)


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((1, 16, 1), ("fsdp",), 400e9),  # one ring over both hosts has their eight adapters
        ((2, 8, 1), ("fsdp",), 450e9),  # within a host
        ((2, 8, 1), ("data",), 50e9),  # eight rings, an adapter each
        ((2, 8, 1), ("data", "fsdp"), 400e9),
        ((2, 2, 4), ("data", "fsdp"), 100e9),  # four rings, two adapters each
        ((1, 4, 4), ("fsdp",), 100e9),
        ((2, 8, 1), ("?",), 50e9),
        ((1, 16, 1), ("slices",), 50e9),
    ],
    ids=str,
)
def test_a_ring_over_two_hosts_has_as_many_adapters_as_members_in_a_host(shape, axes, expected):
    assert rate(gpus(2, 8), shape, axes) == expected


def test_what_a_host_sends_is_what_its_adapters_can_whatever_the_mesh():
    """All rings that leave a host together have its eight adapters, no more and no less."""
    for fsdp in (1, 2, 4, 8):
        rings, members = 8 // fsdp, fsdp
        devices = np.array(gpus(2, 8), object).reshape(2, 8 // fsdp, fsdp).transpose(1, 0, 2)
        found = links.rate(
            Collective("all-reduce", ("fsdp", "tensor"), 1, 1, 1),
            SimpleNamespace(devices=devices, axis_names=AXES, size=16),
            HELD,
        )
        assert found == members * HELD.network and rings * found == 8 * HELD.network


def test_a_ring_that_has_fewer_members_in_one_host_has_so_few_adapters():
    assert rate(gpus(3, 4), (2, 6, 1), ("fsdp",)) == 100e9  # four in one host and two in the next


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("collective-permute", 50e9), ("all-to-all", 50e9 * 15 / 8), ("ragged-all-to-all", 50e9 * 15 / 8)],
)
def test_what_goes_from_device_to_device_has_the_adapter_of_the_sender(kind, expected):
    """Of an all-to-all 15/16 leave a device and 8/16 its host."""
    assert rate(gpus(2, 8), (1, 16, 1), ("fsdp",), kind) == expected


V5P, V5E, V7X = "TPU v5", "TPU v5 lite", "TPU7x"


@pytest.mark.parametrize(
    ("kind", "lengths", "shape", "axes", "ports"),
    [
        (V5P, (2, 2, 1), (1, 4, 1), ("fsdp",), 2),  # two neighbours
        (V5P, (2, 2, 2), (1, 8, 1), ("fsdp",), 3),
        (V5P, (2, 4, 4), (1, 32, 1), ("fsdp",), 3),  # no torus below a cube
        (V5P, (4, 4, 4), (1, 64, 1), ("fsdp",), 6),
        (V5P, (4, 4, 4), (4, 16, 1), ("fsdp",), 4),  # two of its axes
        (V5P, (4, 4, 4), (4, 16, 1), ("data",), 2),
        (V5P, (4, 4, 4), (8, 8, 1), ("fsdp",), 3),  # half an axis, and a whole one: 1 + 2
        (V5E, (2, 4, 1), (1, 8, 1), ("fsdp",), 2),
        (V5E, (4, 4, 1), (4, 4, 1), ("fsdp",), 1),  # a line
        (V5E, (8, 16, 1), (1, 128, 1), ("fsdp",), 3),
        (V5E, (16, 16, 1), (1, 256, 1), ("fsdp",), 4),
        (V5E, (4, 4, 1), (4, 2, 2), ("fsdp",), 2),  # every other chip of a line: all that the slice wires
    ],
    ids=str,
)
def test_ports_of_a_tpu_slice(kind, lengths, shape, axes, ports):
    assert rate(tpus(kind, lengths), shape, axes) == pytest.approx(450e9 * ports / links.PORTS[kind])


def test_the_two_devices_of_a_chip_are_no_further_apart_than_a_chip_s_links():
    devices = tpus(V7X, (2, 2, 1), cores=2)
    assert rate(devices, (4, 2, 1), ("fsdp",)) == 450e9
    assert rate(devices, (1, 8, 1), ("fsdp",)) == 450e9 * 2 / 6


def test_every_tpu_has_its_ports():
    assert set(links.PORTS) == {kind for kind in hardware.CAPACITIES if kind.startswith("TPU")}
