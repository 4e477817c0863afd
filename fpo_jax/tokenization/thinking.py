"""The thoughts of reasoning models in texts: what marks them, and texts without them."""

import re

# what opens and closes a thought
_PAIRS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
MARKS = tuple(mark for pair in _PAIRS for mark in pair)
_SWITCH = re.compile(r"/(?:no_)?think\b")  # in a user's or a system text, which templates take out and obey


def held(text: str) -> bool:
    """Whether a text has a mark that opens or closes a thought."""
    return any(mark in text for mark in MARKS)


def dropped(text: str) -> str:
    """Return a text without its closed thoughts; one that is only opened, as a cut answer has it, stays.

    A closing mark alone ends a thought as well: the generation prompt has opened it.

    >>> dropped("<think>a</think> b <think>c</think>d"), dropped("a</think> b"), dropped("<think>cut")
    ('b d', 'b', '<think>cut')
    """
    for opens, closes in _PAIRS:
        if closes not in text:
            continue
        text = re.sub(rf"{re.escape(opens)}.*?{re.escape(closes)}\s*", "", text, flags=re.DOTALL)
        text = text.rpartition(closes)[2].lstrip() if closes in text else text
    return text


def opened(text: str) -> bool:
    """Whether a text ends within a thought.

    >>> opened("a<think>"), opened("<think></think>"), opened("a")
    (True, False, False)
    """
    return any(text.rfind(opens) > text.rfind(closes) for opens, closes in _PAIRS)


def closed(text: str) -> bool:
    """Whether a text has a mark that closes a thought."""
    return any(closes in text for _, closes in _PAIRS)


def plain(text: str) -> str:
    """Return the words of a text alone: what is left where templates set thoughts and white space in their own way."""
    for mark in MARKS:
        text = text.replace(mark, " ")
    return " ".join(_SWITCH.sub(" ", text).split())
