"""`fpo init` on own data of every kind; `tests/test_packaging.py` runs the command that it prints."""

import json

import datasets
import pytest

from fpo_jax.cli import init
from fpo_jax.config import overrides
from fpo_jax.trainer import run_inputs
from tests import tiny


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


COUNT = 44
KINDS = {  # rows by number; stage, loss, a line of the file
    "pairs": (lambda i: {"prompt": f"q{i}", "chosen": "yes", "rejected": "no"}, "align", "dpo", "c.loss.beta = 0.1"),
    "chats": (
        lambda i: {"chosen": [user(f"q{i}"), bot("yes")], "rejected": [user(f"q{i}"), bot("no")]},
        "align",
        "dpo",
        "c.data.max_prompt_length = ",
    ),
    "demonstrations": (lambda i: {"messages": [user(f"q{i}"), bot("yes")]}, "sft", "sft", 'c.stage = "sft"'),
    "texts": (lambda i: {"text": f"this is text {i}"}, "sft", "sft", 'c.data.rule = "raw"'),
    "rewards": (
        lambda i: {"prompt": f"q{i}", "completions": ["a", "b", "c"], "rewards": [1, 2, 0.5]},
        "align",
        "alpha",
        "c.data.group_size = 3",
    ),
    "labels": (
        lambda i: {"prompt": f"q{i}", "completion": "a", "label": i % 2 == 0},
        "reward",
        "binary_cross_entropy",
        "c.data.group_size = 1",
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("init")
    tiny.write_model(folder / "model", layers=1, max_positions=128)
    for name, (row, *_) in KINDS.items():
        table = datasets.Dataset.from_list([row(i) for i in range(COUNT)])
        table.to_json(folder / f"{name}.jsonl")
        table.to_parquet(folder / f"{name}.parquet")
        if name in ("pairs", "labels"):
            table.to_csv(folder / f"{name}.csv")
    return folder


def written(place, data, *more, name):
    out = place / f"{name}.py"
    out.unlink(missing_ok=True)
    given = ["--data", str(data), "--model", str(place / "model"), "--out", str(out), *more]
    return init.main(given), out


@pytest.mark.parametrize("name", KINDS)
def test_the_file_is_what_the_data_ask_for(place, name, capsys):
    _, stage, loss, line = KINDS[name]
    code, out = written(place, place / f"{name}.jsonl", name=name)
    printed = capsys.readouterr().out
    assert code == 0 and "⟦" in printed and f"stage {stage}, loss {loss};" in printed
    assert "hold" in next(said for said in printed.split("\n") if said.startswith("format "))
    c = overrides.load_config(str(out))
    assert line in out.read_text() and (c.stage, c.loss.name) == (stage, loss)
    assert (c.data.train_rows, c.data.eval_rows) == (":42", "42:")
    inputs = run_inputs.prepare(c)
    assert inputs.train.prepared.groups >= c.train.batch_size and inputs.evaluation is not None
    assert inputs.train.audit.prompts_cut == inputs.train.audit.completions_cut == 0


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([{"prompt": "q"}], (), "prompts without completions, and nothing can be trained on them"),
        ([{"a": 1}], (), "the columns a are none that is known"),
        ([{"prompt": "q", "completions": ["a", "b", "c"][: n + 1], "rewards": [1.0] * (n + 1)} for n in (1, 2)], (),
         "the rows have 2 and 3 completions, which make no groups of one size"),
        ([{"prompt": "q", "completion": "a"}], ("--stage", "rl"), "--stage='rl' is not one of sft, reward, align"),
        ([{"prompt": "q", "completion": "a"}], ("--split", "train"), "--split=train applies to folders"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_sentence_and_no_file(place, tmp_path, rows, more, message, capsys):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out = written(place, tmp_path / "d.jsonl", *more, name="refused")
    error = capsys.readouterr().err
    assert code == 2 and message in error and len(error.strip().split("\n")) == 1 and not out.exists()


def test_a_file_that_is_there_is_not_written_over(place, capsys):
    (place / "mine.py").write_text("x = 1\n")
    given = ["--data", str(place / "pairs.csv"), "--model", str(place / "model"), "--out", str(place / "mine.py")]
    assert init.main(given) == 2
    assert "mine.py exists; give another --out" in capsys.readouterr().err
    assert (place / "mine.py").read_text() == "x = 1\n"


def test_a_folder_with_splits_is_evaluated_on_its_own(place, tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_bytes((place / "pairs.jsonl").read_bytes())
    _, out = written(place, tmp_path, name="splits")
    c = overrides.load_config(str(out))
    assert (c.data.train_split, c.data.eval_split, c.data.train_rows) == ("train", "test", "")
