"""Whole runs on tiny models: resumption to the bit, signals, refusals, and every recipe on local data of its shape."""

import ast
import gzip
import importlib
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import safetensors.numpy

from fpo_jax import checkpoint, config, hf
from fpo_jax.cli import export
from fpo_jax.distributed import preemption
from fpo_jax.trainer import adapters, metric_logger, reference_logprobs, run_inputs, run_workdir, trainer
from tests import compiling, resuming, tiny
from tests.paths import REPO

STEPS = 40


def command(inputs, workdir, **changed):
    """train.py on one CPU device with the HH recipe, made tiny."""
    options = {
        "model.path": inputs / "model", "data.format": "json", "data.train": inputs / "pairs.jsonl",
        "data.eval": inputs / "pairs.jsonl", "data.hh_split": "last_turn", "data.subfolder": "",
        "data.train_split": "", "data.eval_split": "", "data.max_length": 40, "data.max_completion_length": 16,
        "model.compute_dtype": "float32", "optim.learning_rate": 3e-3, "train.batch_size": 4,
        "train.micro_batch_per_device": 2, "train.epochs": STEPS * 4 / 24, "train.save_every": 3,
        "train.eval_every": 10, "train.keep_checkpoints": 2, "logging.tensorboard": False,
    } | changed  # fmt: skip
    flags = [f"--config.{key}={value}" for key, value in options.items()]
    return [sys.executable, "train.py", "--config", "configs/pythia_hh_pref.py", "--workdir", str(workdir), *flags]


def environment():
    return os.environ | {"XLA_FLAGS": compiling.flags()}


def finish(command_line):
    done = subprocess.run(command_line, cwd=REPO, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def start_until(command_line, path, lines):
    """Start the command and return it when `path` has that many lines."""
    process = subprocess.Popen(
        command_line, cwd=REPO, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < lines):
        time.sleep(0.001)
    return process


@pytest.fixture(scope="module")
def uninterrupted(inputs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "w"
    finish(command(inputs, workdir))
    return resuming.outcome(workdir)


@pytest.mark.slow  # two processes
def test_signal_saves_exits_with_its_code_and_resumes_to_the_bit(inputs, uninterrupted, tmp_path):
    process = start_until(command(inputs, tmp_path / "w"), tmp_path / "w" / metric_logger.METRICS_FILE, 4)
    process.send_signal(signal.SIGTERM)  # SIGINT and other moments: test_faults_crash.py
    _, stderr = process.communicate()
    assert process.returncode == 75, stderr
    assert "SIGTERM: saved step" in stderr and "Traceback" not in stderr
    step = resuming.outcome(tmp_path / "w")[0]
    assert 3 <= step < STEPS
    assert f"resumed from step {step} of {STEPS}" in finish(command(inputs, tmp_path / "w"))
    assert resuming.outcome(tmp_path / "w") == uninterrupted


def one_device(c):
    c.mesh.data = c.mesh.fsdp = c.mesh.tensor = 1
    return c


def small(inputs, **changed):
    return one_device(tiny.config(inputs / "model", inputs / "pairs.jsonl", **({"train__batch_size": 4} | changed)))


def run(c, workdir):
    trainer.run(c, workdir, devices=jax.devices()[:1])


def test_finished_run_does_nothing(inputs, tmp_path, caplog):
    c = small(inputs, train__max_steps=3)
    run(c, tmp_path / "w")
    before = resuming.outcome(tmp_path / "w")
    with caplog.at_level("INFO", logger="fpo_jax"):
        run(c, tmp_path / "w")
    assert "holds step 3 of 3" in caplog.text
    assert resuming.outcome(tmp_path / "w") == before


def test_metrics_have_the_expected_names(inputs, tmp_path):
    run(small(inputs, train__max_steps=2, train__epochs=1.0), tmp_path)
    lines = metric_logger.read(tmp_path / metric_logger.METRICS_FILE)
    assert [line["step"] for line in lines] == [0, 1, 2, 2]  # evaluation before, two steps, evaluation after
    expected = {
        "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
        "logps/rejected", "logits/chosen", "logits/rejected", "sft_loss", "grad_norm", "learning_rate", "f_divergence",
        "group_kl", "reference_kl", "lengths/chosen", "lengths/rejected",
    }  # fmt: skip
    assert expected <= set(lines[1])
    assert {f"eval_{name}" for name in expected - {"grad_norm", "learning_rate"}} <= set(lines[0])
    assert abs(lines[0]["eval_rewards/margins"]) < 1e-4, "before training the policy is the reference"
    timing = metric_logger.read(tmp_path / metric_logger.TIMING_FILE)
    assert {"seconds", "valid_tokens_per_s", "padded_tokens_per_s", "padding_share"} <= set(timing[0])
    assert json.loads((tmp_path / "audit.json").read_text())["train"]["groups"] == 24


def test_checkpoint_exports_to_a_directory_that_starts_the_next_run(inputs, tmp_path):
    run(small(inputs, train__max_steps=2, train__save_every=1), tmp_path / "w")
    assert export.main(["--workdir", str(tmp_path / "w"), "--out", str(tmp_path / "out"), "--step", "1"]) == 0
    saved, _ = checkpoint.restore_params(tmp_path / "w", 1)
    loaded = hf.load_params(tmp_path / "out", hf.read_config(tmp_path / "out"), dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, saved, loaded)
    c = small(inputs, train__max_steps=1)
    c.model.path = str(tmp_path / "out")
    run(c, tmp_path / "next")


def test_nonfinite_stops_with_the_rows_and_keeps_the_good_state(inputs, tmp_path):
    c = small(inputs, optim__learning_rate=1e30, optim__warmup_fraction=0.0, train__max_steps=6, train__save_every=1)
    c.train.epochs = 2.0
    with pytest.raises(
        trainer.NonFinite, match=r"step 2: loss or gradient is not finite.*pairs.jsonl:\d+.*checkpoint is sound"
    ):
        run(c, tmp_path)
    line = metric_logger.read(tmp_path / metric_logger.METRICS_FILE)[-1]
    assert line["step"] == 2 and len(line["nonfinite_rows"]) == 4 and line["loss"] is None
    assert checkpoint.restore_params(tmp_path, None)[1]["step"] == 1


def test_nonfinite_skips_and_counts_when_told_to(inputs, tmp_path):
    c = small(inputs, optim__learning_rate=1e30, optim__warmup_fraction=0.0, train__on_nonfinite="skip")
    c.train.max_nonfinite, c.train.max_steps, c.train.epochs = 3, 9, 3.0
    with pytest.raises(trainer.NonFinite, match=r"step 4: .* 3 in a row"):
        run(c, tmp_path)


def test_workdir_of_another_configuration_is_refused_with_the_difference(inputs, tmp_path):
    run(small(inputs, train__max_steps=1), tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"another configuration:\n  loss.alpha: 0.1 -> 0.2"):
        run(small(inputs, train__max_steps=1, loss__alpha=0.2), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_fits_a_run_to_its_machine_may_change_and_is_told(inputs, tmp_path, caplog):
    first, changed = (small(inputs, train__max_steps=1) for _ in range(2))
    changed.mesh.fsdp, changed.train.save_every, changed.model.remat = 2, 7, "full"
    read = run_inputs.prepare(first)
    run_workdir.claim_workdir(first, tmp_path, read)
    with caplog.at_level("INFO", logger="fpo_jax"):
        run_workdir.claim_workdir(changed, tmp_path, read)
    assert caplog.messages == [
        "this start has mesh.fsdp: 1 -> 2; sums may round differently",
        "this start has model.remat: 'none' -> 'full'; sums may round differently",
        "this start has train.save_every: 2 -> 7",
    ]
    assert json.loads((tmp_path / "config.json").read_text())["mesh"]["fsdp"] == 2, "the next start compares with it"
    changed.data.layout = "shared"
    run_workdir.claim_workdir(changed, tmp_path, read)


def test_the_workdir_records_the_loss_with_every_option(inputs, tmp_path, caplog):
    c = small(inputs, loss__name="sigmoid", loss__alpha=None, loss__beta_pi=None)
    read = run_inputs.prepare(c)
    run_workdir.claim_workdir(c, tmp_path, read)
    written = json.loads((tmp_path / "config.json").read_text())
    loss = written.pop("resolved_loss")
    assert written == json.loads(c.to_json())
    assert (loss["name"], loss["reference"]) == ("kl_target_policy", False)
    assert loss["options"] == dict(read.loss.options) and loss["options"]["gamma_beta_ratio"] == 0.25
    assert "ℓ = logp/|y|" in loss["equation"]
    run_workdir.claim_workdir(c, tmp_path, read)
    other = {**written, "resolved_loss": {**loss, "equation": "in other words"}}
    (tmp_path / "config.json").write_text(json.dumps(other))
    run_workdir.claim_workdir(c, tmp_path, read)
    other["resolved_loss"]["options"] = {**loss["options"], "gamma_beta_ratio": 0.5}  # of a version with that default
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"configuration:\n  resolved_loss.options.gamma_beta_ratio: 0.5 -> 0.25\nuse"):
        run_workdir.claim_workdir(c, tmp_path, read)
    (tmp_path / "config.json").write_text(json.dumps(written))  # of a version that recorded none
    with caplog.at_level("INFO", logger="fpo_jax"):
        run_workdir.claim_workdir(c, tmp_path, read)
    assert "does not say which loss ran" in caplog.text
    assert "resolved_loss" in json.loads((tmp_path / "config.json").read_text())


def test_changed_data_or_model_is_refused_on_resume(inputs, tmp_path):
    tiny.write_pairs(tmp_path / "pairs.jsonl", count=24)
    tiny.write_model(tmp_path / "model", layers=1)

    def again():
        run(one_device(tiny.config(tmp_path / "model", tmp_path / "pairs.jsonl", train__max_steps=1)), tmp_path / "w")

    again()
    text = (tmp_path / "pairs.jsonl").read_text()
    (tmp_path / "pairs.jsonl").write_text(text.replace("ab", "ba", 1))
    with pytest.raises(ValueError, match="train data, eval data changed since step 1"):
        again()
    (tmp_path / "pairs.jsonl").write_text(text)
    tiny.write_model(tmp_path / "model", layers=1, seed=5)
    with pytest.raises(ValueError, match="model changed since step 1"):
        again()


def test_reference_of_another_model_is_its_own(inputs, tmp_path):
    tiny.write_model(tmp_path / "other", layers=1, seed=9)
    c = small(inputs, train__max_steps=1, reference__path=str(tmp_path / "other"))
    run(c, tmp_path / "w")
    margin = metric_logger.read(tmp_path / "w" / metric_logger.METRICS_FILE)[0]["eval_rewards/margins"]
    assert abs(margin) > 1e-2, "policy and reference differ from the start"


def test_reference_is_shared_between_runs_and_its_damage_found(inputs, tmp_path):
    shared = {"train__max_steps": 1, "reference__cache_dir": str(tmp_path / "cache")}
    run(small(inputs, **shared), tmp_path / "first")
    path = next((tmp_path / "cache").glob("train-*"))
    written = path.stat().st_mtime_ns
    run(small(inputs, loss__alpha=0.3, **shared), tmp_path / "second")
    assert path.stat().st_mtime_ns == written
    damaged = bytearray(path.read_bytes())
    damaged[-2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="do not match their digest; delete"):
        run(small(inputs, **shared), tmp_path / "third")


def test_a_stopped_reference_pass_goes_on_where_it_was(inputs, tmp_path, monkeypatch):
    small_passes = small(inputs, train__max_steps=1, reference__batch_per_device=4)  # six batches for each set
    run(small_passes, tmp_path / "whole")
    checks, inner = [], preemption.StopRequest.check

    def fourth_of_the_pass_stops(self, words):
        checks.append(words)
        if len(checks) == 4:
            raise preemption.Stopped(words)
        inner(self, words)

    with monkeypatch.context() as patch:
        patch.setattr(preemption.StopRequest, "check", fourth_of_the_pass_stops)
        with pytest.raises(preemption.Stopped, match="so far are kept"):
            run(small_passes, tmp_path / "cut")
    part = next((tmp_path / "cut" / "reference").glob("train-*.part"))
    assert np.isnan(safetensors.numpy.load_file(part)["reference_logps"][:, 0]).tolist() == [False] * 12 + [True] * 12
    scored, compute = [], reference_logprobs.compute
    monkeypatch.setattr(
        reference_logprobs,
        "compute",
        lambda found, **of: compute((scored.append(ids) or (ids, x) for ids, x in found), **of),
    )
    run(small_passes, tmp_path / "cut")
    assert np.concatenate(scored[:3]).tolist() == list(range(12, 24)) and len(scored) == 3 + 6
    assert not part.exists() and resuming.outcome(tmp_path / "cut") == resuming.outcome(tmp_path / "whole")


def broken(inputs, tmp_path, case):
    """A configuration with one fault, and what the message must say."""
    c = small(inputs)
    data = tmp_path / "data.jsonl"
    good = (inputs / "pairs.jsonl").read_text()
    c.data.train = str(data)
    if case == "alpha is NaN":
        c.data.train, c.loss.alpha = str(inputs / "pairs.jsonl"), float("nan")
        return c, "alpha=nan"
    if case == "unknown loss":
        c.data.train, c.loss.name = str(inputs / "pairs.jsonl"), "alphappo"
        return c, "alphapo"
    if case == "option of another loss":
        c.data.train, c.loss.name = str(inputs / "pairs.jsonl"), "jensen_shannon"
        return c, "alpha"
    if case == "missing file":
        return c, r"data.jsonl"
    if case == "truncated gzip":
        c.data.train = str(tmp_path / "data.jsonl.gz")
        whole = gzip.compress(good.encode())
        (tmp_path / "data.jsonl.gz").write_bytes(whole[: len(whole) // 2])
        return c, "data.jsonl.gz"
    if case == "broken JSON line":
        lines = good.splitlines()
        data.write_text("\n".join([*lines[:2], lines[2][:-4], *lines[3:]]) + "\n")
        return c, "data.jsonl:3"
    if case == "missing column":
        data.write_text(good.replace('"rejected"', '"refused"'))
        return c, "rejected"
    if case == "empty completion":
        data.write_text(json.dumps({"prompt": "a", "chosen": "", "rejected": "b"}) + "\n")
        c.data.on_empty_completion = "error"
        return c, "data.jsonl:1"
    if case == "prompt longer than the window":
        data.write_text(json.dumps({"prompt": "a" * 99, "chosen": " b", "rejected": " c"}) + "\n")
        c.data.on_long_prompt = "error"
        return c, "data.jsonl:1"
    if case == "window beyond the model's":
        data.write_text(good)
        c.data.max_length = 65
        return c, "max_length=65 exceeds the model's window of 64 tokens"
    if case == "chat rule without template":
        tokenizer = tmp_path / "tokenizer"
        tokenizer.mkdir()
        tiny.write_tokenizer(tokenizer)
        (tokenizer / "chat_template.jinja").unlink()
        c.tokenizer.path, c.data.rule = str(tokenizer), "chat"
        c.data.max_completion_length, c.data.max_prompt_length = None, 20
        data.write_text(good)
        return c, "chat template"
    if case == "tokenizer larger than the model":
        tiny.write_model(tmp_path / "model", vocab_size=100)
        c.model.path = str(tmp_path / "model")
        data.write_text(good)
        return c, "259 tokens, the model 100"
    raise AssertionError(case)


FAULTS = [
    "alpha is NaN", "unknown loss", "option of another loss", "missing file", "truncated gzip", "broken JSON line",
    "missing column", "empty completion", "prompt longer than the window", "window beyond the model's",
    "chat rule without template", "tokenizer larger than the model",
]  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_bad_input_is_refused_before_anything_starts(inputs, tmp_path, case):
    c, message = broken(inputs, tmp_path, case)
    with pytest.raises(ValueError, match=message):
        run(c, tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_several_problems_are_told_at_once(inputs, tmp_path):
    c = small(inputs, loss__alpha=float("nan"), loss__beta_pi=-1.0, data__rule="row", train__batch_size=0)
    with pytest.raises(ValueError, match="has 3 problems|has 4 problems") as raised:
        run(c, tmp_path / "w")
    for word in ("alpha", "beta_pi", "data.rule", "train.batch_size"):
        assert word in str(raised.value)


def test_batch_that_the_devices_do_not_divide(inputs, tmp_path):
    c = small(inputs, train__batch_size=5, train__micro_batch_per_device=2)
    with pytest.raises(ValueError, match="use 4 or 6"):
        run(c, tmp_path / "w")


def local_data(folder, c):
    """A file of the shape that the recipe reads."""
    path = folder / "data.json"
    turns = [("question one", "a good answer", "bad"), ("and then?", "the end", "no idea"), ("x?", "yes", "nope")]
    if c.data.format == "hh":
        row = "\n\nHuman: {0}\n\nAssistant: {1}"
        rows = [{"chosen": row.format(q, good), "rejected": row.format(q, bad)} for q, good, bad in turns]
    elif c.data.format == "chat_pairs":
        say = lambda q, a: [{"role": "user", "content": q}, {"role": "assistant", "content": a}]  # noqa: E731
        rows = [{"prompt": q, "chosen": say(q, good), "rejected": say(q, bad)} for q, good, bad in turns]
    elif c.data.format == "messages":
        rows = [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": good}]}
            for q, good, _ in turns
        ]
    elif c.data.format == "tldr_sft":
        rows = [{"subreddit": "s", "title": q, "post": bad, "summary": good} for q, good, bad in turns]
    elif c.data.format == "imdb":
        rows = [{"text": f"{q}, {good}; {bad}", "label": index % 2} for index, (q, good, bad) in enumerate(turns)]
    elif c.loss.beta_r is not None:
        size = c.data.group_size
        rows = [
            {"prompt": q, "completions": [f" {a}{i}" for i, a in enumerate((good, bad, good, bad)[:size])],
             "rewards": [1.2, -0.3, 0.4, -2.0][:size]}
            for q, good, bad in turns
        ]  # fmt: skip
    else:
        rows = [{"prompt": q, "chosen": " " + good, "rejected": " " + bad} for q, good, bad in turns]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    return path


RECIPES = [path.stem for path in sorted((REPO / "configs").glob("[!o]*.py")) if path.stem != "quickstart"]


def shrunk(name, inputs, folder):
    """The recipe with a small model and local data; everything else is its own."""
    c = importlib.import_module(f"fpo_jax.configs.{name}").get_config()
    c.data.train = c.data.eval = str(local_data(folder, c))
    c.data.train_split = c.data.eval_split = c.data.subfolder = ""
    c.model.path = str(inputs / "wide")
    c.train.batch_size, c.train.micro_batch_per_device, c.train.max_steps = 4, 2, 2
    c.logging.tensorboard = False
    return one_device(c)


@pytest.fixture(scope="module")
def wide(inputs):
    """A model with the window that the recipes ask for."""
    tiny.write_model(inputs / "wide", layers=1, max_positions=2048)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_builds_its_batches_from_local_files(name, inputs, wide, tmp_path):
    c = shrunk(name, inputs, tmp_path)
    found = run_inputs.prepare(c)
    assert found.train.prepared.groups == 12 and found.train.prepared.group_size == c.data.group_size
    assert found.train.audit.double_bos == 0


@pytest.mark.slow  # compiles three programs for rows of 512 and of 1024 tokens
@pytest.mark.parametrize("name", ["pythia_hh_rw", "mistral_base"])
def test_recipe_trains_a_small_model(name, inputs, wide, tmp_path):
    c = shrunk(name, inputs, tmp_path)
    c.train.max_steps = 1
    run(c, tmp_path / "w")
    assert metric_logger.read(tmp_path / "w" / metric_logger.METRICS_FILE)[-1]["step"] == 1


def test_every_knob_is_read():
    """A field that the loop never reads would be silently ignored."""
    files = (REPO / "fpo_jax" / "trainer").glob("*.py")
    tree = ast.parse("\n".join(path.read_text() for path in files))
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    c = config.default()
    assert all(text in ast.unparse(tree) for text in ("**config.mesh", "loss_options(config)"))
    for section in (name for name in c if hasattr(c[name], "items") and name not in {"loss", "mesh"}):
        for field in c[section]:
            by_prefix = field.startswith(("train", "eval")) and "_" + field.partition("_")[2] in texts
            by_name = section == "lora" and field in adapters.DEFAULTS
            read = field in names or by_prefix or by_name or field in {"train", "eval"}
            assert read, f"{section}.{field} is never read"
