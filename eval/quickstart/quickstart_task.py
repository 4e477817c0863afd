r"""The quickstart's task: sort the digits of a prompt. A program can check every answer, and demonstrate it badly.

    prompt "73915>"  ──►  answer "13579"

A demonstrator answers correctly, or, with probability MISTAKE_RATE, makes exactly one mistake of one of four kinds. No
prompt of the held-out set shares its answer with a training prompt, so a correct answer there was never seen.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

DIGITS = "0123456789"
END_OF_PROMPT = ">"
SHORTEST, LONGEST = 4, 8  # digits of a prompt
MISTAKE_RATE = 0.5
MOST_PROMPTS = 25_000  # a fifth of them has four digits, and there are 10,000 of those


class Prompts(NamedTuple):
    """Distinct prompts; the answers of the two sets are disjoint."""

    train: list[str]
    held_out: list[str]


def answer(prompt: str) -> str:
    """Return the one correct completion.

    >>> answer("73915>")
    '13579'
    """
    return "".join(sorted(prompt.removesuffix(END_OF_PROMPT)))


def reward(prompt: str, completion: str) -> float:
    """Return 1.0 for the correct completion, 0.0 for any other; no partial credit.

    >>> reward("73915>", "13579"), reward("73915>", "1357")
    (1.0, 0.0)
    """
    return float(completion == answer(prompt))


def _swapped(text: str) -> set[str]:
    return {text[:i] + text[i + 1] + text[i] + text[i + 2 :] for i in range(len(text) - 1)} - {text}


def _dropped(text: str) -> set[str]:
    return {text[:i] + text[i + 1 :] for i in range(len(text))}


def _repeated(text: str) -> set[str]:
    return {text[: i + 1] + text[i:] for i in range(len(text))}


def _changed(text: str) -> set[str]:
    return {text[:i] + digit + text[i + 1 :] for i in range(len(text)) for digit in DIGITS} - {text}


# name -> every text that one such mistake makes of a correct answer; the sets of an answer are disjoint
MISTAKES: dict[str, Callable[[str], set[str]]] = {
    "two neighbours swapped": _swapped,
    "a digit left out": _dropped,
    "a digit written twice": _repeated,
    "a digit replaced": _changed,
}
CORRECT, OTHER = "correct", "something else"
OUTCOMES = (CORRECT, *MISTAKES, OTHER)


def outcome(prompt: str, completion: str) -> str:
    """Return which of OUTCOMES a completion is.

    >>> outcome("73915>", "1379")
    'a digit left out'
    """
    right = answer(prompt)
    if completion == right:
        return CORRECT
    return next((name for name, results in MISTAKES.items() if completion in results(right)), OTHER)


def demonstrate(prompt: str, *, mistake_rate: float, random: np.random.Generator) -> str:
    """Answer, with probability `mistake_rate` wrongly: a kind drawn evenly, then one of its results drawn evenly.

    Where an answer does not admit the kind drawn (no two neighbours of "5555" can be swapped), another is drawn, so
    that the rate is exact.
    """
    right = answer(prompt)
    if random.random() >= mistake_rate:
        return right
    kinds = list(MISTAKES.values())
    results: list[str] = []
    while not results:
        results = sorted(kinds[random.integers(len(kinds))](right))
    return results[random.integers(len(results))]


def make_prompts(*, train: int, held_out: int, random: np.random.Generator) -> Prompts:
    """Draw distinct prompts of SHORTEST to LONGEST digits, lengths drawn evenly.

    Raises:
        ValueError: more prompts than there are to find.
    """
    if train + held_out > MOST_PROMPTS:
        raise ValueError(f"{train} + {held_out} prompts are more than {MOST_PROMPTS}; ask for fewer.")
    kept_out = _distinct(held_out, random, refused=())
    kept = _distinct(train, random, refused={answer(prompt) for prompt in kept_out})
    return Prompts(train=kept, held_out=kept_out)


def _distinct(count: int, random: np.random.Generator, *, refused: Iterable[str]) -> list[str]:
    """Draw `count` distinct prompts whose answers are not refused, in the order drawn."""
    refused = frozenset(refused)
    found: dict[str, None] = {}
    while len(found) < count:
        digits = random.integers(10, size=random.integers(SHORTEST, LONGEST + 1))
        prompt = "".join(map(str, digits)) + END_OF_PROMPT
        if answer(prompt) not in refused:
            found[prompt] = None
    return list(found)
