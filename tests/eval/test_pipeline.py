"""A whole recipe on tiny models: every stage once, nothing the second time, and what a change does again."""

import importlib
import json

import pytest

from fpo_jax.checkpoint import integrity
from fpo_jax.configs.pipelines import common
from fpo_jax.eval.pipeline import pipeline, pipeline_report, stages
from fpo_jax.io import jsonl
from tests import resuming, tiny
from tests.paths import REPO, shared_data

# the study of objectives has tests of its own
RECIPES = sorted(
    path.stem
    for path in (REPO / "configs" / "pipelines").glob("*.py")
    if path.stem not in ("common", "divergence_study")
)


def small(folder, name="hh_rw", **changed):
    """The recipe with a tiny model, two steps a stage, and local pairs."""
    c = importlib.import_module(f"fpo_jax.configs.pipelines.{name}").get_config()
    c.base = str(folder / "model")
    c.data.update({"format": "json", "train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl")})
    c.data.update({"train_split": "", "eval_split": "", "subfolder": "", "hh_split": "last_turn"})
    c.data.update({"max_length": 40})
    c.data.max_completion_length = 16
    for section in ("sft", "reward", "align"):
        c[section].model.compute_dtype = "float32"
        c[section].train.update({"batch_size": 8, "micro_batch_per_device": 1})
        c[section].train.max_steps = 2
        c[section].train.update({"eval_every": 1, "save_every": 1})
        c[section].logging.tensorboard = False
    c.sample.update({"max_new_tokens": 8, "batch_size": 4})
    c.generate.update({"max_new_tokens": 8, "num_prompts": 4, "num_return": 2, "batch_size": 4})
    c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changed.items()})
    return c


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipeline")
    tiny.write_model(root / "model", layers=1)
    tiny.write_pairs(root / "train.jsonl", count=16)
    tiny.write_pairs(root / "eval.jsonl", count=8, seed=1)
    return root


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "w"
    return workdir, pipeline.Pipeline(small(folder), workdir).run()


@pytest.mark.slow  # three trainings, each with its compilations
def test_the_report_compares_every_alignment_with_the_start(finished):
    workdir, report = finished
    assert list(report) == ["start", "alphapo-rw-seed1234"]
    one = report["alphapo-rw-seed1234"]
    assert one["prompts"] == 4 and one["answers"] == 8
    start, aligned = (jsonl.read(workdir / report[name]["file"]) for name in report)
    means = [[sum(line["rewards"]) / 2 for line in lines] for lines in (start, aligned)]
    assert one["change"]["mean"] == pytest.approx(sum(b - a for a, b in zip(*means, strict=True)) / 4)
    won = [
        (new > old) + 0.5 * (new == old)
        for before, after in zip(start, aligned, strict=True)
        for old, new in zip(before["rewards"], after["rewards"], strict=True)
    ]
    assert one["win_rate"]["mean"] == sum(won) / 8 and one["win_rate"]["low"] <= sum(won) / 8 <= one["win_rate"]["high"]
    assert json.loads((workdir / "report" / "report.json").read_text()) == json.loads(json.dumps(report))
    assert "| alphapo-rw-seed1234 | 4 x 2 |" in (workdir / "report" / "table.md").read_text()


def test_the_page_compares_rewards_lengths_and_distances(finished):
    from fpo_jax.eval.report import report

    workdir, found = finished
    text = report.run(report.Options(workdir=workdir, samples=2)).with_suffix(".md").read_text()
    one = found["alphapo-rw-seed1234"]
    assert f"| alphapo-rw-seed1234 | 4 x 2 | {one['mean_reward']:.3f} |" in text
    assert "![Mean reward against the log-ratio to the start](distance.png)" in text
    assert "| prompt | start | alphapo-rw-seed1234 |" in text and "| total |" in text
    assert (workdir / "report" / "report.json").exists(), "the pipeline's own report stays"


@pytest.mark.slow
def test_the_second_time_nothing_is_done(folder, finished, capsys, monkeypatch):
    workdir, report = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    for module, name in (("trainer", "run"), ("generate", "run"), ("label", "run")):
        monkeypatch.setattr(getattr(pipeline, module), name, None)
    assert pipeline.Pipeline(small(folder), workdir).run() == report
    lines = capsys.readouterr().out.splitlines()
    assert sum("done before" in line for line in lines) == 9
    changed = [p for p, t in before.items() if p.stat().st_mtime_ns != t and "report" not in p.parts[-2]]
    assert [path.name for path in changed] in ([], ["run.log"])


@pytest.mark.slow
def test_a_change_does_again_what_depends_on_it_alone(folder, finished, capsys):
    workdir, _ = finished
    c = small(folder, losses=("alphapo-rw", "exo-rw"), align__optim__learning_rate=3e-6)
    report = pipeline.Pipeline(c, workdir).run()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    again = [line.split("]")[1].split("...")[0].strip() for line in lines if "done before" not in line]
    names = ("alphapo-rw-seed1234", "exo-rw-seed1234")
    expected = [text for name in names for text in (f"Align: {name}", f"Answer with {name}", f"Score {name}")]
    assert again == [*expected, "Write the report"] and list(report) == ["start", *names]
    assert len(list(workdir.glob("align-alphapo-rw-seed1234-*"))) == 2, "another rate, another folder"


@pytest.mark.slow
def test_a_stage_that_is_stopped_goes_on(folder, finished, tmp_path, monkeypatch):
    """A signal in the middle of a training: the stage runs again and resumes from its checkpoint."""
    with resuming.signalled(monkeypatch, after=1):
        pipeline.Pipeline(small(folder), tmp_path / "w").run()
    (run,) = (tmp_path / "w").glob("sft-*/run/checkpoints")
    assert integrity.steps(run) == [1]


# --- settings


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_sound(name, tmp_path):
    c = importlib.import_module(f"fpo_jax.configs.pipelines.{name}").get_config()
    if not c.reward_model and "reward" not in c:
        c.reward_model = "some/reward-model"
    pipeline.Pipeline(c, tmp_path / "w")
    text = importlib.import_module(f"fpo_jax.configs.pipelines.{name}").__doc__
    assert all(word in text for word in ("Command", "Stages", "Original", "Expect"))


def test_what_the_pipeline_fills_in_cannot_be_set_in_a_section():
    c = importlib.import_module("fpo_jax.configs.pipelines.hh_rw").get_config()
    for key in ("train", "max_length", "rule"):
        with pytest.raises(KeyError):
            c.sft.data[key] = "x"
    with pytest.raises(AttributeError):
        c.align.seed = 1
    assert set(common.SOURCE) | set(common.ROWS) == set(c.data)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"losses": ()}, "losses=\\(\\) must hold at least one entry"),
        ({"seeds": (1, 1)}, r"seeds=\(1, 1\) must hold at least one entry and none twice"),
        ({"losses": ("alphapo-rv",)}, "losses: unknown loss 'alphapo-rv'"),
        ({"sample__num_return": 3}, "give 3 completions, which align.data.group_size=4 does not divide"),
        ({"measure_kl": True, "generate__top_p": 0.9}, "measure_kl needs answers of one seed.* top_p=0.9"),
        ({"measure_kl": True, "generate__seeds": (1, 2)}, r"measure_kl .* seeds=\(1, 2\)"),
        ({"measure_kl": True, "generate__temperature": 0.0}, "measure_kl .* temperature=0.0"),
        ({"pairing": "best"}, "pairing='best' must be '' or best_worst"),
        ({"reward_model": "x"}, "exclude each other"),
        ({"sft__optim__learning_rate": -1.0}, "sft: .*optim.learning_rate=-1.0"),
        ({"sft__loss__name": "dpo"}, "sft: .*does not belong to stage 'sft'"),
        ({"sample__num_return": 1, "align__data__group_size": 1}, "1 completions, and there is nothing to compare"),
        ({"pairing": "best_worst"}, "pairing='best_worst' makes pairs, and align.data.group_size=4 needs more"),
        ({"sample__max_new_tokens": 40}, "sample: max_new_tokens=40 leaves no room for a prompt in data.max_length=40"),
        ({"generate__max_new_tokens": 41}, "generate: max_new_tokens=41 leaves no room"),
        ({"sample__temperature": -1.0}, "sample: temperature=-1.0 must be finite and at least 0"),
        ({"generate__top_p": 2.0}, "generate: top_p=2.0 must lie in"),
        ({"generate__dedup": "some"}, "generate: --dedup='some' is not one of"),
        ({"sample__seeds": (1, 1)}, r"sample: seeds=\(1, 1\) must hold at least one entry and none twice"),
        ({"generate__num_prompts": 1}, "generate.num_prompts=1: the report's intervals need at least 2 prompts"),
        ({"tokenizer__chat_template": "zephyr"}, "tokenizer.chat_template='zephyr' belongs to data.rule=chat"),
    ],
)
def test_problems_of_all_stages_are_listed_before_any_starts(folder, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        pipeline.Pipeline(small(folder, **changed), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def without_training(folder, tmp_path, monkeypatch, **changed):
    """Run until the first stage, which must not be reached."""
    monkeypatch.setattr(pipeline.trainer, "run", lambda *_: pytest.fail("trained"))
    pipeline.Pipeline(small(folder, **changed), tmp_path / "w").run()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data__train": "absent.jsonl"}, "sft: no file or directory 'absent.jsonl'"),
        ({"data__eval_rows": "99:"}, "sft: .*eval.jsonl: no rows from row 99 on"),
        ({"judgements__format": "hh", "judgements__train": "{}/train.jsonl"}, "(?s)reward: .*is no HH transcript"),
        ({"judgements__format": "json", "judgements__train": "{}/threes.jsonl"}, "reward: .*threes.jsonl:1 has 3 comp"),
        ({"judgements__format": "json", "judgements__train": "{}/chats.jsonl"}, "reward: .*messages, and rule='raw'"),
        ({"demonstrations__format": "json", "demonstrations__train": "{}/train.jsonl",
          "judgements__format": "json", "judgements__train": "{}/train.jsonl", "data__train": "{}/broken.jsonl"},
         "align: .*broken.jsonl:2: missing or null: chosen"),
        ({"base": "{}/judge"}, "sft: .*judge is a reward model"),
    ],
)  # fmt: skip
def test_what_a_later_stage_could_not_read_is_refused_before_the_first(folder, tmp_path, monkeypatch, changed, message):
    if not (folder / "judge").exists():
        tiny.write_model(folder / "judge", layers=1, reward_head=True)
        tiny.write_pairs(folder / "threes.jsonl", count=4, completions=3)
        turns = [{"role": "user", "content": "u"}]
        chat = {"prompt": turns, "chosen": "a", "rejected": "b"}
        (folder / "chats.jsonl").write_text(json.dumps(chat) + "\n")
        (folder / "broken.jsonl").write_text(json.dumps(chat | {"prompt": "p"}) + '\n{"prompt": "q"}\n')
    changed = {key: value.format(folder) if isinstance(value, str) else value for key, value in changed.items()}
    if "judgements__format" in changed:
        changed["judgements__eval"] = str(folder / "eval.jsonl") if changed["judgements__format"] == "json" else ""
        changed |= {} if changed["judgements__eval"] else {"reward__train__keep_best": ""}
    with pytest.raises(ValueError, match=message):
        without_training(folder, tmp_path, monkeypatch, **changed)


def test_a_language_model_is_no_judge(folder, tmp_path, monkeypatch):
    c = small(folder)
    with c.unlocked():
        del c["reward"]
    c.reward_model = str(folder / "model")
    monkeypatch.setattr(pipeline.trainer, "run", lambda *_: pytest.fail("trained"))
    with pytest.raises(ValueError, match="reward_model: .*model is a language model; give a sequence classifier"):
        pipeline.Pipeline(c, tmp_path / "w").run()
    tiny.write_model(tmp_path / "short", layers=1, reward_head=True, max_positions=32)
    c.reward_model = str(tmp_path / "short")
    with pytest.raises(ValueError, match="reward_model: data.max_length=40 exceeds the window of 32 tokens"):
        pipeline.Pipeline(c, tmp_path / "w").run()


def test_the_best_step_is_exported_where_it_is_kept_and_the_newest_elsewhere(folder, tmp_path, monkeypatch):
    """A stage without keep_best failed at its export, after its training."""
    asked = []
    monkeypatch.setattr(pipeline.trainer, "run", lambda *_: None)
    monkeypatch.setattr(pipeline.pipeline_report, "training", lambda _: "")

    def export(run, out, *, step, dtype):
        asked.append(step)
        out.mkdir(parents=True)
        run.mkdir()
        (run / "metrics.jsonl").write_text("")

    monkeypatch.setattr(pipeline.export, "export", export)
    for number, (kept, expected) in enumerate((("", None), ("eval_rewards/accuracies", "best"))):
        made = pipeline.Pipeline(small(folder, reward__train__keep_best=kept), tmp_path / str(number))
        made.workdir.mkdir()
        made.stages = stages.Stages(made.workdir, total=1, program="pipeline")
        made._trained("reward", str(folder / "model"))
        made = pipeline.Pipeline(small(folder, sft__train__keep_best="eval_loss" * bool(kept)), tmp_path / f"s{number}")
        made.workdir.mkdir()
        made.stages = stages.Stages(made.workdir, total=1, program="pipeline")
        made._trained("sft", str(folder / "model"))
        assert asked[-2:] == [expected, expected]


def test_sft_and_the_reward_model_have_data_of_their_own_where_they_are_given_some(folder, tmp_path):
    made = pipeline.Pipeline(small(folder), tmp_path / "w")
    for name in ("sft", "reward"):
        section = made._section(name, model="m")
        assert {key: section.data[key] for key in common.SOURCE} == {
            key: made.config.data[key] for key in common.SOURCE
        }
    given = {"judgements__format": "imdb", "judgements__train": "reviews.json", "judgements__eval": "others.json"}
    given |= {"demonstrations__format": "demonstrations", "demonstrations__train": "texts.json"}
    made = pipeline.Pipeline(small(folder, **given), tmp_path / "w")
    sft, reward = (made._section(name, model="m").data for name in ("sft", "reward"))
    assert (reward.format, reward.train, reward.eval) == ("imdb", "reviews.json", "others.json")
    assert (sft.format, sft.train, sft.eval) == ("demonstrations", "texts.json", "")
    assert made._alignment("alphapo-rw", 0, model="m", sources=dict(made.config.data.items())).data.format == "json"


def test_another_loss_leaves_out_what_it_does_not_take(folder, tmp_path):
    made = pipeline.Pipeline(small(folder, losses=("alphapo-rw", "exo-rw")), tmp_path / "w")
    found = made._alignment("exo-rw", 7, model="m", sources=dict(made.config.data.items()))
    assert (found.loss.name, found.loss.alpha, found.loss.beta_pi, found.seed) == ("exo-rw", None, 0.35, 7)


def test_another_loss_has_its_own_options_where_they_mean_something_else(folder, tmp_path):
    names = ("alphapo-rw", "dpo", "kto", "cpo", "sigmoid")
    made = pipeline.Pipeline(small(folder, losses=names), tmp_path / "w")
    found = {name: made._alignment(name, 7, model="m", sources=dict(made.config.data.items())).loss for name in names}
    assert (found["alphapo-rw"].beta_pi, found["dpo"].beta_pi, found["dpo"].temperature) == (0.35, 0.35, 0.8)
    for name in ("kto", "cpo", "sigmoid"):
        assert (found[name].beta_pi, found[name].beta_r, found[name].temperature) == (None, None, None), name


def test_answers_of_several_seeds_are_one_line(tmp_path):
    for seed, texts in ((1, ["a", "b"]), (2, ["c", "b"])):
        rows = [
            {"index": i, "prompt": f"p{i}", "completions": [text], "finish": ["stop"]} for i, text in enumerate(texts)
        ]
        (tmp_path / f"{seed}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    described = pipeline.merge([tmp_path / "1.jsonl", tmp_path / "2.jsonl"], tmp_path / "o.jsonl")
    (line,) = jsonl.read(tmp_path / "o.jsonl")
    assert line["completions"] == ["a", "c"] and "1 dropped whose answers are all the same" in described
    (tmp_path / "3.jsonl").write_text('{"index":0,"prompt":"p1","completions":["a"],"finish":["stop"]}\n' * 2)
    with pytest.raises(ValueError, match="answer different prompts"):
        pipeline.merge([tmp_path / "1.jsonl", tmp_path / "3.jsonl"], tmp_path / "o.jsonl")


def test_a_report_of_other_prompts_is_refused(tmp_path):
    for name, prompt in (("a", "p"), ("b", "q")):
        (tmp_path / name).write_text(json.dumps({"prompt": prompt, "completions": ["x"], "rewards": [1.0]}) + "\n")
    with pytest.raises(ValueError, match="answer different prompts"):
        pipeline_report.write(tmp_path, {"start": tmp_path / "a", "dpo": tmp_path / "b"}, {}, {})


# --- readers that the recipes use


def test_real_tldr_records():
    from fpo_jax import data

    found = data.read(shared_data("tldr", "comparison_example.jsonl"), format="tldr")
    assert found.rows
    for record in found.rows:
        assert record.prompt.startswith("SUBREDDIT: r/") and record.prompt.endswith("\nTL;DR:")
        assert all(text.startswith(" ") and text == " " + text.strip() for text in record.completions)
        assert list(record.rewards) == [1.0, 0.0]
