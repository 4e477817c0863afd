"""The `fpo` command: its programs are there, recipes have names, and the page of fields is the one in docs/."""

import subprocess
import sys

import pytest

import fpo_jax
from fpo_jax.cli import __main__ as fpo
from fpo_jax.cli import config as config_program
from fpo_jax.config import fields, overrides
from tests.paths import REPO


def ran(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "fpo_jax.cli", *arguments], cwd=REPO, capture_output=True, text=True, **options
    )


@pytest.mark.parametrize("name", fpo.PROGRAMS)
def test_every_program_has_a_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fpo", name, "--help"])
    with pytest.raises(SystemExit) as end:
        fpo.main()
    said = capsys.readouterr().out.strip()
    assert end.value.code == 0 and said and "PosixPath" not in said and "default ''" not in said


def test_an_unknown_program_is_refused_with_those_there_are():
    done = ran("trian")
    assert done.returncode == 2 and done.stderr.startswith(
        "fpo: 'trian' is not one of init, train, plan, config, export"
    )
    assert all(name in ran("--help").stdout for name in fpo.PROGRAMS)
    assert ran("--version").stdout == f"fpo_jax {fpo_jax.__version__}\n"


def test_the_page_of_fields_is_that_of_the_table():
    page = (REPO / "docs" / "config.md").read_text()
    assert page == fields.page(), "run fpo config --markdown > docs/config.md"
    assert all(f"| `{field.name}` | {field.kind.__name__} |" in page for field in fields.FIELDS)


def test_fields_are_found_by_a_word(capsys):
    assert config_program.main(["mesh.fs"]) == 0
    assert capsys.readouterr().out == "mesh.fsdp  int, unset\n    Devices along fsdp: parameters are sharded.\n"
    assert config_program.main(["mush"]) == 2
    assert capsys.readouterr().err == "config: no field has mush in its name; `fpo config` prints all.\n"


def test_every_default_is_of_its_type_and_among_its_choices():
    for field in fields.FIELDS:
        assert field.default is None or type(field.default) is field.kind, field
        assert not field.choices or field.default in field.choices, field
        assert field.about.endswith("."), field


def test_a_recipe_is_found_by_its_name_and_by_its_file():
    by_name = fpo_jax.load_config("mistral_base:sigmoid", ["loss.beta=3", "mesh.tensor=2"])
    by_file = fpo_jax.load_config(f"{REPO / 'configs' / 'mistral_base.py'}:sigmoid", ["loss.beta=3", "mesh.tensor=2"])
    assert by_name.to_dict() == by_file.to_dict() and (by_name.loss.name, by_name.loss.beta) == ("sigmoid", 3.0)
    assert {"mistral_base", "pipelines/hh_rw"} <= set(overrides.recipes())


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        (
            "mistral_bse",
            [],
            "--config=mistral_bse is neither a file nor one of imdb_reward, .*; did you mean mistral_base",
        ),
        ("mistral_base", ["loss.bta=3"], "did you mean --config.loss.beta"),
        ("mistral_base", ["seed=None"], "this field always has a value"),
    ],
)
def test_what_is_no_configuration_is_refused_with_one_sentence(recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        fpo_jax.load_config(recipe, changes)


def test_the_package_has_no_other_names():
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        fpo_jax.trian  # noqa: B018
    assert all(getattr(fpo_jax, name) for name in fpo_jax.__all__)


def test_no_library_warns_that_what_is_not_used_is_not_there():
    """In the process and in those that it starts: torch is kept out on purpose."""
    code = (
        "import subprocess, sys\nfrom fpo_jax.cli import process\nprocess.without_torch()\nimport transformers\n"
        "subprocess.run([sys.executable, '-c', \"import sys; sys.modules['torch'] = None; import transformers\"])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
