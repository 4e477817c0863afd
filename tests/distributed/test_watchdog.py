"""The watchdog: what it measures by, what it leaves alone, and how a run that hangs ends."""

import os
import signal
import subprocess
import sys
import threading
import time
import types

import pytest

from fpo_jax import config
from fpo_jax.distributed import watchdog
from fpo_jax.trainer import callbacks
from tests.paths import REPO


@pytest.fixture
def ended(monkeypatch):
    """Times at which a watch would have ended the run."""
    found = []

    def end(watch):
        found.append(watch.still_s)
        watch.over.set()

    monkeypatch.setattr(watchdog._Watch, "end", end)
    monkeypatch.setattr(watchdog, "TICK_S", 0.05)
    return found


def wait(condition, timeout=30):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_limit_is_a_multiple_of_the_slowest_update_with_a_floor_or_what_is_set(tmp_path):
    with watchdog.watching(None, tmp_path):
        watch = watchdog._watch
        assert watch.limit_s() == watchdog.FLOOR_S
        watchdog.measured(100.0)
        watchdog.measured(7.0)
        assert watch.limit_s() == 20 * 100.0
        with watchdog.unhurried(watchdog.SAVE_S):
            assert watch.limit_s() == watchdog.SAVE_S
            with watchdog.unhurried():
                assert watch.limit_s() == float("inf")
        assert watch.limit_s() == 20 * 100.0
    with watchdog.watching(9, tmp_path), watchdog.unhurried(watchdog.SAVE_S):
        assert watchdog._watch.limit_s() == 9
    with watchdog.watching(0, tmp_path):
        assert watchdog._watch is None
        watchdog.moved()  # and nothing else is done


def test_what_does_not_move_ends_and_what_moves_or_may_take_its_time_does_not(ended, tmp_path):
    with watchdog.watching(1, tmp_path):
        time.sleep(1.3)  # nothing has moved yet, so nothing is expected to
        with watchdog.unhurried():
            watchdog.moved()
            time.sleep(1.3)
        for _ in range(13):
            watchdog.moved()
            time.sleep(0.1)
        assert not ended
        wait(lambda: ended)
    assert 1 < ended[0] < 5


def test_callbacks_of_a_user_may_take_their_time(tmp_path):
    limits = []

    class Any:
        def __getattr__(self, event):
            return lambda *_: limits.append(watchdog._watch.limit_s())

    with watchdog.watching(9, tmp_path):
        callbacks.Run.call(types.SimpleNamespace(callbacks=(Any(),), extra=(Any(),)), "on_save", 3)
    assert limits == [9, float("inf")]


def test_a_time_below_nothing_is_refused():
    c = config.default()
    c.train.hang_timeout = -1
    assert any("train.hang_timeout=-1 must be finite and at least 0" in problem for problem in config.problems(c))


def test_words_of_the_summary():
    assert watchdog.in_words(None).startswith("watchdog: a run in which nothing moves for 20 times its slowest step")
    assert "for 90 s shows its stacks and ends with exit code 70" in watchdog.in_words(90)
    assert "off (train.hang_timeout=0)" in watchdog.in_words(0)


HANGING = """
import sys, threading
from pathlib import Path
from fpo_jax.distributed import watchdog
with watchdog.watching(2, Path(sys.argv[1])):
    watchdog.moved()
    print("armed", flush=True)
    def where_it_hangs(): threading.Event().wait()
    where_it_hangs()
"""


def test_a_run_of_one_process_ends_with_70_and_shows_where_it_is(tmp_path):
    """A process that is stopped has not hung: its time does not count."""
    (tmp_path / "12").mkdir()
    command = [sys.executable, "-c", HANGING, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=REPO, **pipes) as process:
        assert process.stdout.readline() == "armed\n"
        process.send_signal(signal.SIGSTOP)
        threading.Timer(4.0, os.kill, [process.pid, signal.SIGCONT]).start()
        os.waitid(os.P_PID, process.pid, os.WCONTINUED | os.WNOWAIT)
        continued = time.monotonic()
        said = process.communicate(timeout=60)[1]
        assert time.monotonic() - continued > 0.5
    assert process.returncode == 70, said
    assert "in where_it_hangs" in said and "nothing moved for" in said
    assert said.strip().endswith("step 12; the same command on every host goes on from there.")
