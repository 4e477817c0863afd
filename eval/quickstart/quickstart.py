"""Align a model from nothing and measure it: `fpo quickstart --workdir runs/quickstart`.

No data and no weights are needed. A task is made whose answers a program can check (quickstart_task.py), a tiny Llama
is pretrained on imperfect demonstrations, its own samples are checked, and it is aligned with an f-divergence to match
the rewards. Success on held-out prompts is counted before and after: same prompts, sampler, temperature and seed.

    data/ start/ ─loop─► sft/ sft_model/ ─sample─► data/*groups.jsonl ─loop─► align-NAME/ ─► export-NAME/ ─► report/

The devices are those that JAX finds: a GPU or TPU where its JAX is installed, else the CPU. Finished stages are kept:
the same command goes on where it was, and another --divergence starts at the alignment.
"""

import argparse
import dataclasses
import functools
import shutil
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fpo_jax import checkpoint, losses
from fpo_jax import config as configuration
from fpo_jax.configs import quickstart as recipe
from fpo_jax.distributed import preemption, workdir_lock
from fpo_jax.eval.pipeline.stages import StageError, Stages
from fpo_jax.eval.quickstart import quickstart_configs, quickstart_model, quickstart_report, quickstart_summary
from fpo_jax.eval.quickstart import quickstart_task as task
from fpo_jax.eval.quickstart.quickstart_configs import Scale
from fpo_jax.eval.report import report
from fpo_jax.inference import sampler
from fpo_jax.io import jsonl, terminal
from fpo_jax.models import params
from fpo_jax.perf import hardware
from fpo_jax.trainer import export, trainer

DEMONSTRATIONS = 2  # per prompt, of one demonstrator
CANDIDATES = 4  # K, completions per prompt to align on
AFTER = "answers-after-"  # file name of the answers, before the divergence's
TEMPERATURE = 1.0  # of the samples: the model's own distribution


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run, and turn each outcome into an exit code as train.py does."""
    parser = argparse.ArgumentParser(
        prog="fpo quickstart",
        description="Make a task, pretrain a tiny Llama on it, align it, and measure success before and after.",
    )
    parser.add_argument("--workdir", type=Path, required=True, help="folder for everything; resumes what it holds")
    parser.add_argument("--seed", type=int, default=0, help="of task, weights, data order and samples (default 0)")
    parser.add_argument("--divergence", default="alpha", help="a row of `fpo losses` (default alpha)")
    options = parser.parse_args(arguments)
    hardware.lend_memory()
    try:
        hardware.require_devices()
        print(terminal.shown(f"on {jax.device_count()} {jax.devices()[0].device_kind} device(s)"))
        run(options.workdir, seed=options.seed, divergence=options.divergence)
    except (ValueError, OSError, StageError, trainer.NonFinite) as error:
        terminal.refuse("quickstart", error)
        return 2
    except preemption.Stopped as error:
        terminal.refuse("quickstart", error)
        return 75
    except KeyboardInterrupt:
        print("\nquickstart: interrupted; the same command goes on from the last finished stage.", file=sys.stderr)
        return 130
    return 0


def run(workdir: Path, *, seed: int, divergence: str, scale: Scale | None = None) -> dict[str, Any]:
    """Do every stage and return the summary that report/summary.json holds.

    Args:
        workdir: folder for everything.
        seed: of the task, the weights, the order of the data and the samples, in [0, 2**31).
        divergence: name of a loss that matches rewards.
        scale: the sizes; None = those of the quickstart.

    Raises:
        ValueError: an unusable seed or divergence, or matplotlib is absent; nothing has been written.
        StageError: a stage failed, or the workdir is of other settings.
    """
    if not 0 <= seed < 2**31:
        raise ValueError(f"--seed={seed} must lie in [0, 2**31).")
    program = _Quickstart(workdir, seed, divergence, scale or Scale())
    losses.resolve(divergence, **configuration.loss_options(program.alignment))
    report.require_matplotlib()
    with workdir_lock.hold(workdir):
        return program.run()


class _Quickstart:
    """The stages; each method does one and returns its result in a few words."""

    def __init__(self, workdir: Path, seed: int, divergence: str, scale: Scale):
        self.workdir, self.seed, self.divergence, self.scale = workdir, seed, divergence, scale
        self.pretraining = quickstart_configs.pretraining(workdir, seed=seed, scale=scale)
        self.alignment = quickstart_configs.alignment(workdir, seed=seed, divergence=divergence, scale=scale)
        self.demonstrations = workdir / "data" / "demonstrations.jsonl"
        self.held_out = workdir / "data" / "held_out.jsonl"
        self.groups = workdir / "data" / "groups.jsonl"
        self.held_out_groups = workdir / "data" / "held_out_groups.jsonl"
        self.start, self.sft, self.sft_model = workdir / "start", workdir / "sft", workdir / "sft_model"
        self.aligned, self.exported = workdir / f"align-{divergence}", workdir / f"export-{divergence}"
        self.before = workdir / "answers-before.jsonl"
        self.after = workdir / f"{AFTER}{divergence}.jsonl"

    def run(self) -> dict[str, Any]:
        """Run the stages in order."""
        name, seed = self.divergence, self.seed
        stages = Stages(self.workdir, total=8, program="quickstart")
        stages.run(
            "task",
            "Make the task, a tokenizer and a random Llama",
            self.make_task,
            inputs={"seed": seed, **dataclasses.asdict(self.scale), "mistake_rate": task.MISTAKE_RATE},
            outputs=[self.demonstrations, self.held_out, self.start],
        )
        stages.run(
            "pretrain",
            "Pretrain it on imperfect demonstrations",
            self.pretrain,
            inputs={
                **quickstart_configs.settings(self.pretraining),
                "model": self.start,
                "demonstrations": self.demonstrations,
            },
            outputs=[self.sft / "metrics.jsonl", self.sft_model],
        )
        stages.run(
            "sample",
            f"Sample {CANDIDATES} completions per prompt and check them",
            self.sample_groups,
            inputs={"seed": seed, "model": self.sft_model, "prompts": self.demonstrations, "held out": self.held_out},
            outputs=[self.groups, self.held_out_groups],
        )
        stages.run(
            f"align-{name}",
            f"Align it with the {name} divergence",
            self.align,
            inputs={
                **quickstart_configs.settings(self.alignment),
                "model": self.sft_model,
                "groups": self.groups,
                "held_out_groups": self.held_out_groups,
            },
            outputs=[self.aligned / "metrics.jsonl", self.aligned / "audit.json"],
        )
        stages.run(
            f"export-{name}",
            "Export a Hugging Face directory and read it back",
            self.export,
            inputs={"metrics": self.aligned / "metrics.jsonl"},
            outputs=[self.exported],
        )
        for stage, when, model_dir, answers in (
            ("before", "before", self.sft_model, self.before),
            (f"after-{name}", "after", self.exported, self.after),
        ):
            stages.run(
                stage,
                f"Answer the held-out prompts {when} alignment",
                lambda model_dir=model_dir, answers=answers: self.answer(model_dir, answers),
                inputs={"seed": seed, "model": model_dir, "prompts": self.held_out},
                outputs=[answers],
            )
        summary: dict[str, Any] = {}
        stages.always("report", "Write the report", lambda: self.report(stages, summary))
        print(quickstart_report.closing_lines(summary, self.workdir))
        return summary

    def make_task(self) -> str:
        """Write the demonstrations, the held-out prompts and the starting model."""
        prompts = task.make_prompts(
            train=self.scale.demonstrated_prompts,
            held_out=self.scale.held_out_prompts,
            random=np.random.default_rng([self.seed, 0]),
        )
        demonstrate = functools.partial(
            task.demonstrate, mistake_rate=task.MISTAKE_RATE, random=np.random.default_rng([self.seed, 1])
        )
        rows = [
            {"prompt": prompt, "completions": [demonstrate(prompt) for _ in range(DEMONSTRATIONS)]}
            for prompt in prompts.train
        ]
        for row in rows:
            row["rewards"] = [0.0] * DEMONSTRATIONS  # nobody checks a demonstration
        jsonl.write(self.demonstrations, rows)
        jsonl.write(self.held_out, [{"prompt": p, "answer": task.answer(p)} for p in prompts.held_out])
        shutil.rmtree(self.start, ignore_errors=True)
        quickstart_model.write_start(self.start, seed=_seed(self.seed, "weights"))
        right = [task.reward(row["prompt"], text) for row in rows for text in row["completions"]]
        size = params.count(quickstart_model.ARCHITECTURE)
        return f"{len(right):,} demonstrations, {1 - np.mean(right):.1%} with a mistake; {size:,} parameters"

    def pretrain(self) -> str:
        """Train on the demonstrations and export the model that everything is measured against."""
        trainer.run(self.pretraining, self.sft)
        _export(self.sft, self.sft_model)
        lines = jsonl.read(self.sft / "metrics.jsonl")
        last = np.mean([line["loss"] for line in lines[-20:]])
        return f"{len(lines)} steps, loss {lines[0]['loss']:.2f} -> {last:.2f}"

    def sample_groups(self) -> str:
        """Write the training and held-out groups: K completions per prompt, rewarded by the checker."""
        model = quickstart_model.load(self.sft_model)
        rates = []
        for source, target, count in (
            (self.demonstrations, self.groups, self.scale.aligned_prompts),
            (self.held_out, self.held_out_groups, self.scale.held_out_groups),
        ):
            prompts = [row["prompt"] for row in jsonl.read(source)[:count]]
            completions = self.respond(model, prompts, purpose=target.stem, num_return=CANDIDATES)
            rows = [
                {"prompt": prompt, "completions": texts, "rewards": [task.reward(prompt, text) for text in texts]}
                for prompt, texts in zip(prompts, completions, strict=True)
            ]
            if all(len(set(row["rewards"])) == 1 for row in rows):
                raise ValueError(
                    f"in each of {len(rows)} groups all {CANDIDATES} completions have the same reward, so there is"
                    " nothing to prefer; the pretrained model is too weak (raise pretraining_steps) or already perfect."
                )
            jsonl.write(target, rows)
            rates.append(np.mean([row["rewards"] for row in rows]))
        return f"{CANDIDATES * self.scale.aligned_prompts:,} completions, {rates[0]:.1%} correct"

    def align(self) -> str:
        """Match the rewards, with the pretrained model as the reference."""
        trainer.run(self.alignment, self.aligned)
        held_out = [line for line in jsonl.read(self.aligned / "metrics.jsonl") if "eval_loss" in line]
        first, last = (line["eval_rewards/accuracies"] for line in (held_out[0], held_out[-1]))
        return f"{held_out[-1]['step']} steps, held-out reward accuracy {first:.2f} -> {last:.2f}"

    def export(self) -> str:
        """Write the Hugging Face directory and check that reading it gives the checkpoint bit for bit."""
        _export(self.aligned, self.exported)
        written = params.flatten(checkpoint.restore_params(self.aligned, None)[0])
        read = params.flatten(quickstart_model.load(self.exported).weights)
        differing = [
            name for name in written if np.asarray(written[name]).tobytes() != np.asarray(read[name]).tobytes()
        ]
        if differing:
            raise ValueError(f"{self.exported} does not hold the checkpoint's values of {', '.join(differing)}.")
        size = sum(path.stat().st_size for path in self.exported.iterdir())
        return f"{size / 1000:.0f} kB, all {len(read)} parameters bit-identical"

    def answer(self, model_dir: Path, target: Path) -> str:
        """Answer every held-out prompt once at TEMPERATURE and once greedily; the noise is the same for both models."""
        prompts = [row["prompt"] for row in jsonl.read(self.held_out)]
        model = quickstart_model.load(model_dir)
        sampled = self.respond(model, prompts, purpose="answers")
        greedy = self.respond(model, prompts, purpose="answers", temperature=0.0)
        rows = [
            {"prompt": prompt, "completion": text, "outcome": task.outcome(prompt, text), "greedy": best}
            for prompt, (text,), (best,) in zip(prompts, sampled, greedy, strict=True)
        ]
        jsonl.write(target, rows)
        return f"{quickstart_summary.success(rows)['rate']:.1%} of {len(rows):,} correct"

    def report(self, stages: Stages, summary: dict[str, Any]) -> str:
        """Fill `summary` from the files that the stages wrote, and write the report."""
        before, after = jsonl.read(self.before), jsonl.read(self.after)
        name = self.divergence
        done = ["task", "pretrain", "sample", f"align-{name}", f"export-{name}", "before", f"after-{name}"]
        records = {stage: stages[stage] for stage in done}
        summary |= {
            "seed": self.seed,
            "divergence": name,
            **quickstart_summary.compare(before, after),
            "after_by_divergence": {
                path.stem.removeprefix(AFTER): quickstart_summary.success(jsonl.read(path))
                for path in sorted(self.workdir.glob(f"{AFTER}*.jsonl"))
            },
            "mistake_rate": task.MISTAKE_RATE,
            "demonstrations": DEMONSTRATIONS,
            "candidates": CANDIDATES,
            "temperature": TEMPERATURE,
            "parameters": params.count(quickstart_model.ARCHITECTURE),
            "scale": dataclasses.asdict(self.scale),
            "loss": {"name": name, **configuration.loss_options(self.alignment)},
            "overrides": quickstart_configs.overrides(recipe.get_config(name), self.alignment),
            "paths": {
                "pretraining": self.sft.name,
                "alignment": self.aligned.name,
                "export": self.exported.name,
                "before": self.before.name,
                "after": self.after.name,
                "report": "report",
            },
            "stages": records,
            "seconds": sum(record["seconds"] for record in records.values()),
            "peak_rss_bytes": max(record["peak_rss_bytes"] for record in records.values()),
        }
        folder = self.workdir / summary["paths"]["report"]
        quickstart_report.write(folder, summary, workdir=self.workdir)
        return str(folder / "report.html")

    def respond(
        self,
        model: quickstart_model.Loaded,
        prompts: list[str],
        *,
        purpose: str,
        num_return: int = 1,
        temperature: float = TEMPERATURE,
    ) -> list[list[str]]:
        """Return texts; one without EOS has as many tokens as may be, more than any answer, and is hence wrong."""
        (eos_id,) = model.config.eos_ids
        completions = sampler.sample(
            model.weights,
            model.tokenizer(prompts)["input_ids"],
            config=model.config,
            decoding=sampler.Decoding(
                recipe.MAX_COMPLETION_LENGTH, temperature=temperature, stop_ids=model.config.eos_ids
            ),
            seed=_seed(self.seed, purpose),
            num_return=num_return,
            batch_size=self.scale.sampling_rows,
            window=recipe.MAX_LENGTH,
        )
        texts = iter(
            model.tokenizer.batch_decode(
                [[t for t in ids if t != eos_id] for returns in completions for ids in returns]
            )
        )
        return [[next(texts) for _ in returns] for returns in completions]


def _export(run_dir: Path, out_dir: Path) -> None:
    """Write the newest checkpoint as a Hugging Face directory, replacing what an interrupted try left."""
    shutil.rmtree(out_dir, ignore_errors=True)
    export.export(run_dir, out_dir, step=None, dtype="float32")


def _seed(seed: int, purpose: str) -> int:
    """Return a seed of its own for each purpose."""
    return zlib.crc32(f"{seed} {purpose}".encode()) >> 1


if __name__ == "__main__":
    sys.exit(main())
