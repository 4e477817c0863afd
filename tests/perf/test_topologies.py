"""Devices that are not here: what they are compiled for, and which of them links join."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from fpo_jax.perf import hardware


@pytest.mark.parametrize(
    ("platform", "capability", "lowered"),
    [("gpu", "9.0", "cuda"), ("gpu", "gfx942:sramecc+:xnack-", "rocm"), ("tpu", None, "tpu"), ("cpu", None, "cpu")],
)
def test_a_program_is_lowered_for_the_platform_of_its_devices(platform, capability, lowered):
    """JAX calls NVIDIA's and AMD's GPUs by one name, and lowers for either."""
    seen = []

    class Traced:
        def lower(self, *, lowering_platforms):
            seen.extend(lowering_platforms)
            return SimpleNamespace(compile=lambda: None)

    device = SimpleNamespace(platform=platform)
    if capability is not None:
        device.compute_capability = capability
    real = Mesh(np.array(jax.devices()[:1]), ("devices",))
    place = SimpleNamespace(devices=np.array([device]), abstract_mesh=real.abstract_mesh)
    hardware.compile_traced(Traced(), place)
    assert seen == [lowered]


@pytest.mark.parametrize(
    ("device", "group"),
    [
        ({"platform": "gpu", "device_kind": "NVIDIA H200", "process_index": 1}, 1),
        ({"platform": "gpu", "device_kind": "NVIDIA GB200", "process_index": 17}, 0),
        ({"platform": "gpu", "device_kind": "NVIDIA GB200", "process_index": 18}, 1),
        ({"platform": "cpu", "device_kind": "cpu", "process_index": 2}, 2),
        ({"platform": "tpu", "device_kind": "TPU v5", "process_index": 3}, 0),
        ({"platform": "tpu", "device_kind": "TPU v5", "process_index": 3, "slice_index": 1}, 1),
    ],
    ids=str,
)
def test_which_devices_links_join(device, group):
    assert hardware.linked(SimpleNamespace(**device)) == group
