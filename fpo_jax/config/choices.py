"""The one sentence about a value that is none of its choices."""

from collections.abc import Iterable


def problems_of(name: str, value: object, choices: Iterable[str]) -> list[str]:
    """Return what is wrong with a value, in a list of none or one; "" among the choices stands for nothing given.

    >>> problems_of("--rule", "both", ("raw", "chat"))
    ["--rule='both' is not one of raw, chat"]
    """
    known = tuple(choices)
    return [] if value in known else [f"{name}={value!r} is not one of {', '.join(filter(None, known))}"]


def check(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse a value that is none of its choices.

    Raises:
        ValueError: it is none; lists them.
    """
    for problem in problems_of(name, value, choices):
        raise ValueError(f"{problem}.")
