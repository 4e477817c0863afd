"""What orbax has to do for a seal: every process digests what it wrote, and process 0 seals what is committed.

    write ──► digests of its own files (each process) ──► barrier ──► commit by rename ──► seal (process 0) ──► barrier

All of it happens in orbax's background thread. What a digest and a seal are stands in integrity.py.
"""

import asyncio
import functools
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import future

from fpo_jax import distributed
from fpo_jax.checkpoint import integrity
from fpo_jax.distributed import workdir_lock
from fpo_jax.io import atomic_io

ARRAYS = ("params", "optimizer")  # items of a step that hold arrays


def handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    """Say what writes and reads each item of a step."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item in ARRAYS:
        handler = _Digested()
        registry.add(item, ocp.args.StandardSave, handler)
        registry.add(item, ocp.args.StandardRestore, handler)
    handler = ocp.JsonCheckpointHandler()
    registry.add("meta", ocp.args.JsonSave, handler)
    registry.add("meta", ocp.args.JsonRestore, handler)
    return registry


class SealedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Commits by rename and seals the step, in the background and in process 0, before older steps are removed."""

    async def finalize(self) -> None:
        """Commit an item or a step, whose files are on the disk before its name is, and its seal before it counts."""
        workdir_lock.verify()
        step = self.get_final().name.isdigit()
        if step:
            await asyncio.to_thread(atomic_io.sync_tree, Path(self.get()))
        await super().finalize()
        if step:
            await asyncio.to_thread(integrity.seal, Path(self.get_final()))


class _Digested(ocp.StandardCheckpointHandler):
    """Digests what this process wrote of an item, in the background, before the processes meet to commit the step."""

    async def async_save(self, directory: Any, *args: Any, **kwargs: Any) -> list[future.Future]:
        """Begin to write; the one future that is returned ends with the digests."""
        written = await super().async_save(directory, *args, **kwargs)
        act = functools.partial(integrity.digest_own, Path(directory), distributed.process_index())
        return [future.ChainedFuture(written or [], cb=act)]
