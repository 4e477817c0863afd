"""Programs around a run killed at random moments: outputs are whole or absent, and end as those of one start."""

import json
import signal

import pytest

from tests import crash_site, faults, tiny
from tests.crash_site import PROMPTS


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    root = tmp_path_factory.mktemp("site")
    with faults.Zygote(root / "compiled") as zygote:
        one = crash_site.Site(root, zygote)
        tiny.write_model(root / "judge", layers=1, reward_head=True)
        texts = [{"prompt": f"{i} ab?", "completions": [f" {i}", " cde", " f gh"]} for i in range(PROMPTS)]
        (root / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
        (root / "baseline.jsonl").write_text("".join(json.dumps(t | {"completions": [" ab"]}) + "\n" for t in texts))
        questions = [{"instruction": f"{i} ab?", "dataset": "d"} for i in range(PROMPTS)]
        (root / "questions.json").write_text(json.dumps(questions))
        yield one


# name -> module, its options but for --out, and the files that must be whole or absent
PROGRAMS = {
    "label": (
        "fpo_jax.cli.label",
        "--model {root}/judge --data {root}/answers.jsonl --pairing best_worst --compute-dtype float32",
        [""],
    ),
    "export": ("fpo_jax.cli.export", "--workdir {root}/whole --dtype float32", [""]),
    "benchmark": (
        "fpo_jax.eval.benchmarks.answer",
        "--benchmark alpaca_eval --data {root}/questions.json --model {root}/model --temperature 1 --max-new-tokens 5"
        " --batch-size 2 --compute-dtype float32 --name m",
        ["model_outputs.json"],
    ),
    "winrate": (
        "fpo_jax.eval.judge.winrate",
        "--candidate {root}/answers.jsonl --baseline {root}/baseline.jsonl --reward-model {root}/judge"
        " --compute-dtype float32",
        ["verdicts.jsonl", "summary.json"],
    ),
}


def content(path):
    """Bytes of a file, or of all files of a folder by name; None where there is nothing."""
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.iterdir()}
    return path.read_bytes() if path.exists() else None


@pytest.mark.faults  # half a minute each
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_killed_or_stopped_anywhere_leaves_its_output_whole_or_absent(site, tmp_path, name):
    module, options, outputs = PROGRAMS[name]

    def start(folder, fault=None):
        folder.mkdir(exist_ok=True)
        command = [*options.format(root=site.root).split(), "--out", folder / "out"]
        return site.zygote.run(module, command, site.root / "log", fault)

    code, said = start(tmp_path / "whole", {"folder": str(tmp_path / "whole"), "count": 10**9})
    assert code == 0, said
    operations = int(said.rpartition("came by ")[2].split()[0])
    whole = [content(tmp_path / "whole" / "out" / output) for output in outputs]

    def refused(folder):  # what a killed start had already done, by a second one
        return name == "export" and (folder / "out").exists()

    killed, number, wanted = 0, 0, faults.trials(10)
    while killed < wanted:
        random, folder = faults.draws(name, number), tmp_path / str(number)
        for _ in range(3):
            how = random.choice([signal.SIGKILL] * 3 + [signal.SIGTERM])
            code, said = start(folder, {"folder": str(folder), "count": random.randint(1, operations), "signal": how})
            context = f"folder {number}, {how!r}: {code}; {faults.replay('program_killed')}\n{said}"
            assert code in (0, 75, -signal.SIGKILL, -signal.SIGTERM), context
            killed += code == -signal.SIGKILL
            for output, expected in zip(outputs, whole, strict=True):
                assert content(folder / "out" / output) in (None, expected), context
            if code == 0 or refused(folder):
                break
        wanted_code = 2 if refused(folder) else 0
        code, said = start(folder)
        assert code == wanted_code, f"{context}\n{said}"
        assert [content(folder / "out" / output) for output in outputs] == whole, context
        left = [path for name in ("*.tmp", ".*.lock", ".*partial*", "lock.json") for path in folder.rglob(name)]
        assert not left, f"{context}: {left}"
        number += 1
    print(f"{killed} kills, {number} folders")


def pipeline(site, workdir, fault=None):
    """A recipe on tiny models, one step a stage."""
    options = {
        "base": site.root / "model", "data.format": "json", "data.train": site.root / "pairs.jsonl",
        "data.eval": site.root / "pairs.jsonl", "data.train_split": "", "data.eval_split": "", "data.subfolder": "",
        "data.hh_split": "last_turn", "data.max_length": 40, "data.max_completion_length": 16,
        "sample.max_new_tokens": 4, "sample.batch_size": 4, "generate.max_new_tokens": 4, "generate.num_prompts": 4,
        "generate.num_return": 2, "generate.batch_size": 4,
    }  # fmt: skip
    each = {
        "model.compute_dtype": "float32", "train.batch_size": 4, "train.micro_batch_per_device": 4,
        "train.max_steps": 1, "train.eval_every": 0, "logging.tensorboard": False,
    }  # fmt: skip
    options |= {f"{section}.{name}": value for section in ("sft", "reward", "align") for name, value in each.items()}
    command = ["--config", "configs/pipelines/hh_rw.py", "--workdir", workdir]
    command += [f"--config.{name}={value}" for name, value in options.items()]
    workdir.mkdir(exist_ok=True)
    return site.zygote.run("fpo_jax.eval.pipeline.pipeline", command, site.root / "log", fault)


@pytest.mark.faults  # two minutes
def test_a_pipeline_killed_or_stopped_anywhere_goes_on_to_the_report_of_one_start(site, tmp_path):
    code, said = pipeline(site, tmp_path / "whole", {"folder": str(tmp_path / "whole"), "count": 10**9})
    assert code == 0, said
    operations = int(said.rpartition("came by ")[2].split()[0])
    expected = json.loads((tmp_path / "whole" / "report" / "report.json").read_text())
    for number in range(faults.trials(2)):
        random, workdir, described = faults.draws("pipeline", number), tmp_path / str(number), []
        for _ in range(3):
            how = random.choice([signal.SIGKILL] * 3 + [signal.SIGTERM])
            fault = {"folder": str(workdir), "count": random.randint(1, operations), "signal": how}
            code, said = pipeline(site, workdir, fault)
            described.append((code, fault))
            context = f"{described}; {faults.replay('pipeline_killed')}\n{said}"
            assert code in (0, 75, -signal.SIGKILL, -signal.SIGTERM), context
            stages = workdir / "stages.json"
            assert not stages.exists() or json.loads(stages.read_text()), context
        code, said = pipeline(site, workdir)
        assert code == 0, f"{context}\n{said}"
        found = json.loads((workdir / "report" / "report.json").read_text())
        assert found == expected, context
        left = [path for name in ("*.tmp", "*.part", ".*.lock", "lock.json") for path in workdir.rglob(name)]
        assert not left, f"{context}: {left}"
