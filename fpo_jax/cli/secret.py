"""A server's key: read from the environment, sent in a header, and nowhere else: in no message, log or file."""

import json
import os
import urllib.parse
from typing import NoReturn

HIDDEN = "***"
SHORTEST_KEY = 16  # characters


class Secret:
    """A key that prints as ***, is never pickled, and has no attribute that holds it; `header` alone gives it away."""

    __slots__ = ("_reveal",)

    def __init__(self, variable: str):
        """Read the key from an environment variable; "" = none is sent.

        Raises:
            ValueError: the variable is not set, or no header could carry what it holds.
        """
        value = os.environ.get(variable, "").strip() if variable else ""
        if variable and not value:
            raise ValueError(f"the environment variable {variable} is not set; export the server's key in it.")
        if not (value.isascii() and all(character.isprintable() for character in value)):
            raise ValueError(f"the environment variable {variable} holds characters that no header may have.")
        self._reveal = lambda: value

    def header(self) -> dict[str, str]:
        """Return the header that carries it."""
        return {"Authorization": f"Bearer {self._reveal()}"} if self._reveal() else {}

    def hidden(self, text: str) -> str:
        """Return a text without it, as it is or as JSON and URLs write it."""
        for form in self._forms():
            text = text.replace(form, HIDDEN)
        return text

    def stands_in(self, text: str) -> bool:
        """Whether a text holds it; what is shorter than SHORTEST_KEY ("EMPTY") is no secret but a word."""
        return len(self._reveal()) >= SHORTEST_KEY and any(form in text for form in self._forms())

    def _forms(self) -> set[str]:
        value = self._reveal()
        return {value, json.dumps(value)[1:-1], urllib.parse.quote(value, safe="")} - {""}

    def __repr__(self) -> str:
        return HIDDEN

    def __copy__(self) -> "Secret":
        return self

    def __deepcopy__(self, _memo: object) -> "Secret":
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key is never pickled; read it from the environment where it is needed.")
