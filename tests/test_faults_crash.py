"""Programs that are killed anywhere: what is left can be read, goes on, and ends as if nothing had been."""

import json
import re
import signal

import pytest

from tests import crash_site, faults
from tests.answer_server import AnswerServer
from tests.crash_site import LAST, PROMPTS, SAVE_EVERY, saved, stop, weights


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with crash_site.opened(tmp_path_factory.mktemp("site")) as found:
        yield found


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
    """A kill costs one interval between saves; one more where a save may be under way beside the updates."""
    costs = SAVE_EVERY * (1 + async_save)
    killed, number, wanted = 0, 0, faults.trials(40)
    while killed < wanted:
        random, workdir, told = faults.draws(f"kill {async_save}", number), tmp_path / str(number), []
        for _ in range(6):
            fault = killing(random, site, workdir)
            code, said = site.train(workdir, fault, async_save=async_save)
            told.append((code, fault))
            context = f"run {number}, {told}; {faults.replay('killed_anywhere')}"
            assert code in (0, -signal.SIGKILL), f"{context}\n{said}"
            killed += code == -signal.SIGKILL
            steps = saved(workdir)
            begun = max((number for number, _ in faults.trained(workdir)), default=0)
            assert (steps[-1] if steps else 0) >= begun - costs, context
            for step in steps:
                assert weights(workdir, step) == site.weights[step], f"{context}: step {step}"
        site.finish(workdir, context)
        number += 1
    print(f"{killed} kills in {number} runs")


# --- answers and judgements


def generate(site, out, fault=None):
    options = {"--model": site.root / "model", "--data": site.root / "prompts.jsonl", "--out": out}
    options |= {"--max-new-tokens": 5, "--batch-size": 2, "--compute-dtype": "float32", "--max-length": 32}
    command = [part for pair in options.items() for part in pair]
    return site.zygote.run("eval.generate", command, site.root / "log", fault)


@pytest.mark.faults  # half a minute
def test_answers_killed_or_stopped_anywhere_are_those_of_one_start(site, tmp_path):
    code, said = generate(site, tmp_path / "whole.jsonl")
    assert code == 0, said
    killed, number, wanted = 0, 0, faults.trials(40)
    while killed < wanted:
        random, out = faults.draws("generate", number), tmp_path / f"{number}.jsonl"
        for _ in range(3):
            how = random.choice([signal.SIGKILL] * 4 + [signal.SIGTERM])
            fault = stop("generate", random.randint(1, PROMPTS), how, delay=random.choice([0, random.uniform(0, 0.02)]))
            if random.random() < 0.4:
                fault = {"folder": str(out), "count": random.randint(1, 8), "signal": how}
            code, said = generate(site, out, fault)
            context = f"file {number}, {fault}; {faults.replay('answers_killed')}\n{said}"
            assert code in (0, 75, -signal.SIGKILL), context
            killed += code == -signal.SIGKILL
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
            return site.zygote.run("eval.winrate", command, site.root / "log", fault)

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
                assert code in (0, 75, -signal.SIGKILL), context
                killed, starts = killed + (code == -signal.SIGKILL), starts + (code != 0)
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
