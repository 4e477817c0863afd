"""Accelerators that are not here: the devices of a named TPU slice or GPU host, for compiling without running.

    mesh("v5e-8")  mesh("v5p-8")  mesh("h100:8")  mesh("h100:2x8")  devices("here")
    compile_for(function, *abstract arguments placed on such a mesh) -> the compiled program
    capacity(device) -> memory, FLOP/s and bandwidths of its data sheet

TPU names are the cloud's: v5e, v6e and v7x count chips, v5p counts TensorCores, two a chip. GPU names are
`kind:gpus` or `kind:hosts x gpus`. Needs the compilers of the target, which run on any CPU: the extra `tpu` (libtpu) or
`cuda` (plugin and ptxas), see `require`.
"""

import functools
import importlib.util
import math
import os
import re
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
HERE = "here"  # the target that is the devices of this machine


class Capacity(NamedTuple):
    """What one device can hold and do, from its maker's data sheet."""

    memory: int  # bytes that programs may use
    flops: float  # bfloat16 matrix products, dense, per second
    bandwidth: float  # of its memory, bytes/s
    link: float  # bytes/s that it sends to the devices of its host (GPU) or slice (TPU)
    network: float | None  # bytes/s that it sends to other hosts; None where links reach them too


_GIB = 2**30
# GPUs: data sheets of A100 80GB SXM, H100 SXM, H200 SXM; a link is one direction of NVLink. The network is that of the
# DGX A100 and DGX H100/H200: one adapter of 200 or 400 Gb/s per GPU.
# TPUs: cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x; a link is one direction of all of a chip's ICI ports. The memory
# is what libtpu 0.0.50 lets a program use: it prints it when a program asks for more. A v7x chip is two devices.
CAPACITIES = {  # device_kind -> Capacity
    "NVIDIA A100-SXM4-80GB": Capacity(85_095_874_560, 312e12, 2039e9, 300e9, 25e9),
    "NVIDIA H100 80GB HBM3": Capacity(84_978_434_048, 989e12, 3352e9, 450e9, 50e9),
    "NVIDIA H200": Capacity(150_120_000_000, 989e12, 4800e9, 450e9, 50e9),
    "TPU v5 lite": Capacity(int(15.75 * _GIB), 197e12, 819e9, 200e9, None),
    "TPU v5": Capacity(int(95.73 * _GIB), 459e12, 2765e9, 600e9, None),
    "TPU v6 lite": Capacity(int(31.24 * _GIB), 918e12, 1638e9, 400e9, None),
    "TPU7x": Capacity(int(94.74 * _GIB), 2307e12 / 2, 7380e9 / 2, 600e9 / 2, None),
}
GPUS_OF_HOST = 8  # beyond, another host
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
    return Mesh(np.array(all_devices(target)[:devices]), ("devices",))


def all_devices(target: str) -> list[Any]:
    """Return the devices of a target, present ("here") or not.

    Raises:
        ValueError: an unknown target, or a missing compiler.
    """
    if target == HERE:
        return jax.devices()
    return tpu_devices(target) if "-" in target else gpu_devices(target)


def larger(target: str) -> str | None:
    """Return the target with twice the devices of the same kind; None where there is none.

    >>> larger("h100:4"), larger("h100:2x8"), larger("v5e-16"), larger("h100:8")
    ('h100:8', 'h100:4x8', 'v5e-32', 'h100:2x8')
    """
    name, size = re.split("[:-]", target, maxsplit=1) if target != HERE else (HERE, "")
    if name in GPUS:
        hosts, _, count = size.rpartition("x")
        if int(count) < GPUS_OF_HOST:
            return f"{name}:{hosts + 'x' if hosts else ''}{2 * int(count)}"
        return f"{name}:{2 * int(hosts or 1)}x{count}"
    if name in TPUS:
        _, per_chip, arrangements = TPUS[name]
        sizes = [chips * per_chip for chips in arrangements if chips * per_chip >= 2 * int(size)]
        return f"{name}-{min(sizes)}" if sizes else None
    return None


def capacity(device: Any) -> Capacity | None:
    """Return what a device can hold and do; None for a kind without an entry (a CPU)."""
    return CAPACITIES.get(device.device_kind)


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
    return compile_traced(trace_for(jax.jit(function, **options), *args), _mesh_of(args))


def trace_for(jitted, *args) -> jax.stages.Traced:
    """Trace a jitted function for the devices that its abstract arguments are placed on."""
    with jax.sharding.use_abstract_mesh(_mesh_of(args).abstract_mesh):  # kernels ask it what they are compiled for
        return jitted.trace(*args)


def compile_traced(traced: jax.stages.Traced, place: Mesh) -> jax.stages.Compiled:
    """Compile what `trace_for` returned, for the mesh that its arguments are placed on."""
    device = place.devices.flat[0]
    platform = str(device.platform)
    if platform == "gpu":  # JAX's name for two platforms
        platform = "rocm" if str(getattr(device, "compute_capability", "")).startswith("gfx") else "cuda"
    with jax.sharding.use_abstract_mesh(place.abstract_mesh):
        return traced.lower(lowering_platforms=(platform,)).compile()


def _mesh_of(args) -> Mesh:
    return jax.tree.leaves(args)[0].sharding.mesh


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
    known = [*(f"{name}-N" for name in TPUS), *(f"{name}:N" for name in GPUS), HERE]
    return ValueError(f"target {target!r} is unknown; use one of {_list(known)}")


def _list(names) -> str:
    return ", ".join(map(str, names))
