"""Answers to a benchmark, in the files its own harness reads: `fpo benchmark --benchmark alpaca_eval ...`.

What flows in: the questions (a file or a hub data set in the benchmark's own columns) and a model, as `fpo generate`
takes it. What flows out, under --out:

    alpaca_eval  model_outputs.json: a list of dataset, instruction, output, generator;
                 for alpaca_eval --model_outputs
    arena_hard   model_answer/NAME.jsonl; columns by the questions': uid and prompt (v2.0, and v0.1 as published since),
                 or question_id and turns (v0.1 as first published); for arena-hard-auto
    mt_bench     model_answer/NAME.jsonl with both turns; for FastChat's llm_judge

The second turn of MT-Bench is asked with the first answer in the conversation. Temperatures are the benchmark's
(MT-Bench: by category) or those of a recipe, whose decoding --recipe names. The same command goes on where it was.

Exit codes: 0 finished; 1 questions are left that the server did not answer; 2 the input cannot be used; 75 stopped by a
signal with everything saved.
"""

import dataclasses
import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fpo_jax import config as configuration
from fpo_jax.cli import args as command_line
from fpo_jax.cli import generate, generate_args
from fpo_jax.config import choices
from fpo_jax.data import loading
from fpo_jax.distributed import workdir_lock
from fpo_jax.io import atomic_io, json_digest, jsonl, terminal

log = logging.getLogger("fpo_jax")

# FastChat's temperature_config
MT_BENCH_TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1,
    "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0,
}  # fmt: skip


class Recipe(NamedTuple):
    """How the models of a recipe answer (spec 3.6): its template, rendered as its training rendered it in 2024."""

    chat_template: str
    stop_ids: tuple[int, ...]
    alpaca_eval: tuple[float, int]  # temperature, new tokens
    arena_hard: tuple[float, int] = (0.0, 4096)
    mt_bench: tuple[float, int] = (math.nan, 1024)  # by category


_LLAMA3_ENDS = (128001, 128009)  # <|end_of_text|>, <|eot_id|>
RECIPES = {
    "mistral_base": Recipe("zephyr", (2,), (0.7, 2048)),
    "mistral_instruct": Recipe("mistral", (2,), (0.5, 2048)),
    "llama3_base": Recipe("llama3", _LLAMA3_ENDS, (0.9, 4096)),
    "llama3_instruct": Recipe("llama3", _LLAMA3_ENDS, (0.9, 4096)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(generate_args.Answering):
    """Which benchmark, with which model, and how."""

    benchmark: str
    data: str
    out: Path
    name: str = ""  # of the model in the files; "" = the model's own
    split: str = ""
    rows: str = ""
    recipe: str = ""  # whose decoding to use; or give temperature and max_new_tokens
    temperature: float = math.nan
    max_new_tokens: int = 0


class Question(NamedTuple):
    """One question: its turns, and what its harness calls it."""

    turns: list[str]
    temperature: float
    row: dict[str, Any]


def run(options: Options) -> list[Path]:
    """Answer what is not answered and write the harness's file.

    Returns:
        The file; empty where questions are left that the server did not answer.

    Raises:
        ValueError: an option, the questions or the model cannot be used; or another process writes the folder.
        preemption.Stopped: a signal; what was answered is saved.
    """
    temperature, max_new_tokens = _decoding(options)
    questions = _questions(options, temperature)
    name = _name(options)
    with workdir_lock.hold(options.out, option="--out"):
        return _run(options, name, questions, max_new_tokens)


def _run(options: Options, name: str, questions: list[Question], max_new_tokens: int) -> list[Path]:
    answers: list[list[str]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        for group in sorted({question.temperature for question in questions}):
            places = [
                place
                for place, question in enumerate(questions)
                if question.temperature == group and len(question.turns) > turn
            ]
            if not places:
                continue
            prompts = [_conversation(questions[place].turns, answers[place]) for place in places]
            found = _answers(options, prompts, f"turn{turn + 1}-temperature{group:g}", group, max_new_tokens)
            if found is None:
                return []
            for place, answer in zip(places, found, strict=True):
                answers[place].append(answer)
    workdir_lock.verify()
    return [_WRITERS[options.benchmark](options.out, name, questions, answers)]


def _decoding(options: Options) -> tuple[float, int]:
    """Return temperature (NaN = by category) and new tokens; refuse options that do not go together."""
    problems = choices.problems_of("--benchmark", options.benchmark, _WRITERS)
    problems += choices.problems_of("--recipe", options.recipe, ("", *RECIPES))
    if problems:
        raise ValueError("; ".join(problems) + ".")
    given, by_category = not math.isnan(options.temperature), options.benchmark == "mt_bench"
    asked = "temperature", "max_new_tokens", "chat_template", "stop_ids"
    if options.recipe:
        for name in asked:
            value, unset = getattr(options, name), getattr(Options, name)
            if value != unset and not (name == "temperature" and not given):
                problems.append(f"--{name.replace('_', '-')} is what --recipe={options.recipe} sets; leave one out")
        temperature, new_tokens = getattr(RECIPES[options.recipe], options.benchmark)
    else:
        temperature, new_tokens = options.temperature, options.max_new_tokens
        if by_category and given:
            problems.append("--temperature is not for mt_bench, whose categories have their own; leave it out")
        if not by_category and not given:
            problems.append("give --temperature or --recipe")
        if new_tokens < 1:
            problems.append(f"--max-new-tokens={new_tokens} must be at least 1, or give --recipe")
    if options.recipe and options.server and RECIPES[options.recipe].chat_template:
        log.info("the server applies the chat template it was started with; the recipe's is not sent")
    if problems:
        raise ValueError("; ".join(problems) + ".")
    return temperature, new_tokens


def _name(options: Options) -> str:
    name = options.name or Path(options.model or options.workdir or options.server_model).name
    if not name or "/" in name or name.startswith("."):
        raise ValueError(f"--name={name!r} must be a plain name: the file is called after it.")
    return name


def _questions(options: Options, temperature: float) -> list[Question]:
    rows = configuration.row_slice(options.rows)
    found, problems = [], []
    stored = loading.rows(options.data, split=options.split or None, data_dir=None, revision=None)
    for number, (where, row) in enumerate(stored):
        if number < (rows.start or 0) or (rows.stop is not None and number >= rows.stop):
            continue
        try:
            found.append(_READERS[options.benchmark](row, temperature))
        except (KeyError, TypeError, ValueError) as error:
            why = f"no column {error}" if isinstance(error, KeyError) else str(error)
            problems.append(f"{where}: {why}")
    if problems:
        raise ValueError(
            "\n  ".join([f"{len(problems)} rows are no questions of {options.benchmark}:", *problems[:10]])
        )
    if not found:
        raise ValueError(f"{options.data} has no question in rows {options.rows or 'at all'}.")
    return found


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a text that is not empty")
    return value


def _alpaca_eval(row: dict[str, Any], temperature: float) -> Question:
    return Question([_text(row["instruction"], "instruction")], temperature, {"dataset": row.get("dataset")})


def _arena_hard(row: dict[str, Any], temperature: float) -> Question:
    if "uid" in row:
        return Question([_text(row["prompt"], "prompt")], temperature, {"uid": row["uid"]})
    turns = [_text(turn["content"], "turns") for turn in row["turns"]]
    return Question(turns, temperature, {"question_id": row["question_id"]})


def _mt_bench(row: dict[str, Any], temperature: float) -> Question:
    category = row["category"]
    if category not in MT_BENCH_TEMPERATURES:
        raise ValueError(f"the category {category!r} is not one of {', '.join(MT_BENCH_TEMPERATURES)}")
    turns = [_text(turn, "turns") for turn in row["turns"]]
    return Question(turns, MT_BENCH_TEMPERATURES[category], {"question_id": row["question_id"]})


_READERS: dict[str, Callable[[dict[str, Any], float], Question]] = {
    "alpaca_eval": _alpaca_eval,
    "arena_hard": _arena_hard,
    "mt_bench": _mt_bench,
}


def _conversation(turns: list[str], answers: list[str]) -> list[dict[str, str]]:
    """Return what the model is shown: the turns up to the next one, with its own answers between them."""
    found = []
    for turn, answer in zip(turns, [*answers, None], strict=False):
        found.append({"role": "user", "content": turn})
        if answer is not None:
            found.append({"role": "assistant", "content": answer})
    return found


def _answers(
    options: Options, prompts: list[list[dict[str, str]]], part: str, temperature: float, max_new_tokens: int
) -> list[str] | None:
    """Answer some prompts, or read the answers there are; None where some are missing."""
    folder = options.out / "parts"
    path = folder / f"{part}.prompts.jsonl"
    jsonl.write(path, ({"prompt": prompt} for prompt in prompts))
    settings = {field.name: getattr(options, field.name) for field in dataclasses.fields(generate_args.Answering)}
    settings |= {"temperature": temperature, "max_new_tokens": max_new_tokens, "rule": "chat"}
    if recipe := RECIPES.get(options.recipe):
        rendering = {"chat_template": recipe.chat_template, "auto_insert_empty_system": True, "prepend_bos": True}
        settings |= {} if options.server else rendering
        settings["stop_ids"] = recipe.stop_ids
    job = generate.Options(out=folder / f"{part}.jsonl", data=str(path), **settings)
    summary = generate.run(job)
    log.info("%s: %s", part, summary.text)
    if summary.failed:
        log.warning("%d questions without an answer; the same command asks again", summary.failed)
        return None
    return [line["completions"][0] for line in jsonl.read(job.out)]


def _identity(name: str, question: Question, answers: list[str]) -> str:
    """Return an answer's name: the same answer of the same model has the same one."""
    return json_digest.of([name, question.row, question.turns, answers])[:22]


def _write_alpaca_eval(out: Path, name: str, questions: list[Question], answers: list[list[str]]) -> Path:
    rows = [
        {**question.row, "instruction": question.turns[0], "output": answer[0], "generator": name}
        for question, answer in zip(questions, answers, strict=True)
    ]
    return atomic_io.write(out / "model_outputs.json", json.dumps(rows, indent=2, ensure_ascii=False) + "\n")


def _write_arena_hard(out: Path, name: str, questions: list[Question], answers: list[list[str]]) -> Path:
    lines = []
    for question, answer in zip(questions, answers, strict=True):
        if "uid" in question.row:
            messages = [
                {"role": "user", "content": question.turns[0]},
                {"role": "assistant", "content": {"answer": answer[0]}},
            ]
            identity = {"ans_id": _identity(name, question, answer), "model": name, "messages": messages}
        else:
            turns = [{"content": text} for text in answer]
            identity = {"answer_id": _identity(name, question, answer), "model_id": name}
            identity |= {"choices": [{"index": 0, "turns": turns}]}
        lines.append({**question.row, **identity})
    return _write_lines(out, name, lines)


def _write_mt_bench(out: Path, name: str, questions: list[Question], answers: list[list[str]]) -> Path:
    lines = []
    for question, answer in zip(questions, answers, strict=True):
        choices = [{"index": 0, "turns": [text.strip() for text in answer]}]  # as FastChat keeps them
        identity = {"answer_id": _identity(name, question, answer), "model_id": name}
        lines.append({**question.row, **identity, "choices": choices})
    return _write_lines(out, name, lines)


_WRITERS: dict[str, Callable[[Path, str, list[Question], list[list[str]]], Path]] = {
    "alpaca_eval": _write_alpaca_eval,
    "arena_hard": _write_arena_hard,
    "mt_bench": _write_mt_bench,
}


def _write_lines(out: Path, name: str, lines: list[dict[str, Any]]) -> Path:
    """Write a model's answers; the time is that of the newest part, so that a second start writes the same file."""
    written = max(path.stat().st_mtime for path in (out / "parts").glob("*.jsonl") if "prompts" not in path.name)
    return jsonl.write(out / "model_answer" / f"{name}.jsonl", ({**line, "tstamp": written} for line in lines))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as the command line says; return the exit status."""
    return command_line.run(Options, _work, arguments, program="fpo benchmark", about=__doc__)


def _work(options: Options) -> int:
    written = run(options)
    for path in written:
        terminal.say(path)
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
