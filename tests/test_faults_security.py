"""Hostile model directories, templates, keys and our own sources: nothing of a stranger's runs, no key is written."""

import re
import time
from pathlib import Path

import pytest

from eval import generate
from fpo_jax import chat, hf, job
from fpo_jax.chat import rendering
from tests import hostile, tiny

MOST_SECONDS, MOST_BYTES = 10.0, 2**30  # that a hostile directory may cost


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    tiny.write_model(folder / "model")
    tiny.write_pairs(folder / "pairs.jsonl", count=8)
    return folder


def peak_bytes():
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def prepared(directory, pairs):
    """What train.py does with a directory before its first update."""
    c = tiny.config(directory, pairs, data__rule="chat", data__max_prompt_length=24, data__max_response_length=None)
    inputs = job.prepare(c)
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
        entries.append(lambda: chat.encoder(chat.load_tokenizer(tmp_path / "model")))
    for entry in entries:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, start = peak_bytes(), time.monotonic()
        try:
            entry()
        except ValueError as error:
            said.append(str(error))
        assert time.monotonic() - start < MOST_SECONDS
        assert peak_bytes() - before < MOST_BYTES
    assert not hostile.canary(tmp_path / "model").exists(), "code of the directory ran"
    return case, said


@pytest.mark.parametrize("name", hostile.CASES)
def test_a_hostile_directory_is_refused_or_loads_harmlessly(sound, tmp_path, monkeypatch, name):
    monkeypatch.setattr(rendering, "SECONDS", 0.3)
    case, said = opened(name, sound, tmp_path)
    if case.refusal is None:
        assert not said
    else:
        assert len(said) == 2 and all(re.search(case.refusal, one, re.DOTALL) for one in said), said
        assert all(len(one) < 3000 for one in said)
