"""Orbax checkpoints: parameters, optimiser, position and fingerprints in one atomic step directory.

A step directory appears whole or not at all (orbax commits by rename), so a killed run resumes from the newest one.
Parameters are an item of their own, so that export reads them without the optimiser.
"""

import json
import math
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from fpo_jax import shapes

FOLDER = "checkpoints"
SOURCE_FOLDER = "model_source"  # config and tokenizer files of the starting model, for export
BEST = "best"  # in the place of a step's number
_SCORE = "score"
CHUNK_BYTES = 2**26  # of a parameter on disk, the least that is read and decompressed


class Checkpointer:
    """Saves and restores TrainState and a JSON dict under `workdir/checkpoints/<step>`."""

    def __init__(self, workdir: Path, *, keep: int, keep_best: bool = False):
        """Open the folder; the `keep` newest steps stay, and with `keep_best` the one of the highest score."""
        stays: policies.PreservationPolicy = policies.LatestN(keep)
        score = None
        if keep_best:
            score = lambda found: found[_SCORE]  # noqa: E731
            best = policies.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
            stays = policies.AnyPreservationPolicy([stays, best])
        self._keeps_best = keep_best
        self._manager = ocp.CheckpointManager(
            (workdir / FOLDER).absolute(),
            # Without best_fn orbax writes no score to the disk, and a resumed run would drop the best step.
            options=ocp.CheckpointManagerOptions(
                preservation_policy=stays, best_fn=score, cleanup_tmp_directories=True
            ),
            item_names=("params", "optimizer", "meta"),
        )

    def latest_step(self) -> int | None:
        """Return the newest committed step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: shapes.TrainState, meta: dict, *, score: float | None = None) -> None:
        """Write step `step` in the background; orbax has copied the state when this returns, so it may be donated.

        Args:
            step: updates so far.
            state: what to save.
            meta: JSON dict.
            score: by which the best step is told, higher is better; None = this step does not compete.
        """
        self._manager.save(
            step,
            metrics={_SCORE: -math.inf if score is None else score} if self._keeps_best else None,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params, save_args=_chunks(state.params)),
                optimizer=ocp.args.StandardSave(state.opt_state),
                meta=ocp.args.JsonSave({**meta, "step": step, _SCORE: score}),
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
        return shapes.TrainState(items["params"], items["optimizer"], count)  # frozen weights come from their own files

    def wait(self) -> None:
        """Return when every save is committed; raises what a background save raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Commit what is pending and release the folder."""
        self._manager.close()


def restore_params(workdir: Path, step: int | str | None) -> tuple[shapes.PyTree, dict]:
    """Open the parameters of a checkpoint for export; nothing of them is read before it is asked for.

    Args:
        workdir: the run's folder.
        step: which checkpoint; "best" = the one of the highest score (train.keep_best); None = the newest.

    Returns:
        Nested dict of tensorstore.TensorStore, of which np.asarray(leaf[index]) reads a part and np.asarray(leaf) all,
        and the meta dict with `model_dir`, the folder holding config and tokenizer files.

    Raises:
        ValueError: no checkpoint there, or not that step; the message lists the steps there are. No best one.
    """
    folder = (workdir / FOLDER).absolute()
    steps = sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit()) if folder.is_dir() else []
    if not steps:
        raise ValueError(f"{workdir} holds no checkpoint (looked in {folder}); give the --workdir of a training run.")
    if step not in (None, BEST, *steps):
        raise ValueError(f"{workdir} holds no checkpoint of step {step}; it has {', '.join(map(str, steps))}.")
    handlers = {name: ocp.StandardCheckpointHandler() for name in ("params", "optimizer")}
    handlers |= {"meta": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(folder, item_handlers=handlers) as manager:
        metas = {
            number: manager.restore(number, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            for number in (steps if step == BEST else [step or steps[-1]])
        }
        chosen = _best(metas, workdir) if step == BEST else next(iter(metas))
        meta = metas[chosen]
        params = jax.tree.map(_open, manager.item_metadata(chosen)["params"].tree)
    source = workdir / SOURCE_FOLDER
    meta |= {"model_dir": str(source), "hf_config": json.loads((source / "config.json").read_text())}
    return params, meta


def _best(metas: dict[int, dict], workdir: Path) -> int:
    scores = {number: meta[_SCORE] for number, meta in metas.items() if meta.get(_SCORE) is not None}
    if not scores:
        raise ValueError(f"no checkpoint of {workdir} has a score; only runs with train.keep_best have a best one.")
    return max(scores, key=lambda number: (scores[number], number))


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
