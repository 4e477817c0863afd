"""Answers to prompts: what is written, resumption, refusals, checkpoints, the server adapter, and labels."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from fpo_jax import checkpoint, hf, sharding, tokenization
from fpo_jax.cli import generate, jsonl_job, label
from fpo_jax.cli import openai_client as servers
from fpo_jax.distributed import preemption
from fpo_jax.inference import reward_model, sampler
from fpo_jax.io import jsonl
from fpo_jax.models import params
from fpo_jax.trainer import run_inputs, trainer
from tests import tiny
from tests.answer_server import AnswerServer
from tests.inference.test_rewarding import base, reward_config, run  # noqa: F401  fixtures
from tests.paths import REPO, shared_data

PROMPTS = ["one?", "two is longer?", "three?", "one?", "one?", "four?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("generate")
    tiny.write_model(root / "model", layers=1)
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return root


def options(folder, out, **changed):
    given = {
        "model": str(folder / "model"),
        "data": str(folder / "prompts.jsonl"),
        "max_new_tokens": 6,
        "num_return": 2,
        "rule": "raw",
    }
    given |= {"batch_size": 1, "compute_dtype": "float32", "max_length": 40}
    return generate.Options(out=out, **(given | changed))


@pytest.fixture(scope="module")
def answered(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "answers.jsonl"
    summary = generate.run(options(folder, out))
    return out, summary


def test_lines_hold_prompts_and_what_the_sampler_drew(folder, answered):
    out, summary = answered
    lines = jsonl.read(out)
    assert [line["prompt"] for line in lines] == PROMPTS and [line["index"] for line in lines] == [*range(6)]
    assert lines[2]["source"].endswith("prompts.jsonl:3")
    assert (summary.prompts, summary.completions, summary.done_before) == (6, 12, 0)
    tokenizer = tokenization.load_tokenizer(folder / "model")
    config = hf.read_config(folder / "model")
    drawn = sampler.sample(
        hf.load_params(folder / "model", config, dtype="float32"),
        tokenization.generation_prompts(
            tokenization.encoder(tokenizer, tokenization.PromptFormat(rule="raw")), PROMPTS
        ),
        config=config, decoding=sampler.Decoding(6, stop_ids=(2,)), seed=0, num_return=2, batch_size=4,
    )  # fmt: skip
    for line, completions in zip(lines, drawn, strict=True):
        assert line["tokens"] == [len(ids) for ids in completions]
        assert line["finish"] == ["stop" if ids[-1] == 2 else "length" for ids in completions]
        assert line["completions"] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]


def test_a_finished_job_does_nothing_and_another_one_is_refused(folder, answered, monkeypatch):
    out, _ = answered
    before = out.read_bytes()
    monkeypatch.setattr(sampler, "sample", None)
    again = generate.run(options(folder, out))
    assert again.done_before == 6 and again.text == "6 prompts, all done before" and out.read_bytes() == before
    with pytest.raises(ValueError, match=r"belongs to another job:\n  temperature: 1.0 -> 0.5\ngive another file"):
        generate.run(options(folder, out, temperature=0.5))
    (out.parent / "bare.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"exists and has no bare.jsonl.job.json"):
        generate.run(options(folder, out.parent / "bare.jsonl"))


def test_it_goes_on_behind_a_half_written_line(folder, answered, tmp_path):
    whole = answered[0].read_bytes().splitlines(keepends=True)
    out = tmp_path / "answers.jsonl"
    generate.run(options(folder, out))
    (tmp_path / "answers.jsonl.part").write_bytes(whole[4] + whole[1] + whole[0][:25])
    out.unlink()
    summary = generate.run(options(folder, out))
    assert summary.done_before == 2 and out.read_bytes() == b"".join(whole)
    out.unlink()
    (tmp_path / "answers.jsonl.part").write_bytes(whole[4][:25] + b"\n" + whole[1])
    with pytest.raises(ValueError, match=r"answers.jsonl.part:1: broken JSON: .*put the line right"):
        generate.run(options(folder, out))


@pytest.mark.parametrize(("dedup", "kept"), [("none", 6), ("consecutive", 5), ("all", 4)])
def test_repeated_prompts(folder, dedup, kept):
    """The original drops consecutive repeats alone, and counts prompts before."""
    found = generate._prompts(options(folder, folder / "x", dedup=dedup, num_prompts=5))
    assert len(found) == min(kept, 5) and [prompt.index for prompt in found] == [*range(len(found))]


def test_a_long_prompt_loses_its_beginning_as_tokens(folder, tmp_path):
    """The original cuts the answer's text by the length of the prompt before it was cut."""
    long = "abcdefghijklmnopqrstuvwxyz" * 2
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": long}) + "\n" + json.dumps({"prompt": long[-34:]}) + "\n")
    run_with = options(folder, tmp_path / "o.jsonl", data=str(tmp_path / "p.jsonl"), temperature=0.0, num_return=1)
    summary = generate.run(run_with)
    cut, whole = jsonl.read(tmp_path / "o.jsonl")
    assert cut["completions"] == whole["completions"] and cut["prompt"] == long
    assert cut["prompt_cut"] == len(long) - 34 and "prompt_cut" not in whole and summary.cut == 1


def test_stop_strings_end_a_completion_before_them(folder, tmp_path, answered):
    before = [text for line in jsonl.read(answered[0]) for text in line["completions"]]
    stop = next(text[1] for text in before if len(text) > 2 and text[0] != text[1])
    generate.run(options(folder, tmp_path / "s.jsonl", stop_strings=(stop,)))
    lines = jsonl.read(tmp_path / "s.jsonl")
    assert [text for line in lines for text in line["completions"]] == [text.split(stop)[0] for text in before]
    assert all(
        end == "stop"
        for line in lines
        for end, text in zip(line["finish"], line["completions"], strict=True)
        if text not in before
    )


def test_ids_tokens_and_finish_end_with_the_token_that_completes_a_stop_string(folder, tmp_path):
    """What follows a stop string was never drawn for the reader of the text: fpo kl would score it."""
    given = {"keep_ids": 1, "max_new_tokens": 12, "num_return": 3}
    generate.run(options(folder, tmp_path / "a.jsonl", **given))
    free = jsonl.read(tmp_path / "a.jsonl")
    tokenizer = tokenization.load_tokenizer(folder / "model")
    stop = next(text[2:4] for line in free for text in line["completions"] if text[2:4].isascii() and len(text) > 5)
    summary = generate.run(options(folder, tmp_path / "s.jsonl", stop_strings=("never", stop), **given))
    ended = 0
    for line, before in zip(jsonl.read(tmp_path / "s.jsonl"), free, strict=True):
        for place, whole in enumerate(before["ids"]):
            ends = [
                n for n in range(1, len(whole) + 1) if stop in tokenizer.decode(whole[:n], skip_special_tokens=True)
            ]
            kept = whole[: ends[0]] if ends else whole
            assert line["ids"][place] == kept and line["tokens"][place] == len(kept)
            text = tokenizer.decode(kept, skip_special_tokens=True)
            assert line["completions"][place] == (text.removesuffix(stop) if ends else text)
            assert line["finish"][place] == ("stop" if ends else before["finish"][place])
            ended += bool(ends) and len(kept) < len(whole)
    assert ended and summary.tokens == sum(sum(line["tokens"]) for line in jsonl.read(tmp_path / "s.jsonl"))


def test_a_stop_string_across_the_borders_of_tokens():
    """The token that completes it was drawn and stays; what that token writes behind the stop string is not text."""
    from tests import real_tokenizers

    tokenizer = real_tokenizers.encoder("neox").tokenizer
    prompt = tokenizer("Human: hi\n\nAssistant:")["input_ids"]

    def ended(text, *stops, stop_ids=(0,), tail=()):
        ids = [*tokenizer(text)["input_ids"], *tail]
        found = generate._ended(tokenizer, prompt, ids, stop_ids, stops)
        assert found[0] == ids[: len(found[0])]
        return tokenizer.decode(found[0]), *found[1:]

    text = " It is so.\n\nHuman: and then?\n\nHuman: no"
    assert ended(text, "\n\nHuman:") == (" It is so.\n\nHuman:", " It is so.", "stop")
    assert ended(text, "so.\n\nHum") == (" It is so.\n\nHuman", " It is ", "stop"), "the last token goes further"
    assert ended(text, "then", "is so") == (" It is so", " It ", "stop"), "the one that is complete first"
    assert ended(text, "Assistant") == (text, text, "length")
    assert ended(text, "Assistant", tail=[0]) == (text + "<|endoftext|>", text, "stop")
    assert ended(text, "no", tail=[0]) == (text, text.removesuffix("no"), "stop"), "complete before the stop id"
    assert ended("a😀b😀c", "😀") == ("a😀", "a", "stop"), "tokens of less than a character are no text yet"
    assert ended("a😀b😁c", "😁") == ("a😀b😁", "a😀b", "stop")
    assert ended("\ufffd \ufffd b", "b") == ("\ufffd \ufffd b", "\ufffd \ufffd ", "stop")


def test_a_stop_string_that_is_a_special_token_is_refused(folder, tmp_path):
    """No text holds a special token, so such a string would never stop anything."""
    with pytest.raises(ValueError, match=r"'<s>' is a special token, which no text holds; give its id, --stop-ids 1\."):
        generate.run(options(folder, tmp_path / "s.jsonl", stop_strings=("a", "<s>")))
    assert not list(tmp_path.iterdir())
    generate.run(options(folder, tmp_path / "s.jsonl", stop_strings=("</s>",)))  # ends a completion as a stop id


def test_another_stop_id_ends_a_completion(folder, tmp_path, answered):
    config, first = hf.read_config(folder / "model"), jsonl.read(answered[0])[0]
    others = tuple(set(range(config.vocab_size)) - {2})
    generate.run(options(folder, tmp_path / "s.jsonl", stop_ids=others))
    lines = jsonl.read(tmp_path / "s.jsonl")
    assert lines[0]["tokens"] == [1, 1] != first["tokens"] and lines[0]["finish"] == ["stop", "stop"]


def test_a_checkpoint_answers_as_its_export(base, tmp_path):  # noqa: F811
    from fpo_jax.trainer import export

    c = tiny.config(base / "model", base / "train.jsonl", train__max_steps=2, train__save_every=1)
    trainer.run(c, tmp_path / "run")
    export.export(tmp_path / "run", tmp_path / "model", step=1, dtype=None)
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "q?"}) + "\n")
    shared = {"data": str(tmp_path / "p.jsonl"), "temperature": 0.0}
    generate.run(options(tmp_path, tmp_path / "a.jsonl", **shared))
    generate.run(options(tmp_path, tmp_path / "b.jsonl", model="", workdir=str(tmp_path / "run"), step="1", **shared))
    assert jsonl.read(tmp_path / "a.jsonl") == jsonl.read(tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match="only runs with train.keep_best have a best one"):
        checkpoint.restore_params(tmp_path / "run", "best")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"workdir": "w"}, "give one of --model, --workdir and --server, not model and workdir"),
        ({"model": ""}, "not none"),
        ({"step": "3"}, "--step belongs to --workdir"),
        ({"server": "http://x", "model": ""}, "--server needs --server-model"),
        ({"api_key_env": "KEY"}, "belong to --server"),
        ({"rule": "raw", "chat_template": "chatml"}, "--chat-template would change nothing under rule raw"),
        ({"rule": "both"}, "--rule='both' is not one of raw, chat"),
        ({"dedup": "some"}, "--dedup='some' is not one of none, consecutive, all"),
        ({"num_return": 0}, "--num-return=0 must be at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0 must be finite"),
        ({"max_length": 65}, "--max-length=65 exceeds the model's window of 64"),
        ({"max_new_tokens": 40}, "--max-new-tokens=40 leaves no room for a prompt in 40 tokens"),
        ({"compute_dtype": "int8"}, "--compute-dtype='int8' is not one of"),
        ({"stop_strings": ("",)}, "a stop string is empty"),
        ({"data": "nowhere.jsonl"}, "no file or directory 'nowhere.jsonl'"),
        ({"seed": -1}, r"--seed=-1 must lie in \[0, 2\*\*32\)"),
        ({"step": "new", "workdir": "w", "model": ""}, "--step='new' must be a number or best"),
        ({"concurrency": 3}, "with --model, --concurrency would change nothing"),
        ({"server_api": "openai"}, "with --model, --server-api would change nothing"),
        ({"workdir": "w", "model": "", "revision": "main"}, "with --workdir, --revision would change nothing"),
        ({"stop_ids": (1, 999)}, r"stop ids \[999\] lie outside the model's vocabulary of 259 tokens"),
        ({"tensor": 3}, "8 devices are not divisible by 3"),
        ({"tensor": 8}, "heads has 4 entries, mesh axis tensor has 8 devices"),
    ],
)
def test_bad_options_are_named_before_anything_is_written(folder, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        generate.run(options(folder, tmp_path / "x.jsonl", **changed))
    assert not list(tmp_path.iterdir())


def test_weights_cut_over_devices_change_no_token(folder, tmp_path):
    tiny.write_model(tmp_path / "model", layers=1, vocab_size=264)  # 259 tokens cannot be cut
    for tensor in (1, 4):
        out = tmp_path / f"{tensor}.jsonl"
        generate.run(options(folder, out, model=str(tmp_path / "model"), tensor=tensor))
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "4.jsonl").read_bytes()


def test_a_job_killed_before_its_file_was_finished_is_finished(folder, answered, tmp_path, monkeypatch):
    out = tmp_path / "answers.jsonl"
    generate.run(options(folder, out))
    out.rename(out.with_name("answers.jsonl.part"))
    monkeypatch.setattr(sampler, "sample", None)
    assert generate.run(options(folder, out)).done_before == 6
    assert out.read_bytes() == answered[0].read_bytes() and not out.with_name("answers.jsonl.part").exists()


def test_a_finished_file_that_lost_lines_is_refused(folder, answered, tmp_path):
    out = tmp_path / "answers.jsonl"
    generate.run(options(folder, out))
    whole = answered[0].read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(whole[:5]))
    with pytest.raises(ValueError, match="answers.jsonl holds 5 of the 6 lines it had"):
        generate.run(options(folder, out))
    out.write_bytes(b"".join(whole)[:-9])
    with pytest.raises(ValueError, match="answers.jsonl:6: broken JSON: .*put the line right"):
        generate.run(options(folder, out))


def test_another_tokenizer_is_another_job(folder, answered, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "other")
    same = options(folder, answered[0], tokenizer=str(tmp_path / "other"))
    assert generate.run(same).done_before == 6, "the same files elsewhere"
    path = tmp_path / "other" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"belongs to another job:\n  prompt_format.tokenizer: .\w{64}. -> "):
        generate.run(same)


def test_too_little_memory_is_one_sentence(folder, tmp_path, monkeypatch):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5 bytes.\nmore")

    monkeypatch.setattr(sampler, "sample", full)
    with pytest.raises(ValueError, match=r"RESOURCE_EXHAUSTED: .* 5 bytes.. Lower --batch-size or .* with --tensor"):
        generate.run(options(folder, tmp_path / "o.jsonl"))


def test_the_summary_counts_what_this_start_did(folder, answered, tmp_path):
    out = tmp_path / "answers.jsonl"
    generate.run(options(folder, out))
    whole = answered[0].read_bytes().splitlines(keepends=True)
    out.unlink()
    out.with_name("answers.jsonl.part").write_bytes(b"".join(whole[:5]))
    again, last = generate.run(options(folder, out)), jsonl.read(answered[0])[5]
    assert (again.done_before, again.completions, again.tokens) == (5, 2, sum(last["tokens"]))
    assert again.stopped == last["finish"].count("stop")


def test_a_signal_saves_the_batch_and_the_same_command_goes_on(folder, answered, tmp_path, monkeypatch):
    out, asked = tmp_path / "answers.jsonl", iter([None, "SIGTERM"])
    with monkeypatch.context() as patched:
        patched.setattr(preemption.StopRequest, "agreed", lambda self: next(asked, None))
        patched.setattr(generate, "_placed", lambda config, *, tensor: _one_device(config))
        with pytest.raises(preemption.Stopped, match=r"SIGTERM: 2 of 6 prompts are answered and saved"):
            generate.run(options(folder, out, batch_size=2))
    assert generate.run(options(folder, out)).done_before == 2
    assert jsonl.read(out) == jsonl.read(answered[0])


def _one_device(config):
    layout = sharding.make_layout(preset="multi_gpu", data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    return layout, params.shardings(config, mesh=layout.mesh)


def test_the_command_line(folder, tmp_path):
    command = [sys.executable, "-m", "fpo_jax.cli.generate", "--model", folder / "model", "--out", tmp_path / "o.jsonl"]
    bad = subprocess.run([*command, "--data", "nowhere.jsonl"], cwd=REPO, capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.startswith("generate: no file or directory") and "Trace" not in bad.stderr


def test_generation_prompts_are_what_training_makes_of_prompt_and_answer():
    """Prompt ids and answer ids, one after the other, are the row that training would build."""
    from tests import real_tokenizers

    for name, template, prompt, answer in (
        ("phi3", None, "What is it?", "It is a test."),
        ("phi3", "chatml", "What is it?", "It is a test."),
        ("phi3", "zephyr", "What is it?", "It is a test."),
        ("mistral1", "mistral", "What is it?", "It is a test."),
        ("mistral3", "llama3", "What is it?", "It is a test."),
        ("mistral3", "gemma2", "What is it?", "It is a test."),
    ):
        for settled in (None, real_tokenizers.ORIGINAL):
            encoder = real_tokenizers.encoder(name, template, settled)
            (begin,) = tokenization.generation_prompts(encoder, [prompt])
            ((row,),) = tokenization.chat_rows(encoder, [prompt], [[answer]], max_length=200, max_prompt_length=100)
            assert row.ids[: len(begin)] == begin, (name, template)
            rest = encoder.tokenizer.decode(row.ids[len(begin) :], skip_special_tokens=False)
            assert rest.lstrip().startswith(answer), (name, template, rest)
            header = settled is not None and template != "mistral"
            assert len(begin) > row.prompt_length if header else len(begin) == row.prompt_length


# --- the server


def served(folder, out, server, **changed):
    given = {"model": "", "server": server.url, "server_model": "m", "concurrency": 3}
    given |= {name: getattr(generate.Options, name) for name in ("max_length", "batch_size", "compute_dtype")} | changed
    return generate.run(options(folder, out, **given))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(servers, "LONGEST_WAIT_S", 0.02)
    monkeypatch.setattr(servers.Server, "__new__", _patient(servers.Server.__new__))


def _patient(new):
    def make(cls, *args, **kwargs):
        return new(cls, *args, **({"timeout_s": 0.3} | kwargs))

    return make


def test_a_server_that_fails_times_out_and_answers_garbage_loses_nothing(folder, tmp_path, quick, monkeypatch):
    monkeypatch.setenv("ANSWER_KEY", "sk-very-secret")
    how = [429, 503, "garbage", "hang", 500]
    server = AnswerServer(lambda number, body: how[number] if number < len(how) else None, lambda text: f"re: {text}")
    with server.served():
        summary = served(folder, tmp_path / "o.jsonl", server, api_key_env="ANSWER_KEY")
    assert summary.failed == 0 and len(server.bodies) == 6 + len(how) and server.most_at_once <= 3
    lines = jsonl.read(tmp_path / "o.jsonl")
    assert [line["completions"] for line in lines] == [[f"re: {text}"] * 2 for text in PROMPTS]
    assert len({body["seed"] for body in server.bodies}) == 6 and server.bodies[0]["n"] == 2
    assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"
    for path in tmp_path.iterdir():
        assert "secret" not in path.read_text()
    assert "secret" not in repr(servers.Secret("ANSWER_KEY"))


def test_a_prompt_that_fails_for_good_is_asked_again_by_the_same_command(folder, tmp_path, quick):
    refused = [True]
    server = AnswerServer(
        lambda number, body: 400 if refused[0] and body["messages"][-1]["content"] == "three?" else None, str.upper
    )
    with server.served():
        summary = served(folder, tmp_path / "o.jsonl", server, rule="chat")
        assert summary.failed == 1 and not (tmp_path / "o.jsonl").exists()
        refused[0] = False
        asked = len(server.bodies)
        assert served(folder, tmp_path / "o.jsonl", server, rule="chat").done_before == 5
        assert len(server.bodies) == asked + 1
    assert [line["completions"][0] for line in jsonl.read(tmp_path / "o.jsonl")] == list(map(str.upper, PROMPTS))


def test_a_key_that_is_not_there_and_a_url_that_is_none(folder, tmp_path):
    with pytest.raises(ValueError, match="the environment variable NO_SUCH_KEY is not set"):
        servers.Secret("NO_SUCH_KEY")
    with pytest.raises(ValueError, match="is no URL; write e.g. http"):
        servers.checked_url("localhost:8000")


# --- labels


@pytest.fixture(scope="module")
def judge(run, tmp_path_factory):  # noqa: F811
    from fpo_jax.trainer import export

    out = tmp_path_factory.mktemp("judge") / "rm"
    export.export(run, out, step="best", dtype=None)
    return out


def labelled(judge, data, out, **changed):
    given = {"compute_dtype": "float32", "batch_size": 2} | changed
    return label.run(label.Options(model=str(judge), data=data, out=out, **given))


@pytest.fixture(scope="module")
def completions(tmp_path_factory):
    path = tmp_path_factory.mktemp("completions") / "c.jsonl"
    rows = [
        {"prompt": "0: ab?", "completions": [" ab!", " ab.", " ab!"]},
        {"prompt": "1: f?", "completions": [" f!", " f!"]},
        {"prompt": "2: cde?", "completions": [" f.", " cde!"]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rewards_are_the_models_and_duplicates_and_ties_are_counted(judge, completions, tmp_path):
    summary = labelled(judge, completions, tmp_path / "l.jsonl")
    lines = jsonl.read(tmp_path / "l.jsonl")
    assert (summary.lines, summary.completions, summary.tied, summary.duplicates) == (3, 7, 1, 2)
    first = lines[0]["rewards"]
    assert first[0] == first[2] > first[1], "answers with ! are better"
    assert summary.mean_reward == pytest.approx(np.mean([r for line in lines for r in line["rewards"]]))
    c = tiny.config(judge.parent, tmp_path / "l.jsonl")
    records = __import__("fpo_jax.data", fromlist=["read"]).read(tmp_path / "l.jsonl", format="json")
    assert [list(record.rewards) for record in records.rows] == [line["rewards"] for line in lines]
    assert c.data.format == "json"


def test_a_label_is_the_score_that_training_gives_the_same_row(judge, base, tmp_path):  # noqa: F811
    """The rows of labelling and of training are the same tokens."""
    c = reward_config(judge, base / "held_out.jsonl", train__batch_size=8)
    prepared = run_inputs.prepare(c).train.prepared
    encoder = tokenization.encoder(tokenization.load_tokenizer(judge), tokenization.PromptFormat(rule="raw"))
    pairs = jsonl.read(base / "held_out.jsonl")[:8]
    lines = [{"prompt": pair["prompt"], "completions": [pair["chosen"], pair["rejected"]]} for pair in pairs]
    prompts, completions = [line["prompt"] for line in lines], [line["completions"] for line in lines]
    groups = reward_model.rows(encoder, prompts, completions, pad_id=0, window=40)
    rows = [row.ids for group in groups for row in group]
    assert rows == [prepared.row(index)[0].tolist() for index in range(16)]


def test_labels_of_another_tokenizer_are_another_job(judge, completions, tmp_path):
    with pytest.raises(
        ValueError, match=r"was trained with another prompt format .* --eos-token=<s> where it was </s>"
    ):
        labelled(judge, completions, tmp_path / "l.jsonl", eos_token="<s>")
    strange = shutil.copytree(judge, tmp_path / "strange")
    (strange / tokenization.prompt_format.FILE).unlink()
    labelled(strange, completions, tmp_path / "l.jsonl", rule="raw")
    with pytest.raises(ValueError, match=r"belongs to another job:\n  prompt_format.end_ids: "):
        labelled(strange, completions, tmp_path / "l.jsonl", rule="raw", eos_token="<s>")


def test_pairs_of_best_and_worst_leave_ties_out(judge, completions, tmp_path):
    summary = labelled(judge, completions, tmp_path / "p.jsonl", pairing="best_worst")
    pairs = jsonl.read(tmp_path / "p.jsonl")
    assert summary.written == 2 and "2 pairs" in summary.text and "1 tied" in summary.text
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [(" ab!", " ab."), (" cde!", " f.")]
    assert labelled(judge, completions, tmp_path / "p.jsonl", pairing="best_worst").written == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "p"}', "c.jsonl:1: a line must have a prompt and a list of completions"),
        ('{"prompt": "p", "completions": [1]}', "c.jsonl:1: completions must be texts"),
        ('{"prompt": "p", "completions": ["a"', "c.jsonl:1: broken JSON"),
        ("[]", "c.jsonl:1: a line must be a JSON object"),
        ("", "has no line"),
    ],
)
def test_a_damaged_file_is_named(judge, tmp_path, line, message):
    (tmp_path / "c.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        labelled(judge, tmp_path / "c.jsonl", tmp_path / "o.jsonl")


def test_a_signal_saves_what_is_scored(judge, completions, tmp_path, monkeypatch):
    monkeypatch.setattr(label, "CHUNK", 1)
    answers = iter(["SIGTERM"])
    monkeypatch.setattr(preemption.StopRequest, "agreed", lambda self: next(answers, None))
    with pytest.raises(preemption.Stopped, match="SIGTERM: 1 of 3 lines are scored and saved"):
        labelled(judge, completions, tmp_path / "l.jsonl")
    assert labelled(judge, completions, tmp_path / "l.jsonl").lines == 3
    assert [line["index"] for line in jsonl.read(tmp_path / "l.jsonl")] == [0, 1, 2]


def test_scores_that_lost_a_line_are_refused(judge, completions, tmp_path):
    out = tmp_path / "l.jsonl"
    labelled(judge, completions, out)
    out.write_bytes(out.read_bytes().split(b"\n", 1)[1])
    with pytest.raises(ValueError, match="l.jsonl holds 2 of the 3 lines it had"):
        labelled(judge, completions, out)


def test_real_model_and_its_published_text(tmp_path):
    """stories260K, greedy from its own BOS, through the whole program."""
    model = shared_data("stories260K")
    expected = json.loads((model / "expected_greedy.json").read_text())
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "Once upon a time"}) + "\n")
    generate.run(
        generate.Options(
            out=tmp_path / "o.jsonl", data=str(tmp_path / "p.jsonl"), model=str(model), max_new_tokens=40,
            temperature=0.0, compute_dtype="float32", batch_size=1,
        )
    )  # fmt: skip
    (line,) = jsonl.read(tmp_path / "o.jsonl")
    text = line["prompt"] + line["completions"][0]
    assert expected["expected_text"].strip().startswith(text.strip()[:60])


def test_a_start_after_a_kill_at_the_very_end_takes_the_parts_away(tmp_path):
    """The finished file is there, and the parts that it was made of are too."""
    out, part = tmp_path / "o.jsonl", tmp_path / "o.jsonl.part"
    with jsonl_job.JobFile(out, {"job": 1}, count=2) as file:
        for index in (1, 0):
            file.append({"index": index})
        content = part.read_bytes()
        file.finish()
    part.write_bytes(content)
    out.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="holds 1 of the 2 lines"):
        jsonl_job.JobFile(out, {"job": 1}, count=2)
    assert part.exists(), "the only whole copy"
    out.write_bytes(b"".join(sorted(content.splitlines(keepends=True))))
    again = jsonl_job.JobFile(out, {"job": 1}, count=2)
    assert again.finished and again.done == {0, 1} and not part.exists()
    assert [line["index"] for line in jsonl.read(out)] == [0, 1]
