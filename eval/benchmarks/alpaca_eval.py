"""Win rates from AlpacaEval 2 annotations: `fpo alpaca_eval --annotations MODEL_A.json MODEL_B.json`.

One file per model: the annotations.json that the alpaca_eval package writes (`output_1` of the baseline, `output_2` of
the model, `preference` from 1 = baseline to 2 = model), or a CSV table with `len_1` and `len_2` instead.
A table goes to stdout, all numbers to --json. --difficulty hub (or a path to df_gamed.csv) adds the length-controlled
win rate, --weights takes it from published weights instead of a fit. Nothing is judged here and no key is needed.

A preference of 1.5 (or 0, as old files have it) is a tie; so are two equal answers, which no judge was asked about.
Other rows without a preference are left out and counted; where more than 1 % of the 805 instructions are not judged,
win rates are withheld.

Exit codes: 0 scored; 1 a win rate is withheld; 2 the input cannot be used.
"""

import collections
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fpo_jax.cli import args as command_line
from fpo_jax.eval.benchmarks import judgement_files, length_control
from fpo_jax.eval.stats import confidence_intervals
from fpo_jax.io import terminal

CONSTANT = 0.5  # share of one answer among all from which it is reported


@dataclasses.dataclass(frozen=True)
class Options:
    """What to score. Paths as on the command line."""

    annotations: tuple[Path, ...]  # one file per model
    difficulty: str = ""  # df_gamed.csv or hub: adds length control
    weights: str = ""  # table of fitted weights by model, for length control without a fit
    instructions: int = 805  # of the benchmark; 0 = those of the file
    min_coverage: float = 0.99  # share of judged instructions below which win rates are withheld
    json: str = ""


@dataclasses.dataclass(frozen=True)
class Annotations:
    """The judgements of one model, row by row."""

    model: str
    preferences: list[float | None]  # in [0, 1]; None = not judged
    baseline_lengths: list[int]  # characters
    lengths: list[int]
    indices: list[int]  # number of the instruction
    commonest: float  # share of the model's commonest answer
    judge: str


def run(options: Options) -> dict[str, Any]:
    """Score every file.

    Returns:
        "models": per model the published figures (win rates in percent), and what stands out in the file.

    Raises:
        ValueError: an option or a file cannot be used.
    """
    if not 0 <= options.min_coverage <= 1:
        raise ValueError(f"--min-coverage={options.min_coverage} is no share; use a number from 0 to 1.")
    if options.instructions < 0:
        raise ValueError(f"--instructions={options.instructions} must be their number, or 0 for those of the file.")
    if options.weights and not options.difficulty:
        raise ValueError(
            "--weights needs --difficulty too: the win rate is a mean over the instructions' difficulties."
        )
    known = length_control.read_instructions(options.difficulty) if options.difficulty else None
    weights = length_control.read_weights(Path(options.weights)) if options.weights else None
    report: dict[str, Any] = {}
    for path in options.annotations:
        found = read(path)
        if found.model in report:
            raise ValueError(f"{path} is of {found.model}, as an earlier file is; give one file per model.")
        scores = win_rates(found.preferences)
        scores["avg_length"] = sum(found.lengths) // len(found.lengths)
        if known is not None:
            scores |= _controlled(found, known, weights)
        size = options.instructions or len(found.preferences)
        if len(found.preferences) > size:
            raise ValueError(
                f"{path} has {len(found.preferences)} rows and the benchmark {size} instructions; keep one judgement of"
                " each, or give --instructions."
            )
        coverage = scores["n_total"] / size
        withheld = coverage < options.min_coverage
        if withheld:
            scores |= {name: None for name, value in scores.items() if isinstance(value, float)}
        about = {"n_instructions": size, "coverage": coverage, "withheld": withheld}
        report[found.model] = scores | about | {"commonest_answer": found.commonest, "judge": found.judge}
    return {"benchmark": "AlpacaEval 2", "models": report}


def read(path: Path) -> Annotations:
    """Read the annotations of one model.

    Raises:
        ValueError: no annotations, damaged, of several models or judges, or a value that cannot be.
    """
    rows = judgement_files.read(path, fields=("preference",))
    texts = "output_2" in rows[0][1]
    judgement_files.require(rows, ("output_1", "output_2") if texts else ("len_1", "len_2"))
    model = judgement_files.only(path, rows, "generator_2", "give one file per model.")
    judge = judgement_files.only(path, rows, "annotator", "give one file per judge.")
    judgement_files.only(path, rows, "generator_1", "compare with one baseline at a time.")
    pairs = [_answers(place, row, texts) for place, row in rows]
    lengths = [(len(first), len(second)) if isinstance(first, str) else (first, second) for first, second in pairs]
    counts = collections.Counter(second for _, second in pairs)
    return Annotations(
        model=model or path.name.split(".gz")[0].rsplit(".", 1)[0],
        preferences=[_preference(place, row, pair, texts) for (place, row), pair in zip(rows, pairs, strict=True)],
        baseline_lengths=[first for first, _ in lengths],
        lengths=[second for _, second in lengths],
        indices=_indices(path, rows),
        commonest=max(counts.values()) / len(rows) if len(rows) > 1 else 0.0,
        judge=judge,
    )


def win_rates(preferences: Sequence[float | None]) -> dict[str, Any]:
    """Return AlpacaEval's figures of one model, in percent but for the counts.

    The win rate is the mean preference and its standard error the sample's; the discrete win rate counts a preference
    as a win above one half and as half a win at it.

    Args:
        preferences: in [0, 1], of the model over the baseline; None = not judged.

    Raises:
        ValueError: nothing is judged.

    >>> found = win_rates([1.0, 0.75, 0.5, None, 0.0])
    >>> found["win_rate"], found["discrete_win_rate"], found["n_draws"], found["n_total"]
    (56.25, 62.5, 1, 4)
    """
    judged = [preference for preference in preferences if preference is not None]
    count = len(judged)
    if not count:
        raise ValueError(f"none of {len(preferences)} rows has a preference; judge them first.")
    mean = math.fsum(judged) / count
    squares = math.fsum((preference - mean) ** 2 for preference in judged)
    error = math.sqrt(squares / (count - 1) / count) if count > 1 else 0.0
    wins = sum(preference > 0.5 for preference in judged)
    draws = sum(preference == 0.5 for preference in judged)
    return {
        "win_rate": 100 * mean,
        "standard_error": 100 * error,
        "low": 100 * (mean - confidence_intervals.Z95 * error),
        "high": 100 * (mean + confidence_intervals.Z95 * error),
        "n_wins": wins,
        "n_wins_base": count - wins - draws,
        "n_draws": draws,
        "n_total": count,
        "discrete_win_rate": 100 * (wins + draws / 2) / count,
    }


def table(report: dict[str, Any]) -> str:
    """Return the report as text for a terminal."""
    models = report["models"]
    controlled = any("length_controlled_winrate" in one for one in models.values())
    head = ["model", *(["LC win rate"] if controlled else []), "win rate", "s.e.", "95 %", "discrete"]
    head += ["wins", "losses", "draws", "judged", "length"]
    rows = []
    for name, one in sorted(models.items(), key=lambda item: -(item[1]["win_rate"] or 0.0)):
        cells = [name, *([_number(one.get("length_controlled_winrate"))] if controlled else [])]
        cells += [_number(one["win_rate"]), _number(one["standard_error"])]
        cells += [
            "-" if one["withheld"] else f"{one['low']:.2f} to {one['high']:.2f}",
            _number(one["discrete_win_rate"]),
        ]
        cells += [str(one[key]) for key in ("n_wins", "n_wins_base", "n_draws")]
        rows.append([*cells, f"{one['n_total']}/{one['n_instructions']}", str(one["avg_length"])])
    return terminal.table([head, *rows])


def remarks(report: dict[str, Any]) -> list[str]:
    """Return what a reader of the table must know about its rows."""
    found = []
    for name, one in report["models"].items():
        left = one["n_instructions"] - one["n_total"]
        if one["withheld"]:
            found.append(
                f"{name}: win rates withheld, {left} of {one['n_instructions']} instructions are not judged; judge the"
                " rest, or lower --min-coverage."
            )
        elif left:
            found.append(f"{name}: {left} of {one['n_instructions']} instructions are not judged and left out.")
        if one["commonest_answer"] >= CONSTANT:
            found.append(
                f"{name}: {one['commonest_answer']:.0%} of the answers are alike (or as long, in a file without texts),"
                " whatever was asked; such a win rate measures the judge."
            )
    return found


def _controlled(
    found: Annotations, known: length_control.Instructions, weights: dict[str, dict[str, float]] | None
) -> dict[str, Any]:
    extra = [first - second for first, second in zip(found.baseline_lengths, found.lengths, strict=True)]
    if weights is not None:
        if found.model not in weights:
            raise ValueError(
                f"--weights has no row {found.model!r} among its {len(weights)}; rename the file after a row of it, or"
                " leave --weights out to fit."
            )
        result = length_control.predict(weights[found.model], found.indices, known)
    elif not any(extra) and all(preference == 0.5 for preference in found.preferences):
        # The baseline against itself: one half by construction, and nothing to fit.
        result = length_control.predict(dict.fromkeys(length_control.WEIGHTS, 0.0), found.indices, known)
    else:
        result = length_control.fit(found.preferences, extra, found.indices, known)
    return {
        "length_controlled_winrate": result.win_rate,
        "lc_standard_error": result.standard_error,
        "weights": result.weights,
    }


def _answers(place: str, row: dict[str, Any], texts: bool) -> tuple[Any, Any]:
    """Return both answers, or their lengths in a file without texts."""
    if texts:
        return judgement_files.text(place, row, "output_1"), judgement_files.text(place, row, "output_2")
    return judgement_files.whole(place, row, "len_1"), judgement_files.whole(place, row, "len_2")


def _preference(place: str, row: dict[str, Any], answers: tuple[Any, Any], texts: bool) -> float | None:
    if row["preference"] is None or row["preference"] == "":
        return 0.5 if texts and answers[0] == answers[1] else None
    value = judgement_files.number(place, row, "preference")
    if value and not 1 <= value <= 2:
        raise ValueError(
            f"{place}: preference={value} is neither 0 nor in [1, 2]; these are no AlpacaEval annotations."
        )
    return value - 1 if value else 0.5


def _indices(path: Path, rows: Sequence[judgement_files.Row]) -> list[int]:
    """Return the number of each row's instruction: its `index`, or its place in the file."""
    if not all("index" in row for _, row in rows):
        return list(range(len(rows)))
    found = [judgement_files.whole(place, row, "index") for place, row in rows]
    twice = next((index for index, count in collections.Counter(found).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"{path}: index {twice} stands {found.count(twice)} times; keep one judgement of each.")
    return found


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as the command line says; return the exit status."""
    return command_line.run(Options, _work, arguments, program="fpo alpaca_eval", about=__doc__)


def _work(options: Options) -> int:
    with judgement_files.reserved(options.json):
        report = run(options)
        judgement_files.show(report, table=table(report), remarks=remarks(report), json=options.json)
    if not options.difficulty:
        print("no length control: --difficulty=hub, or a path to df_gamed.csv, adds it.")
    return 1 if any(one["withheld"] for one in report["models"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
