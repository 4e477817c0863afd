"""Runs that are killed or told to stop anywhere: what is left can be read, goes on, and ends as if nothing had been."""

import json
import re
import signal
import time

import jax
import numpy as np
import pytest

from fpo_jax import checkpoint, metrics
from tests import faults, tiny
from tests.answer_server import AnswerServer

STEPS, SAVE_EVERY, PAIRS = 6, 2, 12
PROMPTS = 8


class Site:
    """A tiny run, and what it is when nothing strikes it."""

    def __init__(self, root, zygote):
        self.root, self.zygote = root, zygote
        tiny.write_model(root / "model", layers=1)
        tiny.write_pairs(root / "pairs.jsonl", count=PAIRS)
        (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{i} ab?"}) + "\n" for i in range(PROMPTS)))
        whole = root / "whole"
        for folder in (root / "first", whole):  # the first leaves the executables
            code, said = self.train(folder, {"folder": str(folder), "count": 10**9}, keep_checkpoints=STEPS)
            assert code == 0, said
        started = time.monotonic()
        assert self.train(root / "again")[0] == 0
        self.seconds = time.monotonic() - started
        self.operations = int(re.findall(r"came by (\d+) times", said)[-1])
        self.metrics = (whole / metrics.METRICS_FILE).read_bytes()
        self.weights = {step: weights(whole, step) for step in range(SAVE_EVERY, STEPS + 1, SAVE_EVERY)}
        self.groups = dict(faults.trained(whole))

    def train(self, workdir, fault=None, *, keep_checkpoints=2):
        """Start train.py; return its exit code and what it said."""
        workdir.mkdir(exist_ok=True)
        options = {
            "model.path": self.root / "model", "data.train": self.root / "pairs.jsonl",
            "data.eval": self.root / "pairs.jsonl", "data.format": "json", "data.hh_split": "last_turn",
            "data.subfolder": "", "data.train_split": "", "data.eval_split": "", "data.max_length": 40,
            "data.max_response_length": 16, "model.compute_dtype": "float32", "optim.learning_rate": 3e-3,
            "train.batch_size": 4, "train.micro_batch_per_device": 2, "train.epochs": STEPS * 4 / PAIRS,
            "train.save_every": SAVE_EVERY, "train.eval_every": 3, "train.eval_batch_per_device": 3,
            "train.keep_checkpoints": keep_checkpoints, "logging.tensorboard": False,
        }  # fmt: skip
        flags = [f"--config.{key}={value}" for key, value in options.items()]
        command = ["--config", "configs/pythia_hh_pref.py", "--workdir", workdir, *flags]
        return self.zygote.run("train", command, self.root / "log", fault)

    def finish(self, workdir, context):
        """Start it again without a fault: it ends as the uninterrupted run did."""
        code, said = self.train(workdir)
        assert code == 0, f"{context}\n{said}"
        assert (workdir / metrics.METRICS_FILE).read_bytes() == self.metrics, context
        assert weights(workdir, STEPS) == self.weights[STEPS], context
        effective = dict(faults.trained(workdir))  # a number's last start is the one that counts
        assert effective == self.groups, context
        for epoch in range(2):
            ids = [one for number in range(3 * epoch + 1, 3 * epoch + 4) for one in effective[number]]
            assert sorted(ids) == list(range(PAIRS)), f"{context}: an example is lost or repeated"
        assert not list(workdir.rglob("*.tmp")) and not list(workdir.rglob("*tmp-*")), context


def weights(workdir, step):
    """Digest of a checkpoint's weights."""
    found, _ = checkpoint.restore_params(workdir, step)
    return faults.digest([np.asarray(leaf) for leaf in jax.tree.leaves(found)])


def saved(workdir):
    """Steps of the committed checkpoints, ascending."""
    return sorted(int(path.name) for path in (workdir / checkpoint.FOLDER).glob("*") if path.name.isdigit())


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    root = tmp_path_factory.mktemp("site")
    with faults.Zygote(root / "compiled") as zygote:
        yield Site(root, zygote)


def killing(random, site, workdir):
    """Where a run is killed: before an operation on its files, in a phase, or whenever."""
    kind = random.choice(["file", "file", "point", "time"])
    if kind == "file":
        return {"folder": str(workdir), "count": random.randint(1, site.operations), "signal": signal.SIGKILL}
    if kind == "time":
        return {"delay": random.uniform(0, site.seconds), "signal": signal.SIGKILL}
    last = {"data": 2, "load": 1, "reference": 2, "reference written": 2, "update": STEPS, "evaluation": 3, "save": 3}
    point = random.choice(list(last))
    delay = random.uniform(0, 0.05)
    return {"point": point, "count": random.randint(1, last[point]), "delay": delay, "signal": signal.SIGKILL}


@pytest.mark.faults  # some minutes
def test_a_run_killed_anywhere_ends_as_an_uninterrupted_one(site, tmp_path):
    killed, number, wanted = 0, 0, faults.trials(40)
    while killed < wanted:
        random, workdir, told = faults.draws("kill", number), tmp_path / str(number), []
        for _ in range(4):
            fault = killing(random, site, workdir)
            code, said = site.train(workdir, fault)
            told.append((code, fault))
            context = f"run {number}, {told}; {faults.replay('killed_anywhere')}"
            assert code in (0, -signal.SIGKILL), f"{context}\n{said}"
            killed += code == -signal.SIGKILL
            steps = saved(workdir)
            begun = max((number for number, _ in faults.trained(workdir)), default=0)
            # One save may be under way, and one interval may have passed since the one before it was.
            assert (steps[-1] if steps else 0) >= begun - 2 * SAVE_EVERY, context
            for step in steps:
                assert weights(workdir, step) == site.weights[step], f"{context}: step {step}"
        site.finish(workdir, context)
        number += 1
    print(f"{killed} kills in {number} runs")


def stop(point, count, number=signal.SIGTERM, **more):
    return {"point": point, "count": count, "signal": number, **more}


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
    begun = (
        [update for update, _ in faults.trained(tmp_path / "w")] if (tmp_path / "w" / faults.TRAINED).exists() else []
    )
    assert begun == list(range(1, (expected or 0) + 1)), context
    site.finish(tmp_path / "w", context)


@pytest.mark.faults  # a minute
def test_a_signal_at_a_random_moment_saves_within_one_update(site, tmp_path):
    stopped, moments = 0, faults.trials(24)
    for number in range(moments):
        random, workdir = faults.draws("stop", number), tmp_path / str(number)
        fault = stop("update", random.randint(1, STEPS), delay=random.uniform(0, 0.2))
        code, said = site.train(workdir, fault)
        context = f"moment {number}, {fault}; {faults.replay('random_moment')}\n{said}"
        assert code in (0, 75) and "Traceback" not in said, context
        stopped += code == 75
        begun = faults.trained(workdir)[-1][0]
        assert saved(workdir)[-1] == begun, context
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
    struck, number, wanted = 0, 0, faults.trials(20)
    while struck < wanted:
        random, out = faults.draws("generate", number), tmp_path / f"{number}.jsonl"
        for _ in range(3):
            how = random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
            fault = stop("generate", random.randint(1, PROMPTS), how, delay=random.choice([0, random.uniform(0, 0.02)]))
            if random.random() < 0.4:
                fault = {"folder": str(out), "count": random.randint(1, 8), "signal": how}
            code, said = generate(site, out, fault)
            context = f"file {number}, {fault}; {faults.replay('answers_killed')}\n{said}"
            assert code in (0, 75, -signal.SIGKILL), context
            struck += code != 0
        assert generate(site, out)[0] == 0, context
        assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes(), context
        assert not out.with_name(out.name + ".part").exists(), context
        number += 1
    print(f"{struck} starts struck, {number} files")


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
        struck, number, wanted = 0, 0, faults.trials(90)
        while struck < wanted:
            random, out = faults.draws("judge", number), tmp_path / str(number)
            store, starts, server.bodies = out / "replies.jsonl", 0, []
            for _ in range(6):
                how = random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
                fault = stop("judge", random.randint(1, 6), how, delay=random.choice([0, random.uniform(0, 0.02)]))
                if random.random() < 0.3:
                    fault = {"folder": str(out), "count": random.randint(1, 6), "signal": how}
                code, said = judge(out, fault)
                context = f"folder {number}, {fault}; {faults.replay('judgements_killed')}\n{said}"
                assert code in (0, 75, -signal.SIGKILL), context
                struck, starts = struck + (code != 0), starts + (code != 0)
            code, said = judge(out)
            assert code == 0, f"{context}\n{said}"
            for name in ("summary.json", "verdicts.jsonl"):
                assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), context
            keys = [json.loads(line)["key"] for line in store.read_text().splitlines()]
            assert len(keys) == len(set(keys)) == 2 * PROMPTS, context
            # Lost are only the replies that a struck start had under way, or in hand and not yet written.
            assert len(server.bodies) <= 2 * PROMPTS + starts * 2 * workers, context
            number += 1
    print(f"{struck} starts struck, {number} folders")
