"""The quickstart's report: a summary and the files it was counted from in, report.md, report.html and plots out.

What is said is decided here, as blocks; html.py writes them in both formats.
"""

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from fpo_jax.eval.quickstart import quickstart_plots
from fpo_jax.eval.quickstart import quickstart_task as task
from fpo_jax.eval.report import html, report
from fpo_jax.eval.report.html import Block, Code, Heading, Plot, Table, Text
from fpo_jax.io import atomic_io, jsonl

SAMPLES_SHOWN = 14


def write(folder: Path, summary: dict[str, Any], *, workdir: Path) -> None:
    """Write summary.json, the plots, report.md and report.html into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: workdir / relative for name, relative in summary["paths"].items()}
    pretraining = jsonl.read(paths["pretraining"] / "metrics.jsonl")
    alignment = jsonl.read(paths["alignment"] / "metrics.jsonl")
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    quickstart_plots.success(folder / "success.png", summary["success"]["before"], summary["success"]["after"])
    quickstart_plots.alignment(folder / "alignment.png", alignment)
    quickstart_plots.pretraining(folder / "pretraining.png", pretraining)
    blocks = [
        *_result(summary),
        *_method(summary),
        *_training(alignment),
        *_samples(jsonl.read(paths["before"]), jsonl.read(paths["after"])),
        *_audit(atomic_io.read_json(paths["alignment"] / "audit.json")),
        *_costs(summary),
        *_commands(summary, workdir),
    ]
    (folder / "report.md").write_text(html.markdown(blocks))
    (folder / "report.html").write_text(html.html(blocks, folder))


def closing_lines(summary: dict[str, Any], workdir: Path) -> str:
    """Return what the program prints last."""
    before, after = summary["success"]["before"], summary["success"]["after"]
    paths = summary["paths"]
    return "\n".join(
        [
            "",
            f"success on {before['count']:,} held-out prompts: {_percent(before)} before, {_percent(after)} after"
            f" alignment: {_change(summary)}",
            f"report   {workdir / paths['report'] / 'report.html'}",
            f"model    {workdir / paths['export']}  (Hugging Face directory)",
            "next:",
            f"  {next_command(workdir, summary)}",
            *(f"  {command}" for command in own_data_commands(workdir, summary)),
            "the last two take this quickstart's samples and model: put your own in their place.",
        ]
    )


def next_command(workdir: Path, summary: dict[str, Any]) -> str:
    """Return the command that aligns the same model with another divergence."""
    other = "jeffreys" if summary["divergence"] != "jeffreys" else "alpha"
    return f"{_fpo()} quickstart --workdir {_word(workdir)} --seed {summary['seed']} --divergence {other}"


def own_data_commands(workdir: Path, summary: dict[str, Any]) -> tuple[str, str]:
    """Return the commands that look at data, write a config and train with it: here on the samples and the model."""
    data, model, out = workdir / "data" / "groups.jsonl", workdir / summary["paths"]["export"], workdir / "own.py"
    return (
        f"{_fpo()} init --data {_word(data)} --model {_word(model)} --out {_word(out)}",
        f"{_fpo()} train --config {_word(out)} --workdir {_word(workdir / 'own')}",
    )


def _fpo() -> str:
    """Return how this environment's `fpo` is called from this shell: by its name, its path, or as a module."""
    beside = Path(sys.executable).with_name("fpo")
    found = shutil.which("fpo")
    if found is not None and Path(found).resolve() == beside.resolve():
        return "fpo"
    if not beside.is_file():
        return f"{_word(Path(sys.executable))} -m fpo_jax.cli"
    return _word(beside)


def _word(path: Path) -> str:
    """Return a path as a word of a shell, below the current folder without that."""
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


def _result(summary: dict[str, Any]) -> list[Block]:
    before, after = summary["success"]["before"], summary["success"]["after"]
    outcomes = [[name, str(before["outcomes"][name]), str(after["outcomes"][name])] for name in before["outcomes"]]
    return [
        Heading(f"Quickstart: aligned with the {summary['divergence']} divergence", 1),
        Text(
            f"**{_percent(before)} → {_percent(after)}** of {before['count']:,} held-out prompts answered correctly:"
            f" {_change(summary)}. The answers are drawn at temperature {summary['temperature']:g}, with the same"
            " prompts, sampler and seed before and after."
        ),
        Plot("success.png", "Success on held-out prompts with 95 % intervals"),
        Table(
            ["held-out prompts", "before", "after"],
            [
                ["correct", *(f"{rates['correct']:,} of {rates['count']:,}" for rates in (before, after))],
                ["success at temperature 1", *(_percent(rates) for rates in (before, after))],
                [
                    "95 % interval (Wilson)",
                    *(f"{100 * r['low']:.1f} to {100 * r['high']:.1f} %" for r in (before, after)),
                ],
                ["success of greedy decoding", *(f"{100 * r['greedy_rate']:.1f} %" for r in (before, after))],
            ],
        ),
        Text(
            "Greedy decoding shows what the model knows, sampling what it does: alignment moves the probability that"
            " pretraining gave to the demonstrator's mistakes onto the correct answer. What became of the mistakes:"
        ),
        Table(["answer", "before", "after"], outcomes),
        *_divergences(summary),
    ]


def _divergences(summary: dict[str, Any]) -> list[Block]:
    """Compare with the other divergences that were aligned in this folder, if any."""
    results = summary["after_by_divergence"]
    if len(results) == 1:
        return []
    rows = [
        [name, _percent(rates), f"{100 * rates['low']:.1f} to {100 * rates['high']:.1f} %"]
        for name, rates in sorted(results.items(), key=lambda item: -item[1]["rate"])
    ]
    return [
        Text("Every divergence aligned in this folder so far, from the same model and samples:"),
        Table(["divergence", "success after", "95 % interval"], rows),
    ]


def _method(summary: dict[str, Any]) -> list[Block]:
    scale = summary["scale"]
    options = ", ".join(f"{key} = {value}" for key, value in summary["loss"].items() if key != "name")
    kinds = ", ".join(task.MISTAKES)
    return [
        Heading("What was done"),
        Text(
            f"The task is to sort {task.SHORTEST} to {task.LONGEST} digits: `73915>` is answered by `13579`. The"
            " checker is exact match: reward 1 for the correct answer, 0 for anything else. The demonstrator errs with"
            f" probability {summary['mistake_rate']:g}, with one mistake of one kind: {kinds}."
        ),
        Table(
            ["stage", "what", "result"],
            [
                [
                    "1. pretraining",
                    f"Llama of {summary['parameters']:,} parameters, maximum likelihood",
                    f"{summary['demonstrations']} demonstrations of each of {scale['demonstrated_prompts']:,} prompts",
                ],
                [
                    "2. sampling",
                    f"{summary['candidates']} completions to each of {scale['aligned_prompts']:,} training prompts",
                    summary["stages"]["sample"]["result"],
                ],
                ["3. alignment", f"{summary['divergence']}: {options}", "reference: the pretrained model"],
                [
                    "4. evaluation",
                    f"{scale['held_out_prompts']:,} held-out prompts; none shares its answer with a training prompt",
                    "one answer each",
                ],
            ],
            right=False,
        ),
    ]


def _training(alignment: list[dict[str, Any]]) -> list[Block]:
    held_out = [line for line in alignment if "eval_loss" in line]
    names = (
        "loss",
        "rewards/margins",
        "rewards/accuracies",
        "group_kl",
        "reference_kl",
        "logps/chosen",
        "logps/rejected",
    )
    rows = [
        [name, *(f"{line[f'eval_{name}']:.4f}" for line in (held_out[0], held_out[-1]))]
        for name in names
        if f"eval_{name}" in held_out[0]
    ]
    return [
        Heading("Training"),
        Plot("alignment.png", "Alignment: training batches (faint: single steps) and held-out groups"),
        Table(["held-out groups", f"step {held_out[0]['step']}", f"step {held_out[-1]['step']}"], rows),
        Plot("pretraining.png", "Pretraining"),
    ]


def _samples(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[Block]:
    rows = [
        [f"`{a['prompt']}`", f"`{task.answer(a['prompt'])}`", *(_judged(row) for row in (a, b))]
        for a, b in zip(before[:SAMPLES_SHOWN], after[:SAMPLES_SHOWN], strict=True)
    ]
    return [
        Heading("Answers side by side"),
        Text(f"The first {len(rows)} held-out prompts, as they come."),
        Table(["prompt", "correct answer", "before", "after"], rows, right=False),
    ]


def _judged(row: dict[str, Any]) -> str:
    completion = f"`{row['completion']}`" if row["completion"] else "(empty)"
    return f"✓ {completion}" if row["outcome"] == task.CORRECT else f"✗ {completion} {row['outcome']}"


def _audit(audit: dict[str, Any]) -> list[Block]:
    return [
        Heading("Audit of the alignment data"),
        Text(
            "A group whose candidates are all right or all wrong has nothing to prefer; its target is uniform, which"
            " holds the model to the reference there."
        ),
        report.audit(audit),
    ]


def _costs(summary: dict[str, Any]) -> list[Block]:
    rows = [
        [name, f"{stage['seconds']:.1f} s", f"{stage['peak_rss_bytes'] / 2**20:,.0f} MiB", stage["result"]]
        for name, stage in summary["stages"].items()
    ]
    total = ["total", f"{summary['seconds']:.1f} s", f"{summary['peak_rss_bytes'] / 2**20:,.0f} MiB", ""]
    compiled = [f"{name}: {line}" for name, stage in summary["stages"].items() for line in stage["compiled"]]
    return [
        Heading("Time, memory, compilations"),
        Text("Seconds include compilation; memory is the largest of the process so far."),
        Table(["stage", "time", "peak memory", "result"], [*rows, total], right=False),
        Code("\n".join(compiled)),
    ]


def _commands(summary: dict[str, Any], workdir: Path) -> list[Block]:
    overrides = [f"--config.{key}={value}" for key, value in summary["overrides"].items()]
    train = [
        f"python train.py --config configs/quickstart.py:{summary['divergence']} --workdir {workdir / 'align-mine'}",
        *overrides,
    ]
    aligned = workdir / summary["paths"]["alignment"]
    return [
        Heading("Go on"),
        Text("Own data: these commands take this quickstart's samples and model; put your own in their place:"),
        Code("\n".join(own_data_commands(workdir, summary))),
        Text("Another divergence on the same samples; everything up to the sampling is kept:"),
        Code(next_command(workdir, summary)),
        Text("The alignment alone, through the trainer, with any field of `fpo config` changed:"),
        Code(" \\\n  ".join(train)),
        Text("Its checkpoint as a Hugging Face directory, in bfloat16:"),
        Code(f"fpo export --workdir {aligned} --out {workdir / 'export-bfloat16'} --dtype bfloat16"),
        Text(
            "A real model on real preferences: any Llama, Mistral or GPT-NeoX directory, for instance stories260K"
            " (260,032 parameters), on HH-RLHF transcripts. The empty settings undo what the recipe says about the hub:"
        ),
        Code(_HH_COMMAND),
    ]


def _change(summary: dict[str, Any]) -> str:
    change = summary["difference"]
    return f"{change['points']:+.1f} points (95 % interval {change['low']:.1f} to {change['high']:.1f})"


def _percent(rates: dict[str, Any]) -> str:
    return f"{100 * rates['rate']:.1f} %"


_HH_COMMAND = """\
python train.py --config configs/pythia_hh_pref.py --workdir runs/hh \\
  --config.model.path=MODEL_DIRECTORY --config.data.train=HH.jsonl.gz --config.data.eval=HH.jsonl.gz \\
  --config.data.train_rows=0:1600 --config.data.eval_rows=1600: \\
  --config.data.subfolder= --config.data.train_split= --config.data.eval_split= \\
  --config.model.compute_dtype=float32 --config.optim.learning_rate=1e-3"""
