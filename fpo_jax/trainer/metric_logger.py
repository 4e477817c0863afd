"""(sum, count) pairs to numbers, and the writers that keep them.

`metrics.jsonl` holds what the mathematics determines, one line per step or evaluation, so that a resumed run writes
the same bytes as an uninterrupted one; what depends on the machine (times, rates) goes to `timing.jsonl`.
"""

import html
import importlib.util
import logging
import math
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from fpo_jax.distributed import workdir_lock
from fpo_jax.io import atomic_io, jsonl

log = logging.getLogger("fpo_jax")

METRICS_FILE = "metrics.jsonl"
TIMING_FILE = "timing.jsonl"
WANDB_FILE = "wandb_id.txt"
SHOWN = ("loss", "perplexity", "rewards/accuracies", "rewards/margins", "grad_norm", "learning_rate")
# TensorBoard's page "custom scalars": what a reader looks at first, training and evaluation in one chart.
LAYOUT = {
    "training": {
        title: ["Multiline", [f"^train/{name}$", f"^eval/{name}$"]]
        for title, name in (
            ("loss", "loss"),
            ("margins", "rewards/margins"),
            ("accuracies", "rewards/accuracies"),
            ("log-ratio to the reference", "reference_kl"),
            ("gradient norm", "grad_norm"),
        )
    },
    "speed": {"seconds a step": ["Multiline", ["^timing/(seconds|data_seconds|host_seconds)$"]]},
}


def means(pairs: Mapping[str, tuple]) -> dict[str, float]:
    """Turn (sum, count) pairs into means; a name with count 0 has no value and is left out.

    >>> means({"loss": (3.0, 2.0), "absent": (0.0, 0.0)})
    {'loss': 1.5}
    """
    numbers = {name: (float(total), float(count)) for name, (total, count) in pairs.items()}
    return {name: total / count for name, (total, count) in numbers.items() if count}


def add(first: Mapping[str, tuple] | None, second: Mapping[str, tuple]) -> dict[str, tuple]:
    """Add two sets of (sum, count) pairs on the host, in float64."""
    host = {name: tuple(np.float64(np.asarray(part)) for part in pair) for name, pair in second.items()}
    if first is None:
        return host
    return {name: (first[name][0] + pair[0], first[name][1] + pair[1]) for name, pair in host.items()}


def shown(numbers: Mapping[str, float]) -> str:
    """The few that a reader watches, as one line of text.

    >>> shown({"loss": 0.25, "sft_loss": 2.0, "grad_norm": 12.0})
    'loss 0.25  grad_norm 12'
    """
    return "  ".join(f"{name} {numbers[name]:.4g}" for name in SHOWN if name in numbers)


def in_brief(numbers: Mapping[str, float]) -> str:
    """The fewest that a reader watches, to stand behind a progress bar on a terminal of 80 columns.

    >>> in_brief({"loss": 0.25, "rewards/accuracies": 0.5, "rewards/margins": 0.012, "grad_norm": 12.0})
    'loss 0.25 acc 50% margin 0.012'
    """
    found = [f"{name} {numbers[name]:.4g}" for name in ("loss", "perplexity") if name in numbers][:1]
    if "rewards/accuracies" in numbers:
        found.append(f"acc {numbers['rewards/accuracies']:.0%}")
    if "rewards/margins" in numbers:
        found.append(f"margin {numbers['rewards/margins']:.3g}")
    return " ".join(found)


def grouped(name: str, *, timing: bool) -> str:
    """Return the name of a metric in TensorBoard and W&B, which show `train/`, `eval/` and `timing/` as groups.

    >>> grouped("rewards/margins", timing=False), grouped("eval_loss", timing=False), grouped("seconds", timing=True)
    ('train/rewards/margins', 'eval/loss', 'timing/seconds')
    """
    if timing:
        return f"timing/{name}"
    return f"eval/{name.removeprefix('eval_')}" if _of_evaluation(name) else f"train/{name}"


class Silent:
    """Writes nothing: the writers of every process but the first."""

    def write(self, *_: object, **__: object) -> None:
        """Drop a line."""

    def table(self, *_: object) -> None:
        """Drop a table."""

    def sync(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Writers:
    """jsonl always; TensorBoard where tensorboardX is installed; W&B when a project is named."""

    def __init__(self, workdir: Path, *, resume_step: int, tensorboard: bool, wandb_project: str | None, config: dict):
        """Open the files, dropping lines after `resume_step` that an interrupted run wrote."""
        self._files = {name: _open_until(workdir / name, resume_step) for name in (METRICS_FILE, TIMING_FILE)}
        self._tensorboard = None
        if tensorboard and importlib.util.find_spec("tensorboardX"):
            import tensorboardX

            self._tensorboard = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)
            self._tensorboard.add_custom_scalars(LAYOUT)
        self._wandb = None
        if wandb_project is not None:
            try:
                import wandb  # pyright: ignore[reportMissingImports]
            except ImportError:
                raise ValueError(
                    f"logging.wandb_project={wandb_project!r} needs the wandb package; run pip install wandb, or unset"
                    " it."
                ) from None
            self._wandb = wandb.init(
                project=wandb_project,
                dir=str(workdir),
                config=config,
                id=_wandb_id(workdir),
                name="/".join(workdir.absolute().parts[-2:]),
                resume="allow",
            )

    def write(
        self,
        step: int,
        numbers: Mapping[str, float],
        *,
        timing: bool = False,
        rows: Sequence[int] | None = None,
        why: str = "nonfinite",
    ) -> None:
        """Append one line; a number that is not finite is null there and left out elsewhere, where names are `grouped`.

        Args:
            step: steps so far.
            numbers: metric name -> value.
            timing: the numbers depend on the machine.
            rows: data rows of a step that was not applied, written as `WHY_rows`.
            why: nonfinite or spike.
        """
        workdir_lock.verify()
        file = self._files[TIMING_FILE if timing else METRICS_FILE]
        line = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
        jsonl.append(file, {"step": step, **line, **({} if rows is None else {f"{why}_rows": list(rows)})})
        numbers = {grouped(name, timing=timing): number for name, number in numbers.items() if math.isfinite(number)}
        if self._tensorboard is not None:
            for name, number in numbers.items():
                self._tensorboard.add_scalar(name, number, step)
        if self._wandb is not None:
            self._wandb.log(dict(numbers), step=step)

    def table(self, step: int, name: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show texts in TensorBoard and W&B; the files do not hold them."""
        if self._tensorboard is not None:
            lines = [header, ["---"] * len(header), *([_cell(text) for text in row] for row in rows)]
            self._tensorboard.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in lines), step)
        if self._wandb is not None:
            import wandb  # pyright: ignore[reportMissingImports]

            self._wandb.log({name: wandb.Table(columns=list(header), data=[list(row) for row in rows])}, step=step)

    def sync(self) -> None:
        """Bring the files to the disk; called before a checkpoint that relies on them commits."""
        for file in self._files.values():
            os.fsync(file.fileno())

    def close(self) -> None:
        """Flush and close all writers."""
        for file in self._files.values():
            file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read(path: Path) -> list[dict]:
    """Read a jsonl file of ours; a last line cut short by a kill is left out."""
    return jsonl.read_appended(path).rows


def has_evaluation(path: Path, step: int) -> bool:
    """Return whether the file holds the evaluation after a step."""
    return any(line["step"] == step and any(map(_of_evaluation, line)) for line in _readable(path)[0])


def _readable(path: Path) -> tuple[list[dict], str]:
    """Return the sound lines of a file, and what is wrong with the first other one; half a last line is no fault."""
    found: list[dict] = []
    faults: list[str] = []
    for number, line in jsonl.lines(path) if path.exists() else ():
        try:
            row = jsonl.parse(line)
            if type(row["step"]) is not int:
                raise TypeError
            found.append(row)
        except (ValueError, KeyError, TypeError):
            faults += [f"{path}:{number} is no line of a run"] if line.endswith(b"\n") else []
    return found, faults[0] if faults else ""


def _wandb_id(workdir: Path) -> str:
    """Return the id of the run in a workdir, made once: folder names come again, in sweeps and in pipelines."""
    path = workdir / WANDB_FILE
    if not path.exists():
        atomic_io.write(path, secrets.token_hex(8) + "\n")
    return path.read_text().strip()


def _of_evaluation(name: str) -> bool:
    return name.startswith("eval_")


def _cell(text: str) -> str:
    """Return a text as a cell of a Markdown table, which no text can leave."""
    return html.escape(text, quote=False).replace("|", "&#124;").replace("\n", "<br>")


def _open_until(path: Path, last_step: int) -> IO[bytes]:
    """Open a file behind the lines of the step that is resumed; a damaged one is kept beside, and refuses no run."""
    lines, fault = _readable(path)
    kept = [line for line in lines if line["step"] <= last_step]
    if fault:
        aside = path.with_name(f"{path.name}.damaged")
        shutil.copyfile(path, aside)
        log.warning("%s; it is kept as %s, and the run goes on with its %d sound lines", fault, aside.name, len(kept))
    steps = {line["step"] for line in kept if not any(map(_of_evaluation, line))}
    if missing := last_step - len(steps - {0}):
        if missing > 0:
            log.warning("%s lacks %d of the %d steps that the checkpoint holds", path, missing, last_step)
    return jsonl.write(path, kept).open("ab")
