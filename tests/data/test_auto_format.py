"""`data.format=auto`: every kind of data set from every kind of file, told by its columns, and what is refused."""

import csv
import json
import re

import datasets
import pytest

from fpo_jax import data, tokenization
from fpo_jax.config import fields
from fpo_jax.data import auto_format, formats
from tests import tiny
from tests.paths import REPO

USER, YES, NO = (
    {"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "y"), ("assistant", "n"))
)
SYSTEM = {"role": "system", "content": "Be brief."}
SAID = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "y"}]

# row, what the run wants, the format that is found, (prompt, completions, rewards)
ROWS = [
    ({"prompt": "Hi", "chosen": "y", "rejected": "n"}, "pairs", "json", ("Hi", ["y", "n"], [1, 0])),
    ({"question": "Hi", "chosen": "y", "rejected": "n"}, "pairs", "json", ("Hi", ["y", "n"], [1, 0])),
    ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, "pairs", "json", ([USER], [YES, NO], [1, 0])),
    ({"chosen": [USER, YES], "rejected": [USER, NO]}, "pairs", "chat_pairs", ([USER], [YES, NO], [1, 0])),
    (
        {"prompt": "Hi", "chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO], "messages": [USER, YES]},
        "pairs",
        "chat_pairs",
        ([SYSTEM, USER], [YES, NO], [1, 0]),
    ),
    ({"chosen": "Say A: yes", "rejected": "Say A: yet"}, "pairs", "text_pairs", ("Say A:", [" yes", " yet"], [1, 0])),
    (
        {"prompt": "Hi", "chosen": "y", "rejected": "n", "score_chosen": 0.5, "score_rejected": 2},
        "rewards",
        "scored_pairs",
        ("Hi", ["y", "n"], [0.5, 2]),
    ),
    (
        {"prompt": "Hi", "chosen": "y", "rejected": "n", "score_chosen": 0.5, "score_rejected": 2},
        "pairs",
        "json",
        ("Hi", ["y", "n"], [1, 0]),
    ),
    ({"prompt": "Hi", "completions": ["y", "n"], "rewards": [3, 1]}, "pairs", "json", ("Hi", ["y", "n"], [3, 1])),
    ({"prompt": "Hi", "responses": ["y", "n"], "scores": [3, 1]}, "rewards", "json", ("Hi", ["y", "n"], [3, 1])),
    ({"prompt": "Hi", "completions": ["n", "y"], "ranks": [2, 1]}, "pairs", "rankings", ("Hi", ["n", "y"], [-2, -1])),
    ({"prompt": "Hi", "completion": "y", "label": True}, "labels", "labelled", ("Hi", ["y"], [1])),
    ({"prompt": "Hi", "completion": "y", "label": 1}, "demonstrations", "liked", ("Hi", ["y"], [1])),
    ({"prompt": "Hi", "completion": "y"}, "demonstrations", "demonstrations", ("Hi", ["y"], [1])),
    ({"instruction": "Add", "output": "y"}, "demonstrations", "demonstrations", ("Add", ["y"], [1])),
    ({"instruction": "Add", "input": "1", "output": "y"}, "demonstrations", "alpaca", ("Add\n\n1", ["y"], [1])),
    ({"instruction": "Add", "input": None, "output": "y"}, "demonstrations", "alpaca", ("Add", ["y"], [1])),
    ({"messages": [USER, YES]}, "demonstrations", "messages", ([USER], [YES], [1])),
    ({"conversations": [USER, YES]}, "demonstrations", "messages", ([USER], [YES], [1])),
    ({"conversations": SAID}, "demonstrations", "sharegpt", ([USER], [YES], [1])),
    ({"text": "all of it"}, "demonstrations", "text", ("", ["all of it"], [1])),
    ({"prompt": "Hi", "chosen": "y", "rejected": "n"}, "demonstrations", "json", ("Hi", ["y", "n"], [1, 0])),
    ({"prompt": "Hi", "chosen": [USER, YES], "rejected": [USER, NO]}, "any", "chat_pairs", ([USER], [YES, NO], [1, 0])),
]  # fmt: skip


def shown(records):
    return [(row.prompt, list(row.completions), list(row.rewards)) for row in records.rows]


def write(path, rows):
    """Write rows as the name of the path says; what is no text stands as JSON in a cell of CSV."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            for row in rows:
                writer.writerow(
                    {
                        name: value if isinstance(value, str) else json.dumps(value)
                        for name, value in row.items()
                        if value is not None
                    }
                )
    else:
        table = datasets.Dataset.from_list(rows)
        if path.suffix == ".parquet":
            table.to_parquet(path)
        else:
            table.save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "arrow", "memory"])
@pytest.mark.parametrize(
    ("row", "wants", "format", "expected"), ROWS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_kind_from_every_file(tmp_path, row, wants, format, expected, kind):
    source = [row] * 2 if kind == "memory" else write(tmp_path / f"d.{kind}", [row] * 2)
    found = data.read(source, format="auto", wants=wants)
    assert shown(found) == [expected] * 2
    assert found.format.startswith(f"{format}: the columns ") and all(
        name in found.format for name in row if name in ("question", "responses", "scores")
    )


def test_transcripts_are_conversations_where_the_rule_is_chat_and_text_where_it_is_raw(tmp_path):
    asked = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    path = write(tmp_path / "d.jsonl", [{"chosen": f"{asked} y", "rejected": f"{asked} n"}])
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    assert shown(data.read(path, format="auto", rule="chat")) == [(turns, ["y", "n"], [1, 0])]
    assert shown(data.read(path, format="auto", rule="raw")) == [(asked, [" y", " n"], [1, 0])]


@pytest.mark.parametrize("row", [{"messages": [USER, YES, USER, NO]}, {"conversations": [*SAID, *SAID]}])
def test_all_answers_of_a_conversation_are_trained_or_the_last(row):
    records = {turns: data.read([row], format="auto", turns=turns).rows for turns in ("all", "last")}
    assert [len(one.prompt) for one in records["all"]] == [1, 3]
    assert [one[:3] for one in records["last"]] == [records["all"][1][:3]]


def test_what_is_labelled_false_is_no_demonstration(tmp_path):
    rows = [{"prompt": "Hi", "completion": text, "label": text == "y"} for text in "yn"]
    found = data.read(write(tmp_path / "d.jsonl", rows), format="auto", wants="demonstrations")
    assert shown(found) == [("Hi", ["y"], [1])] and {name: len(at) for name, at in found.dropped.items()} == {
        "label_false": 1
    }


def test_other_columns_are_noted_and_a_margin_is_warned_of(tmp_path, caplog):
    row = {"prompt": "Hi", "chosen": "y", "rejected": "n", "margin": 2.0, "id": 7}
    found = data.read(write(tmp_path / "d.jsonl", [row]), format="auto", wants="pairs")
    assert set(found.noted) == {"column_not_used:margin", "column_not_used:id"}
    assert "does not use the columns margin (1 rows)" in caplog.text


@pytest.mark.parametrize(
    ("rows", "wants", "message"),
    [
        (
            [{"a": 1, "b": 2}],
            "pairs",
            r"d.jsonl: the columns a, b are none that is known; accepted are prompt \+ chosen \+ rejected; chosen",
        ),
        (
            [{"prompt": "Hi", "completion": "y"}],
            "pairs",
            r"the columns completion, prompt hold a prompt with a completion, and this run comp.*--config.stage=sft",
        ),
        ([{"prompt": "Hi"}], "demonstrations", r"hold prompts without completions, and this run trains on demonstr"),
        (
            [{"prompt": "Hi", "completion": "y", "label": True}],
            "rewards",
            r"hold completions labelled true or false, and this run matches rewards; give prompt \+ completions \+",
        ),
        (
            [{"prompt": "Hi", "chosen": "y", "rejected": "n"}, {"chosen": [USER, YES], "rejected": [USER, NO]}],
            "pairs",
            r"its rows are of several kinds \(.*\), none of which has 90% of the first 2; split the file",
        ),
        ([{"chosen": "yes", "rejected": "no"}], "pairs", r"begin with no common words, .* give a column prompt"),
        ([], "pairs", r"no rows"),
    ],
)
def test_what_cannot_be_told_or_used_is_refused_in_one_sentence(tmp_path, rows, wants, message):
    with pytest.raises(ValueError, match=message) as raised:
        data.read(write(tmp_path / "d.jsonl", rows), format="auto", wants=wants)
    assert "\n" not in str(raised.value)


def test_a_row_that_is_otherwise_than_the_first_ones_is_bad(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"prompt": "Hi", "chosen": "y", "rejected": "n"}] * 70 + [{"prompt": "Hi"}])
    with pytest.raises(ValueError, match=r"d.jsonl:71: missing or null: chosen, rejected"):
        data.read(path, format="auto")


def test_a_format_that_is_named_is_not_looked_for():
    found = data.read([{"prompt": "Hi", "completion": "y"}], format="demonstrations", name="mine")
    assert (found.format, found.rows[0].source) == ("", "mine[0]")


def test_plain_texts_need_rule_raw_and_their_first_token_is_given(tmp_path):
    with pytest.raises(ValueError, match=r"holds plain texts, .* set --config.data.rule=raw"):
        data.read([{"text": "abc"}], format="auto", rule="chat")
    tiny.write_tokenizer(tmp_path)
    encoder = tokenization.encoder(
        tokenization.load_tokenizer(tmp_path), tokenization.PromptFormat(rule="raw"), end_ids=()
    )
    records = data.read([{"text": "abc"}], format="auto", wants="demonstrations", rule="raw")
    prepared, audit = data.prepare(records, encoder, max_length=9, max_completion_length=8, group_size=1)
    assert data.masked_sample(prepared, encoder.tokenizer) == "a⟦bc</s>⟧"
    assert "format text: the columns text hold plain texts" in audit.text()


def test_the_first_lines_say_what_was_found():
    assert auto_format.find([{"question": "Hi", "response": "y"}]).why == (
        "the columns question (as prompt), response (as completion) hold a prompt with a completion"
    )


@pytest.mark.parametrize(
    ("heading", "row"),
    [
        (heading, json.loads(block))
        for heading, block in re.findall(
            r"^### (.+?)\n(?:(?!^###)[\s\S])*?```json\n(.+)\n```", (REPO / "docs" / "datasets.md").read_text(), re.M
        )
    ],
)
def test_the_examples_of_the_page_are_what_it_says(heading, row):
    wants = {"scored_pairs": "rewards", "labelled": "labels"}.get(heading, "any")
    for rule, name in (("raw", heading.split()[0].strip(",")), ("chat", heading.split()[-1])):
        if heading != "text" or rule == "raw":
            found = data.read([row], format="auto", wants=wants, rule=rule).format.partition(":")[0]
            assert found == ("json" if name == "rewards" else name)


def test_the_page_has_every_format():
    page = (REPO / "docs" / "datasets.md").read_text()
    assert [name for name in fields.FORMATS[1:] if f"`{name}`" not in page and f"### {name}" not in page] == []
    assert set(fields.FORMATS) == set(formats.FORMATS)
