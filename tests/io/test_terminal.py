"""What people are shown: no character that a terminal obeys, no endless message, one sentence for an error."""

import errno
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import transformers

from fpo_jax.cli import args, export, generate, train
from fpo_jax.eval.report import report
from fpo_jax.io import terminal
from fpo_jax.trainer import run_inputs, run_summary
from tests import tiny
from tests.paths import REPO

OBEYED = "\x1b]0;title\x07\x1b[2J\x1b]52;c;cm0=\x07\x9b1A\x7f\x08\r\u202e\u2066\u2028\ud800"
ATTACKED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.fixture(autouse=True)
def _logging_as_before(monkeypatch):
    """A program sends the log of its process to its own standard error."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(logging.getLogger(), "handlers", list(logging.getLogger().handlers))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("terminal")
    tiny.write_model(root / "model")
    return root


def answered(main, arguments, capfd):
    """Exit code and standard error of a program, which printed no character that a terminal obeys."""
    code = main([str(one) for one in arguments])
    found = capfd.readouterr()
    assert not ATTACKED.search(found.out + found.err), found
    assert "Traceback" not in found.err
    return code, found.err


def test_texts_are_shown_as_they_are_written_and_no_text_is_obeyed():
    assert terminal.shown("a\tb\né 漢字 👩‍🔬 ' \\") == "a\tb\né 漢字 👩‍🔬 ' \\"
    assert terminal.shown(OBEYED) == (
        r"\x1b]0;title\x07\x1b[2J\x1b]52;c;cm0=\x07\x9b1A\x7f\x08\r\u202e\u2066\u2028\ud800"
    )
    assert terminal.shown(terminal.shown(OBEYED)) == terminal.shown(OBEYED)
    for number in range(0x110000):
        assert number in (9, 10) or not ATTACKED.search(terminal.shown(chr(number)))


def test_a_long_message_is_cut_in_its_middle(capsys):
    terminal.refuse("x", ValueError("a" * 10**7 + "z"))
    said = capsys.readouterr().err
    assert len(said) < 5_000 and said.startswith("x: aaa") and said.endswith("az\n") and "characters" in said


def test_our_log_is_shown_by_every_handler(caplog):
    caplog.set_level("INFO", "fpo_jax")
    logging.getLogger("fpo_jax").info("one row: %s", OBEYED)
    assert not ATTACKED.search(caplog.text.replace("\r\n", "\n")) and r"\x1b]52" in caplog.text


@pytest.mark.parametrize("where", ["error", "traceback", "library"])
def test_a_program_s_last_words_are_shown(where):
    act = {
        "error": f"print(args.ended('fpo x', lambda: int({OBEYED!r})))",
        "traceback": f"args.ended('fpo x', lambda: {{}}[{OBEYED!r} + chr(27)] + {{}}.get(1, 2).x)",
        "library": f"args.ended('fpo x', lambda: logging.getLogger('other').warning({OBEYED!r}) or 0)",
    }[where]
    code = "import logging; from fpo_jax.cli import args\n"
    code += f"try:\n  {act}\nexcept KeyError:\n  raise RuntimeError({OBEYED!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True)
    said = done.stderr.decode()
    assert r"\x1b]" in said and not ATTACKED.search(said)


def test_no_program_prints_past_it():
    """What reaches a terminal goes through fpo_jax/io/terminal.py: no other file prints a text with a value in it."""
    raw = re.compile(r"print\(f?\"[^\"]*\{(error|path|name|options|directory|table|summary)[^}]*\}|basicConfig\(")
    found = []
    for root in ("fpo_jax", "eval"):
        for path in sorted((REPO / root).rglob("*.py")):
            if path.name != "terminal.py":
                found += [f"{path}: {line}" for line in path.read_text().split("\n") if raw.search(line)]
    assert [line for line in found if "terminal.shown" not in line and ">>>" not in line] == []


class TestForeignText:
    """Data, templates, names: each with what a terminal obeys."""

    def given(self, folder, data, **changed):
        options = {"model": folder / "model", "data": data, "out": folder / "o.jsonl", "format": "prompts"}
        options |= {"max_length": 40, "num_return": 1, "max_new_tokens": 2, "compute_dtype": "float32", "rule": "raw"}
        return [part for key, value in (options | changed).items() for part in (f"--{key.replace('_', '-')}", value)]

    def test_the_row_that_a_run_shows(self, folder, caplog):
        caplog.set_level("INFO", "fpo_jax")
        rows = [{"prompt": OBEYED[:-1], "chosen": " \x1b[31m a", "rejected": " b"}] * 8
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        inputs = run_inputs.prepare(tiny.config(folder / "model", path))
        for shown in (inputs.train.audit.text(), inputs.train.sample):  # as `log_summary` does
            run_summary.log.info("%s", shown)
        assert not ATTACKED.search(caplog.text) and r"\x1b]52" in caplog.text

    def test_a_file_s_name_and_a_key_in_it(self, folder, capfd):
        path = folder / f"a{OBEYED[:-1]}.jsonl"
        path.write_text(json.dumps({OBEYED: 1}) + "\n")
        code, said = answered(generate.main, self.given(folder, path), capfd)
        assert code == 2 and r"\x1b]52" in said

    @pytest.mark.parametrize(
        ("template", "fact"),
        [
            ("{{ raise_exception('\x1b]52;c;x\x07 no') }}", r"refuses a conversation .*\\x1b\]52;c;x\\x07 no"),
            ("{{ '\\ud800' }}{{ messages[0]['content'] }}</s>", "writes half a surrogate pair"),
        ],
    )
    def test_a_template(self, folder, tmp_path, capfd, template, fact):
        shutil.copytree(folder / "model", tmp_path / "model")
        (tmp_path / "model" / "chat_template.jinja").write_text(template)
        (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
        code, said = answered(generate.main, self.given(tmp_path, tmp_path / "p.jsonl", rule="chat"), capfd)
        assert code == 2 and re.search(fact, said), said


class TestOneSentence:
    """Inputs that cannot be used end a program with exit code 2 and one sentence."""

    def test_an_error_of_the_system_names_file_and_remedy(self):
        for number in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EEXIST, errno.EIO):
            error = OSError(number, "what it is", "/some/where")
            assert re.fullmatch(r"/some/where cannot be used \(what it is\); \w+ .*\.", terminal.sentence(error))
        assert terminal.sentence(OSError("words alone")) == "words alone"
        assert terminal.sentence(ValueError()) == "ValueError"

    @pytest.mark.parametrize("kind", ["file", "below a file", "dangling"])
    def test_a_workdir_that_is_none(self, folder, tmp_path, capfd, kind):
        (tmp_path / "file").write_text("x")
        (tmp_path / "dangling").symlink_to("nowhere/at/all")
        workdir = {"file": "file", "below a file": "file/w", "dangling": "dangling"}[kind]
        pairs = tiny.write_pairs(tmp_path / "pairs.jsonl", count=8)
        options = {"data.train": pairs, "data.eval": "", "model.path": folder / "model", "data.format": "json"}
        options |= {"data.max_length": 40, "data.max_completion_length": 16, "data.rule": "raw", "train.batch_size": 8}
        options |= {
            "train.micro_batch_per_device": 1,
            "data.subfolder": "",
            "data.train_split": "",
            "data.eval_split": "",
            "data.hh_split": "last_turn",
        }
        flags = [f"--config.{key}={value}" for key, value in options.items()]
        code, said = answered(
            train.main, ["--config", "pythia_hh_pref", "--workdir", tmp_path / workdir, *flags], capfd
        )
        assert code == 2 and said.rpartition("\n")[0].rpartition("\n")[2].count(" is no folder; give a folder") == 1, (
            said
        )

    def test_a_disk_that_is_full_while_prompts_are_answered(self, folder, tmp_path, capfd, monkeypatch):
        (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')

        class Full:
            name = str(tmp_path / "o.jsonl.part")

            def write(self, _):
                raise OSError(errno.ENOSPC, "No space left on device")

            def close(self):
                pass

        monkeypatch.setattr(generate.jsonl_job.JobFile, "__enter__", lambda job: setattr(job, "_file", Full()) or job)
        arguments = TestForeignText().given(folder, tmp_path / "p.jsonl", out=tmp_path / "o.jsonl")
        code, said = answered(generate.main, arguments, capfd)
        assert code == 2 and f"{tmp_path}/o.jsonl.part cannot be used (No space left on device); make room" in said

    @pytest.mark.parametrize(
        ("file", "change", "fact"),
        [
            ("config.json", {"torch_dtype": "bflaot16"}, "torch_dtype='bflaot16' is not supported"),
            ("config.json", {"dtype": ["float32"]}, "dtype=.'float32'. is not supported"),
            ("config.json", {"initializer_range": 2}, "Field 'initializer_range' expected float"),
            ("config.json", {"model_type": "x" * 10**7}, "is not supported; supported: llama"),
            ("tokenizer.json", {"added_tokens": [{"id": -1, "content": "x"}]}, "cannot load a tokenizer from .*-1"),
            ("config.json", None, "config.json is not valid JSON"),
            ("tokenizer.json", None, "tokenizer.json is not valid JSON"),
            ("tokenizer_config.json", None, "tokenizer_config.json is not valid JSON"),
        ],
    )
    def test_a_model_directory(self, folder, tmp_path, capfd, file, change, fact):
        shutil.copytree(folder / "model", tmp_path / "model")
        path = tmp_path / "model" / file
        text = path.read_text()
        path.write_text(text[: len(text) // 2] if change is None else json.dumps(json.loads(text) | change))
        (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
        code, said = answered(generate.main, TestForeignText().given(tmp_path, tmp_path / "p.jsonl"), capfd)
        assert code == 2 and re.search(fact, said) and len(said) < 5_000, said

    def test_records_of_a_run_that_are_cut(self, tmp_path, capfd):
        (tmp_path / "config.json").write_text('{"a": 1, "b"')
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
        code, said = answered(report.main, ["--workdir", tmp_path], capfd)
        assert code == 2 and f"{tmp_path}/config.json is not valid JSON" in said
        code, said = answered(export.main, ["--workdir", tmp_path / "none", "--out", tmp_path / "o"], capfd)
        assert code == 2 and "none is not a directory" in said

    def test_a_signal_while_a_tokenizer_is_loaded_is_no_fault_of_the_tokenizer(self, folder, capfd, monkeypatch):
        def struck(*_, **__):
            os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", struck)
        (folder / "p.jsonl").write_text('{"prompt": "a"}\n')
        code, said = answered(generate.main, TestForeignText().given(folder, folder / "p.jsonl"), capfd)
        assert code == 75 and said.endswith("the same command goes on.\n") and "tokenizer" not in said

    def test_a_signal_ends_a_program_in_one_sentence(self, capfd):
        def struck():
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("it went on")

        assert args.ended("fpo x", struck) == 75
        assert "x: SIGTERM: nothing was under way" in capfd.readouterr().err
