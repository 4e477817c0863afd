"""run.log: every line with its time, appended, bounded, and nothing in it that a terminal obeys."""

import io
import logging
import re
import sys

import pytest

from fpo_jax.io import run_log, terminal

log = logging.getLogger("fpo_jax")
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z "


@pytest.fixture(autouse=True)
def _logging_as_before(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(logging.getLogger(), "handlers", list(logging.getLogger().handlers))
    log.setLevel("INFO")
    yield
    log.setLevel("NOTSET")


def lines(path):
    return path.read_text().split("\n")[:-1]


def test_lines_have_times_and_a_later_start_appends(tmp_path):
    path, collector = tmp_path / run_log.FILE, run_log.Collector()
    with collector.collecting():
        log.info("before there is a folder")
    log.info("nobody takes this")
    with run_log.written(path, collector):
        log.info("first start")
        logging.getLogger("other").warning("a library's")
    with run_log.written(path, collector):
        log.info("second start")
    expected = ["fpo_jax: before there is a folder", "fpo_jax: first start", "WARNING other: a library's"]
    for line, end in zip(lines(path), [*expected, "fpo_jax: second start"], strict=True):
        assert re.fullmatch(TIME + re.escape(end), line), line


def test_no_line_is_obeyed_by_a_terminal(tmp_path):
    with run_log.written(tmp_path / run_log.FILE, run_log.Collector()):
        logging.getLogger("other").warning("\x1b[2J\u202e")
    assert lines(tmp_path / run_log.FILE)[0].endswith(r"WARNING other: \x1b[2J\u202e")


def test_an_error_is_the_last_line(tmp_path):
    with pytest.raises(ValueError, match="no more"), run_log.written(tmp_path / run_log.FILE, run_log.Collector()):
        raise ValueError("no more\x1b")
    assert lines(tmp_path / run_log.FILE)[0].endswith(r"ERROR fpo_jax: ended by ValueError: no more\x1b")


def test_the_file_is_bounded_and_the_lines_before_are_kept_once(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "KEPT_BYTES", 2_000)
    with run_log.written(tmp_path / run_log.FILE, run_log.Collector()):
        for number in range(200):
            log.info("line %d of many", number)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [run_log.FILE, f"{run_log.FILE}.1"]
    assert all(path.stat().st_size <= 2_000 for path in tmp_path.iterdir())
    kept = [*lines(tmp_path / f"{run_log.FILE}.1"), *lines(tmp_path / run_log.FILE)]
    assert kept[-1].endswith("line 199 of many") and len(kept) > 30


def test_a_full_disk_is_told_once_and_ends_nothing(tmp_path, capsys):
    with run_log.written(tmp_path / run_log.FILE, run_log.Collector()):
        [file] = [one for one in logging.getLogger().handlers if isinstance(one, run_log.RunLog)]
        file.stream.close()
        file.stream = open("/dev/full", "w")
        log.info("lost")
        log.info("lost too")
    said = capsys.readouterr().err
    assert said.count("cannot be written; its lines are lost") == 1 and "Traceback" not in said


def test_details_are_for_the_file_and_not_for_the_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    terminal.log_to_stderr()
    with run_log.written(tmp_path / run_log.FILE, run_log.Collector()):
        log.info("the whole", extra=terminal.DETAIL)
        log.info("the summary")
    assert sys.stderr.getvalue() == "the summary\n"
    assert [line.split(": ")[1] for line in lines(tmp_path / run_log.FILE)] == ["the whole", "the summary"]


def test_warnings_still_reach_the_terminal_where_nobody_set_up_logging(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with run_log.written(tmp_path / run_log.FILE, run_log.Collector()):
        log.warning("look")
        log.info("not this")
    assert capsys.readouterr().err == "look\n"
    assert logging.getLogger().handlers == []
