"""How far judges agree: scores of the same answers, and votes on the same pairs of answers.

A vote says which of two models answered a question better, or that they tie. A judge who scores answers one by one
votes for every pair of models it scored, and ties where the scores differ by at most 0.1. As in the MT-Bench paper
(arXiv 2306.05685) agreement is the share of pairs of votes that are equal, with ties (a random judge has 33 %) and
among the pairs of votes without one (50 %).
"""

import collections
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fpo_jax.eval.stats import confidence_intervals

TIE = 0.1  # largest difference of two scores that is a tie


class Answer(NamedTuple):
    """One answer that was scored."""

    question: int
    turn: int
    model: str


class Vote(NamedTuple):
    """A judge's opinion on two answers; `winner` is one of the models, or "" for a tie."""

    question: int
    turn: int
    models: tuple[str, str]  # sorted
    judge: str
    winner: str


def votes_of_scores(judge: str, scores: Mapping[Answer, float]) -> list[Vote]:
    """Return the vote on every two answers to the same turn of a question."""
    groups = collections.defaultdict(list)
    for answer, score in scores.items():
        groups[answer.question, answer.turn].append((answer.model, score))
    found = []
    for (question, turn), models in groups.items():
        for (first, one), (second, other) in itertools.combinations(sorted(models), 2):
            winner = "" if abs(one - other) <= TIE else first if one > other else second
            found.append(Vote(question, turn, (first, second), judge, winner))
    return found


def of_votes(votes: Iterable[Vote]) -> list[dict[str, Any]]:
    """Return the agreement of every two judges who voted on the same pairs, and of the voters of one judge.

    Returns:
        per pair of judges and turn: `judges`, `turn`, and per kind (`with_ties`, `without_ties`) the number of pairs of
        votes, the share that is equal and its Wilson interval, which takes the pairs for independent.
    """
    ballots = collections.defaultdict(lambda: collections.defaultdict(list))
    for vote in votes:
        ballots[vote.question, vote.turn, vote.models][vote.judge].append(vote.winner)
    counts: dict[tuple[int, str, str], dict[str, list[int]]] = {}
    for (_, turn, _), judges in ballots.items():
        for first, second in itertools.combinations_with_replacement(sorted(judges), 2):
            own = itertools.combinations(judges[first], 2)
            for one, other in own if first == second else itertools.product(judges[first], judges[second]):
                entry = counts.setdefault((turn, first, second), {"with_ties": [0, 0], "without_ties": [0, 0]})
                for kind in ("with_ties", *(["without_ties"] if one and other else [])):
                    entry[kind][0] += one == other
                    entry[kind][1] += 1
    return [
        {"judges": [first, second], "turn": turn} | {kind: _share(*pair) for kind, pair in entry.items()}
        for (turn, first, second), entry in sorted(counts.items())
    ]


def of_scores(scores: Mapping[str, Mapping[Answer, float]]) -> list[dict[str, Any]]:
    """Return, of every two judges, how their scores of the same answers compare.

    Args:
        scores: per judge, per answer.

    Returns:
        per pair of judges: `judges`, `count` of answers both scored, share that is `equal` and `within_one`, and
        `mean_difference`, the second judge's score less the first's.
    """
    found = []
    for first, second in itertools.combinations(sorted(scores), 2):
        shared = [answer for answer in scores[first] if answer in scores[second]]
        differences = [scores[second][answer] - scores[first][answer] for answer in shared]
        if differences:
            count = len(differences)
            found.append(
                {
                    "judges": [first, second],
                    "count": count,
                    "equal": sum(difference == 0 for difference in differences) / count,
                    "within_one": sum(abs(difference) <= 1 for difference in differences) / count,
                    "mean_difference": sum(differences) / count,
                }
            )
    return found


def _share(equal: int, count: int) -> dict[str, Any]:
    low, high = confidence_intervals.wilson(equal, count) if count else (None, None)
    return {"count": count, "equal": equal / count if count else None, "low": low, "high": high}
