"""Arena-Hard scores against the definition of the public harness, and against its real questions and leaderboard."""

import csv
import json
import math

import numpy as np
import pytest
from scipy import optimize

from fpo_jax.eval.benchmarks import arena_hard
from tests import tolerances
from tests.paths import shared_data

LABELS = ("A>>B", "A>B", "A=B", "B>A", "B>>A")


def old_row(number, first, second, *, model="ours"):
    return {"question_id": f"q{number}", "model": model, "judge": "j", "games": [{"score": first}, {"score": second}]}


def new_row(number, first, second, *, model="ours", category="hard_prompt", baseline="base"):
    games = [{"score": first, "judgment": {"answer": "..."}}, {"score": second, "judgment": {"answer": "..."}}]
    head = {"uid": f"u{number}", "category": category, "judge": "j", "model": model, "baseline": baseline}
    return {**head, "games": games}


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scored(path, rows, **more):
    more = {"min_coverage": 0.0, "rounds": 50, **more}
    return arena_hard.run(arena_hard.Options(judgements=(written(path, rows),), **more))


def test_intervals_are_of_90_percent_in_v2_and_of_95_in_v01_as_in_their_harnesses(tmp_path):
    games = [("B>A", "A>B") if i % 3 else ("A>B", "B>A") for i in range(60)]  # the baseline is A first
    found = {}
    for row_of, category, percent in ((old_row, arena_hard.OLD, 95), (new_row, "hard_prompt", 90)):
        report = scored(tmp_path / f"{percent}.jsonl", [row_of(i, *pair) for i, pair in enumerate(games)], rounds=1000)
        assert report["categories"][category]["interval_percent"] == percent
        assert f"{percent} % (battles)" in arena_hard.table(report) and f"{185 - percent} %" not in arena_hard.table(
            report
        )
        found[percent] = ours(report, category)
    # 120 battles, 80 of them won, drawn as the harness draws them
    won_R = np.random.default_rng(0).multinomial(120, [1 / 3, 0, 2 / 3], 1000)[:, 2]
    for percent, bounds in ((95, (2.5, 97.5)), (90, (5, 95))):
        assert [found[percent]["low"], found[percent]["high"]] == pytest.approx(np.percentile(won_R / 1.2, bounds))
    assert found[95]["low_questions"] < found[90]["low_questions"]
    assert found[90]["high_questions"] < found[95]["high_questions"]


def ours(report, category=arena_hard.OLD):
    return report["categories"][category]["models"]["ours"]


def drawn(rows_of, models, count, seed):
    generator = np.random.default_rng(seed)
    return [
        rows_of(number, *generator.choice(LABELS, 2, p=shares).tolist(), model=model)
        for model, shares in models.items()
        for number in range(count)
    ]


MODELS = {"weak": (0.4, 0.3, 0.1, 0.1, 0.1), "even": (0.2,) * 5, "ours": (0.1, 0.1, 0.2, 0.2, 0.4)}


def battles(row):
    """What the model won of each battle, as the harness of v0.1 lays battles out."""
    found = []
    for game, better in zip(row["games"], ("B", "A"), strict=True):
        label = game["score"]
        found += [0.5] if label == "A=B" else [float(label[0] == better)] * (3 if len(label) == 4 else 1)
    return found


def test_every_verdict_in_both_orders(tmp_path):
    """The model is B in the first game and A in the second."""
    for first, second, won, count in (
        ("A>>B", "A>>B", 3, 6),
        ("B>>A", "A>>B", 6, 6),
        ("B>A", "A=B", 1.5, 2),
        ("A>B", "B>>A", 0, 4),
        ("A=B", "B>A", 0.5, 2),
    ):
        found = ours(scored(tmp_path / "j.jsonl", [old_row(0, first, second)]))
        assert (found["score"], found["n_battles"]) == (pytest.approx(100 * won / count), count), (first, second)
    assert (
        ours(scored(tmp_path / "j.jsonl", [old_row(0, "A>B", "A>B"), old_row(1, "B>A", "A=B")]))["contradicted"] == 0.5
    )


def test_score_is_the_joint_bradley_terry_fit(tmp_path):
    """The harness fits all models at once by maximum likelihood and reads each win rate against the baseline off it."""
    rows = drawn(old_row, MODELS, 60, seed=1)
    names = [*MODELS]
    model_M = np.array([names.index(row["model"]) for row in rows for _ in battles(row)])
    won_M = np.array([won for row in rows for won in battles(row)])

    def loss(ratings):  # of the three models and, last, of the baseline, which the data do not fix alone
        margins_M = ratings[model_M] - ratings[-1]
        return np.sum(np.logaddexp(0, margins_M) - won_M * margins_M) + 1e-9 * ratings @ ratings

    ratings = optimize.minimize(loss, np.zeros(4), tol=1e-12).x
    expected = 100 / (1 + np.exp(ratings[3] - ratings[:3]))
    found = scored(tmp_path / "j.jsonl", rows)["categories"][arena_hard.OLD]["models"]
    np.testing.assert_allclose([found[name]["score"] for name in names], expected, atol=tolerances.BRADLEY_TERRY)


def test_new_form_is_the_mean_of_its_scores(tmp_path):
    rows = drawn(new_row, MODELS, 40, seed=2)
    found = scored(tmp_path / "j.jsonl", rows)["categories"]["hard_prompt"]
    assert found["baseline"] == "base"
    for name in MODELS:
        expected = np.mean([won for row in rows if row["model"] == name for won in battles(row)])
        assert found["models"][name]["score"] == pytest.approx(100 * expected, abs=1e-9)


def test_turned_verdicts_and_lost_games_follow_each_version(tmp_path):
    turned = [("A<<B", "B<<A"), ("B=A", "A<B")]
    new = ours(scored(tmp_path / "n.jsonl", [new_row(i, *pair) for i, pair in enumerate(turned)]), "hard_prompt")
    assert new["score"] == pytest.approx(100 * (6 + 0.5) / 8) and new["n_battles"] == 8
    lost = [("A>>B", None), (None, None), ("B>A", "A>B"), ("A<<B", "A>B")]
    new = ours(scored(tmp_path / "n.jsonl", [new_row(i, *pair) for i, pair in enumerate(lost[:3])]), "hard_prompt")
    assert (new["score"], new["n_battles"], new["n_questions"], new["n_unjudged"]) == (100, 2, 1, 2)
    old = ours(scored(tmp_path / "o.jsonl", [old_row(i, *pair) for i, pair in enumerate(lost)]))
    assert (old["score"], old["n_battles"], old["n_questions"], old["n_unjudged"]) == (50, 6, 3, 1)
    row = new_row(0, None, None) | {"games": [None, {"score": "A>B"}]}
    with pytest.raises(ValueError, match="no verdict on any of 1 questions of hard_prompt"):
        scored(tmp_path / "n.jsonl", [row])


def test_intervals_cover_what_they_say(tmp_path):
    """Percentiles of resampled battles, and of resampled questions with all their battles together."""
    rows = drawn(old_row, {"ours": MODELS["ours"]}, 400, seed=3)
    found = ours(scored(tmp_path / "j.jsonl", rows, rounds=4000))
    wins = np.array([won for row in rows for won in battles(row)])
    half = 1.96 * 100 * wins.std() / math.sqrt(len(wins))
    for bound, expected in (("low", -half), ("high", half)):
        assert found[bound] - found["score"] == pytest.approx(expected, rel=tolerances.BOOTSTRAP)
    per_question = [(sum(battles(row)), len(battles(row))) for row in rows]
    points, counts = np.array(per_question).T
    residuals = points - counts * points.sum() / counts.sum()  # delta method of a ratio of sums
    half = 1.96 * 100 * math.sqrt(np.sum(residuals**2)) / counts.sum()
    for bound, expected in (("low_questions", -half), ("high_questions", half)):
        assert found[bound] - found["score"] == pytest.approx(expected, rel=tolerances.BOOTSTRAP)
    assert found["high_questions"] - found["low_questions"] > 1.2 * (found["high"] - found["low"])
    again = ours(scored(tmp_path / "j.jsonl", rows, rounds=4000))
    assert again == found  # the draws are those of the seed


def test_repeated_judgements_count_once(tmp_path, capsys):
    rows = [new_row(0, "A>B", None), new_row(1, "A=B", "A=B"), new_row(0, "B>A", "A>B"), new_row(0, None, None)]
    found = ours(scored(tmp_path / "j.jsonl", rows), "hard_prompt")
    assert (found["score"], found["n_questions"], found["n_repeated"], found["n_unjudged"]) == (75, 2, 2, 0)
    assert arena_hard.main(["--judgements", str(tmp_path / "j.jsonl"), "--min-coverage", "0"]) == 0
    assert "ours, hard_prompt: 498 questions missing from the file, 2 judgements repeated" in capsys.readouterr().out


def test_too_few_verdicts_withhold_the_score(tmp_path, capsys):
    rows = [old_row(number, "B>A", "A>B") for number in range(494)]
    out = tmp_path / "scores.json"
    arguments = ["--judgements", str(written(tmp_path / "j.jsonl", rows)), "--json", str(out)]
    assert arena_hard.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "ours, arena-hard-v0.1: 6 questions missing from the file, score withheld" in printed
    assert "100.0" not in printed and "494/500" in printed
    assert ours(json.loads(out.read_text()))["score"] is None
    written(tmp_path / "j.jsonl", [*rows, old_row(494, "B>A", "A>B")])
    assert arena_hard.main(arguments) == 0
    assert "100.0" in capsys.readouterr().out


WRONG = [
    (
        [{"uid": "u", "category": "math", "model": "m", "games": [None, None]}],
        "category='math' is not one of arena-hard",
    ),
    ([new_row(0, "A>B", "A>B", category=["hard_prompt"])], r"category=\['hard_prompt'\] is not one of"),
    ([{"model": "m", "games": [None, None]}], r"no field 'uid' \(v2\.0\) or 'question_id' \(v0\.1\)"),
    ([old_row(0, "A>B", "A>B") | {"games": [{"score": "A>B"}]}], "games must be two, one in each order"),
    ([old_row(0, "A>B", "A>B") | {"games": [{}, None]}], "a game must be null or have a `score`"),
    ([old_row(0, "A>B", 7)], "a game must be null or have a `score`"),
    ([old_row(0, "A>B", "A>B", model=None)], "model=None is no text"),
    ([old_row(0, "A>B", "A>B"), old_row(1, "A>B", "A>B") | {"judge": "k"}], "of 2 judges, j, k; score one judge"),
    ([new_row(0, "A>B", "A>B"), new_row(1, "A>B", "A>B", baseline="b", model="n")], "judged against b, base; compare"),
    (
        [old_row(number, "A>B", "A>B") for number in range(501)],
        "ours has 501 questions of arena-hard-v0.1, which has 500",
    ),
    (
        [{"question_id": 81, "model": "m", "score": 7, "turn": 1}],
        "the file holds MT-Bench judgements, which fpo mt_bench",
    ),
]


@pytest.mark.parametrize(("rows", "message"), WRONG)
def test_wrong_files_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        scored(tmp_path / "j.jsonl", rows)


def test_command_line_says_what_is_wrong(tmp_path, capsys):
    path = written(tmp_path / "j.jsonl", [old_row(0, "A>B", "A>B")])
    with path.open("a") as file:
        file.write('{"question_id": "q1", "ga')
    assert arena_hard.main(["--judgements", str(path)]) == 2
    assert "j.jsonl:2: broken JSON" in capsys.readouterr().err
    assert arena_hard.main(["--judgements", str(path), "--rounds", "0"]) == 2
    assert "--rounds=0 must be at least 1" in capsys.readouterr().err


# real artefacts


def test_categories_are_those_of_the_real_questions():
    counts = {}
    for version in ("v0.1", "v2.0"):
        for line in shared_data("arena_hard", f"question.{version}.jsonl").open(encoding="utf-8"):
            category = json.loads(line)["category"]
            counts[category] = counts.get(category, 0) + 1
    assert counts == arena_hard.SIZES


def test_published_intervals_are_those_of_resampled_battles():
    """A model's 500 questions are 1,000 battles if no verdict is strong and 3,000 if all are.

    Its published interval must lie between those two; one over questions would be wider than either.
    """
    with shared_data("arena_hard", "arena_hard_leaderboard_20240731.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows if row["score"] == "50.0"} == {arena_hard.BASELINES[arena_hard.OLD]}
    ratios = []
    for row in rows:
        if row["model"] == "gpt-4-0314":
            continue
        won = round(5 * float(row["score"]))  # of 500 questions, alike in both orders
        widths = []
        for battle in (1, 3):
            questions = [
                arena_hard.Question(2 * battle * right, 2 * battle, ((right, battle),) * 2, False)
                for right in [1.0] * won + [0.0] * (500 - won)
            ]
            found = arena_hard.score(questions, rounds=500, generator=np.random.default_rng(0), percentiles=(2.5, 97.5))
            widths.append(found["high"] - found["low"])
        ratios.append([(float(row["rating_q975"]) - float(row["rating_q025"])) / width for width in widths])
    weak, strong = np.array(ratios).T
    assert len(ratios) == 59 and weak.max() < 1 < strong.min()  # measured 0.91 and 1.03
