"""Responses from an OpenAI-compatible server: prompts in, texts out, with retries.

The key is read from the environment, sent in a header, and stands nowhere else: not in a message, a log or a file.
"""

import email.utils
import http.client
import json
import os
import queue
import random
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)  # status codes that may pass
REFUSED = (401, 403, 404)  # what every request would get: no such key, model or place
LONGEST_WAIT_S = 60.0
GRACE_S = 20.0  # that a stopped job waits for requests under way
_POLL_S = 0.1
HIDDEN = "***"
SHORTEST_KEY = 16  # characters
LONGEST_ANSWER = 2**16  # bytes that are read of a refusal
APIS = ("vllm", "openai")
# Fields that OpenAI refuses, with the values that change nothing. vLLM takes what a request does not say from the
# model's generation_config.json, so neutral values are said too.
_NEUTRAL_OF_VLLM = {
    "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "min_tokens": 0, "stop": [], "stop_token_ids": []
}  # fmt: skip
_NOT_KNOWN = "(?:unrecognized|unknown|unexpected|unsupported|not supported|not permitted|extra|no such)"

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Failed(Exception):
    """The server did not answer one request in all attempts, or refused it."""


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


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is a failure: it would take the key to another place, and a question asked by POST is not repeated."""

    def redirect_request(self, *_args: object, **_options: object) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


class Server(NamedTuple):
    """Where to ask, and how patiently."""

    url: str  # up to /v1
    model: str  # as the server calls it
    key: Secret
    ended: threading.Event  # set = ask nothing again
    timeout_s: float = 600.0  # of silence within one request
    attempts: int = 6

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Post a request and return the answer; failures that may pass are tried again after growing, random waits.

        Raises:
            Failed: no answer in all attempts, or the server refuses the request.
            ValueError: the server would refuse every request.
        """
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/{path}",
            json.dumps({"model": self.model, **body}).encode(),
            {"Content-Type": "application/json", **self.key.header()},
        )
        cause = ""
        for attempt in range(self.attempts):
            wait = min(LONGEST_WAIT_S, 2.0**attempt) * random.uniform(0.5, 1.0)
            try:
                with _OPENER.open(request, timeout=self.timeout_s) as response:
                    content = response.read()
                answer = json.loads(content)
                if self.key.stands_in(content.decode(errors="replace")) or self.key.stands_in(repr(answer)):
                    raise Failed("the answer repeats the key, which no file may hold")
                if isinstance(answer, dict):
                    return answer
                cause = "the answer is no JSON object"
            except urllib.error.HTTPError as error:
                with error:
                    # hidden before it is cut: a cut through the key would show the first part of it
                    said = self.key.hidden(error.read(LONGEST_ANSWER).decode(errors="replace"))
                cause = f"status {error.code}: {said[:300]}"
                if error.code in REFUSED:
                    raise ValueError(
                        f"{self.url} answers with {cause}; check --server, --server-model and the key."
                    ) from None
                if error.code not in RETRIED:
                    raise Failed(cause + self._remedy(error.code, said, body)) from None
                wait = max(wait, _retry_after(error.headers.get("Retry-After")))
            except (OSError, http.client.HTTPException, ValueError) as error:
                cause = f"{type(error).__name__}: {error}"  # time-outs, broken connections, what is no HTTP or no JSON
            if attempt + 1 == self.attempts or self._wait(wait):
                break
        raise Failed(f"no answer in {attempt + 1} attempts; the last one: {self.key.hidden(cause)}")

    def responses(self, prompt: str | list[dict[str, str]], options: dict[str, Any]) -> list[tuple[str, str]]:
        """Return (text, finish reason) of each response to a text, or to a conversation.

        Raises:
            Failed: as `ask`; an answer of another form.
            ValueError: as `ask`.
        """
        path, question = ("completions", "prompt") if isinstance(prompt, str) else ("chat/completions", "messages")
        choices = self.ask(path, {question: prompt, **options}).get("choices")
        found = [_choice(choice, "text" if isinstance(prompt, str) else "message") for choice in _list(choices)]
        texts = [one for one in found if one is not None]
        if len(texts) != options.get("n", 1):
            raise Failed(f"the answer has {len(texts)} texts, {options.get('n', 1)} were asked for")
        return texts

    def _remedy(self, code: int, said: str, body: dict[str, Any]) -> str:
        """Return what to try after a refusal of a request that has fields of vLLM alone.

        Raises:
            ValueError: the server says that it does not know one of them, which stands in every request.
        """
        fields = [name for name in body if name in _NEUTRAL_OF_VLLM and name != "stop"]
        if code not in (400, 422) or not fields:
            return ""
        if unknown := [name for name in fields if _says_unknown(said, name)]:
            raise ValueError(
                f"{self.url} answers with status {code}: {said[:300]}; it does not know {', '.join(unknown)};"
                " --server-api=openai leaves out what OpenAI does not know."
            )
        return "; where it is a field that the server does not know, give --server-api=openai"

    def _wait(self, seconds: float) -> bool:
        """Wait before the next attempt; return whether there shall be none."""
        return self.ended.wait(seconds)


def sampling_fields(
    api: str,
    *,
    max_tokens: int,
    temperature: float,
    n: int = 1,
    top_p: float = 1.0,
    top_k: int = 0,
    min_tokens: int = 0,
    stop: Sequence[str] = (),
    stop_token_ids: Sequence[int] = (),
) -> dict[str, Any]:
    """Return all that a request says about sampling, but for the seed; what is neutral is said too.

    Args:
        api: one of APIS, which names the fields.
        max_tokens: of a response.
        temperature: 0 = greedy.
        n: responses.
        top_p: 1 = off.
        top_k: 0 = off; OpenAI has none.
        min_tokens: before a stop token; OpenAI has none.
        stop: texts that end a response.
        stop_token_ids: tokens that end a response, besides those of the server; OpenAI has none.

    Raises:
        ValueError: no such API.
    """
    if api not in APIS:
        raise ValueError(f"--server-api={api!r} is not one of {', '.join(APIS)}.")
    fields: dict[str, Any] = {"max_tokens": max_tokens, "temperature": float(temperature), "top_p": top_p, "n": n}
    fields |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
    given = {"top_k": top_k or None, "min_tokens": min_tokens, "stop_token_ids": list(stop_token_ids)}
    given = {name: value for name, value in (given | {"stop": list(stop)}).items() if value}
    if api == "openai":
        assert given.keys() <= {"stop"}, given
        return fields | given  # without an empty list of stop strings, which OpenAI refuses
    return fields | _NEUTRAL_OF_VLLM | given


def each(
    work: Callable[[_Item], _Result],
    items: Iterable[_Item],
    *,
    workers: int,
    ended: threading.Event,
    asked: Callable[[], object],
) -> Iterator[_Result]:
    """Yield the results of `work` as they come, with at most `workers` items under way.

    Once `asked()` is true `ended` is set and no further item is taken; what is under way is waited for GRACE_S at most.
    The first item that raises ends the others in the same way, without a wait.

    Raises:
        Exception: what `work` raised.
    """
    results: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    waiting, lock = iter(items), threading.Lock()

    def take() -> None:
        while not ended.is_set():
            with lock:
                item = next(waiting, results)  # `results` stands for none left: an item may be anything else
            if item is results:
                break
            try:
                results.put(("result", work(item)))  # pyright: ignore[reportArgumentType]
            except BaseException as error:
                ended.set()
                results.put(("error", error))
        results.put(("done", None))

    # Daemons: a request that hangs must not keep a stopped program from ending.
    for _ in range(workers):
        threading.Thread(target=take, daemon=True).start()
    running, until = workers, float("inf")
    while running and time.monotonic() < until:
        if not ended.is_set() and asked():
            ended.set()
            until = time.monotonic() + GRACE_S
        try:
            kind, value = results.get(timeout=_POLL_S)
        except queue.Empty:
            continue
        if kind == "error":
            raise value
        if kind == "result":
            yield value
        running -= kind == "done"


def checked_url(url: str) -> str:
    """Return the URL of a server.

    Raises:
        ValueError: not http or https, no host, or a password inside, which would stand in files and messages.
    """
    parts = urllib.parse.urlparse(url)
    if "@" in parts.netloc:
        raise ValueError("--server holds a password; give the key with --api-key-env alone.")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"--server={url!r} is no URL; write e.g. http://localhost:8000/v1.")
    return url


def _says_unknown(said: str, name: str) -> bool:
    """Whether a refusal calls a field unknown, in the sentence or the object that names it."""
    found = rf"\b{name}\b"
    pattern = rf"{_NOT_KNOWN}[^{{}}]{{0,80}}{found}|{found}[^{{}}]{{0,40}}{_NOT_KNOWN}"
    return re.search(pattern, said, re.IGNORECASE) is not None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _choice(choice: Any, kind: str) -> tuple[str, str] | None:
    """Return text and finish reason of one choice; None where it is none."""
    if not isinstance(choice, dict):
        return None
    text = choice.get(kind)
    if kind == "message":
        text = text.get("content") if isinstance(text, dict) else None
    if not isinstance(text, str) or any("\ud800" <= character <= "\udfff" for character in text):
        return None  # half a surrogate pair is no text: no file could hold it
    return text, str(choice.get("finish_reason") or "")


def _retry_after(value: str | None) -> float:
    """Seconds that a server asks to wait, as a number or a date; nonsense counts as none."""
    try:
        seconds = float(value or 0)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value or "").timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(LONGEST_WAIT_S, max(0.0, seconds))
