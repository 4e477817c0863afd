"""MT-Bench figures from judgements: `fpo mt_bench --judgements gpt-4_single.jsonl more.jsonl`.

Rows as FastChat's judge writes them, in any mix: single-answer scores (`score`, -1 = the judge gave none), pairwise
judgements in both orders (`g1_winner`, `g2_winner`), and votes on pairs (`winner`) such as those of the human experts.
The scores give each model's mean per turn and category; all of them give the agreement of the judges.

Every score is read from its judgement's text again, and a difference is reported. A judgement that stands twice counts
once, the last that has a score; FastChat counts all of them, and its mean is given as `all_rows_average`. Where more
than 1 % of the 160 scores are missing, a model's overall mean is withheld.

Exit codes: 0 scored; 1 a mean is withheld; 2 the input cannot be used.
"""

import collections
import dataclasses
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fpo_jax.cli import args as command_line
from fpo_jax.eval.benchmarks import judge_agreement, judgement_files
from fpo_jax.eval.stats import confidence_intervals
from fpo_jax.io import terminal

# ten questions each, from number 81 on
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
FIRST, LAST = 81, 160
TURNS = (1, 2)
EXPECTED = len(TURNS) * (LAST - FIRST + 1)
UNPARSED = -1
_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))  # the second only without the first
_PEOPLE = {"expert": "human", "author": "author"}  # voters are named expert_12, author_3: label of all of a kind
_LEFT = {
    "n_unparsed": "judgements without a score, left out",
    "n_missing": "answers not judged",
    "n_repeated": "judgements repeated (the last with a score counts)",
    "n_differing": "scores that differ from their text (the stored ones count)",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to score. Paths as on the command line."""

    judgements: tuple[Path, ...]
    min_coverage: float = 0.99  # share of the 160 answers of a model below which its mean is withheld
    json: str = ""


def run(options: Options) -> dict[str, Any]:
    """Score every model that every judge scored, and compare the judges.

    Returns:
        "judges": per judge and model the means and what is missing; "score_agreement" and "vote_agreement".

    Raises:
        ValueError: an option or a file cannot be used.
    """
    if not 0 <= options.min_coverage <= 1:
        raise ValueError(f"--min-coverage={options.min_coverage} is no share; use a number from 0 to 1.")
    singles, votes = _sorted(options.judgements)
    report: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    scores: dict[str, dict[judge_agreement.Answer, float]] = collections.defaultdict(dict)
    for (judge, model), rows in sorted(singles.items()):
        kept, repeated = judgement_files.latest(rows, key=lambda row: _answer(row[1]), counts=_scored)
        own = {_answer(row[1]): row[1]["score"] for row in kept if _scored(row)}
        if not own:
            raise ValueError(f"{judge} gave {model} no score in {len(kept)} judgements; judge it again.")
        scores[judge] |= own
        found = _means(own, options.min_coverage)
        found["all_rows_average"] = (
            None if found["withheld"] else _mean(row[1]["score"] for row in rows if _scored(row))
        )
        found |= {"n_unparsed": len(kept) - len(own), "n_missing": EXPECTED - len(kept), "n_repeated": repeated}
        report[judge][model] = found | {"n_differing": sum(_differs(row) for _, row in rows)}
    for judge, own in scores.items():
        votes += judge_agreement.votes_of_scores(judge, own)
    return {
        "benchmark": "MT-Bench",
        "judges": report,
        "score_agreement": judge_agreement.of_scores(scores),
        "vote_agreement": judge_agreement.of_votes(votes),
    }


def rating(text: str) -> float:
    """Return the score in a judgement's text, the first `[[number]]` or else the first `[number]`; -1 where none is.

    >>> rating("Good. Rating: [[8.5]]"), rating("see [1]: [[7]]"), rating("Rating: [6]"), rating("8/10")
    (8.5, 7.0, 6.0, -1)
    """
    found = next(filter(None, (pattern.search(text) for pattern in _RATINGS)), None)
    return float(found[1]) if found else UNPARSED


def category(question: int) -> str:
    """Return the category of a question by its number."""
    return CATEGORIES[(question - FIRST) // 10]


def table(report: dict[str, Any]) -> str:
    """Return the report as text for a terminal."""
    parts = []
    for judge, models in report["judges"].items():
        head = [f"judge {judge}", "mean", "95 %", "turn 1", "turn 2", *CATEGORIES, "scored"]
        rows = []
        for name, one in sorted(models.items(), key=lambda item: -(item[1]["average"] or 0.0)):
            bounds = "-" if one["low"] is None else f"{one['low']:.2f} to {one['high']:.2f}"
            means = [one["turns"][str(turn)] for turn in TURNS]
            means += [one["categories"].get(name, {}).get("average") for name in CATEGORIES]
            rows.append([name, _number(one["average"]), bounds, *map(_number, means), f"{one['n_scored']}/{EXPECTED}"])
        parts.append(terminal.table([head, *rows]))
    if report["score_agreement"]:
        head = ["scores of the same answers", "answers", "equal", "within 1", "difference"]
        rows = [
            [" / ".join(one["judges"]), str(one["count"]), *(f"{one[key]:.1%}" for key in ("equal", "within_one"))]
            for one in report["score_agreement"]
        ]
        for row, one in zip(rows, report["score_agreement"], strict=True):
            row.append(f"{one['mean_difference']:+.2f}")
        parts.append(terminal.table([head, *rows]))
    if report["vote_agreement"]:
        head = ["votes on the same pairs", "turn", "votes", "agree", "95 %", "without ties", "agree", "95 %"]
        rows = [
            [" / ".join(one["judges"]), str(one["turn"]), *_shares(one["with_ties"]), *_shares(one["without_ties"])]
            for one in report["vote_agreement"]
        ]
        parts.append(terminal.table([head, *rows]))
    return "\n\n".join(parts)


def remarks(report: dict[str, Any]) -> list[str]:
    """Return what a reader of the table must know about its rows."""
    found = []
    for judge, models in report["judges"].items():
        for name, one in models.items():
            described = [f"{one[key]} {what}" for key, what in _LEFT.items() if one[key]]
            if one["withheld"]:
                described.append("mean withheld; judge the rest, or lower --min-coverage")
            found += [f"{name}, judge {judge}: {', '.join(described)}."] if described else []
    return found


def _sorted(
    paths: Sequence[Path],
) -> tuple[dict[tuple[str, str], list[judgement_files.Row]], list[judge_agreement.Vote]]:
    """Read files; return the scored rows of each judge and model, and the votes on pairs."""
    singles = collections.defaultdict(list)
    votes: list[judge_agreement.Vote] = []
    machine_votes: dict[tuple, judge_agreement.Vote] = {}  # of each pair the last
    for path in paths:
        for place, row in judgement_files.read(path, fields=("question_id", "judge")):
            if "score" in row:
                row = _single(place, row)
                singles[_judge(place, row), row["model"]].append((place, row))
            elif vote := _vote(place, row):
                if vote.judge in _PEOPLE.values():
                    votes.append(vote)
                else:
                    machine_votes[vote[:-1]] = vote
    return singles, [*votes, *machine_votes.values()]


def _means(scores: Mapping[judge_agreement.Answer, float], min_coverage: float) -> dict[str, Any]:
    """Return the means of one model; the interval takes questions, not answers, for independent."""
    by_question = collections.defaultdict(list)
    for answer, score in scores.items():
        by_question[answer.question].append(score)
    found: dict[str, Any] = dict.fromkeys(("average", "low", "high"))
    coverage = len(scores) / EXPECTED
    if coverage >= min_coverage:
        found["average"] = centre = math.fsum(scores.values()) / len(scores)
        if len(by_question) > 1:
            mean, low, high = confidence_intervals.mean_interval(
                [math.fsum(one) / len(one) for one in by_question.values()]
            )
            found |= {"low": centre - (mean - low), "high": centre + (high - mean)}
    found["turns"] = _by_turn(scores)
    found["categories"] = {}
    for name in CATEGORIES:
        own = {answer: score for answer, score in scores.items() if category(answer.question) == name}
        if own:
            found["categories"][name] = {"average": _mean(own.values()), "turns": _by_turn(own), "n_scored": len(own)}
    return found | {"n_scored": len(scores), "coverage": coverage, "withheld": coverage < min_coverage}


def _by_turn(scores: Mapping[judge_agreement.Answer, float]) -> dict[str, float | None]:
    return {str(turn): _mean(score for answer, score in scores.items() if answer.turn == turn) for turn in TURNS}


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return math.fsum(found) / len(found) if found else None


def _single(place: str, row: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a scored answer with its numbers checked; null is -1."""
    judgement_files.require([(place, row)], ("model", "turn"))
    judgement_files.text(place, row, "model")
    score = UNPARSED if row["score"] is None else judgement_files.number(place, row, "score")
    if score != UNPARSED and not 0 <= score <= 10:
        raise ValueError(f"{place}: score={score:g} is neither -1 nor from 0 to 10; these are no MT-Bench scores.")
    question, turn = _place(place, row)
    return row | {"question_id": question, "turn": turn, "score": score}


def _place(place: str, row: dict[str, Any]) -> tuple[int, int]:
    question, turn = judgement_files.whole(place, row, "question_id"), judgement_files.whole(place, row, "turn")
    if not FIRST <= question <= LAST or turn not in TURNS:
        raise ValueError(
            f"{place}: question {question}, turn {turn}; MT-Bench has questions {FIRST} to {LAST}, turns 1, 2."
        )
    return question, turn


def _judge(place: str, row: dict[str, Any]) -> str:
    """Return the judge's name: of (model, prompt) the model, as the prompt goes with the question."""
    judge = row["judge"]
    if isinstance(judge, list) and judge and isinstance(judge[0], str):
        return judge[0]
    return judgement_files.text(place, row, "judge")


def _answer(row: Mapping[str, Any]) -> judge_agreement.Answer:
    return judge_agreement.Answer(row["question_id"], row["turn"], row["model"])


def _scored(row: judgement_files.Row) -> bool:
    return row[1]["score"] != UNPARSED


def _differs(row: Mapping[str, Any]) -> bool:
    text = row.get("judgment")
    return isinstance(text, str) and rating(text) != row["score"]


def _vote(place: str, row: dict[str, Any]) -> judge_agreement.Vote | None:
    """Return the vote of a row on a pair; None where the judge gave no verdict."""
    both = "g1_winner" in row
    names = ("model_1", "model_2") if both else ("model_a", "model_b")
    judgement_files.require([(place, row)], (*names, "turn", *(("g2_winner",) if both else ("winner",))))
    models = {name: judgement_files.text(place, row, name) for name in names}
    given = {judgement_files.text(place, row, name) for name in (("g1_winner", "g2_winner") if both else ("winner",))}
    if "error" in given:
        return None
    described = {winner for winner in given if not winner.startswith("tie")}
    if not described <= set(models):
        raise ValueError(f"{place}: winner {' / '.join(sorted(described))} is not one of {', '.join(names)}, tie.")
    # The two orders tie unless they name the same winner.
    winner = models[described.pop()] if len(given) == 1 and described else ""
    judge = _judge(place, row)
    label = next((label for kind, label in _PEOPLE.items() if judge.startswith(kind)), f"{judge} (pairs)")
    first, second = sorted(models.values())
    return judge_agreement.Vote(*_place(place, row), (first, second), label, winner)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _shares(one: Mapping[str, Any]) -> list[str]:
    if not one["count"]:
        return ["0", "-", "-"]
    return [str(one["count"]), f"{one['equal']:.1%}", f"{one['low']:.1%} to {one['high']:.1%}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as the command line says; return the exit status."""
    return command_line.run(Options, _work, arguments, program="fpo mt_bench", about=__doc__)


def _work(options: Options) -> int:
    with judgement_files.reserved(options.json):
        report = run(options)
        judgement_files.show(report, table=table(report), remarks=remarks(report), json=options.json)
    return 1 if any(one["withheld"] for models in report["judges"].values() for one in models.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
