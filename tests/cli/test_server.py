"""The server adapter against servers that misbehave: broken answers, redirects, leaks, waits, and signals."""

import email.utils
import json
import threading
import time

import anyio
import pytest

from fpo_jax.cli import generate
from fpo_jax.cli import openai_client as servers
from fpo_jax.distributed import preemption
from fpo_jax.io import jsonl
from tests.answer_server import AnswerServer

KEY = "sk-very-secret"


def ask(behave, **changed):
    """Ask a server one question; returns the answer and the server."""
    server = AnswerServer(behave, lambda text: f"re: {text}")
    with server.served():
        given = {"timeout_s": 2.0, "attempts": 2} | changed
        patient = servers.Server(server.url, "m", given.pop("key", servers.Secret("")), threading.Event(), **given)
        return anyio.run(patient.completions, "one?", {"n": 1}), server


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(servers, "LONGEST_WAIT_S", 0.02)


def half_a_body(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "500")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')


def no_http(handler):
    handler.wfile.write(b"what?\r\n\r\n")


def closed(handler):
    handler.connection.close()


@pytest.mark.parametrize("how", [half_a_body, no_http, closed, "garbage", [], 503])
def test_what_may_pass_is_asked_again(quick, how):
    answer, server = ask(lambda number, body: how if number == 0 else None)
    assert answer == [("re: one?", "stop")] and len(server.bodies) == 2
    with pytest.raises(servers.Failed, match="no answer in 2 attempts; the last one: "):
        ask(lambda number, body: how)


@pytest.mark.parametrize(
    "choices", [None, "text", {"0": "text"}, ["text"], [{}], [{"text": 3}], [{"text": "a"}] * 2, [{"text": "\ud800"}]]
)
def test_an_answer_of_another_form_fails(quick, choices):
    with pytest.raises(servers.Failed, match="the answer has . texts, 1 were asked for"):
        ask(lambda number, body: {"choices": choices})


def test_messages_of_another_form_fail(quick):
    for message in ("text", None, ["text"], {"content": None}):
        server = AnswerServer(lambda number, body, said=message: {"choices": [{"message": said}]}, str)
        with server.served(), pytest.raises(servers.Failed, match="the answer has 0 texts"):
            patient = servers.Server(server.url, "m", servers.Secret(""), threading.Event())
            anyio.run(patient.completions, [{"role": "user", "content": "q"}], {"n": 1})


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_the_key_follows_no_redirect(quick, monkeypatch, code):
    monkeypatch.setenv("ANSWER_KEY", KEY)
    other = AnswerServer(lambda number, body: None, str)
    got = []

    def redirect(handler):
        handler.send_response(code)
        handler.send_header("Location", other.url)
        handler.end_headers()

    with other.served():
        monkeypatch.setattr(other, "behave", lambda *_: got.append(1))
        with pytest.raises(servers.Failed, match=f"status {code}"):
            ask(lambda number, body: redirect, key=servers.Secret("ANSWER_KEY"))
    assert not other.headers and not got


@pytest.mark.parametrize("value", [KEY, f"{KEY}\n", f" {KEY}"])
def test_the_key_stands_in_no_message(quick, monkeypatch, value):
    """Not even where the server repeats it; white space around it, which no header may hold, is cut off."""
    monkeypatch.setenv("ANSWER_KEY", value)

    def tell(handler):
        handler.send_response(400)
        handler.end_headers()
        handler.wfile.write(f"wrong: {handler.headers['Authorization']}".encode())

    with pytest.raises(servers.Failed, match="status 400: wrong: Bearer") as caught:
        ask(lambda number, body: tell, key=servers.Secret("ANSWER_KEY"))
    assert "secret" not in str(caught.value)


def test_keys_and_urls_that_cannot_be_used(monkeypatch):
    monkeypatch.setenv("ANSWER_KEY", "two\nlines")
    with pytest.raises(ValueError, match="ANSWER_KEY holds characters that no header may have") as caught:
        servers.Secret("ANSWER_KEY")
    assert "two" not in str(caught.value)
    with pytest.raises(ValueError, match="--server holds a password") as caught:
        servers.checked_url("http://me:hunter2@host/v1")
    assert "hunter2" not in str(caught.value)
    for url in (
        "http:///v1",
        "http://[::1/v1",
        "http://host:port/v1",
        "http://host:99999/v1",
        "ftp://host/v1",
        "host:80",
    ):
        with pytest.raises(ValueError, match="is no URL.*write e.g. http"):
            servers.checked_url(url)


@pytest.mark.parametrize("host", ["judge.example.org", "10.0.0.3:8000", "[2001:db8::1]", "localhost.example.org"])
def test_a_remote_server_without_encryption_is_told(caplog, host):
    assert servers.checked_url(f"http://{host}/v1") == f"http://{host}/v1"
    assert [line for line in caplog.messages if "is not encrypted" in line and "use https, or a tunnel" in line]
    caplog.clear()
    for url in (f"https://{host}/v1", "http://localhost:8000/v1", "http://127.0.0.1/v1", "http://[::1]:8000/v1"):
        servers.checked_url(url)
    assert not caplog.messages


@pytest.mark.parametrize("named", ["http_proxy", "HTTP_PROXY"])
def test_the_environment_s_proxy_is_asked_unless_no_proxy_names_the_host(monkeypatch, named):
    proxy = AnswerServer(lambda number, body: None, lambda text: f"by proxy: {text}")
    monkeypatch.setenv("ALL_PROXY", "socks5://nowhere")  # never read
    patient = servers.Server("http://judge.example.org/v1", "m", servers.Secret(""), threading.Event(), 5.0, 1)
    with proxy.served():
        for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(named, proxy.url.removeprefix("http://").removesuffix("/v1"))
        servers._proxy.cache_clear()
        assert anyio.run(patient.completions, "one?", {"n": 1}) == [("by proxy: one?", "stop")]
        monkeypatch.setenv("no_proxy", "example.org")
        servers._proxy.cache_clear()
        with pytest.raises(servers.Failed, match="no answer in 1 attempts"):
            anyio.run(patient.completions, "one?", {"n": 1})
    servers._proxy.cache_clear()


def test_a_refusal_tells_a_terminal_nothing(quick):
    def tell(handler):
        handler.send_response(400)
        handler.end_headers()
        handler.wfile.write(b"\x1b]52;c;cm0=\x07\x1b[2J no\r\n")

    with pytest.raises(servers.Failed, match="status 400: ") as caught:
        ask(lambda number, body: tell)
    assert str(caught.value).isprintable()


def test_it_waits_as_long_as_the_server_asks(monkeypatch):
    assert servers._retry_after("7") == 7.0
    assert servers._retry_after(email.utils.formatdate(time.time() + 30, usegmt=True)) == pytest.approx(30, abs=2)
    assert servers._retry_after(email.utils.formatdate(time.time() - 30, usegmt=True)) == 0.0
    assert servers._retry_after("1e9") == servers.LONGEST_WAIT_S
    assert [servers._retry_after(value) for value in (None, "", "soon", "-3", "nan")] == [0.0] * 5
    waited = []

    async def wait(self, seconds):
        waited.append(seconds)

    monkeypatch.setattr(servers.Server, "_wait", wait)

    def later(handler):
        handler.send_response(429)
        handler.send_header("Retry-After", "9")
        handler.end_headers()

    answer, _ = ask(lambda number, body: (later, 503, 503, None)[number], attempts=4)
    assert answer and waited[0] == 9.0 and 1.0 <= waited[1] <= 2.0 and 2.0 <= waited[2] <= 4.0


# --- the whole job


def options(tmp_path, server, **changed):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{number}?"}) + "\n" for number in range(8)))
    given = {"out": tmp_path / "o.jsonl", "data": str(data), "server": server.url, "server_model": "m"}
    given["rule"] = "raw"
    return generate.Options(**(given | {"concurrency": 2} | changed))


def test_a_signal_keeps_what_is_under_way_and_asks_no_more(tmp_path, monkeypatch):
    """A server that is down does not hold a job that is told to stop: waits between attempts end at once."""
    asked, described = threading.Event(), threading.Event()

    def agreed(self):
        if not asked.is_set():
            return None
        described.set()
        return "SIGTERM"

    monkeypatch.setattr(preemption.StopRequest, "agreed", agreed)
    monkeypatch.setattr(servers, "_retry_after", lambda value: 30.0)

    def behave(number, body):
        if body["prompt"] == "0?":
            return 503  # waits half a minute, then would ask again
        asked.set()
        described.wait(20)
        time.sleep(0.5)
        return None

    server = AnswerServer(behave, lambda text: f"re: {text}")
    with server.served():
        started = time.perf_counter()
        with pytest.raises(preemption.Stopped, match="SIGTERM: 1 of 8 prompts are saved"):
            generate.run(options(tmp_path, server))
        assert time.perf_counter() - started < 20 and len(server.bodies) == 2
    assert json.loads((tmp_path / "o.jsonl.part").read_text())["completions"] == ["re: 1?"]


def test_a_signal_does_not_wait_for_a_server_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(servers, "GRACE_S", 0.3)
    monkeypatch.setattr(preemption.StopRequest, "agreed", lambda self: "SIGTERM")
    free = threading.Event()
    server = AnswerServer(lambda number, body: free.wait(20) and None, str)
    with server.served():
        started = time.perf_counter()
        with pytest.raises(preemption.Stopped, match="SIGTERM: 0 of 8 prompts are saved"):
            generate.run(options(tmp_path, server))
        assert time.perf_counter() - started < 5
        free.set()


# the fields that both APIs know; what is absent from a request, OpenAI takes as 0 and vLLM from the model's files
COMMON = {"model": "m", "max_tokens": 256, "temperature": 1.0, "top_p": 1.0, "n": 1}
COMMON |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "min_tokens": 0, "stop": [], "stop_token_ids": []}


def sent(tmp_path, **changed):
    """Return the request of the first prompt, without it, and the job's record."""
    server = AnswerServer(lambda number, body: None, str.upper)
    with server.served():
        generate.run(options(tmp_path, server, concurrency=1, rule="raw", **changed))
    body, record = server.bodies[0], json.loads((tmp_path / "o.jsonl.job.json").read_text())
    assert body.pop("prompt") == "0?" and body.pop("seed") == record["seed"] == changed.get("seed", 0)
    return body, record


def test_a_server_is_sent_neutral_fields_too(tmp_path):
    """vLLM fills what is absent from generation_config.json: Qwen2.5 would have top_k 20, repetition_penalty 1.05."""
    body, record = sent(tmp_path)
    assert body == COMMON | NEUTRAL
    assert {"model": "m", **record["sent"]} == body and record["server_api"] == "vllm"


def test_a_server_is_sent_what_was_asked_for(tmp_path):
    asked = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_new_tokens": 2, "max_new_tokens": 8, "num_return": 3}
    body, _ = sent(tmp_path, seed=4, stop_strings=("a", "b"), stop_ids=(7, 9), **asked)
    expected = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_tokens": 2, "max_tokens": 8, "n": 3}
    assert body == COMMON | NEUTRAL | expected | {"stop": ["a", "b"], "stop_token_ids": [7, 9]}


def test_openai_is_sent_what_it_knows(tmp_path):
    body, record = sent(tmp_path, server_api="openai")
    assert body == COMMON and record["server_api"] == "openai", "an empty list of stop strings is refused there"
    (tmp_path / "two").mkdir()
    body, _ = sent(tmp_path / "two", server_api="openai", stop_strings=("a",), top_p=0.5)
    assert body == COMMON | {"stop": ["a"], "top_p": 0.5}


@pytest.mark.parametrize(
    "said",
    [
        "Unrecognized request argument supplied: top_k",
        "Unrecognized request arguments supplied: min_p, top_k",
        json.dumps({"error": {"message": "Unknown parameter: 'top_k'.", "param": "top_k"}}),
        json.dumps({"detail": [{"type": "extra_forbidden", "loc": ["body", "top_k"], "msg": "Extra inputs"}]}),
        "property 'top_k' is unsupported",
    ],
)
@pytest.mark.parametrize("code", [400, 422])
def test_a_server_that_does_not_know_a_field_ends_the_job_with_the_option_that_helps(tmp_path, code, said):
    def refuse(handler):
        handler.send_response(code)
        handler.end_headers()
        handler.wfile.write(said.encode())

    server = AnswerServer(lambda number, body: refuse if "top_k" in body else None, str)
    with server.served():
        with pytest.raises(ValueError, match=r"does not know top_k.*; --server-api=openai leaves out what OpenAI does"):
            generate.run(options(tmp_path, server))
        assert len(server.bodies) <= 2, "one request of each worker at most"
        (tmp_path / "two").mkdir()
        assert generate.run(options(tmp_path / "two", server, server_api="openai")).failed == 0


def test_a_request_refused_for_another_reason_fails_alone(tmp_path, caplog):
    def too_long(handler):
        handler.send_response(400)
        handler.end_headers()
        handler.wfile.write(b"the maximum context length is 8 tokens")

    server = AnswerServer(lambda number, body: too_long if body["prompt"] == "3?" else None, str)
    with server.served():
        assert generate.run(options(tmp_path, server)).failed == 1
        assert "8 tokens; where it is a field that the server does not know, give --server-api=openai" in caplog.text
        caplog.clear()
        (tmp_path / "two").mkdir()
        assert generate.run(options(tmp_path / "two", server, server_api="openai")).failed == 1
    assert "status 400: the maximum" in caplog.text and "--server-api" not in caplog.text


@pytest.mark.parametrize("code", [401, 403, 404])
def test_a_server_that_knows_no_such_key_or_model_ends_the_job(tmp_path, code):
    server = AnswerServer(lambda number, body: code, str)
    with server.served(), pytest.raises(ValueError, match=f"answers with status {code}: refused; check --server, "):
        generate.run(options(tmp_path, server))
    assert len(server.bodies) <= 2, "one request of each worker at most"


def test_the_summary_counts_what_this_start_did(tmp_path, monkeypatch):
    refused = [True]
    server = AnswerServer(lambda number, body: 400 if refused[0] and body["prompt"] in ("3?", "5?") else None, str)
    with server.served():
        first = generate.run(options(tmp_path, server, num_return=3))
        assert (first.prompts, first.done_before, first.failed, first.completions, first.stopped) == (8, 0, 2, 18, 18)
        refused[0] = False
        second = generate.run(options(tmp_path, server, num_return=3))
        assert (second.done_before, second.failed, second.completions, second.stopped) == (6, 0, 6, 6)
    assert [line["index"] for line in jsonl.read(tmp_path / "o.jsonl")] == [*range(8)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 3}, "with --server, --batch-size would change nothing"),
        ({"compute_dtype": "float32"}, "with --server, --compute-dtype would change nothing"),
        ({"eos_token": "</s>"}, "with --server, --eos-token would change nothing"),
        ({"revision": "main"}, "with --server, --revision would change nothing"),
        ({"tokenizer": "t", "max_length": 9}, "with --server, --tokenizer, --max-length would change nothing"),
        ({"server_api": "tgi"}, "--server-api='tgi' is not one of vllm, openai"),
        ({"server_api": "openai", "top_k": 3}, "--server-api=openai cannot carry --top-k; leave it out, or ask a vLLM"),
        ({"server_api": "openai", "min_new_tokens": 3}, "cannot carry --min-new-tokens; leave it out"),
        ({"server_api": "openai", "top_k": 3, "stop_ids": (1,)}, "cannot carry --top-k, --stop-ids; leave them out"),
        ({"server_api": "openai", "temperature": 2.5}, "--temperature=2.5 is above 2, the highest of"),
        ({"server_api": "openai", "stop_strings": tuple("abcde")}, "has 5 stop strings, OpenAI takes 4"),
    ],
)
def test_options_that_a_server_would_not_see_are_refused(tmp_path, changed, message):
    server = AnswerServer(lambda number, body: None, str)
    server.url = "http://127.0.0.1:9/v1"
    with pytest.raises(ValueError, match=message):
        generate.run(options(tmp_path, server, **changed))
    assert not (tmp_path / "o.jsonl.job.json").exists()
