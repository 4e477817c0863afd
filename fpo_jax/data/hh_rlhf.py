r"""Split a pair of HH-RLHF transcripts into a prompt and two completions.

A transcript is "\n\nHuman: ...\n\nAssistant: ...\n\nHuman: ...". The prompt starts with two newlines and ends exactly
in "Assistant:"; a completion begins with one space. The prompt is never the common character prefix: that puts answer
text into the prompt of 19 % of the rows of HH harmless.

    last_turn         the completion is the last Assistant turn; a pair whose prompts differ is dropped
    first_difference  f-PO's original: turns are compared in order, the first that differs is the completion, and what
                      follows it is lost; "Humans:" reads as "Human:", "Human: " inside an answer becomes a space

The original strips the left of an answer on the chosen side only; here both sides are treated alike, because a double
space that marks one side is a giveaway and not a preference.
"""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_ROLE = re.compile(r"\n\n(Human|Assistant):")


class Pair(NamedTuple):
    """A prompt with the completion people chose and the one they rejected."""

    prompt: str
    chosen: str
    rejected: str


class Dropped(NamedTuple):
    """A well-formed row that makes no preference pair."""

    reason: str
    note: str = ""  # what else is odd about it


def split_last_turn(chosen: str, rejected: str) -> Pair | Dropped:
    r"""Split at the last Assistant turn of each side.

    >>> split_last_turn("\n\nHuman: Hi\n\nAssistant: Hello", "\n\nHuman: Hi\n\nAssistant: Go")
    Pair(prompt='\n\nHuman: Hi\n\nAssistant:', chosen=' Hello', rejected=' Go')
    >>> split_last_turn("\n\nHuman: Hi\n\nAssistant: Hello", "\n\nHuman: Ho\n\nAssistant: Go")
    Dropped(reason='prompts_differ', note='')

    Raises:
        ValueError: a side is not a transcript.
    """
    sides = []
    for name, transcript in (("chosen", chosen), ("rejected", rejected)):
        _check(name, transcript)
        end = transcript.rindex(ASSISTANT) + len(ASSISTANT)
        if HUMAN in transcript[end:]:
            return Dropped("last_turn_not_assistant")
        sides.append((transcript[:end], " " + transcript[end:].lstrip()))
    if sides[0][0] != sides[1][0]:
        return Dropped("prompts_differ")
    return Pair(sides[0][0], sides[0][1], sides[1][1])


def split_first_difference(chosen: str, rejected: str) -> Pair | Dropped:
    r"""Split at the first turn that differs, which must be an Assistant turn on both sides.

    >>> tail = "\n\nHuman: And?"
    >>> split_first_difference("\n\nHumans: Hi\n\nAssistant:  Hello" + tail, "\n\nHuman: Hi\n\nAssistant: Go")
    Pair(prompt='\n\nHuman: Hi\n\nAssistant:', chosen=' Hello', rejected=' Go')

    Raises:
        ValueError: a side is not a transcript.
    """
    _check("chosen", chosen)
    _check("rejected", rejected)
    ours, theirs = _turns(chosen), _turns(rejected)
    common = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if common is None:
        return Dropped("identical" if len(ours) == len(theirs) else "no_differing_turn")
    if not ours[common].startswith(ASSISTANT) or not theirs[common].startswith(ASSISTANT):
        return Dropped("differ_at_human_turn")
    first, second = (" " + side[common].removeprefix(ASSISTANT).lstrip() for side in (ours, theirs))
    return Pair("".join(ours[:common]) + ASSISTANT, first, second)


SPLITS: dict[str, Callable[[str, str], Pair | Dropped]] = {
    "last_turn": split_last_turn,
    "first_difference": split_first_difference,
}


def has_odd_turns(transcript: str) -> bool:
    r"""Tell whether two turns of one role follow each other.

    >>> has_odd_turns("\n\nHuman: a\n\nAssistant: b"), has_odd_turns("\n\nHuman: a\n\nHuman: b\n\nAssistant: c")
    (False, True)
    """
    return any(first == second for first, second in pairwise(_ROLE.findall(transcript)))


def _turns(transcript: str) -> list[str]:
    """Turns with their blank lines and role in front; answers stripped on the left, one space after the role."""
    turns: list[str] = []
    for segment in transcript.split("\n\n"):
        if re.match("Humans?:( |$)", segment):
            turns.append(f"{HUMAN} " + segment.split(":", 1)[1].removeprefix(" "))
        elif re.match("Assistant:( |$)", segment):
            turns.append(f"{ASSISTANT} " + segment.removeprefix("Assistant:").replace("Human: ", " ").lstrip())
        elif turns:
            inside = segment if turns[-1].startswith(HUMAN) else segment.replace("Human: ", " ")
            turns[-1] += "\n\n" + inside
    return turns


def _check(name: str, transcript: str) -> None:
    if not transcript.startswith((HUMAN, "\n\nHumans:")) or ASSISTANT not in transcript:
        raise ValueError(
            f"{name} is no HH transcript: it must start with {HUMAN!r} and have a turn {ASSISTANT!r}, "
            f"and it starts with {transcript[:24]!r}"
        )
