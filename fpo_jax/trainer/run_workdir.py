"""What makes a run the same run: its identity, and the workdir that is its own."""

import json
import logging
import shutil
from pathlib import Path

import jax

from fpo_jax import __version__, checkpoint, hf, losses
from fpo_jax import config as configuration
from fpo_jax.io import atomic_io
from fpo_jax.trainer.run_inputs import Inputs

# Keys of config.json beside the configuration.
RESOLVED_LOSS = "resolved_loss"  # the loss with all its options
SETTLED = "settled"  # what was settled for fields that are automatic
LENGTH = frozenset({"train.epochs", "train.max_steps"})  # fields that a run which is extended may change

log = logging.getLogger("fpo_jax")


def fingerprints(inputs: Inputs) -> dict[str, str]:
    """Return what must be the same for a checkpoint to be resumed; every process calls this."""
    directories = {"model": inputs.source}
    if inputs.reference is not None:
        directories["reference"] = inputs.reference.source
    if inputs.adapter is not None:
        directories["adapter"] = inputs.adapter
    return {
        "train data": inputs.train.fingerprint(),
        "eval data": "" if inputs.evaluation is None else inputs.evaluation.fingerprint(),
    } | hf.weights_fingerprints(directories)


def identity(config: configuration.Config) -> dict[str, object]:
    """Return what else every process of a run must have alike: the versions and every field."""
    return {"fpo_jax": __version__, "jax": jax.__version__} | configuration.flatten(config.to_dict())


def keep_source(config: configuration.Config, workdir: Path, inputs: Inputs) -> None:
    """Keep what an export carries beside the weights, as this run trains, so that it needs nothing else.

    Raises:
        ValueError: transformers, given these files, would not render a conversation as it is trained here.
    """
    target = workdir / checkpoint.SOURCE_FOLDER
    if target.exists() and (workdir / "config.json").exists():
        return
    temporary = target.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        if inputs.encoder is None:
            hf.copy_companions(inputs.source, temporary)
        else:
            example, tokenizer = inputs.train.audit.example, config.tokenizer.path
            if example is None:
                log.info(
                    "no conversation of the data can be compared with what transformers makes of it: all are cut,"
                    " spell control tokens, hold thoughts or have completions of several turns; the export goes"
                    " unchecked"
                )
            hf.companions.write(inputs.source, inputs.encoder, out_dir=temporary, example=example, tokenizer=tokenizer)
        shutil.rmtree(target, ignore_errors=True)  # of a start that was killed before the workdir became its own
        atomic_io.sync_tree(temporary)
        temporary.rename(target)
        atomic_io.sync(workdir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def claim_workdir(
    config: configuration.Config,
    workdir: Path,
    inputs: Inputs,
    *,
    settled: dict[str, object] | None = None,
    steps: int = 0,
    extend: bool = False,
) -> None:
    """Write the run's identity into the workdir, or check that it is the same run's.

    Args:
        config: as it was given.
        workdir: of the run.
        inputs: of the run.
        settled: automatic fields and their values in this start.
        steps: of the run as it is configured.
        extend: whether the run may go on to more steps where its learning rates change with that.

    Raises:
        ValueError: the workdir belongs to another configuration, or its loss had other defaults; lists what differs.
    """
    path, settled = workdir / "config.json", settled or {}
    mine, loss = json.loads(config.to_json()), losses.described(inputs.loss)
    if path.exists():
        before = atomic_io.read_json(path)
        loss_before, settled_before = before.pop(RESOLVED_LOSS, None), before.pop(SETTLED, {})
        longer = _extended(before, mine, workdir, steps=steps, extend=extend)
        changed = configuration.difference(before, mine, ignore=configuration.RESUMABLE | longer)
        if loss_before is None:
            log.info("%s does not say which loss ran with which defaults; they are now those named below", path)
        elif not changed:  # the same settings, of which another version may make another loss
            was, now = ({key: one[key] for key in ("name", "options")} for one in (loss_before, loss))
            changed = configuration.difference({RESOLVED_LOSS: was}, {RESOLVED_LOSS: now})
        if changed:
            raise ValueError(
                f"{workdir} holds a run with another configuration:\n  "
                + "\n  ".join(changed)
                + "\nuse another --workdir, or give the old values to go on with that run"
                + (
                    "; --extend goes on to more steps, with the learning rates of the longer run."
                    if _of_length(changed)
                    else "."
                )
            )
        for line in configuration.difference(before, mine):
            field = line.partition(":")[0]
            remark = "; sums may round differently" if field in configuration.FITTING else ""
            log.info("this start has %s%s", line, f"; the run goes on to {steps} steps" if field in LENGTH else remark)
        for field in settled_before.keys() & settled.keys():
            if settled_before[field] != settled[field]:
                log.info(
                    "this start has %s: %r -> %r, both automatic; sums may round differently; give the old"
                    " value to go on to the bit",
                    field,
                    settled_before[field],
                    settled[field],
                )
    elif workdir.is_dir() and (workdir / checkpoint.FOLDER).exists():
        raise ValueError(f"{workdir} holds checkpoints but no config.json; use another --workdir.")
    workdir.mkdir(parents=True, exist_ok=True)
    atomic_io.write(
        path, json.dumps(mine | {RESOLVED_LOSS: loss} | ({SETTLED: settled} if settled else {}), indent=2) + "\n"
    )
    audits = {"train": inputs.train.audit.as_dict()}
    if inputs.evaluation is not None:
        audits["eval"] = inputs.evaluation.audit.as_dict()
    atomic_io.write(workdir / "audit.json", json.dumps(audits, indent=2) + "\n")


def _extended(before: dict, mine: dict, workdir: Path, *, steps: int, extend: bool) -> frozenset[str]:
    """Return the fields that say how long a run is, where it may become longer; none where they have not changed.

    Under a constant learning rate the steps that were made are those that the longer run would have made.

    Raises:
        ValueError: the run has made more steps already.
    """
    if not configuration.difference(before, mine, ignore=frozenset(configuration.flatten(mine)) - LENGTH):
        return frozenset()
    same_rates = mine["optim"]["schedule"] == "constant" and not mine["optim"]["warmup_fraction"]
    if not (extend or same_rates):
        return frozenset()
    made = [int(folder.name) for folder in (workdir / checkpoint.FOLDER).glob("*") if folder.name.isdigit()]
    if steps < max(made, default=0):
        raise ValueError(
            f"{workdir} holds step {max(made)}, and this start would end at step {steps}; raise train.epochs or"
            " train.max_steps."
        )
    return LENGTH


def _of_length(changed: list[str]) -> bool:
    """Whether nothing but the length of a run has changed."""
    return all(line.partition(":")[0] in LENGTH for line in changed)
