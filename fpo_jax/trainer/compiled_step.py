"""Compiles the jitted functions of a run ahead of time, once per batch shape, and checks that they fit."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from fpo_jax import types
from fpo_jax.distributed import watchdog
from fpo_jax.perf import hardware

log = logging.getLogger("fpo_jax")

_REMEDY = "Lower train.micro_batch_per_device, set model.remat=full, or use more devices; `fpo plan` tries them."


def keep_compiled(folder: str) -> None:
    """Read compiled programs from a folder and leave new ones there; "" changes nothing."""
    if folder:
        compilation_cache.reset_cache()  # jax looks for its folder once, at the first compilation
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).absolute()))


class CompiledStep:
    """A jitted `f(first, batch)`, compiled ahead of its first call once per batch shape."""

    def __init__(self, name: str, jitted: Callable):
        """Take the jitted function; `name` is for the log."""
        self.name, self.jitted = name, jitted
        self._compiled: dict[tuple, jax.stages.Compiled] = {}

    def __call__(self, first: types.PyTree, batch: types.Batch):
        """Run on the batch, compiling when its shape is new.

        Raises:
            ValueError: the program needs more memory than a device has.
        """
        key = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if key not in self._compiled:
            start = time.perf_counter()
            with watchdog.unhurried():
                compiled = self._compile(first, batch)
            seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
            size = ""
            if memory is not None:
                self._check_memory(memory.argument_size_in_bytes + memory.temp_size_in_bytes)
                size = f"; {mib(memory.argument_size_in_bytes)} arguments, {mib(memory.temp_size_in_bytes)} temporaries"
            log.info(
                "compiled %s for rows of %d tokens (%d scored) in %.1f s%s",
                self.name,
                batch.tokens_NT.shape[-1],
                batch.targets_NR.shape[-1],
                seconds,
                size,
            )
            self._compiled[key] = compiled
        return self._compiled[key](first, batch)

    def _compile(self, first: types.PyTree, batch: types.Batch) -> jax.stages.Compiled:
        lowered = self.jitted.lower(first, batch)
        try:
            return lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            fact = next(line for line in str(error).splitlines() if "RESOURCE_EXHAUSTED" in line)
            raise ValueError(f"{self.name} does not fit: {fact}. {_REMEDY}") from error

    def _check_memory(self, needed: int) -> None:
        """Refuse here what would run out of memory later; a CPU does not say what it has."""
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        if limit and needed > limit:
            raise ValueError(
                f"{self.name} needs {mib(needed)} on every device, and a device lends {mib(limit)} (a GPU lends what"
                f" {hardware.MEMORY_VARIABLE} says, else {hardware.JAX_SHARE:.0%}). {_REMEDY}"
            )

    @property
    def temporaries(self) -> int | None:
        """Most bytes beside its arguments that any shape needs on a device; None where the compiler does not say."""
        found = [compiled.memory_analysis() for compiled in self._compiled.values()]
        return max((memory.temp_size_in_bytes for memory in found if memory is not None), default=None)

    @property
    def compilations(self) -> int:
        """Number of batch shapes compiled so far."""
        return len(self._compiled)


def mib(count: float) -> str:
    """Bytes as text, in MiB below 10 GiB and in GiB from there on.

    >>> mib(3 * 2**20), mib(20 * 2**30)
    ('3.0 MiB', '20.0 GiB')
    """
    return f"{count / 2**20:.1f} MiB" if count < 10 * 2**30 else f"{count / 2**30:.1f} GiB"
