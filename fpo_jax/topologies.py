"""Accelerators that are not here: the devices of a named TPU slice or GPU host, for compiling without running.

    mesh("v5e-8")  mesh("v5p-8")  mesh("h100:8")  mesh("h100:2x8")
    compile_for(function, *abstract arguments placed on such a mesh) -> the compiled program

TPU names are the cloud's: v5e, v6e and v7x count chips, v5p counts TensorCores, two a chip. GPU names are
`kind:gpus` or `kind:hosts x gpus`. Needs the compilers of the target, which run on any CPU: the extra `tpu` (libtpu) or
`cuda` (plugin and ptxas), see `require`.
"""

import functools
import importlib.util
import math
import os
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh


class Gpu(NamedTuple):
    """What XLA asks about a GPU: the maker's data sheet."""

    description: str
    capability: tuple[int, int]
    cores: int
    memory_bytes: int
    bandwidth: int  # bytes/s
    l2_bytes: int
    clock_ghz: float
    shared_per_core: int
    shared_per_block: int


GPUS = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 85_095_874_560, 2_039_000_000_000, 41_943_040, 1.41, 167_936, 166_912
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 84_978_434_048, 3_352_320_000_000, 52_428_800, 1.98, 233_472, 232_448
    ),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 150_120_000_000, 4_800_000_000_000, 52_428_800, 1.98, 233_472, 232_448),
}
# chips -> arrangement of a slice
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBE = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
TPUS = {  # name -> (libtpu's name, counted in a slice's name per chip, arrangements)
    "v5e": ("v5e", 1, _FLAT),
    "v5p": ("v5p", 2, _CUBE),
    "v6e": ("v6e", 1, _FLAT),
    "v7x": ("tpu7x", 1, _CUBE),
}


def mesh(target: str, *, devices: int | None = None) -> Mesh:
    """Return the devices of a target as a mesh with the one axis "devices".

    Args:
        target: "v5e-8", "v5p-8", "v6e-8", "v7x-4"; "h100:1", "h100:8", "h100:2x8".
        devices: use this many of them; None for all.

    Raises:
        ValueError: an unknown target, or a missing compiler.
    """
    found = tpu_devices(target) if "-" in target else gpu_devices(target)
    return Mesh(np.array(found[:devices]), ("devices",))


@functools.cache  # programs take only arguments from one description
def tpu_devices(target: str) -> list[Any]:
    """Return the devices of a TPU slice such as "v5e-8"."""
    name, _, size = target.partition("-")
    if name not in TPUS:
        raise _unknown(target)
    library_name, per_chip, arrangements = TPUS[name]
    sizes = {chips * per_chip: shape for chips, shape in arrangements.items()}
    if not size.isdigit() or int(size) not in sizes:
        raise ValueError(f"target {target!r}: there is no {name} slice of {size}; use one of {_list(sizes)}")
    require("libtpu", "tpu", target)
    shape = sizes[int(size)]
    options = {"chips_per_host_bounds": [1, 1, 1]} if shape == "1x1" else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{library_name}:{shape}", **options).devices


@functools.cache
def gpu_devices(target: str) -> list[Any]:
    """Return the GPUs of one host or several, such as "h100:8" or "h100:2x8"."""
    name, _, size = target.partition(":")
    if name not in GPUS:
        raise _unknown(target)
    hosts, _, count = size.rpartition("x")
    if not count.isdigit() or not (hosts or "1").isdigit() or math.prod(map(int, (hosts or "1", count))) < 1:
        raise ValueError(
            f"target {target!r} does not end in a number of GPUs; write {name}:8, or {name}:2x8 for two hosts"
        )
    require("jax_plugins.xla_cuda13", "cuda", target)
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # the plugin looks for a driver otherwise
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=name,
        topology=f"1x{hosts or 1}x{count}",
        target_config=_target_config(GPUS[name]),
    ).devices


def require(module: str, extra: str, target: str) -> None:
    """Raise ValueError where the compiler for a target is not installed."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise ValueError(
            f"target {target!r} needs its compiler, and {module} is not installed; run pip install 'fpo_jax[{extra}]'"
        )


def compile_for(function, *args, **options) -> jax.stages.Compiled:
    """Compile a function for the devices that its abstract arguments are placed on.

    Args:
        function: of arrays.
        args: pytrees of jax.ShapeDtypeStruct with a sharding on the devices of one target.
        options: of jax.jit.

    Returns:
        The program; it cannot be called, but `memory_analysis()` and `as_text()` tell what it would do.
    """
    place = jax.tree.leaves(args)[0].sharding.mesh
    platform = {"tpu": "tpu"}.get(place.devices.flat[0].platform, "cuda")
    with jax.sharding.use_abstract_mesh(place.abstract_mesh):  # kernels ask it what they are compiled for
        traced = jax.jit(function, **options).trace(*args)
        return traced.lower(lowering_platforms=(platform,)).compile()


def _target_config(gpu: Gpu) -> str:
    """XLA's description of a GPU, as text proto."""
    major, minor = gpu.capability
    limits = {
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "threads_per_warp": 32,
        "threads_per_block_limit": 1024,
        "threads_per_core_limit": 2048,
        "core_count": gpu.cores,
        "fpus_per_core": 128 if gpu.capability >= (9, 0) else 64,
        "memory_bandwidth": gpu.bandwidth,
        "l2_cache_size": gpu.l2_bytes,
        "clock_rate_ghz": gpu.clock_ghz,
        "device_memory_size": gpu.memory_bytes,
        "shared_memory_per_core": gpu.shared_per_core,
        "shared_memory_per_block": 49152,
        "shared_memory_per_block_optin": gpu.shared_per_block,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    facts = " ".join(f"{name}: {value}" for name, value in limits.items())
    return (
        f"gpu_device_info {{ cuda_compute_capability {{ major: {major} minor: {minor} }} {facts} }} "
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} '
        f'device_description_str: "{gpu.description}"'
    )


def _unknown(target: str) -> ValueError:
    known = [f"{name}-N" for name in TPUS] + [f"{name}:N" for name in GPUS]
    return ValueError(f"target {target!r} is unknown; use one of {_list(known)}")


def _list(names) -> str:
    return ", ".join(map(str, names))
