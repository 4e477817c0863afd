"""Run a recipe from its base model to a reward report: `fpo pipeline --config configs/pipelines/hh_rw.py`.

    base ─► sft ─┬─► sample ─► label ─► align (each loss and seed) ─► generate ─► score, KL ─► report
    base ─► reward ───────────► label ─────────────────────────────────────────► score

A stage's folder is named by a digest of everything that goes into it, settings and the content of files, so that two
runs that differ in anything share what does not depend on it and never overwrite each other. Finished stages are kept:
the same command does nothing; interrupted ones go on. Settings are given as --config.key=value; the recipe's file in
configs/pipelines/ says which there are. Exit codes are those of train.py.
"""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags

from fpo_jax import checkpoint, hf, recipes, tokenization
from fpo_jax import config as configuration
from fpo_jax.cli import generate, label
from fpo_jax.config import overrides
from fpo_jax.distributed import preemption, workdir_lock
from fpo_jax.eval.pipeline import divergence_study, pipeline_inputs, pipeline_report, sections
from fpo_jax.eval.pipeline.stages import StageError, Stages
from fpo_jax.eval.stats import kl
from fpo_jax.io import jsonl, terminal
from fpo_jax.trainer import export, trainer

_EACH = ("completions", "finish", "tokens", "ids")  # of a line of answers: one entry for each of them


class Pipeline:
    """One recipe in one folder; `run` does what is not done and returns the report."""

    def __init__(self, config: Any, workdir: Path):
        """Check every stage's settings.

        Raises:
            ValueError: with everything that is wrong, before anything is read or written.
        """
        self.config, self.workdir = config, workdir
        configuration.raise_problems(self._problems())
        runs = len(config.losses) * len(config.seeds)
        sampled = 2 if "sample" in config else 0
        self.total = ("sft" in config) + ("reward" in config) + sampled + 2 + (3 + config.measure_kl) * runs + 1

    def run(self) -> dict[str, Any]:
        """Run the stages in order.

        Raises:
            ValueError: a model or data that one of them could not use, before the first of them; or another process
                runs them.
        """
        with workdir_lock.hold(self.workdir):
            self.stages = Stages(self.workdir, total=self.total, program="pipeline")
            return self._run()

    def _run(self) -> dict[str, Any]:
        c = self.config
        stages = {name: self._section(name, model=c.base) for name in ("sft", "reward") if name in c}
        stages["align"] = self._alignment(c.losses[0], c.seeds[0], model=c.base, sources=dict(c.data.items()))
        pipeline_inputs.check(c, stages)
        start = self._trained("sft", c.base) if "sft" in c else sections.place(c.base)
        judge = self._trained("reward", c.base) if "reward" in c else sections.place(c.reward_model)
        sources = dict(c.data.items())
        if "sample" in c:
            sources |= self._labelled(start, judge)
        scores = {"start": self._scored("start", self._answered("start", start), judge)}
        divergences: dict[str, Path] = {}
        for loss in c.losses:
            for seed in c.seeds:
                name = f"{loss}-seed{seed}"
                config = self._alignment(loss, seed, model=str(start), sources=sources)
                aligned = self._train(f"align-{name}", f"Align: {name}", config)
                answers = self._answered(name, aligned)
                scores[name] = self._scored(name, answers, judge)
                if c.measure_kl:
                    divergences[name] = self._diverged(name, aligned, start, answers)
        report: dict[str, Any] = {}
        self.stages.always(
            "report",
            "Write the report",
            lambda: pipeline_report.write(self.workdir, scores, divergences, report),
        )
        terminal.say(pipeline_report.table(report))
        return report

    def _problems(self) -> list[str]:
        """List what is wrong with the settings of all stages."""
        c, found = self.config, []
        if not c.reward_model and "reward" not in c:
            found.append("reward_model is empty and there is no stage `reward`; give a sequence classifier.")
        if c.reward_model and "reward" in c:
            found.append(f"reward_model={c.reward_model!r} and the stage `reward` exclude each other; set it to ''.")
        if c.pairing not in ("", "best_worst") or (c.pairing and "sample" not in c):
            found.append(f"pairing={c.pairing!r} must be '' or best_worst, and needs a section `sample`.")
        drawn = c.generate
        fit = drawn.temperature > 0 and drawn.top_k == 0 and drawn.top_p == 1 and len(drawn.seeds) == 1
        if c.measure_kl and not fit:
            described = ", ".join(f"{name}={drawn[name]}" for name in ("temperature", "top_k", "top_p", "seeds"))
            found.append(
                f"measure_kl needs answers of one seed, drawn with a temperature alone, and generate has {described};"
                " change them, or unset measure_kl."
            )
        for name, values in (("losses", c.losses), ("seeds", c.seeds)):
            if not values or len(set(values)) != len(values):
                found.append(f"{name}={tuple(values)} must hold at least one entry and none twice.")
        for name in ("sft", "reward"):
            if name in c:
                found += [f"{name}: {problem}" for problem in sections.problems_of(self._section(name, model="model"))]
        for loss in c.losses:
            try:
                config = self._alignment(loss, 0, model="model", sources=dict(c.data.items()))
            except ValueError as error:  # a name that does not exist, or options that the recipe's loss does not take
                found.append(f"losses: {error}")
            else:
                found += [f"align with {loss}: {problem}" for problem in sections.problems_of(config)]
        found += pipeline_inputs.problems(c)
        return found

    def _section(self, name: str, *, model: str) -> Any:
        """Return a whole training configuration: the section with what all stages share."""
        c = self.config
        own = c.demonstrations if name == "sft" else c.judgements
        sources = dict(c.data.items()) | (own.to_dict() if any(own.values()) else {})
        return sections.whole(c[name], model=model, data=sources, tokenizer=c.tokenizer)

    def _alignment(self, loss: str, seed: int, *, model: str, sources: dict[str, Any]) -> Any:
        """Return the configuration of one alignment; a loss that is not the recipe's has its own options."""
        config = sections.whole(self.config.align, model=model, data=sources, tokenizer=self.config.tokenizer)
        config.seed = seed
        recipes.use_loss(config, loss)
        return config

    def _trained(self, name: str, model: str) -> Path:
        titles = {"sft": "Fine-tune on demonstrations", "reward": "Train the reward model"}
        return self._train(name, titles[name], self._section(name, model=model))

    def _train(self, name: str, title: str, config: Any) -> Path:
        """Run one training and export its model, the best where it keeps that; return the exported directory."""
        export_step = checkpoint.BEST if config.train.keep_best else None
        inputs: dict[str, Any] = {**configuration.flatten(json.loads(config.to_json())), "exported": export_step}
        for key in ("model.path", "data.train", "data.eval"):
            inputs[key] = sections.place(inputs[key])

        def work(folder: Path) -> str:
            trainer.run(config, folder / "run")
            shutil.rmtree(folder / "model", ignore_errors=True)
            export.export(folder / "run", folder / "model", step=export_step, dtype=None)
            return pipeline_report.training(folder / "run")

        return self._stage(name, title, work, inputs=inputs, outputs=["model", "run/metrics.jsonl"]) / "model"

    def _labelled(self, model: Path | str, judge: Path | str) -> dict[str, Any]:
        """Sample, score and pair; return where the alignment finds its data."""
        c = self.config
        splits = [split for split in ("train", "eval") if c.data[split]]
        samples = self._sampled("sample", "Sample completions to align on", model, c.sample, splits)
        inputs = {"judge": judge, "samples": samples, "pairing": c.pairing, **self._row_settings()}

        def work(folder: Path) -> str:
            described = []
            for split in splits:
                scored = self._label(judge, samples / f"{split}.jsonl", folder / f"{split}.jsonl", pairing=c.pairing)
                described.append(f"{split}: {scored}")
            return "; ".join(described)

        folder = self._stage("label", "Score them with the reward model", work, inputs=inputs, outputs=_files(splits))
        empty = dict.fromkeys(("train_split", "train_rows", "eval_split", "eval_rows", "subfolder", "revision"), "")
        paths = {split: str(folder / f"{split}.jsonl") for split in splits}
        return {**empty, **paths, "format": "json", "hh_split": "last_turn"}

    def _answered(self, name: str, model: Path | str) -> Path:
        """Answer the test prompts; return the file."""
        split = pipeline_inputs.answered(self.config)
        section = self.config.generate
        if self.config.measure_kl:
            section = ml_collections.ConfigDict({**section, "keep_ids": 1})
        return self._sampled(f"generate-{name}", f"Answer with {name}", model, section, [split]) / f"{split}.jsonl"

    def _diverged(self, name: str, model: Path, start: Path | str, answers: Path) -> Path:
        """Measure KL(model || start) on the model's answers; return the file."""

        def work(folder: Path) -> str:
            options = kl.Options(policy=str(model), reference=str(start), data=answers, out=folder / "kl.jsonl")
            return kl.run(options).text

        inputs = {"model": model, "start": start, "answers": answers.parent}  # with the record of how they were drawn
        return self._stage(f"kl-{name}", f"KL of {name}", work, inputs=inputs, outputs=["kl.jsonl"]) / "kl.jsonl"

    def _scored(self, name: str, answers: Path, judge: Path | str) -> Path:
        """Score the answers to the test prompts; return the scored file."""

        def work(folder: Path) -> str:
            return self._label(judge, answers, folder / "scores.jsonl", pairing="")

        inputs = {"judge": judge, "answers": answers.parent, **self._row_settings()}
        return (
            self._stage(f"score-{name}", f"Score {name}", work, inputs=inputs, outputs=["scores.jsonl"])
            / "scores.jsonl"
        )

    def _sampled(self, name: str, title: str, model: Path | str, section: Any, splits: Sequence[str]) -> Path:
        c = self.config
        inputs = {
            "model": model,
            **configuration.flatten(section.to_dict(), "sampling."),
            **configuration.flatten(c.data.to_dict(), "data."),
            **configuration.flatten(c.tokenizer.to_dict(), "tokenizer."),
            **{f"data.{split}": sections.place(c.data[split]) for split in splits},
        }

        def work(folder: Path) -> str:
            return "; ".join(self._answer(model, section, split, folder / f"{split}.jsonl") for split in splits)

        return self._stage(name, title, work, inputs=inputs, outputs=_files(splits))

    def _answer(self, model: Path | str, section: Any, split: str, out: Path) -> str:
        """Draw the completions to one split's prompts; of several seeds one after the other, then in one line each."""
        c, parts, described = self.config, [], []
        for seed in section.seeds:
            parts.append(out if len(section.seeds) == 1 else out.with_suffix(f".seed{seed}.jsonl"))
            options = generate.Options(
                out=parts[-1],
                model=str(model),
                data=c.data[split],
                format=c.data.format,
                split=c.data[f"{split}_split"],
                rows=c.data[f"{split}_rows"],
                subfolder=c.data.subfolder,
                data_revision=c.data.revision,
                hh_split=c.data.hh_split,
                **pipeline_inputs.sampling_format(c),
                max_length=c.data.max_length,
                seed=seed,
                compute_dtype=c.align.model.compute_dtype,
                **{key: value for key, value in section.items() if key != "seeds"},
            )
            described.append(generate.run(options).text)
        if len(parts) > 1:
            described.append(merge(parts, out))
        return "; ".join(described)

    def _label(self, judge: Path | str, answers: Path, out: Path, *, pairing: str) -> str:
        c = self.config
        options = label.Options(
            model=str(judge),
            data=answers,
            out=out,
            thoughts=tokenization.judge_thoughts(hf.local_dir(judge), c.data.thoughts),
            max_length=c.data.max_length,
            pairing=pairing,
            compute_dtype=c.align.model.compute_dtype,
        )
        return label.run(options).text

    def _row_settings(self) -> dict[str, Any]:
        """Return what rows for the reward model, which is read in its own way, depend on besides model and texts."""
        c = self.config
        return {key: c.data[key] for key in ("max_length", "thoughts")} | {"compute_dtype": c.align.model.compute_dtype}

    def _stage(
        self, name: str, title: str, work: Callable[[Path], str], *, inputs: dict[str, Any], outputs: Sequence[str]
    ) -> Path:
        """Run one stage in the folder that its inputs name."""
        folder = self.workdir / f"{name}-{self.stages.key(inputs)}"
        self.stages.run(
            folder.name, title, lambda: work(folder), inputs=inputs, outputs=[folder / output for output in outputs]
        )
        return folder


def merge(parts: Sequence[Path], out: Path) -> str:
    """Put the completions of several seeds to each prompt in one line; prompts with equal ones alone are dropped.

    Raises:
        ValueError: the parts are not of the same prompts in the same order.
    """
    kept, alike = [], 0
    for lines in zip(*map(jsonl.read, parts), strict=True):
        if len({json.dumps(line["prompt"]) for line in lines}) > 1:
            raise ValueError(f"{', '.join(part.name for part in parts)} answer different prompts.")
        texts = [text for line in lines for text in line["completions"]]
        alike += len(set(texts)) == 1
        if len(set(texts)) > 1:
            each = {key: [one for line in lines for one in line[key]] for key in _EACH if key in lines[0]}
            kept.append({**lines[0], **each})
    jsonl.write(out, kept)
    return f"{len(kept)} prompts of {len(parts)} seeds, {alike} dropped whose answers are all the same"


def _files(splits: Sequence[str]) -> list[str]:
    return [f"{split}.jsonl" for split in splits]


def program(config: Any) -> type:
    """Return what runs such a configuration: a study of objectives, or a recipe."""
    if "objectives" not in config:
        return Pipeline
    return divergence_study.Study


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as the command line says; return the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    values = overrides.flag_values(arguments)
    flags.DEFINE_string("workdir", "", "Folder for everything; goes on with what it holds.", flag_values=values)
    terminal.log_to_stderr()
    keys = "the recipe's file in configs/pipelines/, with configs/pipelines/common.py,"
    try:
        config = overrides.parse(values, arguments, keys=keys, about=__doc__, pipeline=True)
        if not values.workdir:
            raise ValueError("--workdir is missing; give the folder of the pipeline, new or to be gone on with.")
        with preemption.StopRequest(begun=False):  # where no stage has one of its own
            program(config)(config, Path(values.workdir)).run()
        return 0
    except (ValueError, OSError, StageError, trainer.NonFinite, preemption.Stopped) as error:
        terminal.refuse("pipeline", error)
        return {trainer.NonFinite: 1, preemption.Stopped: 75}.get(type(error), 2)


if __name__ == "__main__":
    sys.exit(main())
