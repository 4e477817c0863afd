"""Readers of what other trainers read: ShareGPT, Alpaca, plain text, labels, rankings, pairs without a prompt column.

What flows in: the columns of one row under the names of `formats`. What flows out: what the row says, or why it is
dropped. `auto_format` finds out which of them a file needs.
"""

from typing import Any

from fpo_jax.data import values
from fpo_jax.data.hh_rlhf import HUMAN, Dropped, split_last_turn
from fpo_jax.data.values import Parsed
from fpo_jax.io.jsonl import BadRow
from fpo_jax.tokenization.messages import Message

ROLES = {  # ShareGPT's `from` -> role
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}
LABELS = {True: 1.0, False: 0.0, "true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0}


def sharegpt(row: dict[str, Any], _: str) -> Parsed:
    """Read `conversations`, turns of `from` and `value`; every answer is a demonstration."""
    return demonstrations(said(row["conversations"], "conversations"))


def demonstrations(turns: list[Message]) -> Parsed:
    """Return a demonstration for each assistant turn of a conversation, given what came before it."""
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers or answers[0] == 0:
        roles = ", ".join(turn["role"] for turn in turns)
        raise BadRow(f"messages must be a prompt and an assistant turn after it, but its turns are {roles}")
    first, *more = (Parsed(turns[:index], [turns[index]], [1.0]) for index in answers)
    return first._replace(more=more)


def said(value: Any, name: str) -> list[Message]:
    """Return ShareGPT's turns as messages."""
    if not isinstance(value, list) or not value:
        raise BadRow(f"{name} must be a list of turns, not {values.kind(value)}")
    turns = []
    for index, turn in enumerate(value):
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise BadRow(f"{name}[{index}] must be an object with from and value, not {values.kind(turn)}")
        if not isinstance(turn["from"], str) or turn["from"] not in ROLES:
            raise BadRow(f"{name}[{index}].from={turn['from']!r} is not one of {', '.join(ROLES)}")
        turns.append({"role": ROLES[turn["from"]], "content": values.text(turn["value"], f"{name}[{index}].value")})
    return turns


def alpaca(row: dict[str, Any], _: str) -> Parsed:
    """Read `instruction`, `input` (may be absent) and `output`."""
    parts = [values.text(row[name], name) for name in ("instruction", "input") if row.get(name)]
    return Parsed("\n\n".join(parts), [values.text(row["output"], "output")], [1.0])


def plain_text(row: dict[str, Any], _: str) -> Parsed:
    """Read `text`, all of which is trained on."""
    return Parsed("", [values.text(row["text"], "text")], [1.0])


def labelled(row: dict[str, Any], _: str) -> Parsed:
    """Read `prompt`, `completion` and `label`, true or false: a reward of 1 or 0."""
    prompt, label = values.prompt(row["prompt"]), row["label"]
    label = label.lower() if isinstance(label, str) else label
    if isinstance(label, list | dict) or label not in LABELS:
        raise BadRow(f"label must be true or false, not {label!r}")
    return Parsed(prompt, [values.completion(row["completion"], prompt, 0)], [LABELS[label]])


def liked(row: dict[str, Any], _: str) -> Parsed | Dropped:
    """Read the same for fine-tuning: what is labelled false is no demonstration."""
    found = labelled(row, _)
    return found if found.rewards[0] else Dropped("label_false")


def rankings(row: dict[str, Any], _: str) -> Parsed:
    """Read `prompt`, `completions` and `ranks`, of which the lowest is the best; a rank's reward is its negative."""
    prompt, completions, ranks = values.prompt(row["prompt"]), row["completions"], row["ranks"]
    if not isinstance(completions, list) or not isinstance(ranks, list) or len(completions) != len(ranks):
        raise BadRow("completions and ranks must be lists of one length")
    if len(completions) < 2:
        raise BadRow(f"{len(completions)} completions; a group needs at least 2")
    read = [values.completion(completion, prompt, index) for index, completion in enumerate(completions)]
    return Parsed(prompt, read, [0.0 - values.reward(rank, index) for index, rank in enumerate(ranks)])


def scored_pairs(row: dict[str, Any], _: str) -> Parsed:
    """Read `prompt`, `chosen`, `rejected` with `score_chosen` and `score_rejected` as their rewards."""
    prompt = values.prompt(row["prompt"])
    read = [values.completion(row[name], prompt, index) for index, name in enumerate(("chosen", "rejected"))]
    return Parsed(
        prompt, read, [values.reward(row[f"score_{name}"], i) for i, name in enumerate(("chosen", "rejected"))]
    )


def text_pairs(row: dict[str, Any], _: str) -> Parsed:
    """Read `chosen` and `rejected`, whole texts: the prompt is what both begin with, up to a white space."""
    chosen, rejected = (values.text(row[name], name) for name in ("chosen", "rejected"))
    shared = next(
        (at for at, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other),
        min(len(chosen), len(rejected)) - 1,
    )
    both_blank = (at for at in range(shared, 0, -1) if chosen[at].isspace() and rejected[at].isspace())
    cut = next(both_blank, 0)
    if not cut:
        raise BadRow("chosen and rejected begin with no common words, which would be the prompt; give a column prompt")
    return Parsed(chosen[:cut], [chosen[cut:], rejected[cut:]], [1.0, 0.0])


def transcript_chats(row: dict[str, Any], _: str) -> Parsed | Dropped:
    """Read HH transcripts as conversations, for rule `chat`."""
    try:
        pair = split_last_turn(values.text(row["chosen"], "chosen"), values.text(row["rejected"], "rejected"))
    except ValueError as error:
        raise BadRow(str(error)) from error
    if isinstance(pair, Dropped):
        return pair
    turns: list[Message] = []
    for part in pair.prompt.removesuffix("\n\nAssistant:").split(HUMAN)[1:]:
        asked, *answers = part.split("\n\nAssistant:")
        turns.append({"role": "user", "content": asked.strip()})
        turns += [{"role": "assistant", "content": answer.strip()} for answer in answers]
    return Parsed(turns, [pair.chosen.strip(), pair.rejected.strip()], [1.0, 0.0])
