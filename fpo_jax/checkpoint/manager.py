"""Orbax checkpoints: parameters, optimiser, position and fingerprints in one atomic step directory.

A step directory appears whole or not at all (orbax commits by rename), and is sealed with the digests of its files
before older ones are removed (integrity.py), so a killed run resumes from the newest step, and a damaged one is found,
named and set aside for the newest good one. A save that fails is made again. Parameters are an item of their own, so
that export reads them without the optimiser.
"""

import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from fpo_jax import distributed, types
from fpo_jax.checkpoint import disk_space, integrity, sealing, verification
from fpo_jax.distributed import watchdog, workdir_lock
from fpo_jax.io import atomic_io, terminal

log = logging.getLogger("fpo_jax")

FOLDER = "checkpoints"
SOURCE_FOLDER = "model_source"  # config and tokenizer files of the starting model, for export
BEST = "best"  # in the place of a step's number
_SCORE = "score"
CHUNK_BYTES = 2**26  # of a parameter on disk, the least that is read and decompressed
_EXPORTED = ("params", "meta")
_REMOVED = ".removed"  # where old steps go by one rename, so that none is ever half there, and then from the disk
ATTEMPTS = 3  # saves that fail in a row before the run ends


class SaveFailed(Exception):
    """A checkpoint could not be written."""


class Checkpointer:
    """Saves and restores TrainState and a JSON dict under `workdir/checkpoints/<step>`."""

    def __init__(self, workdir: Path, *, keep: int, keep_best: bool = False):
        """Open the folder; the `keep` newest steps stay, and with `keep_best` the one of the highest score.

        Steps newer than the newest good one are renamed to <step>.damaged; the log says what is wrong with them.

        Raises:
            ValueError: there are steps, and none of them is good.
        """
        self._folder = (workdir / FOLDER).absolute()
        self._keep, self._keeps_best = keep, keep_best
        with distributed.together():
            if distributed.is_main_process():
                atomic_io.make_folder(self._folder)
                atomic_io.sync_parents(self._folder)
                integrity.clear(self._folder)
                _sweep(self._folder)
        choice = verification.newest_good(self._folder)
        with distributed.together():
            if choice is not None:
                _set_aside(self._folder, choice)
        stays: policies.PreservationPolicy = policies.LatestN(keep)
        score = None
        if keep_best:
            score = lambda found: found[_SCORE]  # noqa: E731
            best = policies.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
            stays = policies.AnyPreservationPolicy([stays, best])
        self._manager = ocp.CheckpointManager(
            self._folder,
            # Without best_fn orbax writes no score to the disk, and a resumed run would drop the best step.
            options=ocp.CheckpointManagerOptions(
                preservation_policy=stays,
                best_fn=score,
                cleanup_tmp_directories=True,
                temporary_path_class=sealing.SealedPath,
                todelete_subdir=_REMOVED,
                # Where the folder cannot be made, orbax's writers would wait five minutes for it.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            ),
            handler_registry=sealing.handlers(),
        )
        if distributed.is_main_process():
            (self._folder / _REMOVED).mkdir(exist_ok=True)  # now: a full disk may not have room for it
        self._pending: int | None = None  # step that is being written
        self._failures, self._reason = 0, ""  # saves that failed since the last good one; why the last did

    def latest_step(self) -> int | None:
        """Return the newest committed step, or None."""
        return self._manager.latest_step()

    def check_space(self, abstract: types.TrainState) -> None:
        """Compare the disk with what the run will keep on it.

        Args:
            abstract: shapes and dtypes of the state.

        Raises:
            ValueError: not even one more checkpoint fits.
        """
        if not distributed.is_main_process():
            return
        each, free = (
            disk_space.bound(self._folder, (abstract.params, abstract.opt_state)),
            disk_space.free(self._folder),
        )
        kept = self._keep + self._keeps_best
        more = max(1, kept + 1 - len(integrity.steps(self._folder)))  # an old step goes once the new one is there
        if each > free:
            raise ValueError(f"{_short(self._folder, 'a checkpoint', each, free)}")
        if more * each > free:
            log.warning(_short(self._folder, f"{more} more checkpoints ({kept} kept, one written)", more * each, free))

    @watchdog.unhurried(watchdog.SAVE_S)
    def save(self, step: int, state: types.TrainState, meta: dict, *, score: float | None = None) -> None:
        """Write step `step` in the background; orbax has copied the state when this returns, so it may be donated.

        A failure is logged, now or when the writer meets it, and leaves nothing behind: see `failing`.

        Args:
            step: steps so far.
            state: what to save.
            meta: JSON dict.
            score: by which the best step is told, higher is better; None = this step does not compete.

        Raises:
            SaveFailed: the last of ATTEMPTS saves in a row failed, or one of a run of several processes.
        """
        self._settle()
        try:
            self._check_fits(step, state)
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
        except Exception as error:  # of the disk, by way of orbax and tensorstore: of many types
            self._fail(step, error)
        else:
            self._pending = step

    def commit(self, step: int, state: types.TrainState, meta: dict, *, score: float | None = None) -> None:
        """Save and return when it is on the disk; a save that fails is made again at once.

        Raises:
            SaveFailed: as for save.
        """
        self.save(step, state, meta, score=score)
        self._settle()
        while self._failures:
            self.save(step, state, meta, score=score)
            self._settle()

    def failing(self) -> bool:
        """Return whether the last save is known to have failed, so that a newer state should be saved; never waits."""
        # Of several processes orbax's flag waits for all: there a failure shows at the next save.
        if distributed.process_count() == 1 and self._pending is not None and not self._manager.is_saving_in_progress():
            self._settle()
        return self._failures > 0

    def meta(self, step: int) -> dict:
        """Read the JSON dict of a step."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, step: int, abstract: types.TrainState) -> types.TrainState:
        """Read step `step` into the shapes, dtypes and shardings of `abstract`."""
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.params),
                optimizer=ocp.args.StandardRestore(abstract.opt_state),
            ),
        )
        count = jax.device_put(jax.numpy.int32(step), abstract.step.sharding)
        return types.TrainState(items["params"], items["optimizer"], count)  # frozen weights come from their own files

    def wait(self) -> None:
        """Return when every save is committed.

        Raises:
            SaveFailed: the last save failed.
        """
        self._settle()
        if self._failures:
            self._failures = 0
            raise SaveFailed(f"the newest state was not saved to {self._folder}: {self._reason}")

    def close(self) -> None:
        """Commit what is pending and release the folder; raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _check_fits(self, step: int, state: types.TrainState) -> None:
        """Refuse to begin what the disk cannot hold; what pruning frees comes only after the commit."""
        if distributed.is_main_process():
            needed, free = (
                disk_space.estimate(self._folder, (state.params, state.opt_state)),
                disk_space.free(self._folder),
            )
            if needed > free:
                raise SaveFailed(_short(self._folder, f"step {step}", needed, free))

    @watchdog.unhurried(watchdog.SAVE_S)
    def _settle(self) -> None:
        """Wait for the save that is being written, if there is one, and note how it ended."""
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # as in save
            self._fail(step, error)
        else:
            self._failures = 0
        if distributed.is_main_process():
            _sweep(self._folder)

    def _fail(self, step: int, error: Exception) -> None:
        """Remove what a failed save left, so that the next one has its place, and tell."""
        workdir_lock.verify()  # or it is another run's
        self._failures += 1
        self._reason = terminal.first_line(error)
        if distributed.process_count() > 1:  # a process that failed meets the others at no barrier any more
            raise SaveFailed(f"step {step} was not saved to {self._folder}: {self._reason}") from error
        for path in self._folder.glob(f"{step}{ocp.path.atomicity_types.TMP_DIR_SUFFIX}*"):
            shutil.rmtree(path, ignore_errors=True)
        committed = self._folder / str(step)
        if committed.exists() and not integrity.sealed(committed):
            shutil.rmtree(committed, ignore_errors=True)
        if self._failures >= ATTEMPTS:
            tries, self._failures = self._failures, 0
            left = integrity.steps(self._folder)
            newest = f"the newest checkpoint is step {left[-1]}" if left else "there is no checkpoint"
            raise SaveFailed(
                f"step {step} was not saved to {self._folder}, attempt {tries} in a row: {self._reason}; {newest}."
                " Free or mend the disk; the same command goes on from there."
            ) from error
        log.warning("step %d was not saved, and the run tries again: %s", step, self._reason)
        if self._folder.exists():
            self._manager.reload()  # orbax counts a failed step, and no longer those that it was to replace


def restore_params(workdir: Path, step: int | str | None) -> tuple[types.PyTree, dict]:
    """Open the parameters of a checkpoint for export; nothing of them is read before it is asked for.

    Args:
        workdir: the run's folder.
        step: which checkpoint; "best" = the one of the highest score (train.keep_best); None = the newest.

    Returns:
        Nested dict of tensorstore.TensorStore, of which np.asarray(leaf[index]) reads a part and np.asarray(leaf) all,
        and the meta dict with `model_dir`, the folder holding config and tokenizer files.

    Raises:
        ValueError: no checkpoint there, or not that step; the message lists the steps there are. No best one. The step
            that was asked for is damaged, or all are; of None the log says which newer ones are.
    """
    folder = (workdir / FOLDER).absolute()
    steps = integrity.steps(folder)
    if not steps:
        raise ValueError(f"{workdir} holds no checkpoint (looked in {folder}); give the --workdir of a training run.")
    if step not in (None, BEST, *steps):
        raise ValueError(f"{workdir} holds no checkpoint of step {step}; it has {', '.join(map(str, steps))}.")
    if step is None:
        choice = integrity.newest_good(folder, only=_EXPORTED)
        _tell(choice, folder)
        steps = [number for number in steps if number == choice.step]
    elif step == BEST:
        for number in steps:
            _check_sound(folder, number, only=("meta",))
    else:
        steps = [number for number in steps if number == step]
        _check_sound(folder, steps[0], only=_EXPORTED)
    handlers = {name: ocp.StandardCheckpointHandler() for name in ("params", "optimizer")}
    handlers |= {"meta": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(folder, item_handlers=handlers) as manager:
        metas = {
            number: manager.restore(number, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            for number in steps
        }
        chosen = _best(metas, workdir) if step == BEST else next(iter(metas))
        meta = metas[chosen]
        if step == BEST:
            _check_sound(folder, chosen, only=_EXPORTED)
        params = jax.tree.map(_open, manager.item_metadata(chosen)["params"].tree)
    source = workdir / SOURCE_FOLDER
    meta |= {"model_dir": str(source), "hf_config": atomic_io.read_json(source / "config.json")}
    return params, meta


def _set_aside(folder: Path, choice: integrity.Choice) -> None:
    """Rename every step that is newer than the newest good one, and say so."""
    aside = {number: integrity.set_aside(folder, number).name for number in choice.rejected}
    _tell(choice, folder, aside)


def _sweep(folder: Path) -> None:
    for path in (folder / _REMOVED).glob("*"):
        shutil.rmtree(path, ignore_errors=True)


def _tell(choice: integrity.Choice, folder: Path, aside: Mapping[int, str] | None = None) -> None:
    for number, fault in sorted(choice.rejected.items()):
        kept = f"; set aside as {aside[number]}" if aside else ""
        log.warning("checkpoint %d of %s cannot be used: %s%s", number, folder, fault, kept)
    if choice.rejected:
        log.warning("using step %d, the newest good checkpoint", choice.step)
    if not choice.verified:
        log.warning("checkpoint %d of %s has no %s and is used unverified", choice.step, folder, integrity.MANIFEST)


def _check_sound(folder: Path, step: int, *, only: Sequence[str]) -> None:
    place = folder / str(step)
    if not integrity.sealed(place):
        log.warning("checkpoint %d of %s has no %s and is used unverified", step, folder, integrity.MANIFEST)
        fault = integrity.of_another(place)
    else:
        fault = integrity.faults(place, only=only)
    if fault:
        raise ValueError(f"checkpoint {step} of {folder} is damaged: {fault}; put back a copy, or choose another step.")


def _short(folder: Path, what: str, needed: int, free: int) -> str:
    return (
        f"{what} needs {disk_space.gb(needed)}, the disk of {folder} has {disk_space.gb(free)} free; make room, lower"
        " train.keep_checkpoints, or use a --workdir elsewhere."
    )


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


def _chunks(params: types.PyTree) -> types.PyTree:
    """Cut parameters for the disk, stacked ones by layer, so that export reads a layer without its neighbours."""

    def cut(path: tuple, leaf: jax.Array) -> ocp.SaveArgs:
        layers = path[0].key in ("layers", "dense_layers")
        return ocp.SaveArgs(shard_axes=(0,) if layers else (), chunk_byte_size=CHUNK_BYTES)

    return jax.tree_util.tree_map_with_path(cut, params)
