"""Splits of wall time against a clock that the test turns, utilisation, and a trace of two updates."""

import jax.numpy as jnp
import pytest

from fpo_jax import profiling


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 10.0

    monkeypatch.setattr(profiling.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_the_parts_of_a_lap_sum_up(clock):
    split = profiling.Split("data", "device")
    clock.now += 1
    with split.part("data"):
        clock.now += 2
    with split.part("device"):
        clock.now += 4
    with split.part("data"):
        clock.now += 8
    lap = split.lap()
    assert lap == {"seconds": 15.0, "data_seconds": 10.0, "device_seconds": 4.0, "host_seconds": 1.0}
    clock.now += 3
    assert split.lap() == {"seconds": 3.0, "data_seconds": 0.0, "device_seconds": 0.0, "host_seconds": 3.0}


def test_a_restart_forgets_the_lap(clock):
    split = profiling.Split("data")
    with split.part("data"):
        clock.now += 5
    split.restart()
    clock.now += 1
    assert split.lap() == {"seconds": 1.0, "data_seconds": 0.0, "host_seconds": 1.0}


def test_utilisation_of_an_unknown_device_is_unknown():
    assert profiling.utilisation(1e12, seconds=1.0, devices=8, peak=None) is None
    assert profiling.utilisation(1e12, seconds=1.0, devices=4, peak=1e12) == 0.25


def test_trace_covers_the_updates_asked_for(tmp_path):
    trace, traced = profiling.Trace(range(3, 5), tmp_path), []
    for number in range(1, 7):
        if trace.begins(number):
            trace.start()
            traced.append(f"start {number}")
        jnp.ones(3).block_until_ready()
        if trace.ends(number):
            trace.stop()
            traced.append(f"stop {number}")
    assert traced == ["start 3", "stop 4"]
    assert list((tmp_path / profiling.FOLDER).rglob("*.xplane.pb"))
    trace.stop()  # of no trace: nothing


def test_a_run_that_resumes_inside_the_range_traces_the_rest(tmp_path):
    trace = profiling.Trace(range(3, 6), tmp_path)
    assert trace.begins(4) and not trace.begins(6)
    assert not profiling.Trace(range(0), tmp_path).begins(1)
