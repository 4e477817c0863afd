"""How tests compile soon: it is most of their time, and programs this small gain nothing by doing it well."""

import gc
import importlib.metadata
import importlib.util
import pathlib
import re
import shutil
import subprocess
from typing import NamedTuple

# LLVM's own passes are off; XLA's, and with them the maths, stay as they are. Emitting fusions without MLIR takes a
# fifth of the time; jaxlib 0.11 and newer may not know that flag, and XLA ends a process over an unknown one.
# One part of a program for LLVM instead of 32 takes a quarter less.
_QUICK = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
# Options of `compile` that give the programs of a user's run, where it matters that two of them round alike.
AS_USERS: dict[str, bool] = {}
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    _QUICK.append("--xla_cpu_use_fusion_emitters=false")
    AS_USERS["xla_cpu_use_fusion_emitters"] = True


def flags(*, devices: int = 1) -> str:
    """Return the value of XLA_FLAGS for so many virtual CPU devices."""
    return " ".join([f"--xla_force_host_platform_device_count={devices}", *_QUICK])


def collect_seldom() -> None:
    """Look for garbage less often: tracing makes little, and a sixth of its time is to look for it."""
    gc.set_threshold(100_000, 50, 100)


class Resources(NamedTuple):
    """What a GPU kernel that Triton compiled takes of a processor."""

    registers: int  # of a thread
    spilled_bytes: int  # of a thread, stored to memory for want of registers
    shared_bytes: int  # of a thread block
    ptx: str  # the kernel, before ptxas


def dumping_to(folder: pathlib.Path) -> dict[str, str | int]:
    """Return `compiler_options` of jax.jit with which XLA compiles as for a user, and leaves what `resources` reads.

    Without a pattern it would also leave what each pass of Triton makes: 20 MB, in ten times the time.
    """
    return {"xla_dump_to": str(folder), "xla_dump_emitter_re": "ptx", "xla_backend_optimization_level": 3}


def resources(folder: pathlib.Path, kernel: str) -> Resources:
    """Say what the one kernel of that name takes that was compiled with `dumping_to(folder)`."""
    (ptx_path,) = (path for path in folder.glob("*.ptx") if f".entry {kernel}(" in path.read_text())
    ptx = ptx_path.read_text()
    (architecture,) = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
    command = [_ptxas(), "-v", f"-arch={architecture}", "-o", "/dev/null", str(ptx_path)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", report)
    (spilled,) = re.findall(r"(\d+) bytes spill stores", report)
    (thunks,) = (path.read_text() for path in folder.glob("*.thunk_sequence.txt"))
    (shared,) = re.findall(rf"\b{kernel} .*shared_memory: (\d+) bytes", thunks)
    return Resources(int(registers), int(spilled), int(shared), ptx)


def _ptxas() -> str:
    """The one beside the CUDA compiler of jax, or else of the machine."""
    packages = importlib.util.find_spec("nvidia")
    for folder in packages.submodule_search_locations or () if packages else ():
        for path in pathlib.Path(folder).glob("*/bin/ptxas"):
            return str(path)
    return shutil.which("ptxas") or "ptxas"
