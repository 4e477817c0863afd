"""Arena-Hard scores from judgements: `fpo arena_hard --judgements MODEL_A.jsonl MODEL_B.jsonl`.

Files as arena-hard-auto's gen_judgment writes them, of v0.1 (`question_id`) or v2.0 (`uid`, `category`): per question
two games, the first with the baseline as assistant A, the second with the model as A, each with a verdict. A verdict is
a battle, a strong one (A>>B) three, and a tie is half a win. Every battle is against the one baseline of its category,
so that the Bradley-Terry win probability of a model is the mean over its battles, whatever the other models did.

Two bootstrap intervals, of 95 % for v0.1 and of 90 % (5th to 95th percentile) for v2.0, as their harnesses have them:
over battles, as the published leaderboards draw them, and over questions, which is the honest one: the three battles of
a strong verdict, and the two games of a question, are not independent.

Nothing is judged here and no key is needed. A table goes to stdout, all numbers to --json. Questions that the judge
left without a verdict are left out and counted; where more than 1 % are missing the score is withheld.

Exit codes: 0 scored; 1 a score is withheld; 2 the input cannot be used.
"""

import collections
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fpo_jax.cli import args as command_line
from fpo_jax.eval.benchmarks import judgement_files
from fpo_jax.io import terminal

OLD = "arena-hard-v0.1"
BASELINES = {OLD: "gpt-4-0314", "hard_prompt": "o3-mini-2025-01-31", "creative_writing": "gemini-2.0-flash-001"}
SIZES = {OLD: 500, "hard_prompt": 500, "creative_writing": 250}  # questions of each category
STRONG = 3  # battles of a strong verdict
PERCENTILES = {OLD: (2.5, 97.5), "hard_prompt": (5.0, 95.0), "creative_writing": (5.0, 95.0)}  # of each harness
# verdict -> (is A better: 1, 0 or 1/2 = tie; battles)
VERDICTS = {"A>>B": (1.0, STRONG), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, STRONG)}
# v2.0 also takes these; v0.1 leaves them out
_TURNED = {"B<<A": "A>>B", "B<A": "A>B", "B=A": "A=B", "A<B": "B>A", "A<<B": "B>>A"}

_INTERVALS = ("low", "high", "low_questions", "high_questions")
_LEFT = {
    "n_unjudged": "questions without a verdict",
    "n_missing": "questions missing from the file",
    "n_repeated": "judgements repeated (the last counts)",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to score. Paths as on the command line."""

    judgements: tuple[Path, ...]
    rounds: int = 1000  # bootstrap samples
    seed: int = 0
    min_coverage: float = 0.99  # share of the category's questions below which a score is withheld
    json: str = ""


@dataclasses.dataclass(frozen=True)
class Question:
    """The verdicts of one model on one question: `points` of `battles` are won."""

    points: float
    battles: int
    outcomes: tuple[tuple[float, int], ...]  # (won 1, lost 0 or tied 1/2; battles) of each game
    contradicted: bool  # each order of the answers has another winner


def run(options: Options) -> dict[str, Any]:
    """Score every model in every category.

    Raises:
        ValueError: an option or a file cannot be used.
    """
    if options.rounds < 1 or not 0 <= options.min_coverage <= 1:
        raise ValueError(
            f"--rounds={options.rounds} must be at least 1 and --min-coverage={options.min_coverage} lie in [0, 1]."
        )
    groups = collections.defaultdict(list)
    for path in options.judgements:
        for row in read(path):
            groups[row[1].get("category", OLD), row[1]["model"]].append(row)
    judges = sorted({str(row["judge"]) for rows in groups.values() for _, row in rows if "judge" in row})
    if len(judges) > 1:
        raise ValueError(f"the files are of {len(judges)} judges, {', '.join(judges[:5])}; score one judge at a time.")
    baselines = _baselines(groups)
    found: dict[str, Any] = {}
    for (category, model), rows in sorted(groups.items()):
        low, high = PERCENTILES[category]
        head = {"baseline": baselines[category], "interval_percent": high - low, "models": {}}
        entry = found.setdefault(category, head)
        entry["models"][model] = _scored(rows, category, options)
    return {"benchmark": "Arena-Hard", "judge": judges[0] if judges else "", "categories": found}


def read(path: Path) -> list[judgement_files.Row]:
    """Read the judgements of a file, of one model or several.

    Raises:
        ValueError: no such file, or a row that is no judgement of Arena-Hard; names the row.
    """
    rows = judgement_files.read(path, fields=("games", "model"))
    for place, row in rows:
        judgement_files.text(place, row, "model")
        if "uid" not in row and "question_id" not in row:
            raise ValueError(
                f"{place}: no field 'uid' (v2.0) or 'question_id' (v0.1); this is no Arena-Hard judgement."
            )
        category = row.get("category", None if "uid" in row else OLD)
        if not isinstance(category, str) or category not in SIZES:
            raise ValueError(f"{place}: category={category!r} is not one of {', '.join(SIZES)}.")
        games = row["games"]
        if not isinstance(games, list) or len(games) != 2:
            raise ValueError(f"{place}: games must be two, one in each order; judge the question in both.")
        for game in games:
            verdict = game.get("score") if isinstance(game, dict) else game
            if (isinstance(game, dict) and "score" not in game) or not isinstance(verdict, str | None):
                raise ValueError(f"{place}: a game must be null or have a `score` such as 'A>>B', not {game!r:.80}.")
    return rows


def question(row: judgement_files.Row) -> Question | None:
    """Return the battles of one row; None where the judge left it without a verdict.

    v0.1 counts the other game of a question that has one verdict, v2.0 leaves the question out.
    """
    old = "uid" not in row[1]
    verdicts = [_verdict(game, old) for game in row[1]["games"]]
    if not any(verdicts) or not (old or all(verdicts)):
        return None
    first, second = verdicts
    outcomes = [(1 - first[0], first[1])] if first else []  # the baseline is A in the first game
    outcomes += [second] if second else []
    contradicted = bool(first and second) and {won for won, _ in outcomes} == {0.0, 1.0}
    return Question(
        points=sum(won * battles for won, battles in outcomes),
        battles=sum(battles for _, battles in outcomes),
        outcomes=tuple(outcomes),
        contradicted=contradicted,
    )


def score(
    questions: Sequence[Question], *, rounds: int, percentiles: tuple[float, float], generator: np.random.Generator
) -> dict[str, Any]:
    """Return the win probability against the baseline in percent, its two intervals, and counts.

    Args:
        questions: of one model, at least one.
        rounds: bootstrap samples of each interval.
        percentiles: of the samples, where the intervals end.
        generator: draws them.
    """
    battles = collections.Counter()
    for one in questions:
        for won, count in one.outcomes:
            battles[won] += count
    total = sum(battles.values())
    values_V = np.array([0.0, 0.5, 1.0])  # V outcomes of a battle
    shares_V = np.array([battles[value] for value in values_V.tolist()]) / total
    by_battle_R = generator.multinomial(total, shares_V, rounds) @ values_V / total
    points_Q = np.array([one.points for one in questions])
    battles_Q = np.array([one.battles for one in questions])
    drawn_RQ = generator.integers(len(questions), size=(rounds, len(questions)))
    by_question_R = points_Q[drawn_RQ].sum(1) / battles_Q[drawn_RQ].sum(1)
    bounds = [*np.percentile(by_battle_R, percentiles), *np.percentile(by_question_R, percentiles)]
    return {
        "score": 100 * float(points_Q.sum() / total),
        **{name: 100 * float(bound) for name, bound in zip(_INTERVALS, bounds, strict=True)},
        "n_questions": len(questions),
        "n_battles": total,
        "n_wins": battles[1.0],
        "n_ties": battles[0.5],
        "contradicted": sum(one.contradicted for one in questions) / len(questions),
    }


def _scored(rows: Sequence[judgement_files.Row], category: str, options: Options) -> dict[str, Any]:
    """Return the figures of one model in one category, and what its files lack."""
    rows, repeated = judgement_files.latest(rows, key=lambda row: _name(row[1]), counts=lambda row: bool(question(row)))
    judged = [one for one in map(question, rows) if one is not None]
    size, model = SIZES[category], rows[0][1]["model"]
    if len(rows) > size:
        raise ValueError(
            f"{model} has {len(rows)} questions of {category}, which has {size}; give that benchmark's files."
        )
    if not judged:
        raise ValueError(f"{model} has no verdict on any of {len(rows)} questions of {category}; judge them first.")
    generator = np.random.default_rng(options.seed)
    found = score(judged, rounds=options.rounds, percentiles=PERCENTILES[category], generator=generator)
    coverage = len(judged) / size
    withheld = coverage < options.min_coverage
    if withheld:
        found |= dict.fromkeys(("score", *_INTERVALS))
    left = {"n_unjudged": len(rows) - len(judged), "n_missing": size - len(rows), "n_repeated": repeated}
    return found | left | {"coverage": coverage, "withheld": withheld}


def table(report: dict[str, Any]) -> str:
    """Return the report as text for a terminal."""
    parts = []
    for category, entry in report["categories"].items():
        rows = []
        for name, one in sorted(entry["models"].items(), key=lambda item: -(item[1]["score"] or 0.0)):
            numbers = ["-"] * 3 if one["withheld"] else _numbers(one)
            judged = f"{one['n_questions']}/{SIZES[category]}"
            rows.append([name, *numbers, judged, str(one["n_battles"]), f"{one['contradicted']:.0%}"])
        percent = f"{entry['interval_percent']:.0f} %"
        head = [f"{category} vs {entry['baseline']}", "score", f"{percent} (battles)", f"{percent} (questions)"]
        parts.append(terminal.table([[*head, "judged", "battles", "contradicted"], *rows]))
    return "\n\n".join(parts)


def remarks(report: dict[str, Any]) -> list[str]:
    """Return what a reader of the table must know about its rows."""
    found = []
    for category, entry in report["categories"].items():
        for name, one in entry["models"].items():
            left = [f"{one[key]} {what}" for key, what in _LEFT.items() if one[key]]
            if one["withheld"]:
                left.append("score withheld; judge the rest, or lower --min-coverage")
            found += [f"{name}, {category}: {', '.join(left)}."] if left else []
            if name == report["judge"]:
                found.append(f"{name}, {category}: judged by itself.")
    return found


def _verdict(game: dict[str, Any] | None, old: bool) -> tuple[float, int] | None:
    if not game or not game["score"]:
        return None
    label: str = game["score"]
    return VERDICTS.get(label if old else _TURNED.get(label, label))


def _name(row: dict[str, Any]) -> str:
    return str(row["uid"] if "uid" in row else row["question_id"])


def _baselines(groups: Mapping[tuple[str, str], Sequence[judgement_files.Row]]) -> dict[str, str]:
    """Return the one baseline of each category."""
    found = collections.defaultdict(set)
    for (category, _), rows in groups.items():
        found[category] |= {str(row.get("baseline", BASELINES[category])) for _, row in rows}
    for category, names in found.items():
        if len(names) > 1:
            described = ", ".join(sorted(names))
            raise ValueError(f"{category} was judged against {described}; compare with one baseline at a time.")
    return {category: names.pop() for category, names in found.items()}


def _numbers(one: dict[str, Any]) -> list[str]:
    intervals = [f"{one[low]:.1f} to {one[high]:.1f}" for low, high in (_INTERVALS[:2], _INTERVALS[2:])]
    return [f"{one['score']:.1f}", *intervals]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as the command line says; return the exit status."""
    return command_line.run(Options, _work, arguments, program="fpo arena_hard", about=__doc__)


def _work(options: Options) -> int:
    with judgement_files.reserved(options.json):
        report = run(options)
        judgement_files.show(report, table=table(report), remarks=remarks(report), json=options.json)
    entries = report["categories"].values()
    return 1 if any(one["withheld"] for entry in entries for one in entry["models"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
