"""What a stranger gets wrong at the start: one sentence with the way out, exit code 2, before anything expensive."""

import json
import shutil

import jax
import pytest

from fpo_jax.cli import jsonl_job, train
from fpo_jax.config import overrides
from fpo_jax.eval.pipeline import pipeline
from fpo_jax.perf import hardware
from fpo_jax.trainer import run_inputs, start_checks
from tests import tiny

GOOD = "from fpo_jax import config\n\ndef get_config():\n    c = config.default()\n    return c\n"


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "none.py").write_text("x = 1\n")
    (tmp_path / "broken.py").write_text("imprt os\n")
    (tmp_path / "wrong.py").write_text(GOOD.replace("    return", "    c.loss.bta = 1.0\n    return"))
    (tmp_path / "afile").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing; give a file, which `fpo init` writes for your own data, or one of imdb_reward"),
        (["--config", "god.py"], "--config=god.py is neither a file nor one of imdb_reward.*; did you mean good.py?"),
        (["--config", "mistral_bas"], "did you mean mistral_base?"),
        (["--config", "none.py"], "--config=none.py defines no get_config(), which returns the configuration"),
        (["--config", "broken.py"], "broken.py:1 is no Python (invalid syntax); mend the file of --config."),
        (["--config", "wrong.py"], 'wrong.py:5: Key "bta" does not exist and cannot be added'),
        (["--config", "good.py", "--config.learning_rate=1"], "did you mean --config.optim.learning_rate?"),
        (["--config", "good.py", "--config.optim.learning_rat=1"], "did you mean --config.optim.learning_rate?"),
        (
            ["--config", "good.py", "--config.batch_size=4", "--config.loss.bta=4"],
            "--config.batch_size is no config field; did you mean --config.train.batch_size? --config.loss.bta is no",
        ),
        (
            ["--config", "good.py", "--config.train.batch_size=abc"],
            "--config.train.batch_size=abc: 'abc' is not a whole n",
        ),
        (["--config", "good.py", "--config.loss.beta=x"], "--config.loss.beta=x: 'x' is not a number"),
        (
            ["--config", "good.py", "--config.data.shuffle=maybe"],
            "--config.data.shuffle=maybe: 'maybe' is not True or F",
        ),
        (["--config", "pipelines/hh_rw"], "hh_rw.py is the recipe of a pipeline; give it to fpo pipeline."),
    ],
)
def test_a_command_line_that_cannot_be_read(place, arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        train.main([*arguments, "--workdir", "run"])
    said = capsys.readouterr().err
    first, _, rest = message.partition(".*")
    assert end.value.code == 2 and first in said and rest in said and not (place / "run").exists()
    assert len(said.strip().split("\n")) == 1 and "Traceback" not in said and "\\'" not in said


def test_a_pipeline_is_told_from_a_run(place, capsys):
    assert pipeline.main(["--config", "good.py", "--workdir", "run"]) == 2
    assert "--config=good.py is the recipe of one training run; give it to fpo train." in capsys.readouterr().err


def test_all_places_and_the_configuration_are_one_list(place):
    c = overrides.load_config("good.py")
    c.reference.cache_dir, c.train.batch_size = "/proc/nobody", 0
    with pytest.raises(ValueError, match="the configuration has 5 problems") as raised:
        run_inputs.prepare(c, workdir=place / "afile")
    told = str(raised.value)
    assert f"--workdir={place / 'afile'}: {place / 'afile'} is no folder; give a folder" in told
    assert "--config.reference.cache_dir=/proc/nobody: /proc cannot be written" in told
    assert "train.batch_size=0" in told and "model.path is empty" in told


def test_a_place_that_can_be_made_is_no_problem_and_stays_unmade(place):
    assert start_checks.place_problems("--workdir", place / "a" / "b") == []
    assert not (place / "a").exists() and start_checks.place_problems("--workdir", place) == []


def test_wandb_needs_its_package_and_an_account(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for name in ("WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(start_checks.importlib.util, "find_spec", lambda name: None)
    assert "needs the package wandb" in start_checks.wandb_problems("p")[0] and start_checks.wandb_problems("") == []
    monkeypatch.setattr(start_checks.importlib.util, "find_spec", lambda name: "here")
    assert "needs an account of api.wandb.ai; run `wandb login`" in start_checks.wandb_problems("p")[0]
    (place / ".netrc").write_text("machine api.wandb.ai login user password none\n")
    assert start_checks.wandb_problems("p") == []
    (place / ".netrc").unlink()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert start_checks.wandb_problems("p") == []


def test_a_platform_that_is_not_here(monkeypatch):
    def fails():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", fails)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(
        ValueError, match="JAX_PLATFORMS=cuda names what JAX finds no device of; unset it, set it to cpu"
    ):
        hardware.require_devices()


def test_a_metric_that_will_not_exist_is_told_with_those_that_will(tmp_path):
    c = tiny.config(tmp_path, tmp_path / "pairs.jsonl", train__keep_best="eval_foo")
    with pytest.raises(ValueError, match="train.keep_best='eval_foo' is no metric of this run; choose from eval_loss"):
        run_inputs.prepare(c, workdir=tmp_path / "run")  # the model is not even there


def test_a_job_that_was_refused_before_its_first_line_keeps_nobody_out(tmp_path):
    out = tmp_path / "answers.jsonl"
    jsonl_job.JobFile(out, {"model": "a"}, count=2)
    with jsonl_job.JobFile(out, {"model": "b"}, count=2) as job:
        job.append({"index": 0})
    assert json.loads((tmp_path / "answers.jsonl.job.json").read_text()) == {"model": "b"}
    with pytest.raises(ValueError, match="belongs to another job"):
        jsonl_job.JobFile(out, {"model": "a"}, count=2)
    shutil.rmtree(tmp_path)
