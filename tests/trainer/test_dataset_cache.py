"""Tokenised data kept on disk: the same rows as without, by any number of processes; what makes others; damage."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from fpo_jax import config as configuration
from fpo_jax import data, tokenization
from fpo_jax.data import dataset_folder, worker_pool
from fpo_jax.io import atomic_io
from fpo_jax.trainer import dataset_cache, run_inputs
from tests import damage, tiny
from tests.paths import REPO

ROWS = ("tokens_S", "starts_N", "lengths_N", "prompt_lengths_N", "rewards_BK", "scored_S", "segments_S")
DEMONSTRATIONS = {"stage": "sft", "loss__name": "sft", "loss__alpha": None, "loss__beta_pi": None}
CHAT = {"data__rule": "chat", "data__max_completion_length": None, "data__max_prompt_length": 30}
START = """
import logging, sys
from pathlib import Path
logging.basicConfig(level=logging.INFO, format="%(message)s")
from fpo_jax import config as configuration
from fpo_jax.trainer import run_inputs
from tests import tiny
model, pairs, cache = map(Path, sys.argv[1:])
config = tiny.config(model, pairs, data__eval="", data__cache_dir=str(cache))
print(run_inputs.prepare(config).train.prepared.fingerprint())
"""
SLOWLY = """
import time
from fpo_jax import data
def slow(*given, masked_sample=data.masked_sample):
    print("made", flush=True)
    time.sleep(3)
    return masked_sample(*given)
data.masked_sample = slow
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("kept")
    tiny.write_model(root / "model", layers=1)
    tiny.write_pairs(root / "pairs.jsonl", count=300)
    tiny.write_pairs(root / "few.jsonl", count=40, seed=1)
    with (root / "pairs.jsonl").open("a") as file:  # noted, dropped, identical
        file.write(json.dumps({"prompt": "300: odd?", "chosen": " a", "rejected": " b", "score": 3}) + "\n")
        file.write(json.dumps({"prompt": "301: empty?", "chosen": " a", "rejected": ""}) + "\n")
        file.write(json.dumps({"prompt": "302: same \u2028 é?", "chosen": " a", "rejected": " a"}) + "\n")
    return root


def read(root, cache="", **changed):
    return run_inputs.prepare(tiny.config(root / "model", root / "pairs.jsonl", data__cache_dir=str(cache), **changed))


def same(one: data.Dataset, other: data.Dataset) -> None:
    for name in ROWS:
        mine, theirs = getattr(one.prepared, name), getattr(other.prepared, name)
        np.testing.assert_array_equal(mine, theirs)
        assert mine is None or mine.dtype == theirs.dtype, name
    assert one.prepared.pad_id == other.prepared.pad_id
    assert tuple(one.prepared.sources) == tuple(other.prepared.sources)
    assert one.fingerprint() == one.prepared.fingerprint() == other.prepared.fingerprint()
    assert one.audit == other.audit and list(one.audit.dropped) == list(other.audit.dropped)
    assert one.audit.as_dict() == other.audit.as_dict() and one.audit.text() == other.audit.text()
    assert one.sample == other.sample


@pytest.mark.parametrize(
    "changed",
    [
        {"train__eval_groups": 7},
        CHAT,
        {
            "data__train": "",
            "data__mixer": ("{root}/pairs.jsonl=0.5", "{root}/few.jsonl=1.0"),
            "data__buckets": (20, 40),
        },
        {"data__decontaminate": ("{root}/bench.jsonl=text",), "data__train_rows": "3:200"},
        DEMONSTRATIONS | {"data__group_size": 1, "data__packing": True},
        {"stage": "reward", "loss__name": "bradley_terry", "loss__alpha": None, "loss__beta_pi": None},
    ],
    ids=["eval_groups", "chat", "mixture", "decontaminated", "packed", "reward"],
)
def test_what_is_kept_is_what_is_made_without_it(root, tmp_path, monkeypatch, changed):
    (root / "bench.jsonl").write_text(json.dumps({"text": "7: " + "ab cde f gh " * 3}) + "\n")
    changed = {
        key: tuple(entry.format(root=root) for entry in value)
        if isinstance(value, tuple) and "=" in str(value)
        else value
        for key, value in changed.items()
    }
    plain, made = read(root, **changed), read(root, tmp_path, **changed)
    monkeypatch.setattr(data, "read", None)  # a later start reads no record
    again = read(root, tmp_path, **changed)
    for found in (made, again):
        same(found.train, plain.train)
        same(found.evaluation, plain.evaluation)
        assert isinstance(found.train.prepared.tokens_S.base, np.memmap) or plain.train.prepared.tokens_S.nbytes < 2**16
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files <= {"dataset.json", *(f"{name}.npy" for name in dataset_folder._ROWS), "places.npy", "place_ends.npy",
                     "sources.npy", "reasons.npy"}, "nothing is left of the making"  # fmt: skip


@pytest.mark.slow  # five processes import jax and transformers
@pytest.mark.parametrize(("workers", "rule"), [(2, {}), (3, CHAT)])
def test_any_number_of_processes_makes_the_same_rows(root, tmp_path, monkeypatch, workers, rule):
    plain = read(root, data__eval="", **rule)
    monkeypatch.setattr(run_inputs, "PARALLEL_FROM", 0)
    monkeypatch.setattr(worker_pool, "cpus", lambda: workers)
    monkeypatch.setattr("fpo_jax.data.tokenize._CHUNK", 64)
    started = []
    monkeypatch.setattr(worker_pool, "_start", lambda start=worker_pool._start: started.append(0) or start())
    same(read(root, tmp_path, data__eval="", **rule).train, plain.train)
    assert len(started) == workers


def of(root, name="train", **changed):
    config = tiny.config(root / "model", root / "pairs.jsonl", **changed)
    model_config = run_inputs.read_model(config, root / "model")
    encoder = run_inputs.read_encoder(config, root / "model")
    found = dataset_cache.sources(config, name)
    return dataset_cache.parts(config, name, found, encoder, model_config, reward_pad_id=None)


def test_every_field_of_data_and_tokenizer_makes_other_data_or_is_listed(root):
    config = tiny.config(root / "model", root / "pairs.jsonl")
    every = {field for field in configuration.flatten(config.to_dict()) if field.startswith(dataset_cache.SECTIONS)}
    listed = {field for fields in dataset_cache.NO_PART.values() for field in fields}
    assert listed - every == {"train.eval_groups"} and every - listed <= of(root)["options"].keys()
    assert of(root)["options"].keys().isdisjoint({"data.eval", "train.eval_groups", "data.shuffle"})
    assert of(root, "eval")["options"].keys() >= {"data.eval", "train.eval_groups", "stage"}
    before = of(root)
    for field, value in {"data__on_long_prompt": "drop", "data__max_length": 39, "data__group_size": 1}.items():
        assert of(root, **{field: value}) != before, field
    for field, value in {"data__shuffle": False, "data__eval": "", "seed": 1, "optim__learning_rate": 1.0}.items():
        assert of(root, **{field: value}) == before, field


def test_a_byte_of_source_benchmark_tokenizer_or_template_makes_other_data(root, tmp_path, monkeypatch):
    tiny.write_model(tmp_path / "model", layers=1)
    pairs = tiny.write_pairs(tmp_path / "pairs.jsonl", count=30)
    bench = tmp_path / "bench.jsonl"
    bench.write_text('{"text": "one two three four five six seven eight"}\n')
    options = {"data__decontaminate": (f"{bench}=text",), **CHAT}
    seen = [of(tmp_path, **options)]
    for path, before, after in (
        (pairs, b"0: ", b"9: "),
        (bench, b"one", b"One"),
        (tmp_path / "model" / "chat_template.jinja", b"<{{", b"[{{"),
        (tmp_path / "model" / "tokenizer.json", b'"add_prefix_space":false', b'"add_prefix_space":true'),
        (tmp_path / "model" / "tokenizer.json", b'"trim_offsets":true', b'"trim_offsets":false'),  # of no id
    ):
        content = re.sub(rb'": (true|false)', rb'":\1', path.read_bytes())
        assert content.count(before), path
        path.write_bytes(content.replace(before, after, 1))
        seen.append(of(tmp_path, **options))
    monkeypatch.setattr(dataset_cache, "__version__", "0.0.0")
    seen.append(of(tmp_path, **options))
    monkeypatch.setattr(tokenization, "__file__", str(tmp_path / "other" / "__init__.py"))
    seen.append(of(tmp_path, **options))
    assert len({json.dumps(parts) for parts in seen}) == len(seen)


def test_damage_is_noticed_set_aside_and_mended(root, tmp_path, caplog):
    caplog.set_level(logging.INFO, "fpo_jax")
    plain = read(root, data__eval="").train
    read(root, tmp_path, data__eval="")
    [folder] = tmp_path.iterdir()
    for seed, random in damage.trials(24):
        caplog.clear()
        if seed % 3:
            path = damage.flip_somewhere(folder, random)
        else:
            path = damage.files(folder)[random.integers(len(damage.files(folder)))]
            path.unlink() if seed % 2 else os.truncate(path, path.stat().st_size - 1)
        again = read(root, tmp_path, data__eval="").train
        if f"it is set aside as {folder.name}.damaged, and the data are made anew" not in caplog.text:
            assert seed % 3 and path.suffix == ".npy", damage.replay(seed)  # padding of a header of NumPy's
        same(again, plain)
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, f"{folder.name}.damaged"}


def test_what_is_damaged_as_soon_as_it_is_written_is_an_error(root, tmp_path, monkeypatch):
    monkeypatch.setattr(data.Prepared, "fingerprint", lambda prepared: os.urandom(4).hex())
    with pytest.raises(ValueError, match=r"do not match their digest, though it was just written; give data.cache_dir"):
        read(root, tmp_path, data__eval="")


def test_small_data_leave_nothing_in_the_workdir_and_large_ones_their_rows(root, tmp_path, monkeypatch):
    config = tiny.config(root / "model", root / "pairs.jsonl")
    run_inputs.prepare(config, workdir=tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(dataset_cache, "KEPT_FROM", (root / "pairs.jsonl").stat().st_size)
    run_inputs.prepare(config, workdir=tmp_path)
    assert sorted(path.name.partition("-")[0] for path in (tmp_path / "data").iterdir()) == ["eval", "train"]


def test_bad_data_are_told_as_without_and_leave_nothing(root, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "chosen": " b", "rejected": " c"}\n{"prompt": "a"}\n')
    messages = []
    for cache in ("", str(tmp_path / "cache")):
        with pytest.raises(ValueError, match=r"bad.jsonl:2: missing or null: chosen, rejected") as raised:
            run_inputs.prepare(tiny.config(root / "model", bad, data__cache_dir=cache))
        messages.append(str(raised.value))
    assert len(set(messages)) == 1 and not list((tmp_path / "cache").iterdir())


def test_a_source_that_changes_while_it_is_read_is_refused(root, tmp_path, monkeypatch):
    pairs = tiny.write_pairs(tmp_path / "pairs.jsonl", count=30)
    sample = data.masked_sample
    monkeypatch.setattr(data, "masked_sample", lambda *given: pairs.open("a").write("\n") and sample(*given))
    with pytest.raises(ValueError, match=r"pairs.jsonl@ changed while it was read; start again"):
        run_inputs.prepare(tiny.config(root / "model", pairs, data__cache_dir=str(tmp_path / "cache")))
    assert not list((tmp_path / "cache").iterdir())


def test_a_disk_without_locks_costs_the_second_process_its_own_work(root, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(atomic_io, "flock", lambda file: None)
    plain = read(root, data__eval="").train
    read(root, tmp_path, data__eval="")
    [folder] = tmp_path.iterdir()
    folder.rename(tmp_path / f".{folder.name}.partial")  # as another process leaves it while it works
    same(read(root, tmp_path, data__eval="").train, plain)
    assert "its disk does not tell whether its writer still runs" in caplog.text
    assert "They are made for this process alone." in caplog.text and not folder.exists()


def start(root, cache, *, slowly=False):
    return subprocess.Popen(
        [sys.executable, "-c", slowly * SLOWLY + START, root / "model", root / "pairs.jsonl", cache],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"},
    )


@pytest.mark.slow  # processes of their own import jax and transformers
def test_two_starts_at_once_make_them_once_and_a_killed_one_leaves_nothing_that_counts(root, tmp_path):
    killed = start(root, tmp_path, slowly=True)
    assert killed.stdout.readline() == "made\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    [left] = tmp_path.iterdir()
    assert left.name.endswith(".partial")
    first = start(root, tmp_path, slowly=True)
    assert first.stdout.readline() == "made\n"
    began = time.monotonic()
    second = start(root, tmp_path)
    (out, log), (out_2, log_2) = first.communicate(), second.communicate()
    assert first.returncode == second.returncode == 0, log + log_2
    expected = read(root, data__eval="").train.prepared.fingerprint()
    assert out.strip() == out_2.strip() == expected
    assert "they are tokenised, and kept in" in log and "they are tokenised, and kept in" not in log_2
    assert "waiting for the process that writes" in log_2 or time.monotonic() - began > 3, "a slow import waited for it"
    assert [path.name for path in tmp_path.iterdir()] == [left.name.removeprefix(".").removesuffix(".partial")]


def test_a_hub_data_set_a_saved_one_and_a_folder_are_known_by_their_files(root, tmp_path, monkeypatch):
    import datasets

    def write(folder, first):
        rows = [{"prompt": f"{number}?", "chosen": " a", "rejected": " b"} for number in range(first, first + 20)]
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / folder)
        return datasets.load_from_disk(tmp_path / folder)

    found = {"train": write("one", 0), "test": write("two", 5)}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, **_: found[split])
    folder = tmp_path / "folder"
    folder.mkdir()
    pairs = tiny.write_pairs(folder / "train-0.jsonl", count=9)
    tiny.write_pairs(folder / "test-0.jsonl", count=9)
    ways = [{"data__train": "some/set", "data__train_split": split} for split in ("train", "test")]
    ways += [{"data__train": str(tmp_path / "one")}, {"data__train": str(folder), "data__train_split": "train"}]
    digests = [[of(root, **way)["sources"] for way in ways]]
    assert len({json.dumps(one) for one in digests[0]}) == 4
    for way in ways:
        made = read(root, tmp_path / "cache", data__eval="", **way).train
        same(read(root, tmp_path / "cache", data__eval="", **way).train, made)
    assert len(list((tmp_path / "cache").iterdir())) == 4
    found["train"] = write("three", 6)
    pairs.write_text(pairs.read_text().replace("0: ", "1: ", 1))
    (folder / "test-0.jsonl").write_text("another split")
    digests.append([of(root, **way)["sources"] for way in ways])
    assert [one == other for one, other in zip(*digests, strict=True)] == [False, True, True, False]


def test_what_no_file_holds_is_not_kept(root, tmp_path, monkeypatch):
    import datasets

    rows = [{"prompt": f"{number}?", "chosen": " a", "rejected": " b"} for number in range(20)]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **_: datasets.Dataset.from_list(rows))
    found = read(root, tmp_path / "cache", data__eval="", data__train="some/set", data__train_split="train").train
    assert found.prepared.groups == 20 and not (tmp_path / "cache").exists()
