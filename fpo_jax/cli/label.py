"""Score completions with a reward model: `fpo label --model RM --data answers.jsonl --out labelled.jsonl`.

Lines with `prompt` and `completions` in, the same with `rewards` out, which is what the trainer reads as format `json`;
with --pairing best_worst, `prompt`, `chosen` and `rejected` out. A score is the reward model's where it was trained to
have one, on rows built as the record that its export carries says; without a record, as transformers reads them. Lines
are written as they are scored: the same command goes on where it was, and does nothing when all is done. Exit codes are
those of fpo generate.
"""

import dataclasses
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fpo_jax import config as configuration
from fpo_jax import hf, models, tokenization
from fpo_jax.cli import args as command_line
from fpo_jax.cli import jsonl_job
from fpo_jax.config import choices
from fpo_jax.data import values
from fpo_jax.distributed import preemption, progress, workdir_lock
from fpo_jax.inference import reward_model
from fpo_jax.io import json_digest, jsonl, terminal

log = logging.getLogger("fpo_jax")

PAIRINGS = ("", "best_worst")
CHUNK = 64  # lines scored between two looks at the signals


@dataclasses.dataclass(frozen=True)
class Options:
    """What to score, with what. Paths and names as on the command line."""

    model: str  # reward model: directory or hub name
    data: Path  # JSON Lines with prompt and completions
    out: Path
    revision: str = ""
    tokenizer: str = ""  # "" = the model's, as for all of the prompt format
    rule: str = ""  # raw, chat, or "" = as the model was trained; chat where it has a template
    chat_template: str = ""
    chat_template_kwargs: str = ""  # JSON: {"enable_thinking": false}
    eos_token: str = ""
    thoughts: str = ""  # refuse, keep or drop the thoughts of completions; "" = as the model was trained, or refuse
    # Tokens of prompt and completion, 0 = as the model was trained, else its window; a longer prompt loses its
    # beginning.
    max_length: int = 0
    pairing: str = ""  # best_worst: one pair of each line
    batch_size: int = 64  # rows of a pass, per device
    compute_dtype: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was scored; of the whole file, whenever it was done."""

    lines: int
    completions: int
    mean_reward: float
    tied: int  # lines whose best and worst score are equal: no preference in them
    duplicates: int  # completions that stand before in their line
    cut: int  # completions whose row did not fit the window
    written: int  # lines of the file: with a pairing, those that have a preference

    @property
    def text(self) -> str:
        """In a few words."""
        described = f"{self.completions} completions to {self.lines} prompts, mean reward {self.mean_reward:.3f}"
        for name in ("tied", "duplicates", "cut"):
            described += f", {getattr(self, name)} {name}" if getattr(self, name) else ""
        return described + ("" if self.written == self.lines else f"; {self.written} pairs")


def run(options: Options) -> Summary:
    """Score what is not scored.

    Raises:
        ValueError: an option, the data or the model cannot be used; the file belongs to another job, or another process
            writes it.
        preemption.Stopped: a signal; what was scored is saved.
    """
    _check(options)
    with workdir_lock.beside(options.out):
        return _run(options)


def _run(options: Options) -> Summary:
    lines = _lines(options.data)
    source = hf.local_dir(options.model, revision=options.revision or None)
    config = hf.read_config(source)
    names = ("rule", "tokenizer", "chat_template", "chat_template_kwargs", "eos_token", "thoughts")
    described = tokenization.Given(**{name: getattr(options, name) for name in names})
    encoder = tokenization.resolve(source, described, end_ids=hf.end_ids(source))
    log.info("prompt format: %s", encoder.format.text)
    for warning in tokenization.warnings(encoder):
        log.warning(warning)
    window = options.max_length or encoder.format.limits.get("max_length") or config.max_positions
    kept = ("pairing", "compute_dtype")
    job = {
        "data": json_digest.of(lines),
        "model": hf.weights_fingerprint(source),
        "prompt_format": encoder.format.as_dict(),
        "max_length": window,
    }
    job |= {name: getattr(options, name) for name in kept}
    scored = options.out.with_name(f"{options.out.name}.scored") if options.pairing else options.out
    with jsonl_job.JobFile(scored, job, count=len(lines)) as file, preemption.StopRequest() as stop:
        if file.repaired:
            log.info(file.repaired)
        left = [] if file.finished else [line for line in lines if line["index"] not in file.done]
        if left:
            _score(options, source, encoder, window, left, len(lines), file, stop)
        if not file.finished:
            file.finish()
    found = jsonl.read(scored)
    summary = _summary(found)
    if not options.pairing:
        return summary
    pairs = [pair for line in found if (pair := best_worst(line)) is not None]
    workdir_lock.verify()
    jsonl.write(options.out, pairs)
    return dataclasses.replace(summary, written=len(pairs))


def best_worst(line: dict[str, Any]) -> dict[str, Any] | None:
    """Return the pair of the best and the worst completion of a line; None where they have one score or one text.

    >>> best_worst({"index": 0, "prompt": "p", "completions": ["a", "b", "c"], "rewards": [0.1, 0.7, 0.7]})
    {'index': 0, 'prompt': 'p', 'chosen': 'b', 'rejected': 'a', 'rewards': [0.7, 0.1]}
    """
    texts, rewards = line["completions"], line["rewards"]
    best, worst = (rewards.index(pick(rewards)) for pick in (max, min))
    if rewards[best] == rewards[worst] or texts[best] == texts[worst]:
        return None
    head = {key: line[key] for key in ("index", "source", "prompt", "tools") if key in line}
    return {**head, "chosen": texts[best], "rejected": texts[worst], "rewards": [rewards[best], rewards[worst]]}


def _score(
    options: Options, source: Path, encoder, window: int, left, total: int, file: jsonl_job.JobFile, stop
) -> None:
    rewarder = reward_model.Rewarder(
        source, max_length=window, compute_dtype=options.compute_dtype, batch_per_device=options.batch_size
    )
    bar = progress.bar(total=len(left), unit="prompt", kept=True)
    with bar:
        for start in range(0, len(left), CHUNK):
            chunk = left[start : start + CHUNK]
            prompts, completions = [line["prompt"] for line in chunk], [line["completions"] for line in chunk]
            fits = {"pad_id": rewarder.config.pad_id, "window": window}
            try:
                tools = [line.get("tools") for line in chunk]
                groups = reward_model.rows(encoder, prompts, completions, tools=tools, **fits)
            except ValueError:
                for line in chunk:  # to name the one that is at fault
                    with configuration.about(f"{options.data}:{line['index'] + 1}"):
                        one = [line["prompt"]], [line["completions"]]
                        reward_model.rows(encoder, *one, tools=[line.get("tools")], **fits)
                raise
            scores = iter(rewarder([row.ids for group in groups for row in group]).tolist())
            for line, group in zip(chunk, groups, strict=True):
                cut = sum(row.prompt_cut > 0 or row.completion_cut > 0 for row in group)
                rewards = [next(scores) for _ in group]
                file.append({**line, "rewards": rewards, **({"cut": cut} if cut else {})})
            bar.update(len(chunk))
            if (asked := stop.agreed()) and len(file.done) < total:
                raise preemption.Stopped(f"{asked}: {len(file.done)} of {total} lines are scored and saved.")


def _check(options: Options) -> None:
    problems = []
    if options.pairing not in PAIRINGS:
        problems.append(f"--pairing={options.pairing!r} is not one of best_worst or nothing")
    problems += choices.problems_of("--rule", options.rule, ("", "raw", "chat"))
    problems += choices.problems_of("--thoughts", options.thoughts, ("", *tokenization.prompt_format.THOUGHTS))
    if options.max_length and options.max_length < 2:
        problems.append(f"--max-length={options.max_length} must be at least 2, or 0 for the model's window")
    if options.batch_size < 1:
        problems.append(f"--batch-size={options.batch_size} must be at least 1")
    problems += choices.problems_of("--compute-dtype", options.compute_dtype, models.COMPUTE_DTYPES)
    if problems:
        raise ValueError("; ".join(problems) + ".")


def _lines(path: Path) -> list[dict[str, Any]]:
    """Read prompts with their completions; other keys of a line are dropped but for its number, source and tools."""
    found = []
    for number, line in enumerate(jsonl.read(path)):
        texts = line.get("completions")
        if "prompt" not in line or not isinstance(texts, list) or not texts:
            raise ValueError(f"{path}:{number + 1}: a line must have a prompt and a list of completions.")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{path}:{number + 1}: completions must be texts.")
        head = {key: line[key] for key in ("source", "tools") if key in line}
        if "tools" in head:
            with configuration.about(f"{path}:{number + 1}"):
                head["tools"] = values.tools(head["tools"])
        found.append({"index": number, **head, "prompt": line["prompt"], "completions": texts})
    if not found:
        raise ValueError(f"{path} has no line.")
    return found


def _summary(lines: list[dict[str, Any]]) -> Summary:
    rewards = [reward for line in lines for reward in line["rewards"]]
    return Summary(
        lines=len(lines),
        completions=len(rewards),
        mean_reward=math.fsum(rewards) / len(rewards),
        tied=sum(len(line["rewards"]) > 1 and max(line["rewards"]) == min(line["rewards"]) for line in lines),
        duplicates=sum(len(line["completions"]) - len(set(line["completions"])) for line in lines),
        cut=sum(line.get("cut", 0) for line in lines),
        written=len(lines),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as the command line says; return the exit status."""
    return command_line.run(Options, _work, arguments, program="fpo label", about=__doc__)


def _work(options: Options) -> int:
    terminal.say(f"{options.out}: {run(options).text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
