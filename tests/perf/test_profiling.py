"""Splits of wall time against a clock that the test turns, utilisation, and a trace of two steps."""

import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax import data, models
from fpo_jax.perf import profiler


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 10.0

    monkeypatch.setattr(profiler.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_the_parts_of_a_lap_sum_up(clock):
    split = profiler.Split("data", "device")
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
    split = profiler.Split("data")
    with split.part("data"):
        clock.now += 5
    split.restart()
    clock.now += 1
    assert split.lap() == {"seconds": 1.0, "data_seconds": 0.0, "host_seconds": 1.0}


CONFIG = models.ModelConfig(
    family="llama", vocab_size=11, width=4, layers=3, heads=2, kv_heads=1, head_dim=6, ffn=5, max_positions=9
)
NONE = np.zeros(2, int)
ROWS = data.RowSizes(
    np.array([3, 1]), NONE, sequence_tokens=4, completion_tokens=2, rows=4, length=5, scored=4
)  # two are filling


def forward(tokens, pairs, scored):
    """Operations by hand: query, key, value, out; gate, up, down; the two products of attention; the head."""
    weights = 3 * (4 * 12 + 2 * 4 * 6 + 12 * 4 + 3 * 4 * 5)
    return 2 * weights * tokens + 3 * 2 * (2 * 2 * 6) * pairs + 2 * 4 * 11 * scored


VALID, PADDED = forward(4, 6 + 1, 2), forward(20, 4 * 15, 16)


def test_rates_of_an_update_by_hand():
    rates = profiler.Meter(CONFIG, devices=2, peak=1e3).step(ROWS, seconds=0.5)
    assert rates == pytest.approx(
        {
            "valid_tokens_per_s": 8.0,
            "padded_tokens_per_s": 40.0,
            "padding_share": 0.8,
            "mfu_valid": 3 * VALID / (0.5 * 2 * 1e3),
            "mfu_padded": 3 * PADDED / (0.5 * 2 * 1e3),
        }
    )


def test_the_whole_counts_the_reference_pass_and_a_forward_pass_of_the_loss():
    meter = profiler.Meter(CONFIG, devices=1, peak=1e3, extra_forward=True)
    assert meter.reference([ROWS, ROWS], seconds=2.0)["mfu_valid"] == pytest.approx(2 * VALID / (2.0 * 1e3))
    meter.step(ROWS, seconds=1.0)
    assert meter.overall() == pytest.approx(
        {
            "run_seconds": 3.0,
            "run_mfu_valid": (2 + 4) * VALID / (3.0 * 1e3),
            "run_mfu_padded": (2 + 4) * PADDED / (3.0 * 1e3),
        }
    )


def test_a_device_of_unknown_peak_has_no_utilisation():
    meter = profiler.Meter(CONFIG, devices=8, peak=None)
    assert set(meter.step(ROWS, seconds=1.0)) == {"valid_tokens_per_s", "padded_tokens_per_s", "padding_share"}
    assert meter.overall() == {"run_seconds": 1.0}


def test_trace_covers_the_steps_asked_for(tmp_path):
    trace, seen = profiler.Trace(range(3, 5), tmp_path, last=6), []
    for number in range(1, 7):
        seen += ["begins"] * trace.begins(number)
        trace.before(number)
        jnp.ones(3).block_until_ready()
        seen.append(number)
        seen += ["ends"] * trace.ends(number)
        if trace.ends(number):
            trace.close()
    assert seen == [1, 2, "begins", 3, 4, "ends", 5, 6]
    assert list((tmp_path / profiler.FOLDER).rglob("*.xplane.pb"))
    trace.close()  # of no trace: nothing


def test_a_run_that_resumes_inside_the_range_traces_the_rest(tmp_path):
    trace = profiler.Trace(range(3, 6), tmp_path, last=9)
    assert trace.begins(4) and not trace.begins(6)
    assert not profiler.Trace(range(0), tmp_path, last=9).begins(1)


@pytest.mark.parametrize("steps", [range(0, 2), range(5, 9)])
def test_steps_that_the_run_does_not_have_are_refused(tmp_path, steps):
    with pytest.raises(ValueError, match=r"the run has 1 to 7; choose first:last within 1:8"):
        profiler.Trace(steps, tmp_path, last=7)
