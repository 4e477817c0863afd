"""Hostile model directories, templates, keys and our own sources: nothing of a stranger's runs, no key is written."""

import ast
import collections
import copy
import itertools
import json
import os
import pickle
import pprint
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import anyio
import pytest
import tokenizers

from fpo_jax import hf, models, tokenization
from fpo_jax.cli import generate
from fpo_jax.cli import openai_client as servers
from fpo_jax.tokenization import template_sandbox
from fpo_jax.trainer import run_inputs
from tests import compiling, hostile, tiny, toy_tokenizers
from tests.answer_server import AnswerServer
from tests.paths import REPO

PART = "7Kq9/vXw"  # of the key, and of nothing else
KEY = f"sk-{PART}+planted=Zm{PART}"
MOST_SECONDS, MOST_BYTES = 10.0, 2**30  # that a hostile directory may cost


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    tiny.write_model(folder / "model")
    tiny.write_pairs(folder / "pairs.jsonl", count=8)
    prepared(folder / "model", folder / "pairs.jsonl")  # it is sound; and what is compiled for it counts for no case
    return folder


def peak_bytes():
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def processor_seconds():
    """Of this process and those that it has ended; a machine that others use as well is no fault."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def prepared(directory, pairs):
    """What train.py does with a directory before its first step."""
    c = tiny.config(directory, pairs, data__rule="chat", data__max_prompt_length=24, data__max_completion_length=None)
    inputs = run_inputs.prepare(c)
    return hf.load_params(inputs.source, inputs.model_config, dtype="float32")


def generated(directory, pairs, out):
    asked = {"rule": "chat", "format": "prompts", "max_new_tokens": 8}
    generate.run(generate.Options(model=str(directory), data=str(pairs), out=out, **asked))


def opened(name, sound, tmp_path):
    """Open a hostile directory through every entry; return what refused it."""
    case = hostile.make(sound / "model", tmp_path / "model", name)
    pairs, said = sound / "pairs.jsonl", []
    entries = [lambda: prepared(tmp_path / "model", pairs)]
    if case.refusal is not None:  # else it compiles a model, and is no other reader than these
        entries.append(lambda: generated(tmp_path / "model", pairs, tmp_path / "out.jsonl"))
    else:
        entries.append(lambda: tokenization.encoder(tokenization.load_tokenizer(tmp_path / "model")))
    for entry in entries:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, start = peak_bytes(), processor_seconds()
        try:
            entry()
        except ValueError as error:
            said.append(str(error))
        assert processor_seconds() - start < MOST_SECONDS
        assert peak_bytes() - before < MOST_BYTES
    assert not hostile.canary(tmp_path / "model").exists(), "code of the directory ran"
    return case, said


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", hostile.CASES)
def test_a_hostile_directory_is_refused_or_loads_harmlessly(sound, tmp_path, monkeypatch, name):
    monkeypatch.setattr(template_sandbox, "SECONDS", 0.3)
    case, said = opened(name, sound, tmp_path)
    if case.refusal is None:
        assert not said
    else:
        assert len(said) == 2 and all(re.search(case.refusal, one, re.DOTALL) for one in said), said
        assert all(len(one) < 3000 for one in said)


def test_a_splitter_that_never_ends_is_told_in_a_sentence(sound):
    """The library panics, which no `except Exception` sees; texts on which it ends are encoded."""
    tokenizer = tokenization.load_tokenizer(sound / "model")
    tokenizer.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(a+)+$"), "isolated")
    encoder = tokenization.encoder(tokenizer)
    assert tokenization.encode(encoder, ["b"])
    with pytest.raises(ValueError, match="own rules cannot be applied to a text .*take another tokenizer.json"):
        tokenization.encode(encoder, ["a" * 60 + "b"])


@pytest.mark.faults
@pytest.mark.parametrize("name", [name for name in hostile.CASES if name.startswith("a template that")])
def test_a_hostile_template_is_refused_within_its_real_limits(sound, tmp_path, name):
    case, said = opened(name, sound, tmp_path)
    assert len(said) == 2 and all(re.search(case.refusal, one, re.DOTALL) for one in said), said


@pytest.mark.faults
@pytest.mark.parametrize("name", ["weights as pickles only", "a template that doubles a text", "a header of 200 MB"])
def test_train_ends_in_one_sentence(sound, tmp_path, name):
    case = hostile.make(sound / "model", tmp_path / "model", name)
    flags = {"model.path": tmp_path / "model", "data.train": sound / "pairs.jsonl", "data.format": "json"}
    flags |= {"data.train_split": "", "data.eval": "", "data.eval_split": "", "data.max_length": 64}
    flags |= {"data.max_prompt_length": 32, "tokenizer.chat_template": "", "train.batch_size": 4}
    command = [sys.executable, "train.py", "--config=configs/mistral_base.py", f"--workdir={tmp_path / 'w'}"]
    command += [f"--config.{key}={value}" for key, value in flags.items()]
    done = subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": compiling.flags()}
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"train\.py: .*" + case.refusal, done.stderr, re.DOTALL)
    assert not hostile.canary(tmp_path / "model").exists() and not (tmp_path / "w").exists()


def test_the_hub_s_own_links_into_its_blobs_are_read(sound, tmp_path):
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((sound / "model").iterdir())):
        shutil.copy(path, repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    assert hf.local_dir(snapshot) == snapshot
    assert hf.check_weights(snapshot, hf.read_config(snapshot)) is None
    (tmp_path / "alias").symlink_to(snapshot)
    assert hf.local_dir(tmp_path / "alias") == tmp_path / "alias"
    (repository / "blobs" / "0").rename(repository / "private")  # beside the blobs is outside
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../private")
    with pytest.raises(ValueError, match=r"config\.json is a link to .*private"):
        hf.local_dir(snapshot)


def test_whatever_stands_in_a_config_is_read_or_refused(sound):
    """Every key with every kind of value: a ModelConfig or a ValueError, at once and without memory for it."""
    keys = json.loads((sound / "model" / "config.json").read_text())
    keys |= {"layer_types": None, "rope_theta": 1e4, "id2label": {}, "num_labels": 1, "query_pre_attn_scalar": 256}
    odd = [None, True, -1, 0, 10**12, 10**400, 1.5, float("inf"), float("nan"), "", "x", [], [1], [[]], {}, {"a": 1}]
    start, outcomes = time.process_time(), collections.Counter()
    keys |= {"no_rope_layers": None, "sliding_window_pattern": 3, "rope_parameters": None, "use_sliding_window": True}
    for family in ("llama", "gemma2", "gemma3_text", "smollm3", "phi3", "gpt2"):
        for key, value in itertools.product(keys, odd):
            try:
                models.from_hf_config(keys | {"model_type": family, key: value})
                outcomes["read"] += 1
            except ValueError:
                outcomes["refused"] += 1
    assert outcomes["refused"] > 4 * outcomes["read"] > 0
    assert time.process_time() - start < MOST_SECONDS


def test_a_template_renders_as_transformers_renders_it():
    """What templates use, in the environment of their own against the one of transformers."""
    turns = [{"role": "user", "content": " é<&\n"}, {"role": "assistant", "content": "b"}]
    tokenizer = toy_tokenizers.byte_bpe(bos="<s>")
    for text in (
        "{% for m in messages %}\n  {% if loop.first %}{% continue %}{% endif %}\n{{ m | tojson }}{% endfor %}",
        "{{ messages | tojson(indent=2) }}{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=true) }}",
        "{% set n = namespace(x=1) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}",
        "{% generation %}{% set a = 'in' %}{{ a }}{% endgeneration %}{{ a is defined }}",
        "{{ dict(a=1).a }}{{ bos_token }}{{ tools is none }}{{ add_generation_prompt }}{{ nothing }}",
        "{% macro f(m) -%} {{ m.role | upper }} {%- endmacro %}{{ f(messages[0]) }}{{ messages[::-1][0].content }}",
        "{{ strftime_now is defined }}{{ messages | map(attribute='role') | join(',') }}{{ 'a\\n\\u00e9' | length }}",
    ):
        [own] = template_sandbox.render(
            text, [template_sandbox.Conversation(turns)], variables=tokenizer.special_tokens_map
        )
        assert own == tokenizer.apply_chat_template(turns, chat_template=text, tokenize=False)


def test_a_template_s_process_holds_nothing_of_ours(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", KEY)
    template_sandbox.render("x", [template_sandbox.Conversation([])], variables={})
    process = template_sandbox._process
    environment = Path(f"/proc/{process.pid}/environ").read_bytes()
    assert KEY.encode() not in environment and environment.count(b"=") == 2
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    for name, most in (("Max open files", 0), ("Max file size", 0), ("Max address space", 2**29)):
        assert re.search(rf"{name} +{most} ", limits), limits
    process.kill()
    with pytest.raises(ValueError, match=r"ends the process that renders it \(exit code -9\)"):
        template_sandbox.render("x", [template_sandbox.Conversation([])], variables={})
    assert template_sandbox.render("x", [template_sandbox.Conversation([])], variables={}) == ["x"]  # a new one


BANNED = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "torch", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__"}


def violations(text):
    """What in a source could run what a file says: imports, calls and arguments, as (line, what)."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from ((node.lineno, name) for name in names if name.split(".")[0] in BANNED)
        if not isinstance(node, ast.Call):
            continue
        given = {one.arg: getattr(one.value, "value", ...) for one in node.keywords}
        called = ast.unparse(node.func)
        if isinstance(node.func, ast.Name) and called in CALLS:
            yield node.lineno, called
        if called in {"os.system", "os.popen", "builtins.eval", "builtins.exec", "builtins.compile"}:
            yield node.lineno, called
        if called in {"np.load", "numpy.load", "jnp.load"} and given.get("allow_pickle") is not False:
            yield node.lineno, f"{called} without allow_pickle=False"
        for name in ("shell", "trust_remote_code", "allow_pickle"):
            if name in given and given[name] is not False:
                yield node.lineno, f"{called}({name}={given[name]})"


@pytest.mark.parametrize(
    "text",
    ["import pickle", "from torch import load", "import a, dill.x", "eval('1')", "exec(x)", "compile(a, b, 'exec')",
     "np.load(f)", "np.load(f, allow_pickle=True)", "subprocess.run(c, shell=True)", "os.system(c)",
     "A.from_pretrained(p, trust_remote_code=True)", "A.from_pretrained(p, trust_remote_code=flag)", "__import__(x)"],
)  # fmt: skip
def test_the_scan_sees_what_it_looks_for(text):
    assert list(violations(text))


def test_no_source_runs_what_a_file_says():
    """All that we ship; a file of --config is Python that the user wrote and names, and the one exception by design."""
    paths = [REPO / "train.py"]
    for folder in ("fpo_jax", "kernels", "eval", "configs"):
        paths += sorted((REPO / folder).rglob("*.py"))
    found = [f"{path}:{line}: {what}" for path in paths for line, what in violations(path.read_text())]
    assert len(paths) > 100 and not found, found


def planted(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    return servers.Secret("JUDGE_KEY")


def test_a_key_prints_as_stars_and_is_never_pickled(monkeypatch):
    secret = planted(monkeypatch)
    server = servers.Server("http://host/v1", "m", secret, threading.Event())
    shown = [repr(secret), str(secret), f"{secret}", f"{secret!r:>9}", "%s" % secret, repr(server), repr([secret])]  # noqa: UP031
    shown += [json.dumps({"key": secret}, default=str), repr(copy.copy(secret)), repr(copy.deepcopy(server.key))]
    shown += [repr({name: getattr(secret, name) for name in dir(secret)}), pprint.pformat(server)]
    assert all(PART not in text for text in shown) and shown[0] == "***"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="a key is never pickled"):
            pickle.dumps(secret, protocol)
    with pytest.raises(TypeError):
        vars(secret)
    assert secret.header() == {"Authorization": f"Bearer {KEY}"}


@pytest.mark.parametrize("padding", [0, 250, 280, 300, 70_000])
@pytest.mark.parametrize(
    "form", [str, lambda text: urllib.parse.quote(text, safe=""), lambda text: json.dumps(text)[1:-1]]
)
def test_a_refusal_that_repeats_the_key_shows_no_part_of_it(monkeypatch, padding, form):
    """Wherever it stands: it used to be cut at 300 bytes first, and the head of a key at that place was shown."""
    secret = planted(monkeypatch)

    def tell(handler):
        handler.send_response(400)
        handler.end_headers()
        handler.wfile.write(b"x" * padding + form(handler.headers["Authorization"]).encode())

    with AnswerServer(lambda *_: tell, str).served() as server:
        with pytest.raises(servers.Failed) as caught:
            anyio.run(servers.Server(server.url, "m", secret, threading.Event()).ask, "completions", {"prompt": "p"})
    assert "status 400" in str(caught.value) and PART not in str(caught.value)


def test_an_answer_that_repeats_the_key_is_a_failure_and_a_word_is_no_key(monkeypatch):
    def ask(key, reply):
        monkeypatch.setenv("JUDGE_KEY", key)
        secret = servers.Secret("JUDGE_KEY")
        with AnswerServer(lambda *_: None, lambda _: reply).served() as server:
            asked = servers.Server(server.url, "m", secret, threading.Event(), attempts=1)
            return anyio.run(asked.completions, "p", {"n": 1})

    with pytest.raises(servers.Failed, match="repeats the key"):
        ask(KEY, f"Your key is {KEY}.")
    assert ask("EMPTY", "An EMPTY set.") == [("An EMPTY set.", "stop")]


JUDGE = """
import logging, os, sys
from pathlib import Path
import anyio
logging.basicConfig(level=logging.DEBUG)
from fpo_jax.cli import openai_client
from fpo_jax.eval.judge import winrate
openai_client.LONGEST_WAIT_S = 0.0
url, folder = sys.argv[1], Path(sys.argv[2])
options = winrate.Options(candidate=folder / "a.jsonl", baseline=str(folder / "b.jsonl"), out=folder / "o", server=url,
                          template="helpful", server_model="m", concurrency=2, api_key_env="JUDGE_KEY")
print(options, winrate.run(options))
key = openai_client.Secret("JUDGE_KEY")
asked = openai_client.Server(url, "m", key, None, attempts=1)
print(key, asked, flush=True)
anyio.run(asked.ask, "refuse", {"prompt": "REFUSE"})
"""


def test_a_judge_s_run_writes_no_byte_of_its_key(tmp_path):
    """With refusals and replies that repeat it, the log at debug level, and a traceback at the end."""
    for name in "ab":
        rows = [{"prompt": f"q{i}", "completions": [f"{name}{i}"]} for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def echo(code):
        def tell(handler):
            handler.send_response(code, handler.headers["Authorization"])
            handler.send_header("X-Echo", handler.headers["Authorization"])
            handler.end_headers()
            handler.wfile.write(f"you sent {dict(handler.headers)}".encode())

        return tell

    def behave(number, body):
        return echo(401) if body.get("prompt") == "REFUSE" else {0: echo(500), 1: echo(400)}.get(number)

    def reply(text):
        return f"{KEY}\nVerdict: A" if "q3" in text else "Verdict: A"

    with AnswerServer(behave, reply).served() as server:
        environment = os.environ | {"JUDGE_KEY": KEY, "PYTHONPATH": str(REPO), "HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", JUDGE, server.url, str(tmp_path)], env=environment, capture_output=True, cwd=tmp_path
        )
    assert done.returncode == 1 and b"Traceback" in done.stderr and b"status 401" in done.stderr, done.stderr
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers)
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"replies.jsonl", "summary.json"} <= {path.name for path in written}
    for place, content in {**written, "stdout": done.stdout, "stderr": done.stderr}.items():
        assert PART.encode() not in content, place


@pytest.mark.faults
def test_a_training_run_writes_no_byte_of_the_environment_s_keys(sound, tmp_path):
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY")
    flags = {"model.path": sound / "model", "data.train": sound / "pairs.jsonl", "data.eval": sound / "pairs.jsonl"}
    flags |= {"data.format": "json", "data.hh_split": "last_turn", "data.subfolder": "", "data.train_split": ""}
    flags |= {"data.eval_split": "", "data.max_length": 40, "data.max_completion_length": 16, "train.batch_size": 4}
    flags |= {"train.micro_batch_per_device": 2, "train.max_steps": 2, "logging.tensorboard": True}
    command = [sys.executable, "train.py", "--config=configs/pythia_hh_pref.py", f"--workdir={tmp_path / 'w'}"]
    command += [f"--config.{key}={value}" for key, value in flags.items()]
    environment = os.environ | dict.fromkeys(names, KEY) | {"XLA_FLAGS": compiling.flags(), "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=REPO, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert any("tensorboard" in str(path) for path in written)
    for place, content in {**written, "stdout": done.stdout, "stderr": done.stderr}.items():
        assert PART.encode() not in content, place
