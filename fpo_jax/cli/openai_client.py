"""Responses from an OpenAI-compatible server: prompts in, texts out, with retries.

What a server sends is a stranger's: a reply may take `timeout_s` and a bounded number of bytes, and where it is none it
fails alone.
"""

import email.utils
import functools
import ipaddress
import itertools
import json
import logging
import math
import random
import re
import ssl
import threading
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple, TypeVar

import anyio
import httpx2 as httpx
from anyio import from_thread

from fpo_jax.cli.secret import Secret
from fpo_jax.config import choices
from fpo_jax.io import terminal

log = logging.getLogger(__name__)
for _name in ("httpx2", "httpcore2"):  # they write a line for every request, and headers, which could repeat the key
    logging.getLogger(_name).setLevel(logging.WARNING)

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)  # status codes that may pass
REFUSED = (401, 403, 404)  # what every request would get: no such key, model or place
LONGEST_WAIT_S = 60.0
GRACE_S = 20.0  # that a stopped job waits for requests under way
_POLL_S = 0.1
LONGEST_REFUSAL = 2**16  # bytes that are read of it
LONGEST_ANSWER = 2**20  # bytes that are read of it, and LONGEST_TOKEN more for each token asked for
LONGEST_TOKEN = 64  # bytes; ten times what JSON needs for one
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


class Server(NamedTuple):
    """Where to ask, and how patiently."""

    url: str  # up to /v1
    model: str  # as the server calls it
    key: Secret
    ended: threading.Event  # set = ask nothing again
    timeout_s: float = 600.0  # from the start of one request to the last byte of its reply
    attempts: int = 6

    async def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Post a request and return the answer; failures that may pass are tried again after growing, random waits.

        Raises:
            Failed: no answer in all attempts, or the server refuses the request.
            ValueError: the server would refuse every request.
        """
        content = json.dumps({"model": self.model, **body}).encode()
        longest = LONGEST_ANSWER + LONGEST_TOKEN * body.get("max_tokens", 0) * body.get("n", 1)
        for attempt in range(self.attempts):
            wait = min(LONGEST_WAIT_S, 2.0**attempt) * random.uniform(0.5, 1.0)
            try:
                with anyio.fail_after(self.timeout_s):
                    reply, said = await self._post(path, content, longest)
                if reply.is_success:
                    return self._object(said)
            except Failed:
                raise
            except TimeoutError:
                cause = f"the answer is not whole after {self.timeout_s:g} s"
            # whatever a stranger's bytes make of a library costs their own request and no other
            except Exception as error:
                cause = f"{type(error).__name__}: {error}"
            else:
                cause = self._refusal(reply.status_code, said, body)
                wait = max(wait, _retry_after(reply.headers.get("Retry-After")))
            if attempt + 1 == self.attempts or await self._wait(wait):
                break
        raise Failed(f"no answer in {attempt + 1} attempts; the last one: {self._shown(cause)[:300]}")

    async def _post(self, path: str, content: bytes, longest: int) -> tuple[httpx.Response, bytes]:
        """Return a reply and its bytes, of a refusal the first ones. A redirect, which would take the key, is one.

        The client is its own: nothing of another reply, no cookie and no byte too many, can reach this one.
        """
        url, read = httpx.URL(f"{self.url.rstrip('/')}/{path}"), bytearray()
        # what is packed could be a bomb
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", **self.key.header()}
        options = {"trust_env": False, "proxy": _proxy(url), "verify": _trusted(), "timeout": None}
        async with httpx.AsyncClient(**options) as client:
            async with client.stream("POST", url, content=content, headers=headers) as reply:
                async for chunk in reply.aiter_raw():
                    read += chunk
                    if not reply.is_success and len(read) > LONGEST_REFUSAL:
                        break
                    if len(read) > longest:
                        raise ValueError(f"the answer is longer than {longest:,} bytes")
                return reply, bytes(read[:longest])

    def _object(self, content: bytes) -> dict[str, Any]:
        """Return the JSON object of an answer.

        Raises:
            Failed: it repeats the key.
            ValueError: it is none.
            RecursionError: it is nested as deeply as no answer is.
        """
        answer = json.loads(content)
        if self.key.stands_in(content.decode(errors="replace")) or self.key.stands_in(repr(answer)):
            raise Failed("the answer repeats the key, which no file may hold")
        if not isinstance(answer, dict):
            raise ValueError("the answer is no JSON object")
        return answer

    def _refusal(self, code: int, content: bytes, body: dict[str, Any]) -> str:
        """Return what to say of a refusal that may pass.

        Raises:
            Failed: it will not pass.
            ValueError: every request would be refused.
        """
        # hidden before it is cut: a cut through the key would show the first part of it
        said = self._shown(content.decode(errors="replace"))
        cause = f"status {code}: {said[:300]}"
        if code in REFUSED:
            raise ValueError(f"{self.url} answers with {cause}; check --server, --server-model and the key.")
        if code not in RETRIED:
            raise Failed(cause + self._remedy(code, said, body))
        return cause

    async def completions(self, prompt: str | list[dict[str, str]], options: dict[str, Any]) -> list[tuple[str, str]]:
        """Return (text, finish reason) of each completion of a text, or to a conversation.

        Raises:
            Failed: as `ask`; an answer of another form.
            ValueError: as `ask`.
        """
        path, question = ("completions", "prompt") if isinstance(prompt, str) else ("chat/completions", "messages")
        choices = (await self.ask(path, {question: prompt, **options})).get("choices")
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

    async def _wait(self, seconds: float) -> bool:
        """Wait before the next attempt; return whether there shall be none."""
        until = time.monotonic() + seconds
        while not self.ended.is_set() and (left := until - time.monotonic()) > 0:
            await anyio.sleep(min(left, _POLL_S))
        return self.ended.is_set()

    def _shown(self, text: str) -> str:
        """Return a stranger's text as one line without the key."""
        return terminal.shown(self.key.hidden(text), longest=None).replace("\n", " ")


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
        max_tokens: of a completion.
        temperature: 0 = greedy.
        n: completions.
        top_p: 1 = off.
        top_k: 0 = off; OpenAI has none.
        min_tokens: before a stop token; OpenAI has none.
        stop: texts that end a completion.
        stop_token_ids: tokens that end a completion, besides those of the server; OpenAI has none.

    Raises:
        ValueError: no such API.
    """
    choices.check("--server-api", api, APIS)
    fields: dict[str, Any] = {"max_tokens": max_tokens, "temperature": float(temperature), "top_p": top_p, "n": n}
    fields |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
    given = {"top_k": top_k or None, "min_tokens": min_tokens, "stop_token_ids": list(stop_token_ids)}
    given = {name: value for name, value in (given | {"stop": list(stop)}).items() if value}
    if api == "openai":
        assert given.keys() <= {"stop"}, given
        return fields | given  # without an empty list of stop strings, which OpenAI refuses
    return fields | _NEUTRAL_OF_VLLM | given


def each(
    work: Callable[[_Item], Awaitable[_Result]],
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
    waiting, until = iter(items), math.inf
    under_way: set[futures.Future[_Result]] = set()
    with from_thread.start_blocking_portal() as portal:
        try:
            while time.monotonic() < until:
                if not ended.is_set() and asked():
                    ended.set()
                    until = time.monotonic() + GRACE_S
                room = 0 if ended.is_set() else workers - len(under_way)
                under_way |= {portal.start_task_soon(work, item) for item in itertools.islice(waiting, room)}
                if not under_way:
                    break
                done, under_way = futures.wait(under_way, _POLL_S, futures.FIRST_COMPLETED)
                for one in sorted(done, key=lambda one: one.exception() is not None):  # no result is lost to an error
                    yield one.result()
        finally:
            ended.set()
            for one in under_way:
                one.cancel()


def checked_url(url: str) -> str:
    """Return the URL of a server, and warn where everybody on the way could read what is sent.

    Raises:
        ValueError: not http or https, no host, or a password inside, which would stand in files and messages.
    """
    if "@" in url.partition("//")[2].partition("/")[0]:
        raise ValueError("--server holds a password; give the key with --api-key-env alone.")
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"--server={url!r} is no URL ({error}); write e.g. http://localhost:8000/v1.") from None
    if parts.scheme not in ("http", "https") or not parts.host or (parts.port or 0) >= 2**16:
        raise ValueError(f"--server={url!r} is no URL; write e.g. http://localhost:8000/v1.")
    if parts.scheme == "http" and not _here(parts.host):
        log.warning(
            "--server=%s is not encrypted: prompts, replies and the key can be read and changed on the way to %s;"
            " use https, or a tunnel to localhost.",
            url,
            parts.host,
        )
    return url


def _here(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


@functools.cache
def _proxy(url: httpx.URL) -> str | None:
    """Return the proxy that the environment names for a URL (`https_proxy`, but for what `no_proxy` names)."""
    if urllib.request.proxy_bypass(url.netloc.decode()):
        return None
    proxy = urllib.request.getproxies().get(url.scheme)
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


@functools.cache
def _trusted() -> ssl.SSLContext:
    return ssl.create_default_context()  # the machine's authorities, or those that SSL_CERT_FILE names


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
    text, reason = choice.get(kind), choice.get("finish_reason") or ""
    if kind == "message":
        text = text.get("content") if isinstance(text, dict) else None
    if not isinstance(text, str) or not isinstance(reason, str):
        return None
    if any("\ud800" <= character <= "\udfff" for character in text + reason):
        return None  # half a surrogate pair is no text: no file could hold it
    return text, reason


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
