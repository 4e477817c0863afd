"""Orbax checkpoints: parameters, optimiser, position and fingerprints in one atomic step directory.

A step directory appears whole or not at all (orbax commits by rename), so a killed run resumes from the newest one.
Parameters are an item of their own, so that export reads them without the optimiser.
"""

import json
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from fpo_jax import shapes

FOLDER = "checkpoints"
SOURCE_FOLDER = "model_source"  # config and tokenizer files of the starting model, for export


class Checkpointer:
    """Saves and restores TrainState and a JSON dict under `workdir/checkpoints/<step>`."""

    def __init__(self, workdir: Path, *, keep: int):
        """Open the folder; `keep` newest steps stay."""
        self._manager = ocp.CheckpointManager(
            (workdir / FOLDER).absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
            item_names=("params", "optimizer", "meta"),
        )

    def latest_step(self) -> int | None:
        """Return the newest committed step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: shapes.TrainState, meta: dict) -> None:
        """Write step `step` in the background; orbax has copied the state when this returns, so it may be donated."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave(state.opt_state),
                meta=ocp.args.JsonSave({**meta, "step": step}),
            ),
            force=True,
        )

    def meta(self, step: int) -> dict:
        """Read the JSON dict of a step."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, step: int, abstract: shapes.TrainState) -> shapes.TrainState:
        """Read step `step` into the shapes, dtypes and shardings of `abstract`."""
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.params),
                optimizer=ocp.args.StandardRestore(abstract.opt_state),
            ),
        )
        count = jax.device_put(jax.numpy.int32(step), abstract.step.sharding)
        return shapes.TrainState(items["params"], items["optimizer"], count)

    def wait(self) -> None:
        """Return when every save is committed; raises what a background save raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Commit what is pending and release the folder."""
        self._manager.close()


def restore_params(workdir: Path, step: int | None) -> tuple[shapes.PyTree, dict]:
    """Read the parameters of a checkpoint onto the host, for export.

    Args:
        workdir: the run's folder.
        step: which checkpoint; None = the newest.

    Returns:
        Nested dict of arrays, and the meta dict with `model_dir`, the folder holding config and tokenizer files.

    Raises:
        ValueError: no checkpoint there, or not that step; the message lists the steps there are.
    """
    folder = (workdir / FOLDER).absolute()
    steps = sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit()) if folder.is_dir() else []
    if not steps:
        raise ValueError(f"{workdir} holds no checkpoint (looked in {folder}); give the --workdir of a training run.")
    if step is not None and step not in steps:
        raise ValueError(f"{workdir} holds no checkpoint of step {step}; it has {', '.join(map(str, steps))}.")
    chosen = steps[-1] if step is None else step
    handlers = {name: ocp.StandardCheckpointHandler() for name in ("params", "optimizer")}
    handlers |= {"meta": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(folder, item_handlers=handlers) as manager:
        meta = manager.restore(chosen, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        stored = manager.item_metadata(chosen)["params"]
        host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host), stored)
        params = manager.restore(chosen, args=ocp.args.Composite(params=ocp.args.StandardRestore(abstract)))["params"]
    source = workdir / SOURCE_FOLDER
    meta |= {"model_dir": str(source), "hf_config": json.loads((source / "config.json").read_text())}
    return params, meta
