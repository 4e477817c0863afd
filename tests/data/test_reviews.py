"""Reviews: cleaned, cut after ten tokens, in an order of which a slice has both labels, with every fault named."""

import json

import pytest

from fpo_jax import data, tokenization
from fpo_jax.data import imdb
from tests import tiny
from tests.paths import shared_data


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory):
    """A tokenizer of one token a byte."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return tokenization.load_tokenizer(folder)


def read(folder, tokenizer, *rows, **options):
    path = folder / "r.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data.read(path, format="imdb", tokenizer=tokenizer, **options)


def test_a_review_is_cleaned_and_cut_after_ten_tokens(tmp_path, bytewise):
    found = read(tmp_path, bytewise, {"text": "I liked it.<br /><br />Much. \n", "label": 1})
    (record,) = found.rows
    assert (
        record.prompt == "I liked it" and list(record.completions) == [".\n\nMuch."] and list(record.rewards) == [1.0]
    )
    assert record.source.endswith("r.jsonl:1")


@pytest.mark.parametrize(("label", "reward"), [(0, 0.0), (1, 1.0), ("neg", 0.0), ("pos", 1.0)])
def test_labels_of_the_hub_and_of_the_original(tmp_path, bytewise, label, reward):
    (record,) = read(tmp_path, bytewise, {"text": "eleven bytes and more", "label": label}).rows
    assert list(record.rewards) == [reward]


def test_a_character_of_several_tokens_is_not_cut(tmp_path, bytewise):
    """The tenth byte is the first of three: the prompt keeps the whole character."""
    (record,) = read(tmp_path, bytewise, {"text": "nine char€ and more", "label": 0}).rows
    assert record.prompt == "nine char€" and list(record.completions) == [" and more"]


def test_words_are_cut_where_the_model_s_own_tokens_end():
    """GPT-NeoX's tokens take the space before a word, as GPT-2's do."""
    tokenizer = tokenization.load_tokenizer(
        shared_data("tokenizers", "gpt_neox_20B_tokenizer.json"), eos_token="<|endoftext|>"
    )
    text = "This is one of the best films that I have ever seen, and I have seen many."
    ((prompt, completion),) = imdb.split([text], tokenizer)
    assert prompt == "This is one of the best films that I have" and completion == text[len(prompt) :]
    encoder = tokenization.encoder(tokenizer)
    (row,) = tokenization.raw_rows(encoder, [prompt], [[completion]], max_length=64, max_completion_length=50)[0]
    assert row.prompt_length == imdb.PREFIX_TOKENS and not row.merged
    assert row.ids[:-1] == tokenization.encode(encoder, [text])[0], "the pair is the review, token by token"


def test_labels_alternate_so_that_a_slice_has_both(tmp_path, bytewise):
    """The source is sorted by label, as the hub's is."""
    rows = [{"text": f"review number {index} of some", "label": int(index >= 6)} for index in range(10)]
    found = read(tmp_path, bytewise, *rows)
    assert [record.rewards[0] for record in found.rows] == [1, 0] * 4 + [0, 0]
    assert sorted(record.source for record in found.rows) == sorted(f"{tmp_path}/r.jsonl:{i}" for i in range(1, 11))
    assert [record.source for record in found.rows[::2]][:4] != [f"{tmp_path}/r.jsonl:{i}" for i in range(7, 11)]
    part = read(tmp_path, bytewise, *rows, start=2, stop=6)
    assert part.rows == found.rows[2:6]


def test_what_makes_no_record_is_counted(tmp_path, bytewise):
    rows = [("too short", 1), ("ten bytes!  ", 0), ("nine char€", 1), ("long enough, and", -1), ("long enough, and", 0)]
    found = read(tmp_path, bytewise, *[{"text": text, "label": label} for text, label in rows])
    assert {reason: sorted(places) for reason, places in found.dropped.items()} == {
        "short_review": [f"{tmp_path}/r.jsonl:{line}" for line in (1, 2, 3)],
        "unlabelled": [f"{tmp_path}/r.jsonl:4"],
    }
    assert len(found.rows) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "t"}, "missing or null: label; wanted text, label; found text"),
        ({"text": 3, "label": 1}, "text must be a text, not a number"),
        ({"text": "t", "label": 2}, "label must be 0, 1, neg or pos, not 2"),
        ({"text": "t", "label": True}, "not True"),
        ({"text": "t", "label": 1.0}, "not 1.0"),
        ({"text": "t", "label": [1]}, r"not \[1\]"),
        ("t", "a row must be a JSON object"),
    ],
)
def test_rows_that_are_no_reviews(tmp_path, bytewise, row, message):
    with pytest.raises(ValueError, match=f"r.jsonl:1: .*{message}"):
        read(tmp_path, bytewise, row)


def test_reviews_need_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="format='imdb' cuts reviews by a model's tokens, and none is at hand"):
        read(tmp_path, None, {"text": "t", "label": 1})


def test_columns_beside_text_and_label_are_named(tmp_path, bytewise):
    row = {"text": "a review of more than ten tokens", "label": 1}
    assert read(tmp_path, bytewise, row, row | {"stars": 9}).noted == {
        "column_not_used:stars": [f"{tmp_path}/r.jsonl:2"]
    }
