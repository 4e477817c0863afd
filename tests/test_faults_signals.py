"""Runs that are told to stop anywhere: they save once, exit with their own code, and go on as if nothing had been."""

import re
import signal

import pytest

from tests import crash_site, faults
from tests.crash_site import LAST, saved, stop


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with crash_site.opened(tmp_path_factory.mktemp("site")) as found:
        yield found


# phase -> the point and its call, and the step that is saved, None for none
STOPS = {
    "data": (stop("data", 1), None),
    "data, the second set": (stop("data", 2), None),
    "weights": (stop("load", 1), None),
    "compiling the reference pass": (stop("compile", 1), None),
    "compiling the evaluation": (stop("compile", 2), None),
    "compiling the update": (stop("compile", 3), 1),
    "reference pass": (stop("reference", 1), None),
    "reference written": (stop("reference written", 2), None),
    "evaluation before the first update": (stop("evaluation", 1), None),
    "first update": (stop("update", 1), 1),
    "update": (stop("update", 4), 4),
    "update before an evaluation": (stop("update", 3), 3),
    "last update": (stop("update", 6), 6),
    "evaluation": (stop("evaluation", 2), 3),
    "last evaluation": (stop("evaluation", 3), 6),
    "save": (stop("save", 1), 2),
    "another save": (stop("save", 2), 4),
}


@pytest.mark.faults  # a minute
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("phase", STOPS)
def test_a_signal_in_any_phase_saves_once_and_exits_with_75(site, tmp_path, phase, number):
    fault, expected = STOPS[phase]
    code, said = site.train(tmp_path / "w", fault | {"signal": number})
    context = f"{phase}; {faults.replay('signal_in_any_phase')}\n{said}"
    assert code == 75 and "Traceback" not in said, context
    assert saved(tmp_path / "w")[-1:] == ([] if expected is None else [expected]), context
    assert said.count("saved step") == (expected is not None), context
    assert said.count("train.py: " + number.name) == 1, context
    begun = [update for update, _ in faults.trained(tmp_path / "w")]
    assert begun == list(range(1, (expected or 0) + 1)), context
    site.finish(tmp_path / "w", context)


@pytest.mark.faults  # two minutes
def test_a_signal_at_a_random_moment_saves_within_one_update(site, tmp_path):
    stopped, moments = 0, faults.trials(66)
    for number in range(moments):
        random, workdir = faults.draws("stop", number), tmp_path / str(number)
        point = random.choice(list(LAST))
        fault = stop(point, random.randint(1, LAST[point]), delay=random.uniform(0, 0.2))
        code, said = site.train(workdir, fault)
        context = f"moment {number}, {fault}; {faults.replay('random_moment')}\n{said}"
        assert code in (0, 75) and "Traceback" not in said, context
        stopped += code == 75
        begun = [update for update, _ in faults.trained(workdir)]
        assert begun == list(range(1, len(begun) + 1)) and saved(workdir)[-1:] == begun[-1:], context
        if number % 6 == 0:  # most phases of the test above go on to the end
            site.finish(workdir, context)
    assert stopped >= moments // 2
    print(f"{stopped} of {moments} runs stopped")


@pytest.mark.faults
@pytest.mark.parametrize(("point", "count"), [("compile", 3), ("update", 4), ("evaluation", 2), ("save", 2)])
def test_a_second_signal_ends_the_run_at_once_and_says_what_is_lost(site, tmp_path, point, count):
    code, said = site.train(tmp_path / "w", stop(point, count, times=2))
    newest = re.search(r"SIGTERM, the second signal: ended at once. (?:The newest .* step (\d)|.*no complete)", said)
    assert code == 128 + signal.SIGTERM and newest, said
    assert saved(tmp_path / "w")[-1:] == ([int(newest[1])] if newest[1] else [])
    site.finish(tmp_path / "w", said)
