"""How tests compile soon: it is most of their time, and programs this small gain nothing by doing it well."""

import gc
import importlib.metadata

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
