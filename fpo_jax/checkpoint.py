"""Orbax checkpoints: parameters, optimiser, position and fingerprints in one atomic step directory.

A step directory appears whole or not at all (orbax commits by rename), so a killed run resumes from the newest one.
Parameters are an item of their own, so that export reads them without the optimiser.
"""

import json
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import tensorstore

from fpo_jax import shapes

FOLDER = "checkpoints"
SOURCE_FOLDER = "model_source"  # config and tokenizer files of the starting model, for export
CHUNK_BYTES = 2**26  # of a parameter on disk, the least that is read and decompressed


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
                params=ocp.args.StandardSave(state.params, save_args=_chunks(state.params)),
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
    """Open the parameters of a checkpoint for export; nothing of them is read before it is asked for.

    Args:
        workdir: the run's folder.
        step: which checkpoint; None = the newest.

    Returns:
        Nested dict of tensorstore.TensorStore, of which np.asarray(leaf[index]) reads a part and np.asarray(leaf) all,
        and the meta dict with `model_dir`, the folder holding config and tokenizer files.

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
        params = jax.tree.map(_open, manager.item_metadata(chosen)["params"].tree)
    source = workdir / SOURCE_FOLDER
    meta |= {"model_dir": str(source), "hf_config": json.loads((source / "config.json").read_text())}
    return params, meta


def _open(stored: ocp.metadata.ArrayMetadata) -> tensorstore.TensorStore:
    """Open one array of a checkpoint where orbax says it is; orbax itself restores whole arrays only."""
    folder = {"driver": "file", "path": f"{stored.directory}/"}
    store = {"driver": "ocdbt", "base": folder, "path": f"{stored.name}/"}
    return tensorstore.open({"driver": "zarr", "kvstore": store}, open=True, read=True).result()


def _chunks(params: shapes.PyTree) -> shapes.PyTree:
    """Cut parameters for the disk, stacked ones by layer, so that export reads a layer without its neighbours."""

    def cut(path: tuple, leaf: jax.Array) -> ocp.SaveArgs:
        layers = path[0].key == "layers"
        return ocp.SaveArgs(shard_axes=(0,) if layers else (), chunk_byte_size=CHUNK_BYTES)

    return jax.tree_util.tree_map_with_path(cut, params)
