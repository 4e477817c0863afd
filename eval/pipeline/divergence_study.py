"""Run a study of objectives with one tuning budget: `fpo pipeline --config configs/pipelines/divergence_study.py`.

    pairs ─► two reward models ─┐
    prompts ─► sample ─────────►┴ label ─► tune (objective x β x rate) ─► choose ─► measure (objective x seed) ─► report

A stage's folder is named by a digest of its inputs, as in every pipeline: a second start does nothing, a killed one
goes on, and another objective, seed or point of the grid adds its own stages. A trained model is measured and deleted;
what stays of a run is one JSON file. The point that is chosen has the highest mean training reward of own samples to
the validation prompts; no test prompt and no held-out reward has a part in it.
"""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fpo_jax import config as configuration
from fpo_jax import data, hf, losses, recipes, tokenization
from fpo_jax.cli import generate, label
from fpo_jax.distributed import workdir_lock
from fpo_jax.eval.pipeline import pipeline_report, sections, study_prompts, study_report
from fpo_jax.eval.pipeline.stages import Stages
from fpo_jax.eval.stats import kl
from fpo_jax.io import atomic_io, jsonl, terminal
from fpo_jax.trainer import compiled_step, export, metric_logger, trainer

JUDGES = ("training", "held_out")
_SPLITS = study_prompts.SPLITS
_PAIRS = {"format": "json", "train": "pairs.jsonl", "eval": "judged.jsonl"}  # whose place is known later


class Study:
    """One study in one folder; `run` does what is not done and returns all results."""

    def __init__(self, config: Any, workdir: Path):
        """Check every setting.

        Raises:
            ValueError: with everything that is wrong, before anything is read or written.
        """
        self.config, self.workdir = config, workdir
        configuration.raise_problems(self._problems())
        grid = sum(len(list(self._points(objective))) for objective in config.objectives)
        self.total = 1 + 2 + 1 + 1 + 2 + grid + len(config.objectives) * len(config.seeds) + 1

    def run(self) -> dict[str, Any]:
        """Run the stages in order.

        Raises:
            ValueError: a model or data that cannot be used; or another process runs them.
        """
        with workdir_lock.hold(self.workdir):
            compiled_step.keep_compiled(str(self.workdir / "compiled"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
            self.stages = Stages(self.workdir, total=self.total, program="pipeline")
            return self._run()

    def _run(self) -> dict[str, Any]:
        c = self.config
        self.start = sections.place(c.base)
        self.prompts = self._prepared()
        self.judges = [self._judge(name, half) for name, half in zip(JUDGES, "ab", strict=True)]
        self.groups = self._labelled(self._sampled())
        begun = {split: self._measured_start(split) for split in _SPLITS[1:]}
        results: dict[str, Any] = {"settings": _settings(c), "start": begun, "tuned": [], "runs": [], "chosen": {}}
        for objective in c.objectives:
            tuned = [
                self._measured(objective, beta, rate, c.tuning_seed, "validation")
                for beta, rate in self._points(objective)
            ]
            results["tuned"] += tuned
            best = choose(tuned)
            results["chosen"][objective] = {key: best[key] for key in ("beta", "learning_rate")}
            results["runs"] += [
                self._measured(objective, best["beta"], best["learning_rate"], seed, "test") for seed in c.seeds
            ]
        self.stages.always("report", "Write the report", lambda: study_report.write(results, self.workdir / "report"))
        terminal.say(study_report.table(results))
        return results

    def _problems(self) -> list[str]:
        c, found = self.config, []
        for name in ("objectives", "seeds"):
            if not c[name] or len(set(c[name])) != len(c[name]):
                found.append(f"{name}={tuple(c[name])} must hold at least one entry and none twice.")
        for name, values in c.grid.items():
            if not values or len(set(values)) != len(values) or not all(value > 0 for value in values):
                found.append(f"grid.{name}={tuple(values)} must hold at least one entry above 0 and none twice.")
        if len(c.grid.beta) != len(c.grid.beta_without_reference):
            found.append("grid.beta and grid.beta_without_reference differ in length; budgets must be equal.")
        if c.tuning_seed in c.seeds:
            found.append(f"tuning_seed={c.tuning_seed} is one of seeds; a point must not be chosen on what it reports.")
        if c.completions.tokens + c.completions.prompt_tokens >= c.data.max_length:
            found.append(
                f"completions.prompt_tokens={c.completions.prompt_tokens} and completions.tokens="
                f"{c.completions.tokens} leave no room for an end token in data.max_length={c.data.max_length};"
                " raise it."
            )
        if min(c.sizes.validation, c.sizes.test) < 2:
            found.append("sizes.validation and sizes.test must be at least 2: intervals are over prompts.")
        if c.completions.per_prompt != c.align.data.group_size or c.completions.per_prompt < 2:
            found.append(
                f"completions.per_prompt={c.completions.per_prompt} must be align.data.group_size="
                f"{c.align.data.group_size}, and at least 2."
            )
        judge = sections.whole(c.reward, model="model", data=dict(c.data.items()) | _PAIRS, tokenizer=c.tokenizer)
        found += [f"reward: {problem}" for problem in sections.problems_of(judge)]
        for objective in c.objectives:
            try:
                config = self._alignment(objective, *next(self._points(objective)), 0, model="model", folder=Path("."))
            except (ValueError, StopIteration) as error:
                found.append(f"objectives: {error}")
            else:
                found += [f"align with {objective}: {problem}" for problem in sections.problems_of(config)]
        return found

    def _points(self, objective: str) -> Iterator[tuple[float, float]]:
        """Yield the (β, learning rate) of an objective's grid."""
        grid = self.config.grid
        betas = grid.beta if losses.resolve(objective).needs_reference else grid.beta_without_reference
        yield from itertools.product(betas, grid.learning_rate)

    def _alignment(self, objective: str, beta: float, rate: float, seed: int, *, model: str, folder: Path) -> Any:
        """Return the configuration of one run: divergences have the groups with rewards, the others pairs of them."""
        c = self.config
        on_groups = objective in losses.DIVERGENCES
        files = {"format": "json", "train": str(folder / ("groups.jsonl" if on_groups else "pairs.jsonl"))}
        config = sections.whole(c.align, model=model, data=dict(c.data.items()) | files, tokenizer=c.tokenizer)
        recipes.use_loss(config, objective)
        if not on_groups:
            config.data.group_size = 2
        with config.unlocked():
            config.loss.beta = beta
            config.loss.beta_pi = None
        config.optim.learning_rate, config.seed = rate, seed
        if losses.resolve(objective).needs_reference:
            config.reference.cache_dir = str(self.workdir / "reference")
        else:
            config.reference.update(configuration.default().reference)
        config.train.compilation_cache = str(self.workdir / "compiled")
        return config

    def _prepared(self) -> Path:
        c = self.config
        sizes = study_prompts.Sizes(**c.sizes.to_dict())
        longest = {"prompt_tokens": c.completions.prompt_tokens, "completion_tokens": c.completions.tokens}
        inputs = {"base": self.start, **configuration.flatten(c.sources.to_dict(), "sources."), **sizes._asdict()}
        inputs |= longest | {"hh": sections.place(c.sources.hh), "chats": sections.place(c.sources.chats)}
        names = [*_SPLITS, "pairs-a", "pairs-b", "pairs-judged"]

        def work(folder: Path) -> str:
            directory = hf.local_dir(c.base)
            encoder = tokenization.resolve(directory, tokenization.Given(rule="chat"))
            s = c.sources
            records = {
                "hh": data.read(
                    s.hh, format="hh", split=s.hh_split or None, data_dir=s.hh_subfolder or None, on_bad_row="skip"
                ).rows,
                "chat": data.read(s.chats, format="chat_pairs", split=s.chats_split or None, on_bad_row="skip").rows,
            }
            found = study_prompts.split(records, encoder, sizes=sizes, seed=c.completions.seed, **longest)
            for name in names:
                jsonl.write(folder / f"{name}.jsonl", found[name])
            return ", ".join(f"{len(found[name])} {name}" for name in names)

        return self._stage("prompts", "Divide prompts and pairs", work, inputs=inputs, outputs=_files(names))

    def _judge(self, name: str, half: str) -> Path:
        """Train one reward model; the two have other pairs and another seed."""
        c = self.config
        files = {"format": "json", "train": str(self.prompts / f"pairs-{half}.jsonl")}
        files |= {"eval": str(self.prompts / "pairs-judged.jsonl")}
        config = sections.whole(c.reward, model=str(c.base), data=dict(c.data.items()) | files, tokenizer=c.tokenizer)
        config.seed += JUDGES.index(name)
        config.train.compilation_cache = str(self.workdir / "compiled")

        def work(folder: Path) -> str:
            trainer.run(config, folder / "run")
            shutil.rmtree(folder / "model", ignore_errors=True)
            export.export(folder / "run", folder / "model", step=None, dtype="float32")
            atomic_io.write_json(folder / "accuracy.json", _evaluated(folder / "run", "rewards/accuracies"))
            return pipeline_report.training(folder / "run")

        title = f"Train the {name.replace('_', '-')} reward model"
        inputs = self._run_inputs(config)
        return self._stage(f"judge-{name}", title, work, inputs=inputs, outputs=["model", "accuracy.json"]) / "model"

    def _sampled(self) -> Path:
        """Draw K completions of the start to the prompts of training and validation."""
        per_prompt = self.config.completions.per_prompt

        def work(folder: Path) -> str:
            found = [self._answer(self.start, split, folder, per_prompt=per_prompt) for split in _SPLITS[:2]]
            return "; ".join(found)

        inputs = {"model": self.start, "prompts": self.prompts, **self._drawing(per_prompt)}
        title = f"Sample {per_prompt} completions of the start"
        return self._stage("sample", title, work, inputs=inputs, outputs=_files(_SPLITS[:2]))

    def _labelled(self, samples: Path) -> Path:
        """Reward the samples; write groups, the pair of best and worst of each, and the units of all rewards."""

        def work(folder: Path) -> str:
            rows = {split: self._rewarded(samples / f"{split}.jsonl", split, folder) for split in _SPLITS[:2]}
            scales = {
                judge: {
                    unit: _scale([x for row in rows["train"] if _unit_of(row["kind"]) == unit for x in row[judge]])
                    for unit in ("talk", study_prompts.TASK)
                }
                for judge in JUDGES
            }
            atomic_io.write_json(folder / "scales.json", scales)
            kept = {
                split: [
                    _unit(row, scales)
                    for row in found
                    if len(set(row["training"])) > 1 and len(set(row["completions"])) > 1
                ]
                for split, found in rows.items()
            }
            groups = [
                {"prompt": row["prompt"], "completions": row["completions"], "rewards": row["training"]}
                for row in kept["train"]
            ]
            jsonl.write(folder / "groups.jsonl", groups)
            jsonl.write(
                folder / "pairs.jsonl",
                [
                    {"prompt": row["prompt"], **dict(zip(("chosen", "rejected"), row["pair"], strict=True))}
                    for row in kept["train"]
                ],
            )
            held_out = kept["validation"]
            for row, logps in zip(held_out, self._pair_logprobs(Path(self.start), held_out), strict=True):
                row["pair_start_logprobs"] = logps.tolist()
            jsonl.write(folder / "validation.jsonl", held_out)
            solved = np.mean([x for row in rows["train"] if row["kind"] == study_prompts.TASK for x in row["training"]])
            return f"{len(groups)} of {len(rows['train'])} prompts have a preference; {solved:.0%} of tasks solved"

        inputs = {"samples": samples, "prompts": self.prompts, **{f"judge {n}": j for n, j in enumerate(self.judges)}}
        names = ["groups.jsonl", "pairs.jsonl", "validation.jsonl", "scales.json"]
        return self._stage("label", "Label them", work, inputs=inputs, outputs=names)

    def _measured_start(self, split: str) -> dict[str, Any]:
        def work(folder: Path) -> str:
            return self._measure(Path(self.start), split, folder, {"objective": "start"})

        inputs = self._measure_inputs(split) | {"model": self.start}
        folder = self._stage(
            f"start-{split}", f"Measure the start on {split} prompts", work, inputs=inputs, outputs=["result.json"]
        )
        return atomic_io.read_json(folder / "result.json")

    def _measured(self, objective: str, beta: float, rate: float, seed: int, split: str) -> dict[str, Any]:
        """Train one policy and measure it; what it weighs is deleted."""
        config = self._alignment(objective, beta, rate, seed, model=str(self.config.base), folder=self.groups)
        name = f"{objective}-b{beta:g}-r{rate:g}-seed{seed}"
        head = {"objective": objective, "beta": beta, "learning_rate": rate, "seed": seed}

        def work(folder: Path) -> str:
            trainer.run(config, folder / "run")
            if not (folder / "model").exists():
                export.export(folder / "run", folder / "model", step=None, dtype="float32")
            said = self._measure(folder / "model", split, folder, head, beta=beta, run=folder / "run")
            for part in ("run", "model"):
                shutil.rmtree(folder / part)
            return said

        inputs = self._run_inputs(config) | self._measure_inputs(split)
        title = f"{'Tune' if split == 'validation' else 'Measure'} {objective}: β {beta:g}, rate {rate:g}, seed {seed}"
        folder = self._stage(f"{split}-{name}", title, work, inputs=inputs, outputs=["result.json"])
        return atomic_io.read_json(folder / "result.json")

    def _measure(
        self, model: Path, split: str, folder: Path, head: dict[str, Any], *, beta: float = 1.0, run: Path | None = None
    ) -> str:
        """Write result.json: the policy's answers to a split as numbers, its divergence, and held-out pairs."""
        self._answer(model, split, folder, per_prompt=1)
        answers, c = folder / f"{split}.jsonl", self.config
        rows = [
            _unit(row, atomic_io.read_json(self.groups / "scales.json"))
            for row in self._rewarded(answers, split, folder)
        ]
        kl.run(kl.Options(str(model), str(self.start), answers, folder / "kl.jsonl", batch_size=c.batch_size))
        scored = jsonl.read(folder / "kl.jsonl")
        drawn = jsonl.read(answers)
        tokens = [line["tokens"][0] for line in drawn]
        found: dict[str, Any] = {
            "kind": [row["kind"] for row in rows],
            **{judge: [round(row[judge][0], 4) for row in rows] for judge in JUDGES},
            "kl": [round(a["logprobs"][0] - a["reference_logprobs"][0], 4) for a in scored],
            "entropy": [round(-a["logprobs"][0] / n, 4) for a, n in zip(scored, tokens, strict=True)],
            "tokens": tokens,
            "ended": [int(line["finish"][0] == "stop") for line in drawn],
            **{f"distinct_{n}": distinct([line["ids"][0] for line in drawn], n) for n in (1, 2)},
        }
        if split == "test":
            found["pair_margins"] = self._margins(model, head["objective"], beta)
        if run is not None:
            lines = [line for line in metric_logger.read(run / metric_logger.METRICS_FILE) if "loss" in line]
            found["loss"] = [round(lines[place]["loss"], 4) for place in (0, -1)]
            found["largest_grad_norm"] = round(max(line["grad_norm"] for line in lines), 3)
        atomic_io.write_json(folder / "result.json", head | {"split": split} | found)
        return (
            f"reward {np.mean(found['training']):+.3f}, held out {np.mean(found['held_out']):+.3f},"
            f" KL {np.mean(found['kl']):.2f}, entropy {np.mean(found['entropy']):.2f}"
        )

    def _margins(self, model: Path, objective: str, beta: float) -> list[float]:
        """Return the logit of "best beats worst" that the policy implies on each pair of validation samples."""
        rows = jsonl.read(self.groups / "validation.jsonl")
        logps = self._pair_logprobs(model, rows)
        if objective == "start" or losses.resolve(objective).needs_reference:
            found = logps - np.array([row["pair_start_logprobs"] for row in rows])
        else:
            found = logps / np.array([[len(ids) for ids in row["pair_ids"]] for row in rows])
        return [round(float(beta * (one[0] - one[1])), 4) for one in found]

    def _pair_logprobs(self, model: Path, rows: Sequence[dict[str, Any]]) -> np.ndarray:
        """Return the log-probs [P, 2] of the best and the worst sample of each row."""
        lines = [{"prompt_ids": row["prompt_ids"], "ids": row["pair_ids"]} for row in rows]
        options = {"temperature": 1.0, "compute_dtype": self.config.align.model.compute_dtype}
        return kl.completion_logprobs(model, lines, batch_size=self.config.batch_size // 2, **options)

    def _answer(self, model: Path | str, split: str, folder: Path, *, per_prompt: int) -> str:
        c = self.config
        options = generate.Options(
            out=folder / f"{split}.jsonl",
            model=str(model),
            data=str(self.prompts / f"{split}.jsonl"),
            rule="chat",
            max_length=c.data.max_length,
            compute_dtype=c.align.model.compute_dtype,
            batch_size=c.batch_size,
            **self._drawing(per_prompt),
        )
        return generate.run(options).text

    def _drawing(self, per_prompt: int) -> dict[str, Any]:
        """Return how completions are drawn: the noise of a prompt is the same for all policies."""
        c = self.config.completions
        return {"num_return": per_prompt, "max_new_tokens": c.tokens, "seed": c.seed, "temperature": 1.0, "keep_ids": 1}

    def _rewarded(self, answers: Path, split: str, folder: Path) -> list[dict[str, Any]]:
        """Return the answers with the rewards of both judges; a task's are the program's for both."""
        c = self.config
        for name, judge in zip(JUDGES, self.judges, strict=True):
            label.run(
                label.Options(
                    model=str(judge),
                    data=answers,
                    out=folder / f"{split}.{name}.jsonl",
                    max_length=c.data.max_length,
                    compute_dtype=c.align.model.compute_dtype,
                    batch_size=c.batch_size,
                )
            )
        told = jsonl.read(self.prompts / f"{split}.jsonl")
        scored = [jsonl.read(folder / f"{split}.{name}.jsonl") for name in JUDGES]
        drawn = jsonl.read(answers)
        rows = []
        for asked, line, *judged in zip(told, drawn, *scored, strict=True):
            rewards = [one["rewards"] for one in judged]
            if asked["kind"] == study_prompts.TASK:
                rewards = [[study_prompts.reward(asked["task"], text) for text in line["completions"]]] * 2
            rows.append({**line, "kind": asked["kind"], **dict(zip(JUDGES, rewards, strict=True))})
        return rows

    def _run_inputs(self, config: Any) -> dict[str, Any]:
        """Return what a training depends on, without where its caches lie."""
        found: dict[str, Any] = configuration.flatten(json.loads(config.to_json()))
        for key in ("reference.cache_dir", "train.compilation_cache"):
            del found[key]
        return found | {key: sections.place(found[key]) for key in ("model.path", "data.train", "data.eval")}

    def _measure_inputs(self, split: str) -> dict[str, Any]:
        judges = {f"judge {name}": judge for name, judge in zip(JUDGES, self.judges, strict=True)}
        own = {"prompts": self.prompts / f"{split}.jsonl", "scales": self.groups / "scales.json", "split": split}
        own |= {"held-out pairs": self.groups / "validation.jsonl"} if split == "test" else {}
        return {**judges, **own, **self._drawing(1), "measured length": self.config.data.max_length}

    def _stage(
        self, name: str, title: str, work: Callable[[Path], str], *, inputs: dict[str, Any], outputs: Sequence[str]
    ) -> Path:
        """Run one stage in the folder that its inputs name."""
        folder = self.workdir / f"{name}-{self.stages.key(inputs)}"

        def begun() -> str:
            folder.mkdir(parents=True, exist_ok=True)
            return work(folder)

        self.stages.run(folder.name, title, begun, inputs=inputs, outputs=[folder / output for output in outputs])
        return folder


def choose(tuned: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the run with the highest mean training reward; of equal ones the one that moved least.

    >>> choose([{"training": [0.0, 1.0], "kl": [9.0]}, {"training": [0.5, 0.5], "kl": [2.0]}])["kl"]
    [2.0]
    """
    return max(tuned, key=lambda run: (float(np.mean(run["training"])), -float(np.mean(run["kl"]))))


def distinct(completions: Sequence[Sequence[int]], n: int) -> float:
    """Return the share of different n-grams of tokens among all of them (distinct-n, arXiv 1510.03055).

    >>> distinct([[1, 2, 1], [1, 2]], 2)  # (1, 2), (2, 1), (1, 2)
    0.6667
    """
    grams = [tuple(ids[place : place + n]) for ids in completions for place in range(len(ids) - n + 1)]
    return round(len(set(grams)) / max(1, len(grams)), 4)


def _unit_of(kind: str) -> str:
    """Return which rewards share a unit with those of prompts of a kind: all that a model gives, or a program's."""
    return study_prompts.TASK if kind == study_prompts.TASK else "talk"


def _scale(values: Sequence[float]) -> list[float]:
    """Return mean and standard deviation; of equal values 1, so that they become 0."""
    return [float(np.mean(values)), float(np.std(values)) or 1.0] if values else [0.0, 1.0]


def _unit(row: dict[str, Any], scales: dict[str, Any]) -> dict[str, Any]:
    """Return a row with rewards in standard deviations of the start's samples, and its best and worst completion."""
    rewards = {}
    for judge in JUDGES:
        mean, deviation = scales[judge][_unit_of(row["kind"])]
        rewards[judge] = [(reward - mean) / deviation for reward in row[judge]]
    best, worst = (rewards["training"].index(pick(rewards["training"])) for pick in (max, min))
    pair = {
        "pair": [row["completions"][best], row["completions"][worst]],
        "pair_ids": [row["ids"][best], row["ids"][worst]],
    }
    return {**row, **rewards, **pair}


def _evaluated(run: Path, name: str) -> dict[str, float]:
    lines = metric_logger.read(run / metric_logger.METRICS_FILE)
    values = [line[f"eval_{name}"] for line in lines if f"eval_{name}" in line]
    return {"before": values[0], "after": values[-1]} if values else {"before": math.nan, "after": math.nan}


def _settings(c: Any) -> dict[str, Any]:
    kept = ("objectives", "seeds", "tuning_seed", "sizes", "grid", "completions")
    return json.loads(json.dumps({key: json.loads(c.to_json())[key] for key in kept}))


def _files(names: Sequence[str]) -> list[str]:
    return [f"{name}.jsonl" for name in names]
