"""Readers under damage: whatever a row holds, a reader gives sound records or names the file and line; nothing else."""

import functools
import gzip
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpo_jax import data, tokenization
from fpo_jax.data import formats
from tests import tiny

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
POST = {"subreddit": "r", "title": "t", "post": "p"}
SOUND = {
    "hh": {"chosen": "\n\nHuman: Hi\n\nAssistant: Yo", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
    "chat_pairs": {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "No"}]},
    "chat_groups": {"prompt": "Hi", "all_generated_responses": ["a", "b", "c"], "all_rm_scores": [1, 0.5, -2]},
    "json": {"prompt": "Hi", "completions": ["a", "b"], "rewards": [1, 2]},
    "tldr": {"info": POST, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1},
    "tldr_sft": {**POST, "summary": "s"},
    "imdb": {"text": "a review of some length", "label": 1},
    "messages": {"messages": [*TURNS, *TURNS]},
    "demonstrations": {"prompt": "Hi", "completion": "Yo"},
    "prompts": {"prompt": TURNS[:1]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
    "alpaca": {"instruction": "Add", "input": "1 and 2", "output": "3"},
    "text": {"text": "a text of some length"},
    "labelled": {"prompt": "Hi", "completion": "Yo", "label": True},
    "liked": {"prompt": "Hi", "completion": "Yo", "label": True},
    "rankings": {"prompt": "Hi", "completions": ["a", "b"], "ranks": [1, 2]},
    "scored_pairs": {"prompt": "Hi", "chosen": "a", "rejected": "b", "score_chosen": 1.0, "score_rejected": 0.5},
    "text_pairs": {"chosen": "Say it: yes", "rejected": "Say it: no"},
    "transcript_chats": {"chosen": "\n\nHuman: Hi\n\nAssistant: Yo", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
}

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(["", " ", "\ud800", "\x00", "</s>", "user", "assistant", "\n\nHuman:", "\n\nAssistant:"]),
    st.sampled_from([10**400, -(10**400)]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "text", "post", "x"]), inner, max_size=3),
    ),
    max_leaves=6,
)


@st.composite
def damaged(draw, value):
    """Draw the value with some of its parts replaced, left out, doubled or added to."""
    kind = draw(st.integers(0, 5))
    if kind == 0:
        return draw(VALUES)
    if isinstance(value, dict):
        parts = {key: draw(damaged(part)) if draw(st.booleans()) else part for key, part in value.items()}
        if kind == 1 and parts:
            del parts[draw(st.sampled_from(sorted(parts)))]
        return parts | (draw(st.dictionaries(st.text(max_size=4), VALUES, max_size=1)) if kind == 2 else {})
    if isinstance(value, list):
        parts = [draw(damaged(part)) if draw(st.booleans()) else part for part in value]
        return parts[:-1] if kind == 1 else parts + parts[:1] * (kind == 2)
    return draw(LEAVES) if kind < 4 else value


def sound(record):
    turns = [*(record.prompt if isinstance(record.prompt, list) else [record.prompt]), *record.completions]
    for turn in turns:
        assert isinstance(turn, str) or (set(turn) == {"role", "content"} and isinstance(turn["role"], str))
        (turn if isinstance(turn, str) else turn["content"]).encode("utf-8")
    assert len({isinstance(completion, dict) for completion in record.completions}) <= 1
    assert len(record.rewards) == len(record.completions)
    assert all(type(reward) is float and math.isfinite(reward) for reward in record.rewards)


@functools.cache
def bytewise(folder):
    tiny.write_tokenizer(folder / "tokenizer")
    return tokenization.load_tokenizer(folder / "tokenizer")


def read_or_refuse(path, *, format):
    tokenizer = bytewise(path.parent) if format == "imdb" else None
    try:
        found = data.read(path, format=format, tokenizer=tokenizer)
    except ValueError as error:
        assert str(path) in str(error)
        return
    for record in found.rows:
        sound(record)
        assert record.source.startswith(str(path))


def test_every_format_is_here():
    assert SOUND.keys() == formats._PARSERS.keys()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


@pytest.mark.parametrize("format", SOUND)
@given(draw=st.data())
@settings(max_examples=150, deadline=None)
def test_rows_of_any_content(folder, format, draw):
    row = draw.draw(damaged(SOUND[format]))
    path = folder / f"{format}.jsonl"
    path.write_text(json.dumps(row) + "\n")
    read_or_refuse(path, format=format)


@pytest.mark.parametrize("zipped", [False, True])
@given(draw=st.data())
@settings(max_examples=200, deadline=None)
def test_bytes_flipped_and_files_cut(folder, zipped, draw):
    format = draw.draw(st.sampled_from(sorted(SOUND)))
    whole = (json.dumps(SOUND[format]) + "\n").encode() * 3
    content = bytearray(gzip.compress(whole, mtime=0) if zipped else whole)
    for _ in range(draw.draw(st.integers(0, 3))):
        content[draw.draw(st.integers(0, len(content) - 1))] = draw.draw(st.integers(0, 255))
    path = folder / f"bytes.jsonl{'.gz' * zipped}"
    path.write_bytes(content[: draw.draw(st.integers(0, len(content)))])
    read_or_refuse(path, format=format)
