"""Mixtures of sources: fractions, one fixed order, and every entry that is refused."""

import json

import pytest

from fpo_jax import data
from fpo_jax.trainer import run_inputs
from tests import tiny


def source(path, name, count):
    rows = [{"prompt": f"{name}{i}", "chosen": " a", "rejected": " b"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(part):
    return data.read(part.source, format="json", split=part.split or None)


def test_the_first_part_of_each_source_in_one_fixed_order(tmp_path):
    parts = [
        data.Part(source(tmp_path / "a.jsonl", "a", 10), "", 0.55),
        data.Part(source(tmp_path / "b.jsonl", "b", 4), "", 1.0),
    ]
    found = [record.prompt for record in data.mixture(parts, read).rows]
    assert sorted(found) == ["a0", "a1", "a2", "a3", "a4", "b0", "b1", "b2", "b3"]  # int(5.5) = 5
    assert found != sorted(found) and found == [record.prompt for record in data.mixture(parts, read).rows]


@pytest.mark.parametrize(("fraction", "kept"), [("0.29", 29), ("0.57", 57), ("0.58", 58), ("0.295", 29), ("0.999", 99)])
def test_a_fraction_is_the_decimal_that_was_written(tmp_path, fraction, kept):
    """0.29 * 100 is 28.999999999999996 in binary floating point."""
    part = data.parse(f"{source(tmp_path / 'a.jsonl', 'a', 100)}={fraction}")
    assert len(data.mixture([part], read).rows) == kept


def test_a_run_trains_on_its_mixture_and_evaluates_on_all_of_its_test_set(tmp_path):
    tiny.write_model(tmp_path / "model", layers=1)
    a, b = (source(tmp_path / f"{name}.jsonl", name, 8) for name in "ab")
    c = tiny.config(tmp_path / "model", "", data__mixer=(f"{a}=0.5", f"{b}=1"), data__eval=a)
    inputs = run_inputs.prepare(c)
    assert inputs.train.prepared.groups == 12 and inputs.evaluation.prepared.groups == 8
    assert {place.rpartition("/")[2].split(":")[0] for place in inputs.train.prepared.sources} == {"a.jsonl", "b.jsonl"}


@pytest.mark.parametrize("entry", ["a", "a=0", "a=-0.5", "a=1.5", "a=x", "=1"])
def test_entries_that_are_none(entry):
    with pytest.raises(ValueError, match="is not source=fraction or source@split=fraction"):
        data.parse(entry)


def test_names_with_signs_of_their_own():
    assert data.parse("dir/a=b/c.jsonl=0.5") is not None
    assert data.parse("org/name@train_sft=0.25") == ("org/name", "train_sft", 0.25)
    assert data.parse("./x@y/z.jsonl=1") == ("./x@y/z.jsonl", "", 1.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data__mixer": ("a=2",)}, "data.mixer: 'a=2' is not source=fraction"),
        ({"data__mixer": ("a=1",), "data__train": "b"}, "data.train='b' and data.mixer exclude each other"),
        ({"data__mixer": ("a=1",), "data__train_rows": "0:3"}, "data.train_rows='0:3' and data.mixer"),
        ({}, "data.train is empty"),
    ],
)
def test_settings_that_contradict(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        run_inputs.check(tiny.config(tmp_path, "", data__eval="", **changed))


def test_a_part_without_a_row_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="a fraction of 0.1 keeps none of 4 rows"):
        data.mixture([data.Part(source(tmp_path / "a.jsonl", "a", 4), "", 0.1)], read)
