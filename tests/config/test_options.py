"""Command lines from dataclasses, and the exit codes that the programs of eval/ share."""

import dataclasses
import logging
from pathlib import Path

import pytest

from fpo_jax.cli import args
from fpo_jax.distributed import preemption


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    out: Path
    count: int = 3
    stops: tuple[str, ...] = ()
    quick: bool = False


def run(work, *arguments):
    return args.run(Job, work, arguments, program="fpo job", about="what it does")


def test_fields_are_options():
    seen = []
    assert run(lambda job: seen.append(job) or 1, "--out", "x", "--stops", "a", "b", "--quick") == 1
    assert run(lambda job: seen.append(job) or 0, "--out", "x", "--count", "5") == 0
    assert seen == [Job(out=Path("x"), stops=("a", "b"), quick=True), Job(out=Path("x"), count=5)]


@pytest.mark.parametrize(("error", "code"), [(ValueError("no way"), 2), (preemption.Stopped("SIGTERM: saved"), 75)])
def test_what_goes_wrong_is_one_line_and_an_exit_code(error, code, capsys):
    def work(job):
        raise error

    assert run(work, "--out", "x") == code
    assert capsys.readouterr().err == f"job: {error}\n"


def test_the_log_is_plain_lines_on_stderr(capsys):
    assert run(lambda job: logging.getLogger("fpo_jax").info("told") or 0, "--out", "x") == 0
    assert capsys.readouterr().err == "told\n"


def test_a_fault_of_ours_is_not_hidden():
    with pytest.raises(KeyError):
        run(lambda job: {}["x"], "--out", "x")
