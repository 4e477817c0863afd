"""AlpacaEval 2 figures: the published ones of real judgements, and length control against known weights and peers."""

import csv
import gzip
import json
import math

import numpy as np
import pandas
import pytest
from scipy import optimize

from fpo_jax.eval.benchmarks import alpaca_eval, length_control
from fpo_jax.io import terminal
from tests import tolerances
from tests.paths import shared_data

LENGTH, DIFFICULTY, OWN = length_control.WEIGHTS
MODELS = (
    "FuseChat-Llama-3.2-1B-Instruct",
    "Mixtral-8x7B-Instruct-v0.1_concise",
    "OpenHermes-2.5-Mistral-7B",
    "claude-2.1",
    "gpt4_1106_preview",
    "gpt4_gamed",
)
PUBLISHED = ("win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total", "discrete_win_rate")


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits))


def annotation(index, preference, *, first="x" * 50, second="y" * 40, **more):
    found = {"index": index, "instruction": f"i{index}", "output_1": first, "output_2": second, "annotator": "judge"}
    return {**found, "generator_1": "base", "generator_2": "ours", "preference": preference, **more}


def written(path, rows):
    path.write_text(json.dumps(rows))
    return path


def table_rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# real judgements


@pytest.mark.parametrize("model", MODELS)
def test_the_published_figures_of_a_real_model(model):
    path = shared_data("alpaca_eval", "numeric", f"{model}.csv")
    (published,) = (row for row in table_rows(shared_data("alpaca_eval", "leaderboard.csv")) if row[""] == model)
    found = alpaca_eval.run(alpaca_eval.Options(annotations=(path,)))["models"][model]
    for name in (*PUBLISHED, "avg_length"):
        np.testing.assert_allclose(found[name], float(published[name]), rtol=0, atol=1e-9, err_msg=name)


def test_constant_answers_are_reported_and_real_ones_are_not():
    paths = tuple(shared_data("alpaca_eval", "numeric", f"{model}.csv") for model in MODELS)
    remarks = alpaca_eval.remarks(alpaca_eval.run(alpaca_eval.Options(annotations=paths)))
    assert len(remarks) == 1 and remarks[0].startswith("gpt4_gamed: 95% of the answers are alike")


def test_published_weights_predict_the_published_rates():
    """The difficulties are not here, but the rates of half the models tell how they are distributed.

    With that distribution the weights must give the rates of the other half. Models with rows that were not judged, and
    two whose published row is of another fit than their weights (one of them NullModel), stay out of the comparison.
    """
    weights = length_control.read_weights(shared_data("alpaca_eval", "glm_weights.csv"))
    rows = table_rows(shared_data("alpaca_eval", "leaderboard.csv"))
    whole = {row[""]: float(row["length_controlled_winrate"]) for row in rows if row["n_total"] == "805"}
    names = sorted(set(weights) & set(whole) - {"dbrx-instruct", "NullModel"})
    assert len(names) > 180
    nodes = np.linspace(-6, 6, 61)
    known = instructions(nodes)
    rates = np.array(
        [[length_control.predict(weights[name], [node], known).win_rate for node in range(61)] for name in names]
    )
    targets = np.array([whole[name] for name in names])
    half = np.arange(len(names)) % 2 == 0
    shares, _ = optimize.nnls(np.vstack([rates[half], np.full(61, 1e4)]), np.append(targets[half], 1e4))
    np.testing.assert_allclose(rates[~half] @ shares, targets[~half], atol=tolerances.PUBLISHED_RATE)


# win rates


def test_ties_never_asked_and_rows_never_judged(tmp_path):
    rows = [annotation(0, 2.0), annotation(1, 1.0), annotation(2, None, first="same", second="same")]
    rows += [annotation(3, 0), annotation(4, 1.5), annotation(5, 1.75), annotation(6, None)]
    path = written(tmp_path / "a.json", rows)
    found = alpaca_eval.run(alpaca_eval.Options(annotations=(path,), instructions=0, min_coverage=0.8))["models"][
        "ours"
    ]
    judged = [1, 0, 0.5, 0.5, 0.5, 0.75]
    assert found["win_rate"] == pytest.approx(100 * np.mean(judged), abs=1e-12)
    assert found["standard_error"] == pytest.approx(100 * np.std(judged, ddof=1) / math.sqrt(6), abs=1e-12)
    assert (found["n_wins"], found["n_wins_base"], found["n_draws"], found["n_total"]) == (2, 1, 3, 6)
    assert found["discrete_win_rate"] == pytest.approx(100 * 3.5 / 6)
    assert found["avg_length"] == (6 * 40 + 4) // 7  # characters of all answers, cut to a whole number


def test_too_few_judgements_withhold_the_rate(tmp_path, capsys):
    rows = [annotation(index, None if index < 2 else 2.0) for index in range(100)]
    out = tmp_path / "report" / "scores.json"
    arguments = ["--annotations", str(written(tmp_path / "a.json", rows)), "--json", str(out)]
    assert alpaca_eval.main(arguments) == 1
    assert "ours: win rates withheld, 707 of 805 instructions are not judged" in capsys.readouterr().out
    arguments += ["--instructions", "100"]
    assert alpaca_eval.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "ours: win rates withheld, 2 of 100 instructions are not judged" in printed and "100.00" not in printed
    found = json.loads(out.read_text())["models"]["ours"]
    assert found["win_rate"] is None and found["discrete_win_rate"] is None and found["n_wins"] == 98
    assert alpaca_eval.main([*arguments, "--min-coverage", "0.98"]) == 0
    printed = capsys.readouterr().out
    assert "ours: 2 of 100 instructions are not judged and left out" in printed and "98/100" in printed
    assert json.loads(out.read_text())["models"]["ours"]["win_rate"] == 100.0


def test_every_form_of_file_gives_the_same(tmp_path):
    rows = [annotation(index, 1 + index / 7) for index in range(8)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "lines.jsonl").write_text(lines)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "ours.csv").write_text(
        "index,len_1,len_2,preference\n" + "".join(f"{i},50,40,{1 + i / 7!r}\n" for i in range(8))
    )
    paths = [
        written(tmp_path / "list.json", rows),
        *map(tmp_path.joinpath, ("lines.jsonl", "packed.jsonl.gz", "ours.csv")),
    ]
    options = [alpaca_eval.Options(annotations=(path,), instructions=0) for path in paths]
    found = [alpaca_eval.run(one)["models"]["ours"] for one in options]
    for one in found:
        assert {name: one[name] for name in (*PUBLISHED, "avg_length")} == {
            name: found[0][name] for name in (*PUBLISHED, "avg_length")
        }


WRONG = [
    ([annotation(0, 2.5)], r"a\.json\[0\]: preference=2\.5 is neither 0 nor in \[1, 2\]"),
    ([annotation(0, "better")], "preference='better' is no finite number"),
    ([annotation(0, 1.0), annotation(0, 2.0)], "index 0 stands 2 times"),
    ([annotation(0, 1.0), annotation(1, 1.0, generator_2="theirs")], "2 values of generator_2: ours, theirs"),
    ([annotation(0, 1.0), annotation(1, 1.0, annotator="another")], "2 values of annotator"),
    ([annotation(0, None)], "none of 1 rows has a preference"),
    ([annotation(0, 1.0, second=None)], "output_2=None is no text"),
    ([{"preference": 1.0}], "no field 'len_1', 'len_2'; the file holds AlpacaEval"),
    (
        [{"question_id": 81, "score": 7, "turn": 1}],
        "no field 'preference'; the file holds MT-Bench judgements, which fpo mt_b",
    ),
    ([{"question_id": 1, "games": []}], "the file holds Arena-Hard judgements, which fpo arena_hard reads"),
    ([{"prompt": "p"}], "no field 'preference'; it has prompt"),
    ([3], r"a\.json\[0\]: a row must be a JSON object, not int"),
    ([], "holds no row"),
]


@pytest.mark.parametrize(("rows", "message"), WRONG)
def test_wrong_files_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        alpaca_eval.run(alpaca_eval.Options(annotations=(written(tmp_path / "a.json", rows),)))


def test_damaged_files_are_refused(tmp_path):
    whole = json.dumps(annotation(0, 1.0))
    for name, content, message in (
        ("half.jsonl", f"{whole}\n{whole[:40]}".encode(), r"half\.jsonl:2: broken JSON.*judge it again"),
        ("half.json", f"[{whole}, ".encode(), r"half\.json:1: broken JSON"),
        ("half.jsonl.gz", gzip.compress(whole.encode() * 9)[:60], "gzip stream is cut"),
        ("nan.json", f"[{whole.replace('1.0', 'NaN')}]".encode(), "preference=.*NaN is not JSON.* is no finite number"),
        ("short.csv", b"index,len_1,len_2,preference\n0,5\n", r"short\.csv:2: not the 4 columns"),
        ("torn.csv.gz", gzip.compress(b"index,preference\n" * 9)[:-20] + b"\xff" * 12, "cannot be read as a table"),
        ("long.json", f"[{whole.replace('1.0', '1' * 400)}]".encode(), "preference=1{80} is no finite number"),
        ("empty.json", b"", "holds no row"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            alpaca_eval.read(tmp_path / name)
    with pytest.raises(ValueError, match="is no file"):
        alpaca_eval.read(tmp_path / "absent.json")


def test_the_command_line_says_what_is_wrong(tmp_path, capsys):
    path = written(tmp_path / "a.json", [annotation(0, 1.0), annotation(1, 2.0)])
    for more, message in (
        (["--min-coverage", "1.1"], "--min-coverage=1.1 is no share"),
        (["--instructions", "-1"], "--instructions=-1 must be their number"),
        (["--instructions", "1"], "has 2 rows and the benchmark 1 instructions; keep one judgement of each"),
        (["--weights", "w.csv"], "--weights needs --difficulty"),
        (
            ["--difficulty", "absent.csv"],
            "--difficulty=absent.csv is no file; give the df_gamed.csv of the hub data set",
        ),
        (["--difficulty", "hub"], "could not be fetched"),  # the tests are offline
    ):
        assert alpaca_eval.main(["--annotations", str(path), *more]) == 2
        assert message in capsys.readouterr().err
    assert alpaca_eval.main(["--annotations", str(path), str(path)]) == 2
    assert "is of ours, as an earlier file is" in capsys.readouterr().err


# length control

COUNT = 200
NEEDED = "length control needs scikit-learn, which the extra `eval` installs"
TRUE = {LENGTH: -1.1, DIFFICULTY: 0.6, OWN: -0.4}


def instructions(nodes):
    """Difficulties alone, by number."""
    empty = np.zeros((0, 3))
    return length_control.Instructions(dict(enumerate(map(float, nodes))), empty, empty[:, 0], empty[:, 0], "here")


def judged_by(weights, noise, folder):
    """Write judgements of `ours` and rows of two gamed baselines that follow `weights`; return both, and difficulty."""
    draw = np.random.default_rng(7)
    difficulty = draw.normal(size=COUNT)

    def rate(length, own):
        logits = weights[LENGTH] * np.tanh(length) + weights[DIFFICULTY] * difficulty + own
        return sigmoid(logits + noise * draw.normal(size=COUNT))

    lines = ["model,index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"]
    for model, shift in (("concise", 1.2), ("verbose", -0.8)):
        lengths = shift + 0.5 * draw.normal(size=COUNT)
        for index, row in enumerate(zip(rate(lengths, 0).tolist(), lengths.tolist(), difficulty.tolist(), strict=True)):
            lines.append(f"{model},{index},{','.join(map(repr, row))},False")
    gamed = folder / "df_gamed.csv"
    gamed.write_text("\n".join(lines) + "\n")
    lengths = draw.integers(100, [[1000], [2000]], size=(2, COUNT))  # ours are longer
    extra = lengths[0] - lengths[1]
    rates = rate(extra / extra.std(ddof=1), weights[OWN]).tolist()
    rows = [
        annotation(index, 1 + one, first="x" * int(first), second="y" * int(second))
        for index, (one, first, second) in enumerate(zip(rates, *lengths, strict=True))
    ]
    if noise:
        rows[3]["preference"], rows[5]["preference"] = 1.5, None
    return gamed, written(folder / "ours.json", rows), difficulty


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """Judgements that follow TRUE to the last digit."""
    return judged_by(TRUE, 0.0, tmp_path_factory.mktemp("exact"))


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """Judgements that no weights explain, a tie and a row that was not judged among them."""
    return judged_by({LENGTH: -0.4, DIFFICULTY: 0.9, OWN: 0.3}, 2.0, tmp_path_factory.mktemp("noisy"))


def controlled(annotations, gamed, **more):
    options = alpaca_eval.Options(annotations=(annotations,), difficulty=str(gamed), instructions=0, **more)
    (found,) = alpaca_eval.run(options)["models"].values()
    return found


def test_the_fit_recovers_known_weights(synthetic):
    pytest.importorskip("sklearn", reason=NEEDED)
    gamed, annotations, difficulty = synthetic
    fitted = controlled(annotations, gamed)
    assert list(fitted["weights"]) == [LENGTH, DIFFICULTY, OWN]
    np.testing.assert_allclose(list(fitted["weights"].values()), list(TRUE.values()), atol=tolerances.GLM_WEIGHT)
    expected = 100 * sigmoid(TRUE[OWN] + TRUE[DIFFICULTY] * difficulty)
    assert fitted["length_controlled_winrate"] == pytest.approx(expected.mean(), abs=tolerances.GLM_RATE)
    assert fitted["lc_standard_error"] == pytest.approx(
        expected.std(ddof=1) / math.sqrt(COUNT), abs=tolerances.GLM_RATE
    )
    assert abs(fitted["win_rate"] - fitted["length_controlled_winrate"]) > 1  # the lengths did matter


def test_the_fit_is_that_of_the_package(noisy, monkeypatch):
    """Against what alpaca_eval 0.6.6 found for the same judgements, and against the package where it is installed."""
    pytest.importorskip("sklearn", reason=NEEDED)
    gamed, annotations, _ = noisy
    fitted = controlled(annotations, gamed)
    assert fitted["length_controlled_winrate"] == pytest.approx(53.71902358664288, abs=tolerances.PACKAGE_RATE)
    assert fitted["lc_standard_error"] == pytest.approx(0.7016518288195212, abs=tolerances.PACKAGE_RATE)
    package = pytest.importorskip(
        "alpaca_eval.metrics.glm_winrate",
        reason="the recorded figures agree; the package alpaca_eval itself is not installed",
        exc_type=ImportError,
    )
    monkeypatch.setattr(package, "hf_hub_download", lambda **_: str(gamed))
    frame = pandas.DataFrame(json.loads(annotations.read_text()))
    theirs = package.get_length_controlled_winrate(frame, save_weights_dir=None, is_warn_extreme_changes=False)
    for name in (*PUBLISHED, "length_controlled_winrate", "lc_standard_error"):
        np.testing.assert_allclose(fitted[name], float(theirs[name]), rtol=0, atol=1e-9, err_msg=name)


def test_weights_of_a_table_instead_of_a_fit(synthetic, tmp_path):
    gamed, annotations, difficulty = synthetic
    table = tmp_path / "weights.csv"
    table.write_text(f",{LENGTH},{DIFFICULTY},{OWN}\nours,-1.5,0.25,0.5\nother,0,0,0\n")
    found = controlled(annotations, gamed, weights=str(table))
    expected = 100 * sigmoid(0.5 + 0.25 * difficulty)
    assert found["length_controlled_winrate"] == pytest.approx(expected.mean(), abs=1e-9)
    alone = tmp_path / "instruction_difficulty.csv"  # as the hub has it: the name of the index is empty
    alone.write_text(",instruction_difficulty\n" + "".join(f"{i},{float(d)!r}\n" for i, d in enumerate(difficulty)))
    assert controlled(annotations, alone, weights=str(table)) == found
    with pytest.raises(
        ValueError, match="difficulties alone, and a fit also needs the gamed baselines' rows; give df_ga"
    ):
        controlled(annotations, alone)
    table.write_text(f",{LENGTH},{DIFFICULTY},{OWN}\nother,0,0,0\n")
    with pytest.raises(ValueError, match="no row 'ours' among its 1"):
        controlled(annotations, gamed, weights=str(table))


def test_the_baseline_against_itself_is_one_half(synthetic, tmp_path):
    gamed, _, _ = synthetic
    path = written(tmp_path / "a.json", [annotation(i, None, first="s" * i, second="s" * i) for i in range(5)])
    found = controlled(path, gamed)
    assert found["length_controlled_winrate"] == found["win_rate"] == 50
    assert set(found["weights"].values()) == {0}


def test_length_control_refuses_what_it_cannot_tell(synthetic, tmp_path):
    gamed, _, _ = synthetic
    strange = written(tmp_path / "a.json", [annotation(COUNT + i, 1.0, second="y" * i) for i in range(3)])
    with pytest.raises(ValueError, match=r"knows 200 instructions and not number 200 \(3 in all\)"):
        controlled(strange, gamed)
    alike = written(tmp_path / "b.json", [annotation(i, 1 + i / 4) for i in range(4)])
    with pytest.raises(ValueError, match="all 4 answers differ from the baseline's by 10 characters"):
        controlled(alike, gamed)
    wrong = tmp_path / "df.csv"
    wrong.write_text("index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n0,1.5,0,0,False\n")
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]; this is not df_gamed\.csv"):
        controlled(alike, wrong)


def test_scikit_learn_is_asked_for_where_it_is_missing(synthetic, monkeypatch):
    gamed, annotations, _ = synthetic
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(ValueError, match=r"not installed; run pip install 'scikit-learn>=1.8'"):
        controlled(annotations, gamed)


def test_table_aligns_its_columns():
    assert terminal.table([["model", "rate"], ["a", "1.00"], ["longer name", "10.00"]]) == (
        "model         rate\na             1.00\nlonger name  10.00"
    )
