"""What a pipeline found: rewards and win rates of the answers before and after each alignment, as JSON and as a table.

Scored files in (prompt, completions, rewards a line), report.json and table.md out. An answer's prompt is the unit: a
prompt's rewards are averaged first, and changes are taken prompt by prompt against the model that the alignments began
with, so that hard prompts do not widen the intervals. Win rates compare the answers one by one with the start's, the
higher reward wins; their intervals resample prompts.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fpo_jax.eval.report import html
from fpo_jax.eval.stats import confidence_intervals, kl, win_rates
from fpo_jax.io import atomic_io, jsonl

START = "start"


def write(workdir: Path, scores: Mapping[str, Path], divergences: Mapping[str, Path], report: dict[str, Any]) -> str:
    """Fill `report` from the scored files, write it, and return where it is.

    Args:
        workdir: the pipeline's folder.
        scores: scored file of each model, `start` first.
        divergences: file of `fpo kl` of each aligned model, or none.
        report: filled with one entry per model.

    Raises:
        ValueError: files that answer different prompts.
    """
    before = jsonl.read(scores[START])
    for name, path in scores.items():
        rows = jsonl.read(path)
        if [row["prompt"] for row in rows] != [row["prompt"] for row in before]:
            raise ValueError(f"{path} and {scores[START]} answer different prompts; delete both folders and run again.")
        report[name] = summary(rows, before=None if name == START else before) | {"file": _relative(path, workdir)}
        if name in divergences:
            found = kl.summary(divergences[name])
            report[name]["kl"] = {"mean": found.mean, "low": found.low, "high": found.high}
    folder = workdir / "report"
    atomic_io.write_json(folder / "report.json", report)
    return str(atomic_io.write(folder / "table.md", html.markdown([html.Table(*cells(report))])))


def summary(rows: list[dict[str, Any]], *, before: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Return mean reward and length of one model's answers, and the change against `before` with its 95 % interval."""
    means = [math.fsum(row["rewards"]) / len(row["rewards"]) for row in rows]
    answers = [text for row in rows for text in row["completions"]]
    found: dict[str, Any] = {
        "prompts": len(rows),
        "answers": len(answers),
        "mean_reward": math.fsum(means) / len(means),
        "mean_characters": sum(map(len, answers)) / len(answers),
        "distinct_answers": len(set(answers)) / len(answers),
    }
    if before is not None:
        old = [math.fsum(row["rewards"]) / len(row["rewards"]) for row in before]
        change, low, high = confidence_intervals.paired_difference(old, means)
        found["change"] = {"mean": change, "low": low, "high": high}
        found["better_prompts"] = sum(new > was for was, new in zip(old, means, strict=True)) / len(means)
        found |= _win_rates(rows, before=before)
    return found


def _win_rates(rows: list[dict[str, Any]], *, before: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return how often an answer has a higher reward than the start's, a tie one half; also at equal length."""
    outcomes, lengths, clusters = [], [], []
    for number, (new, old) in enumerate(zip(rows, before, strict=True)):
        answers = zip(new["rewards"], new["completions"], old["rewards"], old["completions"], strict=True)
        for ours, text, theirs, other in answers:
            outcomes.append(0.5 * (1 + (ours > theirs) - (ours < theirs)))
            lengths.append([len(text), len(other)])
            clusters.append(number)
    return win_rates.both(np.array(outcomes), np.array(lengths, float), np.array(clusters))


def table(report: Mapping[str, Any]) -> str:
    """Return the report as text for a terminal."""
    width = max(map(len, report))
    shown = any("kl" in one for one in report.values())
    lines = [
        f"{'':{width}}  mean reward  change (95 %)            win rate (95 %)       at equal length        characters"
        + "  KL from start (95 %)" * shown
    ]
    for name, one in report.items():
        won = f"{win_rates.shown(one, 'win_rate'):20}  {win_rates.shown(one, 'length_controlled_win_rate'):20}"
        numbers = f"{one['mean_reward']:11.3f}  {_change(one):24} {won}  {one['mean_characters']:10.0f}"
        lines.append(f"{name:{width}}  {numbers}" + (f"  {_kl(one)}" if "kl" in one else ""))
    return "\n".join(lines)


def cells(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the report as the header and the rows of a table."""
    with_kl = any("kl" in one for one in report.values())
    header = ["model", "prompts x answers", "mean reward", "change against the start (95 %)", "win rate (95 %)"]
    header += ["at equal length", "characters", *(["KL from the start (95 %)"] if with_kl else [])]
    rows = []
    for name, one in report.items():
        row = [
            name,
            f"{one['prompts']} x {one['answers'] // one['prompts']}",
            f"{one['mean_reward']:.3f}",
            _change(one),
        ]
        row += [win_rates.shown(one, "win_rate"), win_rates.shown(one, "length_controlled_win_rate")]
        rows.append([*row, f"{one['mean_characters']:.0f}", *([_kl(one)] if with_kl else [])])
    return header, rows


def training(run: Path) -> str:
    """Say in a few words what a training run reached, from its metrics."""
    lines = jsonl.read(run / "metrics.jsonl")
    updates = [line for line in lines if "loss" in line]
    described = f"{updates[-1]['step']} steps, loss {updates[0]['loss']:.3f} -> {updates[-1]['loss']:.3f}"
    evaluations = [line for line in lines if "eval_loss" in line]
    for key in ("eval_perplexity", "eval_rewards/accuracies"):
        values = [line[key] for line in evaluations if key in line]
        if values:
            described += f", {key.removeprefix('eval_')} {values[0]:.3g} -> {values[-1]:.3g}"
    return described


def _change(one: Mapping[str, Any]) -> str:
    return "{mean:+.3f} ({low:+.3f}, {high:+.3f})".format(**one["change"]) if "change" in one else ""


def _kl(one: Mapping[str, Any]) -> str:
    return "{mean:.3f} ({low:.3f}, {high:.3f})".format(**one["kl"]) if "kl" in one else ""


def _relative(path: Path, workdir: Path) -> str:
    return path.relative_to(workdir).as_posix()
