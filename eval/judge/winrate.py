"""Compare two models' answers with a judge: `fpo winrate --candidate A --baseline B --out D --server ...`.

Files of `fpo generate` (or the chosen completions of a data set) in; D/summary.json, D/verdicts.jsonl and a table out.
The judge is what an OpenAI-compatible server serves, a causal model here, or a reward model, whose higher score wins:

    --server URL --server-model NAME    asked in both orders; orders that disagree are a tie. --server-api vllm where a
                                        vLLM serves it: greedy replies, too, change with the repetition penalty that it
                                        takes from generation_config.json where a request does not say one
    --judge-model DIR                   the same questions, answered greedily by the sampler
    --reward-model DIR                  no order; equal scores are a tie

A prompt without an answer on the other side is left out and counted; more than half of them are an error. Answers of
one text are a tie that nobody is asked about. A reply without a verdict is a failure, counted and reported, never a
loss; rates are of the comparisons that have a verdict. Replies are kept in --store under a digest of everything they
depend on, so the same command asks only for what is missing, and another comparison never reuses what it must not.
--dry-run counts tokens and dollars and asks nothing. Keys come from the environment alone.

Exit codes: 0 all compared; 1 comparisons are left without a verdict; 2 the input cannot be used; 75 stopped by a
signal.
"""

import contextlib
import dataclasses
import json
import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fpo_jax import config as configuration
from fpo_jax import data, tokenization
from fpo_jax.cli import args as command_line
from fpo_jax.cli import generate, label
from fpo_jax.cli import openai_client as servers
from fpo_jax.config import choices
from fpo_jax.data import formats, hh_rlhf
from fpo_jax.distributed import preemption, progress, workdir_lock
from fpo_jax.eval.judge import pairwise_judge
from fpo_jax.eval.stats import win_rates
from fpo_jax.io import atomic_io, jsonl, terminal
from fpo_jax.tokenization import messages

log = logging.getLogger("fpo_jax")

ANSWERS = "answers"  # the format of a file of fpo generate
_BYTES_PER_TOKEN = 4  # of English text, for an estimate without a tokenizer
_KINDS = {
    "server": (
        "server_model", "server_api", "api_key_env", "concurrency", "timeout", "price_in", "price_out", "store",
        "dry_run",
    ),
    "judge_model": ("rule", "chat_template", "chat_template_kwargs", "batch_size", "compute_dtype"),
    "reward_model": ("rule", "chat_template", "chat_template_kwargs", "thoughts", "batch_size", "compute_dtype"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compare, and who judges. Paths and names as on the command line."""

    candidate: Path
    baseline: str  # a file of answers, or a data set whose best completions are meant
    out: Path
    baseline_format: str = ANSWERS  # or a format of the trainer's data
    baseline_split: str = ""
    baseline_rows: str = ""  # first:last
    baseline_subfolder: str = ""  # of a hub data set
    baseline_revision: str = ""  # its commit
    baseline_hh_split: str = "last_turn"  # or first_difference, as the prompts of the HH recipes are cut
    answers: int = 1  # of each prompt; the original compares the first of four
    num_prompts: int = 0  # 0 = all
    template: str = ""  # helpful, harmless, tldr, or a file
    server: str = ""
    server_model: str = ""
    server_api: str = "openai"  # which sampling fields are sent; vllm for a judge that a vLLM serves: neutral ones too
    api_key_env: str = ""
    concurrency: int = 16
    timeout: float = 120.0  # seconds that one request may take, its whole reply included
    store: str = ""  # file of replies; "" = in out
    max_tokens: int = 300  # of a reply
    price_in: float = 0.0  # dollars per million tokens
    price_out: float = 0.0
    dry_run: bool = False
    judge_model: str = ""
    reward_model: str = ""
    tokenizer: str = ""  # of the judge; for a server: to count tokens with
    rule: str = ""  # of the judge: raw, chat, or "" = as it was trained; chat where it has a template
    chat_template: str = ""
    chat_template_kwargs: str = ""  # JSON
    thoughts: str = ""  # refuse, keep or drop the thought parts of answers; "" = as it was trained, or refuse
    batch_size: int = 16
    compute_dtype: str = "bfloat16"
    seed: int = 0  # of the intervals


def run(options: Options) -> dict[str, Any]:
    """Compare what is not compared, write both files, and return the summary.

    Raises:
        ValueError: an option, an answer file or the judge cannot be used; or another process writes the folder.
        preemption.Stopped: a signal; the replies so far are kept.
    """
    kind = _check(options)
    with workdir_lock.hold(options.out, option="--out"):
        return _run(options, kind)


def _run(options: Options, kind: str) -> dict[str, Any]:
    pairs, unmatched = _pairs(options)
    if kind == "reward_model":
        decisions, judge = _by_rewards(options, pairs)
    else:
        form = pairwise_judge.template(options.template)
        judge = {"model": options.server_model or options.judge_model, "max_tokens": options.max_tokens}
        if kind == "server" and options.server_api != "openai":  # whose replies, paid for, keep the keys they have
            judge |= {"server_api": options.server_api}
        asked = {pair.index: _questions(pair, form, judge) for pair in pairs if not pairwise_judge.same(pair)}
        if options.dry_run:
            return _dry_run(options, asked) | {"unmatched": unmatched}
        ask = _ask_server if kind == "server" else _ask_model
        replies = ask(options, _distinct(asked))

        def reply(pair: pairwise_judge.Pair, turned: bool) -> str | None:
            return replies.get(asked[pair.index][turned].key) if pair.index in asked else None

        decisions = [pairwise_judge.decide(pair, (reply(pair, False), reply(pair, True))) for pair in pairs]
        judge |= {"template": options.template, "temperature": 0}
        if kind == "server":
            judge |= {"server_api": options.server_api, "sent": _sampling_fields(options)}
    summary = _summary(options, pairs, decisions, judge) | {"unmatched": unmatched}
    _write(options.out, pairs, decisions, summary)
    return summary


def _check(options: Options) -> str:
    """Return who judges; raise ValueError for options that contradict each other or do not apply."""
    problems = []
    given = [name for name in _KINDS if getattr(options, name)]
    if len(given) != 1:
        said = " and ".join(f"--{name.replace('_', '-')}" for name in given) or "none"
        problems.append(f"give one of --server, --judge-model and --reward-model, not {said}")
    kind = given[0] if given else ""
    used = set(_KINDS.get(kind, ())) | ({"max_tokens", "template"} if kind != "reward_model" else set())
    every = {name for names in _KINDS.values() for name in names} | {"max_tokens", "template"}
    for name in sorted(every - used) if kind else ():
        if getattr(options, name) != getattr(Options, name):
            problems.append(f"--{name.replace('_', '-')} means nothing with --{kind.replace('_', '-')}; leave it out")
    if kind and kind != "reward_model" and not options.template:
        problems.append("give --template: helpful, harmless, tldr, or a file")
    if kind == "server" and not options.server_model:
        problems.append("--server needs --server-model, the model's name there")
    if kind == "server" and options.tokenizer and not options.dry_run:
        problems.append("--tokenizer with --server counts tokens for --dry-run; leave it out")
    problems += _baseline_problems(options)
    if (options.price_in or options.price_out) and not options.dry_run:
        problems.append("--price-in and --price-out are for --dry-run")
    for name in ("answers", "concurrency", "max_tokens", "batch_size"):
        if getattr(options, name) < 1:
            problems.append(f"--{name.replace('_', '-')}={getattr(options, name)} must be at least 1")
    if options.num_prompts < 0:
        problems.append(f"--num-prompts={options.num_prompts} must be at least 0; 0 is all")
    problems += choices.problems_of("--rule", options.rule, ("", "raw", "chat"))
    if problems:
        raise ValueError("; ".join(problems) + ".")
    if kind == "server":
        servers.checked_url(options.server)
        _sampling_fields(options)
    return kind


def _baseline_problems(options: Options) -> list[str]:
    """List what is wrong with the baseline, and options that its format has no use for."""
    if wrong := choices.problems_of("--baseline-format", options.baseline_format, (ANSWERS, *formats.FORMATS)):
        return wrong
    if options.baseline_format == ANSWERS:
        names = ("baseline_split", "baseline_rows", "baseline_subfolder", "baseline_revision", "baseline_hh_split")
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) != getattr(Options, name)]
        return [f"{name} belongs to a data set; give its --baseline-format" for name in given]
    problems = choices.problems_of("--baseline-hh-split", options.baseline_hh_split, hh_rlhf.SPLITS)
    if not problems and options.baseline_format != "hh" and options.baseline_hh_split != Options.baseline_hh_split:
        problems.append("--baseline-hh-split belongs to --baseline-format=hh")
    try:
        configuration.row_slice(options.baseline_rows)
    except ValueError as error:
        problems.append(f"--baseline-rows: {error}")
    return problems


def _baseline(options: Options) -> list[tuple[Any, list[str]]]:
    """Return each prompt of the baseline with its answers, of a data set the best one."""
    if options.baseline_format == ANSWERS:
        return [(line["prompt"], line["completions"]) for line in _answers(Path(options.baseline))]
    rows = configuration.row_slice(options.baseline_rows)
    found = data.read(
        options.baseline,
        format=options.baseline_format,
        split=options.baseline_split or None,
        hh_split=options.baseline_hh_split,
        start=rows.start or 0,
        stop=rows.stop,
        data_dir=options.baseline_subfolder or None,
        revision=options.baseline_revision or None,
    )
    best = data.best_only(found)
    return [(record.prompt, list(map(messages.said, record.completions))) for record in best.rows]


def _pairs(options: Options) -> tuple[list[pairwise_judge.Pair], int]:
    """Match the answers of both by prompt; a prompt that comes again is matched in its order.

    Returns:
        the pairs, and how many prompts of the candidate have no answer of the baseline.
    """
    candidates = _answers(options.candidate)
    waiting: dict[str, list[list[str]]] = {}
    for prompt, texts in _baseline(options):
        waiting.setdefault(json.dumps(prompt), []).append(texts)
    pairs, missing = [], []
    compared = candidates[: options.num_prompts or None]
    for number, line in enumerate(compared, 1):
        others = waiting.get(json.dumps(line["prompt"]))
        if not others:
            missing.append(f"{options.candidate}:{number}")
            continue
        texts = others.pop(0) if len(others) > 1 else others[0]
        if len(line["completions"]) < options.answers:
            raise ValueError(
                f"{options.candidate}:{number} has {len(line['completions'])} answers;"
                f" --answers={options.answers} needs more."
            )
        for place in range(options.answers):
            pairs.append(
                pairwise_judge.Pair(len(pairs), line["prompt"], line["completions"][place], texts[place % len(texts)])
            )
    if 2 * len(missing) > len(compared):
        raise ValueError(
            f"{len(missing)} of {len(compared)} prompts have no answer in {options.baseline}, the first at"
            f" {', '.join(missing[:3])}; compare answers to the same prompts."
        )
    return pairs, len(missing)


def _answers(path: Path) -> list[dict[str, Any]]:
    lines = jsonl.read(path)
    for number, line in enumerate(lines, 1):
        texts = line.get("completions")
        if (
            "prompt" not in line
            or not isinstance(texts, list)
            or not texts
            or not all(isinstance(t, str) for t in texts)
        ):
            raise ValueError(f"{path}:{number}: a line must have a prompt and completions, a list of texts.")
    if not lines:
        raise ValueError(f"{path} has no line.")
    return lines


def _questions(pair: pairwise_judge.Pair, form: str, judge: dict[str, Any]) -> list[pairwise_judge.Question]:
    return [pairwise_judge.question(pair, form=form, turned=turned, judge=judge) for turned in (False, True)]


def _distinct(asked: dict[int, list[pairwise_judge.Question]]) -> list[pairwise_judge.Question]:
    return list({question.key: question for both in asked.values() for question in both}.values())


def _dry_run(options: Options, asked: dict[int, list[pairwise_judge.Question]]) -> dict[str, Any]:
    """Count what a run would cost at most."""
    with _store(options) as store:
        left = [question for question in _distinct(asked) if question.key not in store]
    texts = [question.text for question in left]
    if options.tokenizer:
        encoder = tokenization.encoder(tokenization.load_tokenizer(options.tokenizer))
        tokens_in = sum(map(len, tokenization.encode(encoder, texts))) if texts else 0
    else:
        tokens_in = sum(len(text.encode()) for text in texts) // _BYTES_PER_TOKEN
    tokens_out = options.max_tokens * len(left)
    dollars = (tokens_in * options.price_in + tokens_out * options.price_out) / 1e6
    counted = "counted" if options.tokenizer else "estimated"
    return {
        "requests": len(left), "tokens_in": tokens_in, "tokens_in_are": counted, "tokens_out_at_most": tokens_out,
        "dollars_at_most": dollars,
    }  # fmt: skip


@contextlib.contextmanager
def _store(options: Options) -> Iterator[pairwise_judge.Store]:
    """Open the replies there are, which two comparisons may share, one after the other."""
    path = Path(options.store) if options.store else options.out / "replies.jsonl"
    with workdir_lock.beside(path, option="--store"), pairwise_judge.Store(path) as store:
        yield store


def _sampling_fields(options: Options) -> dict[str, Any]:
    return servers.sampling_fields(options.server_api, max_tokens=options.max_tokens, temperature=0.0)


def _ask_server(options: Options, questions: list[pairwise_judge.Question]) -> dict[str, str]:
    """Ask for the replies that the store does not have; return all there are."""
    ended = threading.Event()
    key = servers.Secret(options.api_key_env)
    server = servers.Server(options.server, options.server_model, key, ended, timeout_s=options.timeout)
    asked = _sampling_fields(options)
    log.info("%s (server_api=%s) is sent %s", options.server, options.server_api, json.dumps(asked))

    async def ask(question: pairwise_judge.Question) -> tuple[pairwise_judge.Question, str | None]:
        try:
            [(reply, _)] = await server.completions([{"role": "user", "content": question.text}], asked)
        except servers.Failed as error:
            log.warning("no reply: %s", error)
            return question, None
        return question, reply

    with _store(options) as store, preemption.StopRequest() as stop:
        left = [question for question in questions if _wanted(store.get(question.key))]
        bar = progress.bar(total=len(left), unit="reply", kept=True)
        with bar:
            for question, reply in servers.each(ask, left, workers=options.concurrency, ended=ended, asked=stop.agreed):
                bar.update(1)
                if reply is not None:
                    store.add(question.key, reply)
        if name := stop.agreed():
            raise preemption.Stopped(f"{name}: the replies so far are kept; the same command asks for the others.")
        return {q.key: reply for q in questions if (reply := store.get(q.key)) is not None}


def _wanted(reply: str | None) -> bool:
    """Whether to ask, again where the reply had no verdict."""
    return reply is None or pairwise_judge.verdict(reply) is None


def _ask_model(options: Options, questions: list[pairwise_judge.Question]) -> dict[str, str]:
    """Let a causal model here reply, greedily."""
    path = options.out / "questions.jsonl"
    jsonl.write(path, ({"prompt": question.text} for question in questions))
    if not questions:
        return {}
    job = generate.Options(
        out=options.out / "replies.jsonl",
        data=str(path),
        model=options.judge_model,
        tokenizer=options.tokenizer,
        rule=options.rule,
        chat_template=options.chat_template,
        chat_template_kwargs=options.chat_template_kwargs,
        max_new_tokens=options.max_tokens,
        temperature=0.0,
        batch_size=options.batch_size,
        compute_dtype=options.compute_dtype,
    )
    log.info("judge: %s", generate.run(job).text)
    lines = jsonl.read(job.out)
    return {question.key: line["completions"][0] for question, line in zip(questions, lines, strict=True)}


def _by_rewards(
    options: Options, pairs: list[pairwise_judge.Pair]
) -> tuple[list[pairwise_judge.Decision], dict[str, Any]]:
    """Let the higher score win."""
    path = options.out / "pairs.jsonl"
    rows = [{"prompt": pair.prompt, "completions": [pair.candidate, pair.baseline]} for pair in pairs]
    jsonl.write(path, rows)
    job = label.Options(
        model=options.reward_model,
        data=path,
        out=options.out / "scores.jsonl",
        tokenizer=options.tokenizer,
        rule=options.rule,
        chat_template=options.chat_template,
        chat_template_kwargs=options.chat_template_kwargs,
        thoughts=options.thoughts,
        batch_size=options.batch_size,
        compute_dtype=options.compute_dtype,
    )
    log.info("judge: %s", label.run(job).text)
    found = []
    for pair, line in zip(pairs, jsonl.read(job.out), strict=True):
        ours, theirs = line["rewards"]
        same = pairwise_judge.same(pair)
        outcome = (
            pairwise_judge.TIE
            if same or ours == theirs
            else pairwise_judge.WIN
            if ours > theirs
            else pairwise_judge.LOSS
        )
        found.append(pairwise_judge.Decision(outcome, "same_text" if same else ""))
    return found, {"reward_model": options.reward_model}


def _summary(
    options: Options, pairs: list[pairwise_judge.Pair], decisions: list[pairwise_judge.Decision], judge: dict[str, Any]
) -> dict[str, Any]:
    """Return counts, rates with intervals, lengths, and what the answers tried on the judge."""
    numbers: dict[str, int] = {}
    clusters = [numbers.setdefault(json.dumps(pair.prompt), len(numbers)) for pair in pairs]
    judged = [place for place, decision in enumerate(decisions) if decision.outcome is not None]
    lengths = np.array([[len(pair.candidate), len(pair.baseline)] for pair in pairs], float)
    summary: dict[str, Any] = {
        "candidate": str(options.candidate),
        "baseline": options.baseline,
        "judge": judge,
        "comparisons": len(pairs),
        "prompts": len(numbers),
        **pairwise_judge.counts(decisions),
        "mean_characters": {"candidate": lengths[:, 0].mean(), "baseline": lengths[:, 1].mean()},
        "steering": {
            "candidate": sum(pairwise_judge.steers(pair.candidate) for pair in pairs),
            "baseline": sum(pairwise_judge.steers(pair.baseline) for pair in pairs),
        },
    }
    if judged:
        outcomes_P = np.array([decisions[place].outcome for place in judged], float)
        clusters_P = np.array([clusters[place] for place in judged])
        summary |= win_rates.both(outcomes_P, lengths[judged], clusters_P, seed=options.seed)
    return summary


def _write(
    out: Path, pairs: list[pairwise_judge.Pair], decisions: list[pairwise_judge.Decision], summary: dict[str, Any]
) -> None:
    lines = []
    for pair, decision in zip(pairs, decisions, strict=True):
        flags = {"candidate": pairwise_judge.steers(pair.candidate), "baseline": pairwise_judge.steers(pair.baseline)}
        said = [name for name, flag in flags.items() if flag]
        line = {**pair._asdict(), "outcome": decision.outcome, "why": decision.why}
        lines.append(line | ({"steering": said} if said else {}))
    workdir_lock.verify()
    jsonl.write(out / "verdicts.jsonl", lines)
    atomic_io.write_json(out / "summary.json", summary)


def table(summary: dict[str, Any]) -> str:
    """Return the summary as text for a terminal."""
    lines = [f"{summary['comparisons']} comparisons on {summary['prompts']} prompts"]
    for name in ("win_rate", "length_controlled_win_rate"):
        if name in summary:
            lines.append(f"{name.replace('_', ' '):28} {win_rates.shown(summary, name)}")
    shown = ("wins", "ties", "losses", "failures")
    lines.append("  ".join(f"{name} {summary[name]}" for name in shown))
    lines.append(f"of the ties: same text {summary['same_text']}, turned with the order {summary['position']}")
    characters, steering = summary["mean_characters"], summary["steering"]
    lines.append(f"mean characters {characters['candidate']:.0f} against {characters['baseline']:.0f}")
    if summary["unmatched"]:
        lines.append(f"left out: {summary['unmatched']} prompts, which have no answer in {summary['baseline']}")
    if any(steering.values()):
        lines.append(f"answers that speak to the judge: {steering['candidate']} and {steering['baseline']}; read them")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as the command line says; return the exit status."""
    return command_line.run(Options, _work, arguments, program="fpo winrate", about=__doc__)


def _work(options: Options) -> int:
    summary = run(options)
    if options.dry_run:
        terminal.say("\n".join(f"{name} {value}" for name, value in summary.items()))
        return 0
    terminal.say(table(summary))
    failures = summary["failures"]
    if failures:
        terminal.refuse("winrate", f"{failures} comparisons without a verdict; the same command asks again.")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
