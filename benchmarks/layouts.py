"""Shared prompts and packed groups against the padded layout on real lengths: measured time and what tokens predict.

    python -m benchmarks.layouts --data ../shared/data --json runs/layouts.json

The layouts take turns, update by update, on the same groups, in one process, with a random Llama. The prediction is the
ratio of operations that each layout's rows take, padding included (`perf.flops`); the measurement that of medians of
seconds. Losses are asserted equal first. A second table has the share of padding in the updates of the real recipes,
whose models weigh the head otherwise, over one epoch of the same sets: no weight of theirs is needed for it.

    python -m benchmarks.layouts --device gpu --sets pref_chat --layers 12 --json runs/layouts_gpu.json

On a GPU: a Mistral shape in bfloat16 (`random_model.mistral`) and the lengths of the recipes. A process for each
layout, one after the other, as three states do not fit; with the model FLOP/s utilisation on valid tokens of
`fpo_jax.perf.profiler` (of shared rows a prompt once) and the most that the device held. The second table is left out.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import plans, random_model, train_step_gpu, train_step_sides
from benchmarks.updates import Updates
from fpo_jax import config as configuration
from fpo_jax import data, hf
from fpo_jax.io import atomic_io
from fpo_jax.perf import hardware, profiler
from fpo_jax.trainer import run_inputs, run_schedule
from tests import tiny

LAYOUTS = ("padded", "packed", "shared")
GPU_LOSS_RTOL = 2e-2  # of losses without a reference, sums over whole completions in bfloat16
LOSS_RTOL = 1e-3  # after some updates of AdamW, which enlarges rounding where a second moment is near 0
SETS = {
    "pref_chat": {
        "format": "chat_pairs", "train": "pref_chat/ultrafeedback_shaped.jsonl.gz", "rule": "chat",
        "max_length": 1024, "max_prompt_length": 512, "tokenizer": "tokenizers/phi-3-mini", "vocab": 32_064,
        "eos": "", "groups": 8, "recipe": {"model": "Llama-3-8B", "max_length": 2048, "max_prompt_length": 1800},
    },
    "hh_rlhf": {
        "format": "hh", "train": "hh_rlhf/harmless-base.1800.jsonl.gz", "rule": "raw",
        "max_length": 512, "max_completion_length": 256, "tokenizer": "tokenizers/gpt_neox_20B_tokenizer.json",
        "vocab": 50_304, "eos": "<|endoftext|>", "groups": 16, "recipe": {"model": "Pythia-2.8B"},
    },
}  # fmt: skip


def configured(of: dict, folder: Path, model: Path, *, layout: str, updates: int) -> configuration.Config:
    """Return the configuration of a run on one of the SETS."""
    config = configuration.default()
    config.update(
        {
            "model": {
                "path": str(model),
                "compute_dtype": of.get("dtype", "float32"),
                "remat": of.get("remat", "none"),
            },
            "tokenizer": {"path": str(folder / of["tokenizer"]), "eos_token": of["eos"]},
            "loss": {"name": "dpo"},
            "optim": {"learning_rate": of.get("rate", 1e-5), "schedule": "constant"},
            "train": {
                "batch_size": of["groups"],
                "micro_batch_per_device": of.get("micro", 1),
                "max_steps": updates,
            },
        }
    )
    for key in ("format", "rule", "max_length", "max_prompt_length", "max_completion_length"):
        if key in of:
            config.data[key] = of[key]
    config.data.train, config.data.layout = str(folder / of["train"]), layout
    train_step_sides.set_fields(config, of.get("fields", ()))
    return config


def padding(run: Updates, number: int) -> float:
    """Return the share of a step's positions that hold no token of a sequence."""
    return float(1 - data.row_sizes(run.plan.schedule, number).texts.sum() / run.work(number).tokens)


def sides(name: str, folder: Path, settings: Mapping[Any, dict], *, updates: int) -> dict[Any, Updates]:
    """Return a run of one of the SETS for each of some settings, all with the same small model and inputs.

    Args:
        name: of the set.
        folder: of the SETS' files.
        settings: of each run, the layout and what replaces the set's entries.
        updates: steps.
    """
    of, inputs, runs = SETS[name], None, {}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        tiny.write_model(
            model, vocab_size=of["vocab"], width=512, layers=2, heads=8, kv_heads=8, head_dim=64, ffn=1376,
            max_positions=2048, initializer_range=0.02,
        )  # fmt: skip
        for key, changes in settings.items():
            config = configured(of | changes, folder, model, layout=changes["layout"], updates=updates)
            inputs = inputs or run_inputs.Inputs(
                run_inputs.check(config),
                model,
                hf.read_config(model),
                *run_inputs.read_data(config, run_inputs.read_encoder(config, model), hf.read_config(model)),
            )
            runs[key] = Updates(config, inputs, model)
    return runs


def in_turns(name: str, runs: Mapping[Any, Updates], *, updates: int) -> dict[Any, list[float]]:
    """Return the seconds of every step of each run; they take turns, and each turn is printed as it ends."""
    seconds: dict[Any, list[float]] = {key: [] for key in runs}
    for number in range(updates):
        for key, run in runs.items():
            seconds[key].append(timed(run, number))
        print(f"{name} step {number + 1}: " + ", ".join(f"{times[-1]:.2f}" for times in seconds.values()), flush=True)
    return seconds


def compare(name: str, folder: Path, *, updates: int) -> list[dict]:
    """Return a row for each layout."""
    runs = sides(name, folder, {layout: {"layout": layout} for layout in LAYOUTS}, updates=updates)
    seconds = in_turns(name, runs, updates=updates)
    rows = []
    for layout, run in runs.items():
        np.testing.assert_allclose(run.losses, runs["padded"].losses, rtol=LOSS_RTOL)
        rows.append(described(name, layout, run, seconds[layout]))
    return compared(rows)


def timed(run: Updates, number: int) -> float:
    """Return the seconds of an update."""
    started = time.perf_counter()
    run.update(number)
    run.read()
    run.wait()
    return time.perf_counter() - started


def described(name: str, layout: str, run: Updates, seconds: list[float]) -> dict:
    """Return the row of a layout whose updates are over."""
    later = range(1, len(seconds))  # the first one compiles
    shapes = ", ".join(f"T={length} R={scored}" for length, scored in run.plan.shapes)
    return {
        "set": name, "layout": layout, "shapes": shapes, "seconds": statistics.median(seconds[1:]),
        "operations": statistics.mean(map(run.operations, later)),
        "tokens": statistics.mean(run.work(number).tokens for number in later),
        "padding": statistics.mean(padding(run, number) for number in later),
    }  # fmt: skip


def compared(rows: list[dict]) -> list[dict]:
    """Add to rows how many times as fast as the first one they are, predicted and measured."""
    for row in rows:
        row["predicted"], row["measured"] = (rows[0][key] / row[key] for key in ("operations", "seconds"))
    return rows


def alone(name: str, of: dict, folder: Path, model: Path, layout: str, updates: int) -> dict:
    """Return the row of one layout, measured in a process of its own."""
    config = configured(of, folder, model, layout=layout, updates=updates)
    described_model = hf.read_config(model)
    datasets = run_inputs.read_data(config, run_inputs.read_encoder(config, model), described_model)
    run = Updates(config, run_inputs.Inputs(run_inputs.check(config), model, described_model, *datasets), model)
    seconds = [timed(run, number) for number in range(updates)]
    device = jax.devices()[0]
    holds = hardware.capacity(device)
    meter = profiler.Meter(described_model, devices=1, peak=None if holds is None else holds.flops)
    rates = [
        meter.step(data.row_sizes(run.plan.schedule, number), seconds=taken) for number, taken in enumerate(seconds)
    ]
    row = described(name, layout, run, seconds)
    row |= {key: statistics.median(rate[key] for rate in rates[1:]) for key in rates[0]}
    row |= {"device": device.device_kind, "losses": run.losses, "all_seconds": seconds}
    return row | {"peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use", 0)}


def on_gpu(options: argparse.Namespace) -> list[dict]:
    """Return the rows of the sets on a GPU; a layout that fails is left out and said to be."""
    rows = []
    fresh = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.sets:
            known = SETS[name] | {key: value for key, value in SETS[name]["recipe"].items() if key != "model"}
            of = known | {key: getattr(options, key) for key in ("groups", "micro", "remat", "fields")}
            of |= {"dtype": "bfloat16", "rate": 1e-6}
            model = Path(scratch) / name
            shape = {"vocab": of["vocab"], "width": 64 if options.tiny else 4096}
            random_model.write(model, random_model.mistral(options.layers, **shape))
            found = []
            for layout in options.layouts:
                with concurrent.futures.ProcessPoolExecutor(1, mp_context=fresh) as process:
                    try:
                        task = process.submit(alone, name, of, options.data, model, layout, options.updates)
                        found.append(task.result())
                    except Exception as error:  # the other layouts may run
                        print(f"{name} {layout}: {error}", flush=True)
                        continue
                print(found[-1], flush=True)
                if options.json:
                    atomic_io.write_json(options.json, {"updates": rows + found})
            rows += compared(found)
    return rows


def check_losses(rows: list[dict]) -> None:
    """Refuse to compare times of different work."""
    for row in rows:
        first = next(one for one in rows if one["set"] == row["set"])
        np.testing.assert_allclose(row["losses"], first["losses"], rtol=GPU_LOSS_RTOL)


BLOCKS = ((64, 1, 1), (128, 1, 1), (128, 1, 4), (128, 2, 4))  # groups an update, rows a device, devices


def paddings(name: str, folder: Path) -> list[dict]:
    """Return the share of padding of shared prompts in rows that a real recipe chooses."""
    of = SETS[name] | SETS[name]["recipe"]
    rows, datasets = [], None
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        small = tiny.write_model(model, vocab_size=of["vocab"], max_positions=2048)  # its vocabulary alone is read
        for groups, micro, devices in BLOCKS:
            config = configured(of | {"groups": groups}, folder, model, layout="shared", updates=10**6)
            config.train.micro_batch_per_device = micro
            datasets = datasets or run_inputs.read_data(config, run_inputs.read_encoder(config, model), small)
            inputs = run_inputs.Inputs(run_inputs.check(config), model, plans.MODELS[of["model"]], *datasets)
            plan = run_schedule.build(config, inputs, devices=devices)
            sizes = [data.row_sizes(plan.schedule, number) for number in range(plan.steps)]
            texts, all_ = sum(one.texts.sum() for one in sizes), sum(one.rows * one.length for one in sizes)
            rows.append(
                {
                    "set": name, "model": of["model"], "groups": groups, "block": micro * devices,
                    "length": sizes[0].length, "padding": float(1 - texts / all_),
                }
            )  # fmt: skip
    return rows


def padding_table(rows: list[dict]) -> str:
    """Rows as Markdown."""
    lines = ["| set | model | groups / step | rows a block | T | padding |", "|---" * 6 + "|"]
    for row in rows:
        cells = [str(row[key]) for key in ("set", "model", "groups", "block", "length")]
        lines.append(f"| {' | '.join(cells)} | {row['padding']:.1%} |")
    return "\n".join(lines)


def table(rows: list[dict]) -> str:
    """Rows as Markdown."""
    lines = [
        "| set | layout | rows | tokens / step | padding | s / step | predicted | measured |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        lines.append(
            f"| {row['set']} | {row['layout']} | {row['shapes']} | {row['tokens']:,.0f} | {row['padding']:.1%}"
            f" | {row['seconds']:.2f} | {row['predicted']:.2f} | {row['measured']:.2f} |"
        )
    return "\n".join(lines)


def gpu_table(rows: list[dict]) -> str:
    """Rows as Markdown."""
    names = "set, layout, rows, positions / step, padding, s / step, tokens of sequences / s, MFU on valid tokens"
    lines = [f"| {names.replace(', ', ' | ')} | peak GiB | predicted | measured |", "|---" * 11 + "|"]
    for row in rows:
        share = f"{row['mfu_valid']:.1%}" if "mfu_valid" in row else "-"
        lines.append(
            f"| {row['set']} | {row['layout']} | {row['shapes']} | {row['tokens']:,.0f} | {row['padding']:.1%}"
            f" | {row['seconds']:.2f} | {row['valid_tokens_per_s']:,.0f} | {share} | {row['peak_bytes'] / 2**30:.1f}"
            f" | {row['predicted']:.2f} | {row['measured']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Compare what the command line says, print one table, write the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the SETS' files")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    gpu = parser.add_argument_group("with --device gpu")
    gpu.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    gpu.add_argument("--layers", type=int, default=12)
    gpu.add_argument("--groups", type=int, default=32, help="of an update")
    gpu.add_argument("--micro", type=int, default=4, help="train.micro_batch_per_device: groups, or rows of groups")
    gpu.add_argument("--remat", default="full", choices=("none", "dots_and_attention", "dots", "full", "offload"))
    gpu.add_argument("--fields", nargs="+", default=[], metavar="KEY=VALUE", help="of the configuration")
    gpu.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # the same on a CPU
    options = parser.parse_args()
    if options.device == "gpu":
        jax.config.update("jax_platforms", "cpu")  # this process leaves the GPU to those of the layouts
        os.environ.update(train_step_gpu.environment("ours", "tiny" if options.tiny else "gpu"))
        rows = on_gpu(options)
        print(gpu_table(rows))
        if options.json:
            atomic_io.write_json(options.json, {"updates": rows})
        check_losses(rows)
        return
    rows = [row for name in options.sets for row in compare(name, options.data, updates=options.updates)]
    padded = [row for name in options.sets for row in paddings(name, options.data)]
    print(table(rows), padding_table(padded), sep="\n\n")
    if options.json:
        atomic_io.write_json(options.json, {"updates": rows, "padding": padded})


if __name__ == "__main__":
    main()
