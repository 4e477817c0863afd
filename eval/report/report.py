"""One page about a training run or a pipeline: `fpo report --workdir runs/mine`.

What flows in: the files that a run (config.json, audit.json, metrics.jsonl, timing.jsonl, completions/) or a pipeline
(report/report.json and its stages) left, and summaries of `fpo winrate`. What flows out, in WORKDIR/report or --out:
report.html, which needs no other file, report.md with its plots, and of a run model_card.md, to lie as README.md beside
the exported model. Texts of models and data are shown as they are and never as markup. Nothing is computed again.
"""

import dataclasses
import importlib.util
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fpo_jax import __version__, losses
from fpo_jax import config as configuration
from fpo_jax.cli import args as command_line
from fpo_jax.distributed import workdir_lock
from fpo_jax.eval.pipeline import pipeline_report
from fpo_jax.eval.report import html, model_card, report_plots, verdict
from fpo_jax.eval.report.html import Block, Heading, Plot, Table, Text, Texts
from fpo_jax.eval.stats import win_rates
from fpo_jax.io import atomic_io, jsonl, terminal
from fpo_jax.trainer import metric_logger, run_workdir, sample_completions
from fpo_jax.trainer import model_card as run_card

DISTANCE = "log-ratio to the reference, nats per completion of the data (reference_kl)"


@dataclasses.dataclass(frozen=True)
class Options:
    """What to report on. Paths as on the command line."""

    workdir: Path  # of train.py or of fpo pipeline
    out: str = ""  # folder; "" = report in workdir
    winrate: tuple[str, ...] = ()  # folders of fpo winrate
    samples: int = 6  # prompts shown with their answers


def run(options: Options) -> Path:
    """Write the page and return where it is.

    Raises:
        ValueError: no run or pipeline there, no matplotlib, or a summary that cannot be read.
    """
    require_matplotlib()
    if options.samples < 0:
        raise ValueError(f"--samples={options.samples} must be at least 0.")
    summaries = [atomic_io.read_json(Path(folder) / "summary.json") for folder in options.winrate]
    out = Path(options.out) if options.out else options.workdir / "report"
    if not options.workdir.is_dir():
        raise ValueError(f"{options.workdir} is not a directory; give the --workdir of a run or of a pipeline.")
    with workdir_lock.hold(out, option="--out"):
        return _write(options, summaries, out)


def _write(options: Options, summaries: list[dict[str, Any]], out: Path) -> Path:
    if (options.workdir / metric_logger.METRICS_FILE).is_file():
        blocks, card = _of_run(options, summaries, out)
    elif (options.workdir / "stages.json").is_file():
        blocks, card = _of_pipeline(options, summaries, out), None
    else:
        raise ValueError(
            f"{options.workdir} holds neither {metric_logger.METRICS_FILE} of a run nor stages.json of a pipeline."
        )
    atomic_io.write(out / "report.md", html.markdown(blocks))
    atomic_io.write(out / "report.html", html.html(blocks, out))
    if card is not None:
        atomic_io.write(out / "model_card.md", card)
    return out / "report.html"


def require_matplotlib() -> None:
    """Raise ValueError where the plots could not be drawn, before anything else is done."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the report's plots need matplotlib; run pip install matplotlib.")


def audit(parts: dict[str, Any]) -> Table:
    """Return an audit of data, one column for each part, as a table."""
    names = {
        "rows_read": "records read",
        "groups": "groups kept",
        "group_size": "candidates per group",
        "tokens": "tokens",
        "scored_tokens": "scored tokens",
        "prompts_cut": "prompts cut",
        "completions_cut": "completions cut",
        "missing_eos": "rows without EOS",
        "merged": "tokens across the boundary",
        "double_bos": "rows with two BOS",
        "ties": "groups with a tie for the best reward",
    }
    columns = list(parts.values())
    rows = [
        [label, *(f"{part[key]:,}" for part in columns)]
        for key, label in names.items()
        if all(key in part for part in columns)
    ]
    for kind in ("dropped", "noted"):
        for reason in sorted({reason for part in columns for reason in part[kind]}):
            rows.append([f"{kind}: {reason}", *(f"{len(part[kind].get(reason, ())):,}" for part in columns)])
    return Table(["", *parts], rows)


# --- a training run


def _of_run(options: Options, summaries: list[dict[str, Any]], out: Path) -> tuple[list[Block], str]:
    workdir = options.workdir
    config = atomic_io.read_json(workdir / "config.json")
    lines = metric_logger.read(workdir / metric_logger.METRICS_FILE)
    if not lines:
        raise ValueError(
            f"{workdir / metric_logger.METRICS_FILE} has no line yet; report when the run has made a step."
        )
    out.mkdir(parents=True, exist_ok=True)
    loss = _loss(config["loss"]["name"], config.pop(run_workdir.RESOLVED_LOSS, None))
    evaluations = _evaluations(lines)
    updates = max(line["step"] for line in lines)
    settings, costs = _settings(config), _costs_of_run(workdir)
    result = _result_of_run(evaluations)
    parts = {name: part for name, part in atomic_io.read_json(workdir / "audit.json").items() if part}
    said = verdict.of_run(evaluations, parts, _sampled(workdir), summaries)
    title = f"{workdir.name}: {config['stage']} with {config['loss']['name']}"
    about = Text(
        f"{updates:,} steps of {config['train']['batch_size']} from `{run_card.base(config)}`; fpo_jax {__version__}."
    )
    blocks: list[Block] = [Heading(title, 1), about, *said, *result, *_rates(summaries)]
    if report_plots.curves(out / "curves.png", lines):
        blocks += [Heading("Curves"), Plot("curves.png", "Training batches (faint: single steps) and evaluations")]
    blocks += _tradeoff_of_run(evaluations, out)
    blocks += _answers_of_run(workdir, options.samples)
    blocks += [
        Heading("Time and speed"),
        costs,
        *loss,
        Heading("Configuration"),
        Text("What differs from the default; everything else is as there."),
        settings,
        Heading("Audit of the data"),
        audit(parts),
    ]
    return blocks, model_card.text(workdir, config, parts, [*said, *result, *_rates(summaries), *loss], settings, costs)


def _evaluations(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if any(name.startswith("eval_") for name in line)]


def _result_of_run(evaluations: list[dict[str, Any]]) -> list[Block]:
    if not evaluations:
        return [Text("The run has no evaluation.")]
    first, last = evaluations[0], evaluations[-1]
    rows = [
        [name.removeprefix("eval_"), _number(first[name]), _number(last[name])]
        for name in first
        if name.startswith("eval_") and last.get(name) is not None and first[name] is not None
    ]
    return [
        Heading("Before and after"),
        Table(["evaluation", f"step {first['step']}", f"step {last['step']}"], rows),
    ]


def _tradeoff_of_run(evaluations: list[dict[str, Any]], out: Path) -> list[Block]:
    """Plot what the policy gained against how far it went from the reference."""
    gain = (
        "eval_completions/reward"
        if any("eval_completions/reward" in line for line in evaluations)
        else "eval_rewards/margins"
    )
    both = [line for line in evaluations if line.get(gain) is not None and line.get("eval_reference_kl") is not None]
    if len(both) < 2:
        return []
    points = [report_plots.Point(_with_length(line), line["eval_reference_kl"], line[gain]) for line in both]
    label = "mean reward of the answers" if gain == "eval_completions/reward" else "margin of the implied reward"
    report_plots.plane(out / "tradeoff.png", points, x=DISTANCE, y=label, joined=True)
    caption = f"{label} against the log-ratio to the reference, step by step"
    return [Heading("What it cost"), Plot("tradeoff.png", caption)]


def _with_length(line: dict[str, Any]) -> str:
    length = line.get("eval_completions/length")
    return f"{line['step']}" + ("" if length is None else f" ({length:.0f} tokens)")


def _sampled_steps(workdir: Path) -> list[int]:
    folder = workdir / sample_completions.FOLDER
    return sorted(int(path.stem) for path in folder.glob("*.jsonl")) if folder.is_dir() else []


def _sampled(workdir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]] | None:
    """Return the first and the last sample completions."""
    steps, folder = _sampled_steps(workdir), workdir / sample_completions.FOLDER
    if len(steps) < 2:
        return None
    return sample_completions.read(folder, steps[0]), sample_completions.read(folder, steps[-1])


def _answers_of_run(workdir: Path, count: int) -> list[Block]:
    folder, steps = workdir / sample_completions.FOLDER, _sampled_steps(workdir)
    if not steps or not count:
        return []
    before, after = (sample_completions.read(folder, step) for step in (steps[0], steps[-1]))
    rows = [[_prompt(a), _answer(a), _answer(b)] for a, b in zip(before[:count], after[:count], strict=True)]
    return [
        Heading("Answers side by side"),
        Text("The first prompts, as they come; the noise is the same at every step."),
        Texts(["prompt", f"step {steps[0]}", f"step {steps[-1]}"], rows),
    ]


def _prompt(line: dict[str, Any]) -> str:
    prompt = line["prompt"]
    return (
        prompt.strip("\n")
        if isinstance(prompt, str)
        else "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
    )


def _answer(line: dict[str, Any]) -> str:
    reward = f"\n\n[reward {line['reward']:.3g}]" if "reward" in line else ""
    return line["completion"] + reward


def _settings(config: dict[str, Any]) -> Table:
    default = configuration.flatten(json.loads(configuration.default().to_json()))
    mine = configuration.flatten(config)
    rows = [
        [f"`{key}`", _shown(default.get(key, "(absent)")), _shown(value)]
        for key, value in sorted(mine.items())
        if default.get(key) != value
    ]
    return Table(["setting", "default", "here"], rows, right=False)


def _loss(name: str, resolved: dict[str, Any] | None) -> list[Block]:
    """Say which loss a name stood for: its equation, whether it has a reference, and every option."""
    if resolved is None:
        return [Heading("Loss"), Text(f"`{name}`; this run did not record its options.")]
    reference = "a reference" if resolved["reference"] else "no reference"
    described = f"`{name}` is `{resolved['name']}`, with {reference}: `{resolved['equation']}`."
    if name in losses.IN_TRL:
        described += f" Not what TRL calls `{name}`: there {losses.IN_TRL[name]}."
    rows = [[f"`{key}`", _shown(value)] for key, value in resolved["options"].items()]
    return [Heading("Loss"), Text(described), Table(["option", "value"], rows, right=False)]


def _shown(value: Any) -> str:
    """A path of this machine is shown by its last part."""
    if isinstance(value, str) and Path(value).is_absolute():
        value = Path(value).name
    return "(empty)" if value == "" else f"`{value}`"


def _costs_of_run(workdir: Path) -> Table:
    lines = metric_logger.read(workdir / metric_logger.TIMING_FILE)
    updates = [line for line in lines if "seconds" in line]
    total = next((line["run_seconds"] for line in reversed(lines) if "run_seconds" in line), None)
    rows = [["steps timed", f"{len(updates):,}"]]
    if total is not None:
        rows.append(["steps and reference pass since the last start", f"{total:,.1f} s"])
    for name, label, form in (
        ("seconds", "a step, median", "{:.3f} s"),
        ("data_seconds", "of it making the batch", "{:.3f} s"),
        ("host_seconds", "of it the host", "{:.3f} s"),
        ("valid_tokens_per_s", "tokens without padding, median", "{:,.0f} /s"),
        ("padded_tokens_per_s", "tokens with padding, median", "{:,.0f} /s"),
        ("padding_share", "padding, median", "{:.1%}"),
        ("mfu_valid", "MFU on tokens without padding, median", "{:.1%}"),
    ):
        values = [line[name] for line in updates if line.get(name) is not None]
        if values:
            rows.append([label, form.format(statistics.median(values))])
    return Table(["", "measured"], rows)


# --- a pipeline


def _of_pipeline(options: Options, summaries: list[dict[str, Any]], out: Path) -> list[Block]:
    workdir = options.workdir
    found = atomic_io.read_json(workdir / "report" / "report.json")
    out.mkdir(parents=True, exist_ok=True)
    blocks: list[Block] = [
        Heading(f"{workdir.name}: {len(found) - 1} alignments against their start", 1),
        Text(
            "The judge is the reward model; a win is a higher reward than that of the start's answer."
            " Intervals are of 95 %, over prompts."
        ),
        *verdict.of_pipeline(found),
        Table(*pipeline_report.cells(found)),
        *_rates(summaries),
    ]
    report_plots.plane(
        out / "length.png",
        [_point(name, one, one["mean_characters"]) for name, one in found.items()],
        x="mean characters of an answer", y="mean reward", joined=False,
    )  # fmt: skip
    blocks += [Heading("What it cost"), Plot("length.png", "Mean reward against the length of the answers")]
    sampled = any("kl" in one for one in found.values())
    if sampled:
        distances = {name: one["kl"]["mean"] for name, one in found.items() if "kl" in one}
        label, caption = "KL to the start on its own samples, nats per completion", "the KL to the start"
    else:
        distances = {name: ratio for name in found if (ratio := _log_ratio(workdir, name)) is not None}
        label, caption = DISTANCE, "the log-ratio to the start"
    if distances:
        points = [_point(name, found[name], distance) for name, distance in distances.items()]
        start = report_plots.Point("start", 0.0, found[pipeline_report.START]["mean_reward"])
        report_plots.plane(out / "distance.png", [start, *points], x=label, y="mean reward", joined=False)
        blocks.append(Plot("distance.png", f"Mean reward against {caption}"))
    blocks += _answers_of_pipeline(workdir, found, options.samples)
    return [*blocks, *_costs_of_pipeline(workdir)]


def _point(name: str, one: dict[str, Any], x: float) -> report_plots.Point:
    change, mean = one.get("change"), one["mean_reward"]
    if change is None:
        return report_plots.Point(name, x, mean)
    return report_plots.Point(
        name, x, mean, mean - change["mean"] + change["low"], mean - change["mean"] + change["high"]
    )


def _log_ratio(workdir: Path, name: str) -> float | None:
    """Return the last reference_kl of an alignment's evaluations."""
    folders = sorted(
        workdir.glob(f"align-{name}-*/run/{metric_logger.METRICS_FILE}"), key=lambda path: path.stat().st_mtime
    )
    lines = metric_logger.read(folders[-1]) if folders else []
    values = [line["eval_reference_kl"] for line in lines if line.get("eval_reference_kl") is not None]
    return values[-1] if values else None


def _answers_of_pipeline(workdir: Path, found: dict[str, Any], count: int) -> list[Block]:
    names = list(found)
    if not count or len(names) < 2:
        return []
    best = max(names[1:], key=lambda name: found[name]["mean_reward"])
    before, after = (jsonl.read(workdir / found[name]["file"]) for name in (names[0], best))
    rows = [
        [_prompt(a), *(f"{line['completions'][0]}\n\n[reward {line['rewards'][0]:.3g}]" for line in (a, b))]
        for a, b in zip(before[:count], after[:count], strict=True)
    ]
    return [
        Heading("Answers side by side"),
        Text(
            "The first answer to each of the first prompts, of the start and of the model with the highest mean reward."
        ),
        Texts(["prompt", names[0], best], rows),
    ]


def _costs_of_pipeline(workdir: Path) -> list[Block]:
    stages = atomic_io.read_json(workdir / "stages.json")
    rows = [[name, f"{one['seconds']:,.1f} s", one["result"]] for name, one in stages.items()]
    total = sum(one["seconds"] for one in stages.values())
    return [
        Heading("Stages"),
        Table(["stage", "time", "result"], [*rows, ["total", f"{total:,.1f} s", ""]], right=False),
    ]


# --- both


def _rates(summaries: list[dict[str, Any]]) -> list[Block]:
    if not summaries:
        return []
    rows = []
    for one in summaries:
        judge = one["judge"].get("reward_model") or one["judge"]["model"]
        parts = [win_rates.shown(one, name) or "none" for name in ("win_rate", "length_controlled_win_rate")]
        numbers = [f"{one[name]}" for name in ("wins", "ties", "losses", "failures")]
        sides = [Path(one[side]).name for side in ("candidate", "baseline")]
        rows.append([f"{sides[0]} against {sides[1]}", Path(judge).name, *parts, " / ".join(numbers)])
    header = ["answers", "judge", "win rate (95 %)", "at equal length", "won / tied / lost / failed"]
    flagged = sum(sum(one["steering"].values()) for one in summaries)
    note = [Text(f"{flagged} answers speak to the judge; read them in verdicts.jsonl.")] if flagged else []
    return [Heading("Win rates"), Table(header, rows, right=False), *note]


def _number(value: float) -> str:
    return f"{value + 0.0:.4g}"  # -0.0 is 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as the command line says; return the exit status."""
    return command_line.run(Options, _work, arguments, program="fpo report", about=__doc__)


def _work(options: Options) -> int:
    terminal.say(run(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
