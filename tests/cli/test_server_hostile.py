"""Replies that no sound server sends: each costs its own prompt, in bounded time and memory, and no other."""

import contextlib
import gzip
import json
import logging
import random
import re
import socketserver
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest

from fpo_jax.cli import generate
from fpo_jax.cli import openai_client as servers
from fpo_jax.io import jsonl
from tests.paths import REPO

MOST_MIB = 500  # of a job's process, its imports included
TIMEOUT_S, DRIP_S = 1.0, 0.1
WHOLE = json.dumps({"choices": [{"text": "fine", "finish_reason": "stop"}]}).encode()


def reply(content, *, headers=b"", length=None, status=b"200 OK"):
    """Return a reply as bytes, with the length that it says."""
    size = len(content) if length is None else length
    return b"HTTP/1.1 %s\r\n%sContent-Length: %s\r\n\r\n%s" % (status, headers, str(size).encode(), content)


def said(value):
    return reply(json.dumps(value).encode())


def choice(**changed):
    return said({"choices": [{"text": "fine", "finish_reason": "stop"} | changed]})


def endless(start, piece, *, pause=0.0):
    """Return a reply without an end: pieces after a start, for as long as somebody reads."""

    def pieces():
        yield start
        while True:
            yield piece
            time.sleep(pause)

    return pieces


HEAD, CHUNKED = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
MANY = b"x" * 2**16
NESTED = b"[" * 50_000
HOSTILE = {
    "closed": b"",
    "a cut status line": b"HTTP/1.",
    "no HTTP": b"what?\r\n\r\n",
    "another protocol": b"HTTP/9.9 200 OK\r\n\r\n",
    "a status of four digits": reply(WHOLE, status=b"2000 OK"),
    "a status of letters": reply(WHOLE, status=b"abc OK"),
    "cut headers": HEAD + b"Content-Le",
    "a header without a colon": HEAD + b"nonsense\r\n\r\n" + WHOLE,
    "a huge header": reply(WHOLE, headers=b"X-Huge: " + b"x" * 2**22 + b"\r\n"),
    "headers without an end": endless(HEAD, b"X-More: again\r\n" * 1000),
    "headers, a byte now and then": endless(HEAD, b"X", pause=DRIP_S),
    "a body, a byte now and then": endless(HEAD + b"\r\n", b" ", pause=DRIP_S),
    "silence": endless(b"", b"", pause=DRIP_S),
    "a body without an end": endless(HEAD + b"\r\n", MANY),
    "chunks without an end": endless(CHUNKED, b"10000\r\n" + MANY + b"\r\n"),
    "400 MiB": endless(HEAD + b"Content-Length: 419430400\r\n\r\n", b"[" + MANY[1:]),
    "a body cut": reply(WHOLE[:-9], length=len(WHOLE)),
    "a length too short": reply(WHOLE, length=len(WHOLE) - 9),
    "a length too long": reply(WHOLE, length=10**15),
    "a negative length": reply(WHOLE, length=-1),
    "a length of letters": reply(WHOLE, length="many"),
    "two lengths": reply(WHOLE, headers=b"Content-Length: 3\r\n"),
    "a chunk of a broken size": CHUNKED + b"zz\r\n" + WHOLE,
    "a chunk of a huge size": CHUNKED + b"f" * 4000 + b"\r\n",
    "chunks that stop": CHUNKED + b"5\r\nhello\r\n",
    "a gzip bomb": reply(gzip.compress(b" " * 2**28, 9), headers=b"Content-Encoding: gzip\r\n"),
    "deflate that is none": reply(b"\0" * 99, headers=b"Content-Encoding: deflate\r\n"),
    "no JSON": reply(b"<html>"),
    "nothing": reply(b""),
    "invalid UTF-8": reply(WHOLE.replace(b"fine", b"f\xff\xfe")),
    "zeros": reply(b"\0" * 1000),
    "NaN": reply(b'{"choices": NaN}'),
    "a text of NaN": reply(b'{"choices": [{"text": NaN}]}'),
    "a number of a hundred thousand digits": reply(b'{"choices": [{"text": ' + b"9" * 10**5 + b"}]}"),
    "an infinite number": reply(b'{"choices": 1e999999}'),
    "deep nesting": reply(NESTED),
    "deep nesting of objects": reply(b'{"choices":' * 9_000),
    "deep nesting of a reason": reply(
        b'{"choices": [{"text": "", "finish_reason": ' + b"[" * 900 + b"]" * 900 + b"}]}"
    ),
    "a million small lists": reply(b"[" + b"[]," * 349_000 + b"[]]"),
    "endless informational replies": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "another protocol agreed to": reply(b"", status=b"101 Switching Protocols"),
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "not modified": b"HTTP/1.1 304 Not Modified\r\n\r\n",
    "a redirect to itself": reply(b"", headers=b"Location: /v1/completions\r\n", status=b"307 Again"),
    "a redirect to nowhere": reply(b"", headers=b"Location: http://[\r\n", status=b"302 Found"),
    "a refusal without an end": endless(b"HTTP/1.1 400 No\r\n\r\n", MANY),
    "a wait without an end": reply(b"", headers=b"Retry-After: 1e400\r\n", status=b"429 Later"),
    "a wait of another kind": reply(b"", headers=b"Retry-After: Mon, 99 Foo 99999999999\r\n", status=b"503 Later"),
    "a list": said([1]),
    "a text": said("fine"),
    "a number": said(3),
    "null": said(None),
    "no choices": said({}),
    "choices that are an object": said({"choices": {"0": {"text": "fine"}}}),
    "choices that are a text": said({"choices": "fine"}),
    "choices that are numbers": said({"choices": [1]}),
    "no choice": said({"choices": []}),
    "a choice too many": said({"choices": [{"text": "a"}] * 2}),
    "a text that is none": choice(text=["fine"]),
    "half a surrogate": choice(text="\ud800"),
    "a reason that is none": choice(finish_reason=["stop"]),
    "half a surrogate as a reason": choice(finish_reason="\udfff"),
}


@contextlib.contextmanager
def served(replies):
    """Serve the reply that the prompt of a request names, by its place in `replies`; yields the URL."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            head = b"".join(iter(self.rfile.readline, b"\r\n"))
            size = int(re.search(rb"content-length: (\d+)", head.lower()).group(1))
            what = replies[int(json.loads(self.rfile.read(size))["prompt"].rstrip("?"))]
            with contextlib.suppress(OSError):  # the client has given up
                for piece in what() if callable(what) else [what]:
                    self.wfile.write(piece)

    class Many(socketserver.ThreadingTCPServer):
        daemon_threads, request_queue_size = True, 64

        def handle_error(self, *_):
            pass

    with Many(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()


def options(folder, url, count):
    """Ask for all replies."""
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{number}?"}) + "\n" for number in range(count)))
    return {
        "out": str(folder / "o.jsonl"), "data": str(data), "server": url, "server_model": "m", "rule": "raw",
        "max_new_tokens": 16,
    }  # fmt: skip


JOB = """
import json, logging, re, sys
from pathlib import Path
logging.basicConfig(level=logging.WARNING, format="%(message)s")
from fpo_jax.cli import generate, openai_client
openai_client.LONGEST_WAIT_S = 0.0
new = openai_client.Server.__new__
openai_client.Server.__new__ = lambda cls, *given: new(cls, *given, timeout_s=float(sys.argv[2]), attempts=2)
given = json.loads(sys.argv[1])
summary = generate.run(generate.Options(**given | {"out": Path(given["out"])}))
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 2**10
print(json.dumps([summary.prompts, summary.failed, peak]))
"""


@pytest.mark.slow
def test_a_hostile_reply_fails_alone_in_bounded_time_and_memory(tmp_path):
    """Every kind beside whole replies, in a process of its own: so many failures, one of each, and its peak memory."""
    replies = [one for hostile in HOSTILE.values() for one in (hostile, reply(WHOLE))]
    with served(replies) as url:
        job = [sys.executable, "-c", JOB, json.dumps(options(tmp_path, url, len(replies))), str(TIMEOUT_S)]
        done = subprocess.run(job, cwd=REPO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    prompts, failed, mib = json.loads(done.stdout)
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl.part").read_text().splitlines()]
    assert sorted(line["index"] for line in lines) == list(range(1, prompts, 2)), done.stderr
    assert {(*line["completions"], *line["finish"]) for line in lines} == {("fine", "stop")}
    described = [line for line in done.stderr.splitlines() if line.startswith("no answer: ")]
    assert len(HOSTILE) >= 31 and failed == len(described) == len(HOSTILE) == prompts - len(lines)
    assert all(len(line) < 700 and line.isprintable() for line in described), done.stderr
    assert mib < MOST_MIB


def corrupted(draw, content):
    """Damage a reply behind its status line: bytes changed, lost, repeated or put in."""
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        first = draw.randrange(13, len(content))
        last = min(len(content), first + draw.choice((1, 1, 4, 32)))
        piece = bytes(content[first:last])
        content[first:last] = draw.choice((draw.randbytes(last - first), b"", piece * 3, piece + draw.randbytes(3)))
    return bytes(content)


def test_two_hundred_corrupted_replies_fail_alone_or_are_whole(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(servers, "LONGEST_WAIT_S", 0.0)
    new = servers.Server.__new__
    monkeypatch.setattr(
        servers.Server, "__new__", lambda cls, *given: new(cls, *given, timeout_s=5 * TIMEOUT_S, attempts=2)
    )
    draw = random.Random(0)
    replies = [corrupted(draw, reply(WHOLE)) if number % 2 else reply(WHOLE) for number in range(400)]
    with served(replies) as url, caplog.at_level(logging.WARNING):
        given = options(tmp_path, url, len(replies))
        summary = generate.run(generate.Options(**given | {"out": tmp_path / "o.jsonl"}))
    lines = jsonl.read(tmp_path / "o.jsonl.part")
    assert summary.failed + len(lines) == 400 and 20 < summary.failed <= 200
    assert {line["index"] for line in lines} >= set(range(0, 400, 2))
    described = Counter(
        int(re.search(r"prompts\.jsonl:(\d+)", line).group(1)) for line in caplog.messages if "no answer" in line
    )
    assert set(described.values()) == {1} and len(described) == summary.failed
