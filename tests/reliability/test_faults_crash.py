"""Programs killed or told to stop anywhere: what is left can be read, goes on, and ends as if nothing had been."""

import json
import pkgutil
import re
import signal

import pytest

from tests import crash_site, faults
from tests.answer_server import AnswerServer
from tests.crash_site import LAST, PROMPTS, SAVE_EVERY, saved, stop, weights


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    root = tmp_path_factory.mktemp("site")
    with faults.Zygote(root / "compiled") as zygote:
        yield crash_site.Site(root, zygote)


@pytest.mark.parametrize("point", faults.POINTS)
def test_a_point_where_a_run_can_be_struck_is_there(point):
    """The quick suite notices a function that has another name now."""
    assert callable(pkgutil.resolve_name(faults.POINTS[point]))


def killing(random, site, workdir):
    """Where a run is killed: before an operation on its files, in a phase, or whenever."""
    kind = random.choice(["file", "file", "point", "time"])
    if kind == "file":
        return {"folder": str(workdir), "count": random.randint(1, site.operations), "signal": signal.SIGKILL}
    if kind == "time":
        return {"delay": random.uniform(0, site.seconds), "signal": signal.SIGKILL}
    point = random.choice(list(LAST))
    return stop(point, random.randint(1, LAST[point]), signal.SIGKILL, delay=random.uniform(0, 0.05))


@pytest.mark.faults  # a minute each
@pytest.mark.parametrize("async_save", [True, False])
def test_a_run_killed_anywhere_ends_as_an_uninterrupted_one(site, tmp_path, async_save):
    """A kill costs one interval between saves; one more where a save may be under way beside the steps."""
    costs = SAVE_EVERY * (1 + async_save)
    killed, number, wanted = 0, 0, faults.trials(40)
    while killed < wanted:
        random, workdir, described = faults.draws(f"kill {async_save}", number), tmp_path / str(number), []
        for _ in range(6):
            fault = killing(random, site, workdir)
            code, said = site.train(workdir, fault, async_save=async_save)
            described.append((code, fault))
            context = f"run {number}, {described}; {faults.replay('killed_anywhere')}"
            assert code in (0, -signal.SIGKILL), f"{context}\n{said}"
            killed += code == -signal.SIGKILL
            steps = saved(workdir)
            begun = max((number for number, _ in faults.trained(workdir)), default=0)
            assert (steps[-1] if steps else 0) >= begun - costs, context
            for step in steps:
                assert weights(workdir, step) == site.weights[step], f"{context}: step {step}"
            if code == 0:
                break
        site.finish(workdir, context)
        number += 1
    print(f"{killed} kills in {number} runs")


# --- answers and judgements


def generate(site, out, fault=None):
    options = {"--model": site.root / "model", "--data": site.root / "prompts.jsonl", "--out": out}
    options |= {"--max-new-tokens": 5, "--batch-size": 2, "--compute-dtype": "float32", "--max-length": 32}
    command = [part for pair in options.items() for part in pair]
    return site.zygote.run("fpo_jax.cli.generate", command, site.root / "log", fault)


@pytest.mark.faults  # half a minute
def test_answers_killed_or_stopped_anywhere_are_those_of_one_start(site, tmp_path):
    code, said = generate(site, tmp_path / "whole.jsonl")
    assert code == 0, said
    killed, number, wanted = 0, 0, faults.trials(40)
    while killed < wanted:
        random, out = faults.draws("generate", number), tmp_path / f"{number}.jsonl"
        for _ in range(6):
            how = random.choice([signal.SIGKILL] * 4 + [signal.SIGTERM])
            fault = stop("generate", random.randint(1, 4), how, delay=random.choice([0, random.uniform(0, 0.02)]))
            if random.random() < 0.4:
                fault = {"folder": str(out), "count": random.randint(1, 8), "signal": how}
            code, said = generate(site, out, fault)
            context = f"file {number}, {fault}; {faults.replay('answers_killed')}\n{said}"
            assert code in (0, 75, -signal.SIGKILL) or (code == -signal.SIGTERM and out.exists()), context
            killed += code == -signal.SIGKILL
            if out.exists():  # a signal may come when all is done
                break
        assert generate(site, out)[0] == 0, context
        assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes(), context
        assert not out.with_name(out.name + ".part").exists(), context
        number += 1
    print(f"{killed} kills, {number} files")


@pytest.mark.faults  # half a minute
def test_judgements_killed_or_stopped_anywhere_ask_only_for_what_is_missing(site, tmp_path):
    lines = [{"prompt": f"q{i}", "completions": [f"{i} longer"]} for i in range(PROMPTS)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(line | {"completions": ["x"]}) + "\n" for line in lines))
    workers = 2

    def longer(question):
        answers = re.findall(r"BEGIN ANSWER [AB] \w+\n(.*?)\nEND", question, re.DOTALL)
        return f"Verdict: {'A' if len(answers[0]) > len(answers[1]) else 'B'}"

    server = AnswerServer(lambda number, body: None, longer)
    with server.served():

        def judge(out, fault=None):
            options = {"--candidate": tmp_path / "a.jsonl", "--baseline": tmp_path / "b.jsonl", "--out": out}
            options |= {"--template": "helpful", "--server": server.url, "--server-model": "m"}
            command = [part for pair in (options | {"--concurrency": workers}).items() for part in pair]
            return site.zygote.run("fpo_jax.eval.judge.winrate", command, site.root / "log", fault)

        assert judge(tmp_path / "whole")[0] == 0
        killed, number, wanted = 0, 0, faults.trials(80)
        while killed < wanted:
            random, out = faults.draws("judge", number), tmp_path / str(number)
            store, starts, server.bodies = out / "replies.jsonl", 0, []
            for _ in range(6):
                how = random.choice([signal.SIGKILL] * 4 + [signal.SIGTERM])
                fault = stop("judge", random.randint(1, 6), how, delay=random.choice([0, random.uniform(0, 0.02)]))
                if random.random() < 0.3:
                    fault = {"folder": str(out), "count": random.randint(1, 6), "signal": how}
                code, said = judge(out, fault)
                context = f"folder {number}, {fault}; {faults.replay('judgements_killed')}\n{said}"
                done = (out / "summary.json").exists()
                assert code in (0, 75, -signal.SIGKILL) or (code == -signal.SIGTERM and done), context
                killed, starts = killed + (code == -signal.SIGKILL), starts + (code != 0)
                if done:
                    break
            code, said = judge(out)
            assert code == 0, f"{context}\n{said}"
            for name in ("summary.json", "verdicts.jsonl"):
                assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), context
            keys = [json.loads(line)["key"] for line in store.read_text().splitlines()]
            assert len(keys) == len(set(keys)) == 2 * PROMPTS, context
            # Lost are only the replies that a struck start had under way, or in hand and not yet written.
            assert len(server.bodies) <= 2 * PROMPTS + starts * 2 * workers, context
            number += 1
    print(f"{killed} kills, {number} folders")


# --- told to stop

# phase -> the point and its call, and the step that is saved, None for none
STOPS = {
    "data": (stop("data", 1), None),
    "data, the second set": (stop("data", 2), None),
    "weights": (stop("load", 1), None),
    "compiling the reference pass": (stop("compile", 1), None),
    "compiling the evaluation": (stop("compile", 2), None),
    "compiling the step": (stop("compile", 3), 1),
    "reference pass": (stop("reference", 1), None),
    "reference written": (stop("reference written", 2), None),
    "evaluation before the first step": (stop("evaluation", 1), None),
    "first step": (stop("step", 1), 1),
    "step": (stop("step", 4), 4),
    "step before an evaluation": (stop("step", 3), 3),
    "last step": (stop("step", 6), 6),
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
    if number == signal.SIGTERM:  # both signals have left the same by now
        site.finish(tmp_path / "w", context)


@pytest.mark.faults  # a minute
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
@pytest.mark.parametrize(("point", "count"), [("compile", 3), ("step", 4), ("evaluation", 2), ("save", 2)])
def test_a_second_signal_ends_the_run_at_once_and_says_what_is_lost(site, tmp_path, point, count):
    code, said = site.train(tmp_path / "w", stop(point, count, times=2))
    newest = re.search(r"SIGTERM, the second signal: ended at once. (?:The newest .* step (\d)|.*no complete)", said)
    assert code == 128 + signal.SIGTERM and newest, said
    assert saved(tmp_path / "w")[-1:] == ([int(newest[1])] if newest[1] else [])
    site.finish(tmp_path / "w", said)
