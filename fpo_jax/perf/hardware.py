"""Accelerators that are not here: the devices of a named TPU slice or GPU host, for compiling without running.

    mesh("v5e-8")  mesh("v5p-2x8")  mesh("h100:8")  mesh("h100:2x8")  devices("here")
    compile_for(function, *abstract arguments placed on such a mesh) -> the compiled program
    capacity(device) -> memory, FLOP/s and bandwidths of its data sheet

TPU names are the cloud's: v5e, v6e and v7x count chips, v5p counts TensorCores, two a chip; `v5p-2x8` is two slices of
`v5p-8`, which the data centre's network joins. GPU names are `kind:gpus` or `kind:hosts x gpus`. Needs the compilers of
the target, which run on any CPU: the extra `tpu` (libtpu) or `cuda` (plugin and ptxas), see `require`.
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
    """What XLA asks about a GPU, from its maker's data sheet, and what it is built into."""

    description: str
    capability: tuple[int, int]
    cores: int
    memory_bytes: int
    bandwidth: int  # bytes/s
    l2_bytes: int
    clock_ghz: float
    shared_per_core: int
    shared_per_block: int
    of_host: int = 8  # GPUs of a host; beyond, another one
    linked_hosts: int = 1  # hosts whose GPUs NVLink joins


# B200 and GB200: what XLA records of them (xla/backends/gpu/target_config/specs). L40S: its data sheet and the CUDA
# programming guide's table of compute capability 8.9; the memory is what CUDA shows of 48 GB with ECC.
GPUS = {
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 85_095_874_560, 2_039_000_000_000, 41_943_040, 1.41, 167_936, 166_912
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 84_978_434_048, 3_352_320_000_000, 52_428_800, 1.98, 233_472, 232_448
    ),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 150_120_000_000, 4_800_000_000_000, 52_428_800, 1.98, 233_472, 232_448),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 191_514_411_008, 7_672_320_000_000, 132_644_864, 1.965, 233_472, 232_448),
    "gb200": Gpu(
        "NVIDIA GB200", (10, 0), 152, 197_897_748_480, 7_928_064_000_000, 135_528_448, 2.062, 233_472, 232_448, 4, 18
    ),
    "l40s": Gpu("NVIDIA L40S", (8, 9), 142, 47_674_000_000, 864_000_000_000, 100_663_296, 2.52, 102_400, 101_376),
}
HERE = "here"  # the target that is the devices of this machine


class Capacity(NamedTuple):
    """What one device can hold and do, from its maker's data sheet."""

    memory: int  # bytes that programs may use
    flops: float  # bfloat16 matrix products, dense, per second
    bandwidth: float  # of its memory, bytes/s
    link: float  # bytes/s that it sends to the devices that links reach, see `linked`
    network: float  # bytes/s that it sends to the others
    fp8_flops: float | None = None  # products of 8-bit floating point, dense; None = it has none

    def seconds(self, operations: float, *, fp8: float = 0.0) -> float:
        """Return the seconds of matrix products at the data sheet's rates; `fp8` of them are of 8-bit numbers."""
        return (operations - fp8) / self.flops + fp8 / (self.fp8_flops or self.flops)


# Of the data sheet's dense bfloat16 rate, what a large product of XLA reached on the one device that was measured: 622
# of 989 TFLOP/s on an H200 (docs/lab-notes, 2026-11-27).
REACHED = 0.63
# Of a GPU's memory, what the programs of this project have JAX take; the rest is for CUDA's context, NCCL's buffers and
# the workspaces of cuDNN and cuBLAS. JAX alone takes 75 %.
GPU_SHARE, JAX_SHARE = 0.92, 0.75
MEMORY_VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION"
_GIB = 2**30
# GPUs: data sheets of A100 80GB SXM, H100 SXM, H200 SXM, HGX B200 (bfloat16: 36 PFLOP/s with sparsity of eight), GB200
# NVL72 (360 of 72) and L40S; a link is one direction of NVLink, and of PCIe 4.0 x16 on an L40S, which has no NVLink.
# The bandwidth of B200 and GB200 is what XLA records, where the data sheet rounds up to 8 TB/s. The network is that of
# the DGX A100, H100/H200, B200 and GB200: one adapter of 200 or 400 Gb/s per GPU; for the L40S that of NVIDIA's
# reference servers for PCIe cards (2-8-5), 200 Gb/s per GPU. Dense FP8 products run at twice the bfloat16 rate.
# TPUs: cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x; a link is one direction of all of a chip's ICI ports, of which
# a slice may wire fewer (`plan.links`); the network is the data centre's ("DCN bandwidth per chip": 50, 100 and 100
# Gb/s of v5p, v6e and TPU7x; v5e: 6.4 Tb/s of 256). The memory is what libtpu 0.0.50 lets a program use: it prints it
# when a program asks for more. A v7x chip is two devices.
CAPACITIES = {  # device_kind -> Capacity
    "NVIDIA A100-SXM4-80GB": Capacity(85_095_874_560, 312e12, 2039e9, 300e9, 25e9),
    "NVIDIA H100 80GB HBM3": Capacity(84_978_434_048, 989e12, 3352e9, 450e9, 50e9, 1979e12),
    "NVIDIA H200": Capacity(150_120_000_000, 989e12, 4800e9, 450e9, 50e9, 1979e12),
    "NVIDIA B200": Capacity(191_514_411_008, 2250e12, 7672e9, 900e9, 50e9, 4500e12),
    "NVIDIA GB200": Capacity(197_897_748_480, 2500e12, 7928e9, 900e9, 50e9, 5000e12),
    "NVIDIA L40S": Capacity(47_674_000_000, 362e12, 864e9, 32e9, 25e9, 733e12),
    "TPU v5 lite": Capacity(int(15.75 * _GIB), 197e12, 819e9, 200e9, 3.125e9),
    "TPU v5": Capacity(int(95.73 * _GIB), 459e12, 2765e9, 600e9, 6.25e9),
    "TPU v6 lite": Capacity(int(31.24 * _GIB), 918e12, 1638e9, 400e9, 12.5e9),
    "TPU7x": Capacity(int(94.74 * _GIB), 2307e12 / 2, 7380e9 / 2, 600e9 / 2, 12.5e9 / 2, 4614e12 / 2),
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
        target: "v5e-8", "v5p-8", "v6e-8", "v7x-4", "v5p-2x8"; "h100:1", "h100:8", "h100:2x8".
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

    >>> larger("h100:4"), larger("h100:2x8"), larger("h100:8"), larger("gb200:4")
    ('h100:8', 'h100:4x8', 'h100:2x8', 'gb200:2x4')
    >>> larger("v5e-16"), larger("v5p-2x8"), larger("v5e-256")
    ('v5e-32', 'v5p-4x8', 'v5e-2x256')
    """
    if target == HERE:
        return None
    name, mark, size = re.split("([:-])", target, maxsplit=1)
    parts, _, count = size.rpartition("x")
    if name in GPUS and int(count) < GPUS[name].of_host:
        return f"{name}:{parts + 'x' if parts else ''}{2 * int(count)}"
    if name in TPUS and not parts:
        sizes = [own for own in _sizes(name) if own >= 2 * int(count)]
        if sizes:
            return f"{name}-{min(sizes)}"
    return f"{name}{mark}{2 * int(parts or 1)}x{count}"


def capacity(device: Any) -> Capacity | None:
    """Return what a device can hold and do; None for a kind without an entry (a CPU)."""
    return CAPACITIES.get(device.device_kind)


def require_devices() -> None:
    """Refuse what JAX cannot run on, such as JAX_PLATFORMS=cuda on a host without CUDA; opens the devices.

    Raises:
        ValueError: JAX finds no device of the platforms asked for.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # jax asserts where a plugin is not installed
        asked = os.environ.get("JAX_PLATFORMS", "")
        cause = " ".join(str(error).split())[:200]
        raise ValueError(
            f"JAX_PLATFORMS={asked} names what JAX finds no device of{f' ({cause})' if cause else ''}; unset it, set it"
            " to cpu, or install JAX for that device (pip install 'jax[cuda13]' or 'jax[tpu]')."
        ) from None


def lend_memory() -> None:
    """Have JAX take GPU_SHARE of a GPU's memory, unless the environment says another share; before JAX starts."""
    if not {MEMORY_VARIABLE, "XLA_CLIENT_MEM_FRACTION"} & os.environ.keys():
        os.environ[MEMORY_VARIABLE] = str(GPU_SHARE)


def lent(device: Any, capacity: Capacity) -> int:
    """Return the bytes of a device that programs get: of a GPU the share that JAX takes at its start."""
    if device.platform == "tpu":
        return capacity.memory
    return int(memory_share() * capacity.memory)


def memory_share() -> float:
    """Return the share of a GPU's memory that JAX takes at its start."""
    return float(os.environ.get(MEMORY_VARIABLE, JAX_SHARE))


def linked(device: Any) -> int:
    """Return the number of the group of devices that its links join: its TPU slice, its GPU host, its rack of GB200."""
    if device.platform == "tpu":
        return getattr(device, "slice_index", 0)  # JAX gives none where there is one slice
    hosts = {gpu.description: gpu.linked_hosts for gpu in GPUS.values()}
    return device.process_index // hosts.get(device.device_kind, 1)


@functools.cache  # programs take only arguments from one description
def tpu_devices(target: str) -> list[Any]:
    """Return the devices of a TPU slice such as "v5e-8", or of several: "v5e-2x8"."""
    name, _, size = target.partition("-")
    if name not in TPUS:
        raise _unknown(target)
    slices, times, count = size.rpartition("x")
    sizes = _sizes(name)
    if not count.isdigit() or int(count) not in sizes:
        raise ValueError(f"target {target!r}: there is no {name} slice of {count}; use one of {_list(sizes)}")
    if times and (not slices.isdigit() or int(slices) < 1):
        raise ValueError(f"target {target!r} does not say how many slices of {count}; write {name}-2x{count} for two")
    require("libtpu", "jax[tpu]", target)
    options: dict[str, Any] = {"chips_per_host_bounds": [1, 1, 1]} if sizes[int(count)] == "1x1" else {}
    if slices not in ("", "1"):
        options["num_slices"] = int(slices)
    topology = f"{TPUS[name][0]}:{sizes[int(count)]}"
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices


def _sizes(name: str) -> dict[int, str]:
    """What a slice's name counts -> the arrangement of its chips."""
    _, per_chip, arrangements = TPUS[name]
    return {chips * per_chip: shape for chips, shape in arrangements.items()}


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
    require("jax_plugins.xla_cuda13", "jax[cuda13]", target)
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # the plugin looks for a driver otherwise
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=name,
        topology=f"1x{hosts or 1}x{count}",
        target_config=_target_config(GPUS[name]),
    ).devices


def require(module: str, package: str, target: str) -> None:
    """Raise ValueError where the compiler for a target is not installed."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise ValueError(
            f"target {target!r} needs its compiler, and {module} is not installed; run pip install '{package}'"
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


def peak_of(compiled: jax.stages.Compiled, device: Any) -> int:
    """Most bytes of a device's memory that a program holds, its arguments included."""
    memory = compiled.memory_analysis()
    assert memory is not None
    if device.platform == "tpu":  # its temporaries count arguments that it moves
        peak = memory.peak_memory_in_bytes
    else:
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return peak + memory.generated_code_size_in_bytes


def temporaries_of(compiled: jax.stages.Compiled, device: Any) -> int:
    """Most bytes that a program holds beside its arguments, its results and itself."""
    memory = compiled.memory_analysis()
    assert memory is not None
    known = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return peak_of(compiled, device) - known - memory.generated_code_size_in_bytes


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
        "threads_per_core_limit": 1536 if gpu.capability == (8, 9) else 2048,
        "core_count": gpu.cores,
        "fpus_per_core": 128 if gpu.capability >= (8, 9) else 64,
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
