"""Progress bars: on a terminal alone, whole under log lines, and where a program sends them."""

import io
import logging
import re
import sys

import pytest

from fpo_jax.distributed import process, progress
from fpo_jax.io import terminal


class Terminal(io.StringIO):
    """Keeps what is drawn."""

    def isatty(self):
        return True


@pytest.fixture
def begin(monkeypatch):
    """A function that gives the program a terminal; called in the test, as pytest puts its own in between."""

    def start():
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setattr(progress, "_DELAY_S", 0.0)
        terminal.log_to_stderr()
        return sys.stderr

    yield start
    logging.getLogger("fpo_jax").setLevel("NOTSET")


def test_a_log_line_never_stands_in_a_bar(begin):
    tty = begin()
    log = logging.getLogger("fpo_jax")
    with progress.bar(title="loading weights", total=3, unit="tensor", kept=True) as bar:
        for number in range(3):
            log.info("line %d", number)
            bar.update()
    found = re.split(r"[\r\n]", tty.getvalue())
    assert [line for line in found if line.startswith("line")] == ["line 0", "line 1", "line 2"]
    assert all("line" not in line or line.startswith("line") for line in found), found
    assert any("100%" in line and "3/3" in line for line in found)


def test_a_bar_of_passing_work_goes_again(begin):
    tty = begin()
    assert list(progress.bar(range(3), "tokenising", total=3, unit="chunk")) == [0, 1, 2]
    assert "tokenising" in tty.getvalue() and tty.getvalue().rstrip(" ").endswith("\r")


def test_nothing_is_drawn_without_a_terminal_and_by_other_processes(begin, monkeypatch):
    tty = begin()
    monkeypatch.setattr(process, "process_index", lambda: 1)
    list(progress.bar(range(3), "x", unit="y", kept=True))
    monkeypatch.setattr(process, "process_index", lambda: 0)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    list(progress.bar(range(3), "x", unit="y", kept=True))
    assert not sys.stderr.getvalue() and not tty.getvalue() and not progress.shown()


def test_bars_stay_on_the_terminal_while_the_standard_error_goes_to_a_file(begin, monkeypatch):
    tty = begin()
    with progress.drawn_on(tty):
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        assert progress.shown()
        list(progress.bar(range(3), "exporting", unit="tensor", kept=True))
        assert "exporting" in tty.getvalue() and not sys.stderr.getvalue()
    assert not progress.shown()
