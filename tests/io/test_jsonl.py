"""JSON Lines: what is text inside a line, what ends one, and what is said of a line that is none."""

import re

import pytest

from fpo_jax.cli import jsonl_job
from fpo_jax.eval.judge import pairwise_judge
from fpo_jax.eval.pipeline import pipeline_report
from fpo_jax.io import jsonl
from fpo_jax.trainer import sample_completions
from tests.paths import REPO

# everything that `str.splitlines` cuts at, and half a surrogate pair
TEXTS = [
    "a\u2028b",
    "a\u2029b",
    "a\u0085b",
    "a\x0bb\x0cc\x1cd\x1de\x1ef",
    "a\r\nb\nc\rd",
    "\ud800 \udfff",
    "\x00\ufeff\u00e9",
]


def test_every_text_comes_back_from_every_file(tmp_path):
    rows = [{"index": number, "prompt": text} for number, text in enumerate(TEXTS)]
    path = jsonl.write(tmp_path / "0.jsonl", rows)
    assert path.read_bytes().count(b"\n") == len(rows)
    assert jsonl.read(path) == rows == jsonl.read_appended(path).rows == sample_completions.read(tmp_path, 0)
    with jsonl_job.JobFile(tmp_path / "job.jsonl", {}, count=len(rows)) as file:
        for row in reversed(rows):
            file.append(row)
        assert file.lines() == rows[::-1]
        file.finish()
    assert (tmp_path / "job.jsonl").read_bytes() == path.read_bytes()
    with pairwise_judge.Store(tmp_path / "replies.jsonl") as store:
        for text in TEXTS:
            store.add(text, text)
    with pairwise_judge.Store(tmp_path / "replies.jsonl") as store:
        assert [store.get(text) for text in TEXTS] == TEXTS
    scored = [{"prompt": text, "completions": [text], "rewards": [1.0]} for text in TEXTS]
    files = {name: jsonl.write(tmp_path / f"{name}.jsonl", scored) for name in (pipeline_report.START, "kl")}
    report = {}
    pipeline_report.write(tmp_path, files, {}, report)
    assert report["kl"]["prompts"] == len(TEXTS)


def test_no_source_cuts_a_file_s_text_at_more_than_lf():
    sources = [path for folder in ("fpo_jax", "eval") for path in sorted((REPO / folder).rglob("*.py"))]
    assert sources
    cuts = re.compile(r"(read_text|read_bytes|read|decode)\([^()]*\)\.splitlines")
    assert [str(path) for path in sources if cuts.search(path.read_text())] == []


@pytest.mark.parametrize(
    ("line", "fact"),
    [
        (b'{"a": 1', r"broken JSON: Expecting ',' delimiter at column 8; put"),
        (b'{"a": "\xff"}', "not UTF-8: byte 0xff at byte 8 of the line; put"),
        (b'{"a": NaN}', "NaN is not JSON; put"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands twice in one object; put"),
        (b"[1]", "a line must be a JSON object, not list; make"),
        (b'{"a": "' + b"x" * 100 + b'"}', "the line is longer than 64 bytes"),
        (b"[" * 40_000, "the line is longer than 64 bytes"),
    ],
)
def test_a_line_that_is_no_row_is_told_by_file_and_line(tmp_path, monkeypatch, line, fact):
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 64)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 0}\n{"a": 1}\n' + line + b'\n{"a": 3}\n')
    with pytest.raises(ValueError, match=rf"a\.jsonl:3: {fact}"):
        jsonl.read(path)
    with pytest.raises(ValueError, match=r"a\.jsonl:3: "):
        jsonl.read_appended(tmp_path / "a.jsonl")


def test_half_a_last_line_is_told_apart(tmp_path):
    whole = jsonl.line({"index": 0, "text": TEXTS[0]})
    path = tmp_path / "a.jsonl"
    for size in range(1, len(whole)):
        path.write_bytes(whole + whole[:size])
        assert jsonl.read_appended(path) == ([{"index": 0, "text": TEXTS[0]}], len(whole), size)
    path.write_bytes(whole + b"\0" * 100)  # what some disks leave when the power goes
    assert jsonl.read_appended(path).cut == 100
    path.write_bytes(whole)
    assert jsonl.read_appended(path).cut == 0 and jsonl.read_appended(tmp_path / "none.jsonl") == ([], 0, 0)


def test_a_row_that_no_reader_would_take_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 64)
    jsonl.write(tmp_path / "a.jsonl", [{"a": "x" * 54}])
    assert jsonl.read(tmp_path / "a.jsonl") == [{"a": "x" * 54}]
    with pytest.raises(ValueError, match="a row of 65 bytes is longer than the 64 of a line; ask for fewer"):
        jsonl.write(tmp_path / "a.jsonl", [{"a": "x" * 55}])


def test_a_number_that_is_not_finite_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        jsonl.write(tmp_path / "a.jsonl", [{"a": 1.0}, {"a": float("nan")}])
    assert list(tmp_path.iterdir()) == []
