"""Records that repeat a benchmark are dropped and counted, in whatever layout, in the prompt or in a response."""

import json

import pytest

from fpo_jax import data, job
from fpo_jax.data import decontamination
from tests import tiny
from tests.paths import shared_data

PROBLEM = '''def has_close(numbers, threshold):
    """ Check if in given list of numbers, are any two numbers closer to each other than given threshold.
    >>> has_close([1.0, 2.0, 3.0], 0.5)
    False
    """
'''
COPY = "Please CHECK if, in given list of numbers, are any two numbers\n# closer to each other than given threshold!"
SHORT = "Name three things that rivers and roads share."


def records(*rows):
    return data.Records([data.Record(p, r, [1.0, 0.0], f"f:{i}") for i, (p, r) in enumerate(rows, 1)])


def test_what_is_dropped():
    turns = [{"role": "user", "content": COPY}]
    found = decontamination.clean(
        records(
            ("a prompt", ["x", "y"]),
            (COPY, ["x", "y"]),
            (turns, [{"role": "assistant", "content": "z"}] * 2),
            ("a prompt", ["x", f"as you say: {COPY}"]),
            (COPY.replace("closer to", "closer than"), ["x", "y"]),  # twelve words in a row
            (SHORT.upper(), ["x", "y"]),
            (SHORT.removesuffix("share."), ["x", "y"]),
            ("def add(x, y): return x + y", ["x", "y"]),
        ),
        [PROBLEM, SHORT, "    return x + y\n"],
    )
    assert [row.source for row in found.rows] == ["f:1", "f:5", "f:7", "f:8"]
    assert found.dropped == {"contaminated": ["f:2", "f:3", "f:4", "f:6"]}


def test_texts_too_short_to_compare_with():
    with pytest.raises(ValueError, match="no benchmark text has 8 words or more"):
        decontamination.clean(records(("p", ["x", "y"])), ["return x + y"])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_columns(tmp_path):
    path = write(tmp_path / "b.jsonl", [{"turns": ["a", "b"], "prompt": "c", "id": 1}])
    assert decontamination.texts(f"{path}=turns") == ["a", "b"]
    assert decontamination.texts(f"{path}=prompt") == ["c"]
    for column in ("id", "nothing"):
        with pytest.raises(
            ValueError, match=rf"b.jsonl:1: the column '{column}' is neither .*it has turns, prompt, id"
        ):
            decontamination.texts(f"{path}={column}")
    with pytest.raises(ValueError, match="'b.jsonl' is not source=column"):
        decontamination.texts("b.jsonl")


def test_a_run_leaves_them_out_of_training_and_not_of_evaluation(tmp_path):
    tiny.write_model(tmp_path / "model", layers=1)
    rows = [{"prompt": text, "chosen": " a", "rejected": " b"} for text in ("Hi", COPY, "Ho")]
    path, benchmark = write(tmp_path / "d.jsonl", rows), write(tmp_path / "b.jsonl", [{"prompt": PROBLEM}])
    c = tiny.config(tmp_path / "model", path, data__eval=path, data__decontaminate=(f"{benchmark}=prompt",))
    inputs = job.prepare(c)
    assert inputs.train.audit.dropped["contaminated"] == (f"{path}:2",)
    assert inputs.evaluation.prepared.groups == 3
    with pytest.raises(ValueError, match="data.decontaminate: 'x' is not source=column"):
        job.check(tiny.config(tmp_path / "model", path, data__decontaminate=("x",)))


def test_real_benchmarks_against_real_conversations():
    """MT-Bench's own questions are found in themselves, and in none of the real preference data here."""
    questions = shared_data("mt_bench", "question.jsonl")
    texts = decontamination.texts(f"{questions}=turns")
    assert len(texts) == 160
    own = decontamination.clean(records(*((text, ["x", "y"]) for text in texts)), texts)
    assert {row.prompt for row in own.rows} == {t for t in texts if len(decontamination._words(t)) < 8}
    real = data.read(shared_data("pref_chat", "ultrafeedback_shaped.jsonl.gz"), format="chat_pairs", stop=500)
    assert "contaminated" not in decontamination.clean(real, texts).dropped
