"""MT-Bench figures of real judgements, and agreement of judges against counts made by hand."""

import itertools
import json
import math

import numpy as np
import pytest

from fpo_jax.data import loading
from fpo_jax.eval.benchmarks import judge_agreement, mt_bench
from fpo_jax.eval.stats import confidence_intervals
from tests.paths import shared_data

QUESTIONS = range(81, 161)


def single(question, turn, score, *, model="ours", judge="gpt-4", text=None):
    text = f"Fine. Rating: [[{score}]]" if text is None and score != -1 else text or "Both are fine."
    head = {"question_id": question, "turn": turn, "model": model, "judge": [judge, "single-v1"]}
    return {**head, "judgment": text, "score": score, "tstamp": 0.0}


def whole(score_of, **more):
    return [single(question, turn, score_of(question, turn), **more) for turn in (1, 2) for question in QUESTIONS]


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(path, rows, **more):
    return mt_bench.run(mt_bench.Options(judgements=(written(path, rows),), **more))


def of(report, model="ours", judge="gpt-4"):
    return report["judges"][judge][model]


@pytest.fixture(scope="module")
def real():
    path = shared_data("mt_bench", "gpt-4_single.phi-3.jsonl.gz")
    rows = [row for _, row in loading.rows(str(path), split=None, data_dir=None, revision=None)]
    return mt_bench.run(mt_bench.Options(judgements=(path,))), rows


# real judgements


def test_real_scores_are_what_their_texts_say(real):
    report, rows = real
    assert len(rows) == 160
    assert [mt_bench.rating(row["judgment"]) for row in rows] == [row["score"] for row in rows]
    assert of(report, "phi-3-dpo")["n_differing"] == 0


def test_real_means_per_turn_and_category(real):
    report, rows = real
    found = of(report, "phi-3-dpo")
    questions = shared_data("mt_bench", "question.jsonl").read_text().strip().split("\n")
    category = {one["question_id"]: one["category"] for one in map(json.loads, questions)}

    def mean(**wanted):
        rows_of = [row for row in rows if wanted.get("turn", row["turn"]) == row["turn"]]
        return np.mean(
            [
                row["score"]
                for row in rows_of
                if wanted.get("category", category[row["question_id"]]) == category[row["question_id"]]
            ]
        )

    assert found["average"] == found["all_rows_average"] == pytest.approx(mean(), abs=1e-12)
    assert set(found["categories"]) == set(category.values())
    for turn in (1, 2):
        assert found["turns"][str(turn)] == pytest.approx(mean(turn=turn), abs=1e-12)
        for name, one in found["categories"].items():
            assert one["average"] == pytest.approx(mean(category=name), abs=1e-12)
            assert one["turns"][str(turn)] == pytest.approx(mean(category=name, turn=turn), abs=1e-12)
    assert (found["n_scored"], found["n_missing"], found["n_unparsed"], found["n_repeated"]) == (160, 0, 0, 0)


def test_the_categories_are_those_of_the_real_questions():
    for line in shared_data("mt_bench", "question.jsonl").open(encoding="utf-8"):
        question = json.loads(line)
        assert mt_bench.category(question["question_id"]) == question["category"]


# scores


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Rating: [[7]]", 7),
        ("[[6.5]] and later [[9]]", 6.5),
        ("Rating: [5]", 5),
        ("As [1] says, [[3]]", 3),
        ("Rating: [[N/A]]", -1),
        ("Rating: 7", -1),
        ("$ERROR$", -1),
        ("", -1),
    ],
)
def test_ratings_in_texts(text, score):
    assert mt_bench.rating(text) == score


def test_repeated_and_unscored_judgements(tmp_path):
    """A repeated judgement counts once, the last that has a score; -1 is no score."""
    rows = whole(lambda question, turn: 4 + turn)
    rows += [single(81, 1, 9), single(82, 1, -1), single(83, 2, 2), single(83, 2, -1)]
    rows[79] = single(160, 1, -1)  # never scored
    report = run(tmp_path / "j.jsonl", rows)
    found = of(report)
    assert found["turns"]["1"] == pytest.approx((78 * 5 + 9) / 79)
    assert found["turns"]["2"] == pytest.approx((79 * 6 + 2) / 80)
    assert found["average"] == pytest.approx((78 * 5 + 9 + 79 * 6 + 2) / 159)
    assert found["all_rows_average"] == pytest.approx((79 * 5 + 9 + 80 * 6 + 2) / 161)  # as FastChat's show_result
    assert (found["n_scored"], found["n_unparsed"], found["n_repeated"], found["withheld"]) == (159, 1, 4, False)
    (remark,) = mt_bench.remarks(report)
    assert remark.startswith("ours, judge gpt-4: 1 judgements without a score, left out, 4 judgements repeated")


def test_an_exact_copy_of_the_file_changes_nothing(tmp_path):
    rows = whole(lambda question, turn: question % 10 + 1)
    once, twice = run(tmp_path / "j.jsonl", rows), run(tmp_path / "j.jsonl", rows + rows)
    assert of(twice).pop("n_repeated") == 160 and of(once).pop("n_repeated") == 0
    assert once == twice


def test_interval_is_over_questions(tmp_path):
    scores = np.random.default_rng(0).integers(1, 11, size=(80, 2))
    found = of(run(tmp_path / "j.jsonl", whole(lambda question, turn: int(scores[question - 81, turn - 1]))))
    half = 1.959963984540054 * scores.mean(1).std(ddof=1) / math.sqrt(80)
    assert (found["low"], found["high"]) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=1e-9)


def test_too_few_scores_withhold_the_mean(tmp_path, capsys):
    rows = whole(lambda question, turn: 7)[:-1]
    rows[0] = single(81, 1, None, text="Rating: 7")  # null is no score either
    out = tmp_path / "report.json"
    arguments = ["--judgements", str(written(tmp_path / "j.jsonl", rows)), "--json", str(out)]
    assert mt_bench.main(arguments) == 1
    printed = capsys.readouterr().out
    assert (
        "1 judgements without a score, left out, 1 answers not judged, mean withheld" in printed
        and "158/160" in printed
    )
    found = of(json.loads(out.read_text()))
    assert found["average"] is None and found["all_rows_average"] is None and found["low"] is None
    assert found["turns"] == {"1": 7, "2": 7} and found["categories"]["writing"]["n_scored"] == 19
    assert mt_bench.main([*arguments, "--min-coverage", "0.98"]) == 0
    assert of(json.loads(out.read_text()))["average"] == 7


def test_scores_that_differ_from_their_text_are_reported(tmp_path):
    rows = whole(lambda question, turn: 7)
    rows[3] = single(84, 1, 7, text="Rating: [[8]]")
    report = run(tmp_path / "j.jsonl", rows)
    assert of(report)["average"] == 7
    assert mt_bench.remarks(report) == [
        "ours, judge gpt-4: 1 scores that differ from their text (the stored ones count)."
    ]


# agreement


def pair(question, first, second, winners, *, turn=1, judge="gpt-4"):
    """A pairwise judgement of both orders, or one person's vote."""
    if isinstance(winners, tuple):
        head = {"model_1": first, "model_2": second, "judge": [judge, "pair-v2"]}
        return {**head, "question_id": question, "turn": turn, "g1_winner": winners[0], "g2_winner": winners[1]}
    head = {"model_a": first, "model_b": second, "judge": judge, "winner": winners}
    return {**head, "question_id": question, "turn": turn}


def shares(report):
    return {
        (*one["judges"], one["turn"]): [
            (round(one[kind]["equal"] * one[kind]["count"]) if one[kind]["count"] else 0, one[kind]["count"])
            for kind in ("with_ties", "without_ties")
        ]
        for one in report["vote_agreement"]
    }


def test_agreement_of_a_judge_with_people_and_of_people(tmp_path):
    rows = [
        pair(81, "a", "b", ("model_1", "model_1")),  # a
        pair(81, "b", "a", "model_b", judge="expert_1"),  # a, written the other way round
        pair(81, "a", "b", "model_b", judge="expert_2"),  # b
        pair(82, "a", "b", ("model_1", "model_2")),  # the orders contradict each other: tie
        pair(82, "a", "b", "tie (inconsistent)", judge="expert_1"),
        pair(82, "a", "b", "tie", judge="expert_3"),
        pair(83, "a", "b", ("model_2", "tie")),  # tie
        pair(83, "a", "b", "model_b", judge="expert_1"),
        pair(84, "a", "b", ("error", "model_1")),  # no vote
        pair(84, "a", "b", "model_a", judge="expert_1"),
        pair(85, "a", "b", ("model_1", "model_1")),  # judged again
        pair(85, "a", "b", ("model_2", "model_2")),
        pair(85, "a", "b", "model_b", judge="author_1", turn=1),
        pair(86, "a", "b", ("model_1", "model_1"), turn=2),
        pair(86, "a", "b", "model_a", judge="expert_9", turn=2),
    ]
    assert shares(run(tmp_path / "j.jsonl", rows)) == {
        ("gpt-4 (pairs)", "human", 1): [(3, 5), (1, 2)],
        ("human", "human", 1): [(1, 2), (0, 1)],
        ("author", "gpt-4 (pairs)", 1): [(1, 1), (1, 1)],
        ("gpt-4 (pairs)", "human", 2): [(1, 1), (1, 1)],
    }


def test_scores_vote_on_every_pair_and_tie_within_a_tenth(tmp_path):
    scores = {"a": 8, "b": 8.1, "c": 6.5}
    rows = [single(81, 1, score, model=model) for model, score in scores.items()]
    rows += [single(81, 1, score, model=model, judge="other") for model, score in {"a": 7, "b": 9, "c": 6.5}.items()]
    rows += [pair(81, "c", "a", "model_b", judge="expert_1")]
    rows += [single(81, 2, 5, model="a")]  # nothing to compare it with
    report = run(tmp_path / "j.jsonl", rows, min_coverage=0.0)
    # gpt-4: a = b > c; other: b > a > c; the expert: a > c
    assert shares(report) == {
        ("gpt-4", "other", 1): [(2, 3), (2, 2)],
        ("gpt-4", "human", 1): [(1, 1), (1, 1)],
        ("human", "other", 1): [(1, 1), (1, 1)],
    }
    (found,) = report["score_agreement"]
    assert found["judges"] == ["gpt-4", "other"] and found["count"] == 3
    assert found["equal"] == pytest.approx(1 / 3) and found["within_one"] == 1.0
    assert found["mean_difference"] == pytest.approx((-1 + 0.9 + 0) / 3)
    printed = mt_bench.table(report)
    assert "gpt-4 / other" in printed and "66.7%" in printed and "-0.03" in printed


def test_agreement_of_judges_who_share_nothing_is_none(tmp_path):
    rows = [single(81, 1, 5), single(82, 1, 5, judge="other")]
    report = run(tmp_path / "j.jsonl", rows, min_coverage=0.0)
    assert report["score_agreement"] == report["vote_agreement"] == []


def test_votes_of_many_judges_meet_in_every_pair():
    winners = {"j": "a", "k": "a", "l": ""}
    votes = [judge_agreement.Vote(81, 1, ("a", "b"), judge, winner) for judge, winner in winners.items()]
    found = {tuple(one["judges"]): one["with_ties"]["equal"] for one in judge_agreement.of_votes(votes)}
    assert found == {("j", "k"): 1.0, ("j", "l"): 0.0, ("k", "l"): 0.0}
    assert set(found) == set(itertools.combinations(winners, 2))


# wrong input

WRONG = [
    ([single(80, 1, 5)], r"j\.jsonl:1: question 80, turn 1; MT-Bench has questions 81 to 160"),
    ([single(81, 3, 5)], "question 81, turn 3"),
    ([single(81, 1, 55)], "score=55 is neither -1 nor from 0 to 10"),
    ([single(81, 1, 5) | {"score": "high"}], "score='high' is no finite number"),
    ([single(81, 1, 5) | {"question_id": "x"}], "question_id='x' is no finite number"),
    ([single(81, 1, 5) | {"model": ["m"]}], r"model=\['m'\] is no text"),
    ([single(81, 1, 5) | {"judge": 4}], "judge=4 is no text"),
    ([single(81, 1, -1)], "gpt-4 gave ours no score in 1 judgements"),
    ([{"question_id": 81, "judge": "j", "score": 5}], "no field 'model', 'turn'"),
    ([pair(81, "a", "b", ("A", "A"))], "winner A is not one of model_1, model_2, tie"),
    ([pair(81, "a", "b", "model_1", judge="expert_1")], "winner model_1 is not one of model_a, model_b, tie"),
    ([{"question_id": 81, "judge": "j"}], "no field 'model_a', 'model_b', 'turn', 'winner'"),
    ([{"index": 0, "preference": 1.5}], "the file holds AlpacaEval annotations, which fpo alpaca_eval reads"),
    ([{"uid": "u", "games": [], "model": "m"}], "the file holds Arena-Hard judgements, which fpo arena_hard reads"),
]


@pytest.mark.parametrize(("rows", "message"), WRONG)
def test_wrong_files_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "j.jsonl", rows)


def test_the_command_line_says_what_is_wrong(tmp_path, capsys):
    path = written(tmp_path / "j.jsonl", [single(81, 1, 5)])
    with path.open("a") as file:
        file.write('{"question_id": 82, "tu')
    assert mt_bench.main(["--judgements", str(path)]) == 2
    assert "j.jsonl:2: broken JSON" in capsys.readouterr().err
    assert mt_bench.main(["--judgements", str(path), "--min-coverage", "2"]) == 2
    assert "--min-coverage=2.0 is no share" in capsys.readouterr().err


def test_an_interval_needs_two_values():
    with pytest.raises(ValueError, match="an interval of 1 values; need at least 2"):
        confidence_intervals.mean_interval([1.0])
