"""Which format a source has, told by the columns of its first rows: what `data.format=auto` reads.

What flows in: the first rows and what the run trains on. What flows out: a `Found`, with the format's name, the columns
that hold what it reads, and the reason in words; every row is then read as that format, and one that is otherwise is
bad. Nothing is guessed from what the texts say, but for two cases: conversations are told from texts, and HH's
transcripts from other texts.
"""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fpo_jax.data.hh_rlhf import HUMAN
from fpo_jax.io.jsonl import BadRow

AUTO = "auto"
LOOKED_AT = 64  # rows
_MOST = 0.9  # share of them that must be of one kind
WANTS = ("any", "pairs", "rewards", "labels", "demonstrations")  # what a run trains on
# a column of a format -> what else it is called
ALIASES = {
    "prompt": ("question", "query", "instruction"),
    "completion": ("response", "output", "answer"),
    "completions": ("responses",),
    "rewards": ("scores",),
    "ranks": ("rankings", "ranking", "rank"),
    "messages": ("conversation", "conversations"),
    "conversations": ("conversation",),
}
_LISTS = ("messages", "conversations", "completions", "rewards", "ranks")
_NUMBERS = ("score_chosen", "score_rejected")
_CONVERSATIONS = ("prompt", "chosen", "rejected", "completion")


class Found(NamedTuple):
    """The format of a source."""

    format: str
    columns: Mapping[str, str]  # the format's name of a column -> the source's
    why: str  # columns and what they hold, for the first lines of a run

    def row(self, row: Any) -> Any:
        """Return a row under the format's names, lists and numbers that stand in it as text read."""
        if not isinstance(row, dict):
            return row
        taken = {name: row[column] for name, column in self.columns.items() if column in row}
        others = {name: value for name, value in row.items() if name not in self.columns.values()}
        return {name: _read(name, value) for name, value in {**taken, **others}.items()}


class _Kind(NamedTuple):
    format: str
    columns: tuple[str, ...]
    about: str
    holds: Callable[[dict[str, Any]], bool] = lambda row: True  # what the columns must hold beside being there


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def _is_whole(row: dict[str, Any]) -> bool:
    """Whether both sides are whole conversations: an answer alone has one turn."""
    return all(_is_chat(row[name]) and len(row[name]) > 1 for name in ("chosen", "rejected"))


def _are_answers(row: dict[str, Any]) -> bool:
    """Whether both sides are messages that answer a prompt: of conversations that are whole, a user speaks first."""
    return all(_is_chat(row[name]) and row[name][0]["role"] == "assistant" for name in ("chosen", "rejected"))


def _is_transcript(row: dict[str, Any]) -> bool:
    return all(isinstance(row[name], str) and row[name].startswith(HUMAN) for name in ("chosen", "rejected"))


def _are_texts(row: dict[str, Any]) -> bool:
    return all(isinstance(row[name], str) for name in ("chosen", "rejected"))


def _is_label(row: dict[str, Any]) -> bool:
    return row["label"] in (True, False, 0, 1) or str(row["label"]).lower() in ("true", "false", "0", "1")


def _is_sharegpt(row: dict[str, Any]) -> bool:
    turns = row["conversations"]
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]


_PAIRS = (
    _Kind("json", ("prompt", "chosen", "rejected"), "a prompt with two completions", _are_answers),
    _Kind("chat_pairs", ("chosen", "rejected"), "whole conversations that part in an assistant turn", _is_whole),
    _Kind("json", ("prompt", "chosen", "rejected"), "a prompt with two completions"),
    _Kind("transcripts", ("chosen", "rejected"), "HH transcripts that part in their last answer", _is_transcript),
    _Kind("text_pairs", ("chosen", "rejected"), "texts; the prompt is what both begin with", _are_texts),
    _Kind("tldr", ("info", "summaries", "choice"), "comparisons of summaries"),
)
_GROUPS = (
    _Kind("json", ("prompt", "completions", "rewards"), "a prompt with rewarded completions"),
    _Kind("chat_groups", ("prompt", "all_generated_responses", "all_rm_scores"), "a prompt with rewarded completions"),
    _Kind("rankings", ("prompt", "completions", "ranks"), "a prompt with ranked completions, the lowest rank the best"),
)
_SCORED = (
    _Kind(
        "scored_pairs",
        ("prompt", "chosen", "rejected", "score_chosen", "score_rejected"),
        "a prompt with two rewarded completions",
    ),
)
_LIKED = (_Kind("liked", ("prompt", "completion", "label"), "completions, those labelled true", _is_label),)
_LABELLED = (_Kind("labelled", ("prompt", "completion", "label"), "completions labelled true or false", _is_label),)
_DEMONSTRATIONS = (
    _Kind("messages", ("messages",), "conversations", lambda row: _is_chat(row["messages"])),
    _Kind("sharegpt", ("conversations",), "ShareGPT conversations", _is_sharegpt),
    _Kind("alpaca", ("instruction", "input", "output"), "an instruction, its input and an output"),
    _Kind("demonstrations", ("prompt", "completion"), "a prompt with a completion"),
    _Kind("tldr_sft", ("subreddit", "title", "post", "summary"), "posts with a summary"),
    _Kind("text", ("text",), "plain texts", lambda row: isinstance(row["text"], str)),
)
_PROMPTS = (_Kind("prompts", ("prompt",), "prompts without completions"),)
_ORDERS: dict[str, tuple[_Kind, ...]] = {
    "pairs": (*_PAIRS, *_GROUPS),
    "rewards": (*_GROUPS, *_SCORED, *_PAIRS),
    "labels": (*_LABELLED,),
    "demonstrations": (*_LIKED, *_DEMONSTRATIONS, *_PAIRS, *_GROUPS),
    "any": (*_PAIRS, *_GROUPS, *_LABELLED, *_DEMONSTRATIONS, *_PROMPTS),
}
assert _ORDERS.keys() == set(WANTS)


def find(rows: Sequence[Any], *, wants: str = "any", rule: str = "") -> Found:
    """Tell the format of a source.

    Args:
        rows: its first ones.
        wants: one of WANTS, what comes first among several that the columns allow.
        rule: `chat` reads HH transcripts as conversations.

    Raises:
        ValueError: no format fits, or not most of the rows; names the columns and what would be accepted.
    """
    sound = [row for row in rows if isinstance(row, dict)]
    for kind in _ORDERS[wants]:
        fits = [columns for row in sound if (columns := _columns(row, kind)) is not None]
        if fits and len(fits) >= _MOST * len(sound):
            format = kind.format
            if format == "transcripts":
                format = "transcript_chats" if rule == "chat" else "hh"
            columns = fits[0]
            named = ", ".join(column if column == name else f"{column} (as {name})" for name, column in columns.items())
            return Found(format, columns, f"the columns {named} hold {kind.about}")
    raise ValueError(_refusal(sound, wants))


def _columns(row: Mapping[str, Any], kind: _Kind) -> dict[str, str] | None:
    """Return the columns of a row that make it of a kind, None where it is not."""
    found: dict[str, str] = {}
    for name in kind.columns:
        column = next((one for one in (name, *ALIASES.get(name, ())) if row.get(one) is not None), None)
        if column is None and (kind.format, name) == ("alpaca", "input") and "input" in row:
            continue  # an empty one
        if column is None:
            return None
        found[name] = column
    read = {name: _read(name, row[column]) for name, column in found.items()}
    return found if not any(isinstance(value, BadRow) for value in read.values()) and kind.holds(read) else None


def _read(name: str, value: Any) -> Any:
    """Return a list or a number that stands in a cell as text, as in CSV; else the value."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if name in _NUMBERS:
        with contextlib.suppress(ValueError):
            return float(text)
    if (name in _LISTS and text.startswith("[")) or (name in _CONVERSATIONS and text.startswith("[{")):
        with contextlib.suppress(ValueError):
            read = json.loads(text)
            return read if name in _LISTS or _is_chat(read) else value
    return value


def _refusal(sound: Sequence[dict[str, Any]], wants: str) -> str:
    columns = sorted({name for row in sound for name, value in row.items() if value is not None})
    named = f"the columns {', '.join(columns)}" if columns else "rows without a column"
    others = {kind.about: kind for kind in _ORDERS["any"] if any(_columns(row, kind) is not None for row in sound)}
    matching = [
        kind for kind in others.values() if sum(_columns(row, kind) is not None for row in sound) >= _MOST * len(sound)
    ]
    accepted = "; ".join(dict.fromkeys(" + ".join(kind.columns) for kind in _ORDERS[wants]))
    if matching:
        remedy = _REMEDIES.get(wants, "")
        return f"{named} hold {matching[0].about}, and this run {_NEEDS[wants]}; give {accepted}{remedy}."
    if others:
        return (
            f"its rows are of several kinds ({'; '.join(others)}), none of which has {_MOST:.0%} of the first"
            f" {len(sound)}; split the file, or name one kind with --config.data.format."
        )
    return (
        f"{named} are none that is known; accepted are {accepted}; rename the columns, or see docs/datasets.md for what"
        " each holds."
    )


_NEEDS = {
    "any": "reads any data set",
    "pairs": "compares completions of a prompt",
    "rewards": "matches rewards",
    "labels": "learns from labels",
    "demonstrations": "trains on demonstrations",
}
_REMEDIES = {
    "pairs": ", or fine-tune on them with --config.stage=sft (labels train a reward model with"
    " --config.stage=reward --config.loss.name=binary_cross_entropy)",
    "labels": ", or train on pairs with --config.loss.name=bradley_terry",
}
