"""Settings on the command line: every field that may be unset is set and unset, of a run and of every pipeline."""

import importlib
import subprocess
import sys

import pytest
from ml_collections import config_dict

from fpo_jax import config as configuration
from fpo_jax.config import overrides
from fpo_jax.configs.pipelines import common
from fpo_jax.eval.pipeline import sections
from tests.paths import REPO

RECIPES = sorted(path.stem for path in (REPO / "configs").glob("*.py"))
PIPELINES = sorted(path.stem for path in (REPO / "configs" / "pipelines").glob("*.py") if path.stem != "common")
VALUES = {int: ("3", 3), float: ("0.25", 0.25), bool: ("true", True), str: ("text", "text")}


def placeholders(config, prefix=""):
    """{dotted key: type} of the fields that may be unset: by default they are."""
    found = {}
    for key in config:
        if isinstance(config[key], config_dict.ConfigDict):
            found |= placeholders(config[key], f"{prefix}{key}.")
        elif config[key] is None:
            found[f"{prefix}{key}"] = config.get_type(key)
    return found


UNSET = placeholders(configuration.default())


def given(file, *settings):
    """The configuration of a command line, as train.py and fpo pipeline read it."""
    arguments = ["--config", str(REPO / "configs" / file), *(f"--config.{setting}" for setting in settings)]
    return overrides.parse(overrides.flag_values(arguments), arguments, keys="a file", about=None)


def both(file, keys):
    """The same fields set to a value of their type, and set and unset again."""
    texts = {key: VALUES[kind][0] for key, kind in keys.items()}
    return (
        given(file, *(f"{key}={text}" for key, text in texts.items())),
        given(file, *(f"{key}={text}" for key, text in texts.items()), *(f"{key}=None" for key in keys)),
    )


def test_the_fields_that_may_be_unset_are_known():
    assert {"mesh.tensor", "loss.beta", "loss.normalize", "data.row_length", "train.max_steps"} <= set(UNSET)
    assert set(UNSET.values()) <= set(VALUES) and "seed" not in UNSET


@pytest.mark.parametrize("name", RECIPES)
def test_every_field_of_a_run_is_set_and_unset(name):
    made, unset = both(f"{name}.py", UNSET)
    for key, kind in UNSET.items():
        assert configuration.value_at(made, key) == VALUES[kind][1], key
        assert configuration.value_at(unset, key) is None, key


@pytest.mark.parametrize("name", PIPELINES)
def test_every_field_of_a_pipeline_s_sections_is_set_and_unset(name):
    names = [section for section in ("sft", "reward", "align") if section in given(f"pipelines/{name}.py")]
    keys = {
        f"{section}.{key}": kind
        for section in names
        for key, kind in UNSET.items()
        if key not in {f"data.{row}" for row in common.ROWS}
    } | {"data.max_completion_length": int}
    made, unset = both(f"pipelines/{name}.py", keys)
    for key, kind in keys.items():
        assert configuration.value_at(made, key) == VALUES[kind][1], key
        assert configuration.value_at(unset, key) is None, key
    for section in names:
        whole = sections.whole(made[section], model="m", data=dict(made.data.items()), tokenizer=made.tokenizer)
        assert (whole.mesh.tensor, whole.loss.beta, whole.data.max_completion_length) == (3, 0.25, 3)
        assert whole.mesh.get_type("tensor") is int


def test_the_last_setting_counts():
    assert given("mistral_base.py", "loss.beta=None", "loss.beta=3").loss.beta == 3.0
    assert given("mistral_base.py", "loss.beta=3", "loss.beta=None").loss.beta is None
    assert given("mistral_base.py", "model.remat=none").model.remat == "none", "none is a word like another"


@pytest.mark.parametrize(
    "key", ["seed", "optim.learning_rate", "data.shuffle", "model.path", "logging.wandb_project", "train.keep_best"]
)
def test_a_field_that_always_has_a_value_takes_no_none(key):
    with pytest.raises(ValueError, match=rf"^config.{key}=None: this field always has a value; leave it out, or give"):
        given("mistral_base.py", f"{key}=None")


def test_two_configurations_share_no_field():
    one, other = (importlib.import_module("fpo_jax.configs.pipelines.hh_rw").get_config() for _ in range(2))
    one.align.mesh.tensor = 2
    assert (one.sft.mesh.tensor, one.reward.mesh.tensor, other.align.mesh.tensor) == (None, None, None)


@pytest.mark.sampled(8)
@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--config.align.mesh.tenser=2",
            "--config.align.mesh.tenser is no config field; did you mean --config.align.mesh.tensor?",
        ),
        ("--config.align.mesh.tensor=two", "'two' is not a whole number"),
        ("--config.align.train.batch_size=None", "config.align.train.batch_size=None: this field always has a value"),
        ("stray", "unexpected arguments"),
    ],
)
def test_command_line_errors_of_a_pipeline_are_one_sentence(option, message, tmp_path):
    command = [sys.executable, "-m", "eval.pipeline.pipeline", "--config", "configs/pipelines/hh_rw.py", option]
    done = subprocess.run([*command, "--workdir", str(tmp_path / "w")], cwd=REPO, capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1), done.stderr
    assert message in done.stderr and not (tmp_path / "w").exists()
