"""Responses from an OpenAI-compatible server: prompts in, texts out, with retries.

The key is read from the environment, sent in a header, and stands nowhere else: not in a message, a log or a file.
"""

import json
import os
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, NamedTuple

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)  # status codes that may pass
LONGEST_WAIT_S = 60.0


class Failed(Exception):
    """The server did not answer one request in all attempts, or refused it."""


class Secret:
    """A key that never prints itself."""

    def __init__(self, variable: str):
        """Read the key from an environment variable; "" = none is sent.

        Raises:
            ValueError: the variable is not set.
        """
        if variable and not os.environ.get(variable):
            raise ValueError(f"the environment variable {variable} is not set; export the server's key in it.")
        self._value = os.environ[variable] if variable else ""

    def header(self) -> dict[str, str]:
        """Return the header that carries it."""
        return {"Authorization": f"Bearer {self._value}"} if self._value else {}

    def __repr__(self) -> str:
        return "Secret(...)"


class Server(NamedTuple):
    """Where to ask, and how patiently."""

    url: str  # up to /v1
    model: str  # as the server calls it
    key: Secret
    timeout_s: float = 600.0  # of one request
    attempts: int = 6

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Post a request and return the answer; failures that may pass are tried again after growing, random waits.

        Raises:
            Failed: no answer in all attempts, or the server refuses the request.
        """
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/{path}",
            json.dumps({"model": self.model, **body}).encode(),
            {"Content-Type": "application/json", **self.key.header()},
        )
        cause = ""
        for attempt in range(self.attempts):
            wait = min(LONGEST_WAIT_S, 0.5 * 2**attempt) * random.uniform(0.5, 1.0)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    answer = json.loads(response.read())
                if isinstance(answer, dict):
                    return answer
                cause = "the answer is no JSON object"
            except urllib.error.HTTPError as error:
                cause = f"status {error.code}"
                if error.code not in RETRIED:
                    said = error.read(300).decode(errors="replace")
                    raise Failed(f"{cause}: {said}") from None
                wait = max(wait, _retry_after(error.headers.get("Retry-After")))
            except (OSError, ValueError) as error:  # time-outs, broken connections, answers that are not JSON
                cause = f"{type(error).__name__}: {error}"
            if attempt + 1 < self.attempts:
                time.sleep(wait)
        raise Failed(f"no answer in {self.attempts} attempts; the last one: {cause}")

    def responses(self, prompt: str | list[dict[str, str]], options: dict[str, Any]) -> list[tuple[str, str]]:
        """Return (text, finish reason) of each response to a text, or to a conversation.

        Raises:
            Failed: as `ask`; an answer of another form.
        """
        if isinstance(prompt, str):
            choices = self.ask("completions", {"prompt": prompt, **options}).get("choices")
        else:
            choices = self.ask("chat/completions", {"messages": prompt, **options}).get("choices")
        found = []
        for choice in choices if isinstance(choices, list) else []:
            text = choice.get("text") if isinstance(prompt, str) else (choice.get("message") or {}).get("content")
            if isinstance(text, str):
                found.append((text, str(choice.get("finish_reason") or "")))
        if len(found) != options.get("n", 1):
            raise Failed(f"the answer has {len(found)} texts, {options.get('n', 1)} were asked for")
        return found


def checked_url(url: str) -> str:
    """Return the URL of a server.

    Raises:
        ValueError: not http or https.
    """
    if urllib.parse.urlparse(url).scheme not in ("http", "https"):
        raise ValueError(f"--server={url!r} is no URL; write e.g. http://localhost:8000/v1.")
    return url


def _retry_after(value: str | None) -> float:
    """Seconds that a server asks to wait; dates and nonsense count as none."""
    try:
        return min(LONGEST_WAIT_S, max(0.0, float(value or 0)))
    except ValueError:
        return 0.0
