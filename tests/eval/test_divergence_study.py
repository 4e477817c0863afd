"""A study of objectives on a tiny model: all stages once, nothing the second time, and what a change adds."""

import json

import jax
import numpy as np
import pytest

from fpo_jax.configs.pipelines import divergence_study as recipe
from fpo_jax.eval.pipeline import divergence_study, pipeline, study_prompts, study_report
from fpo_jax.io import jsonl
from tests import resuming, tiny


def small(root, **changed):
    """The study with a tiny model, one step a run and two objectives."""
    c = recipe.get_config()
    c.base = str(root / "model")
    c.sources.update({"hh": str(root / "hh.jsonl"), "hh_split": "", "hh_subfolder": ""})
    c.sources.update({"chats": str(root / "chats.jsonl"), "chats_split": ""})
    c.sizes.update({"train": 5, "validation": 3, "test": 2, "pairs": 6, "judged_pairs": 4})
    c.objectives, c.seeds = ("kl_policy_target", "dpo"), (1,)
    c.grid.update({"beta": (0.1,), "beta_without_reference": (2.0,), "learning_rate": (1e-2,)})
    c.completions.update({"tokens": 6, "prompt_tokens": 110})
    c.data.max_length, c.data.max_prompt_length = 120, 110
    c.batch_size = 8
    for section in (c.reward, c.align):
        section.train.update({"batch_size": 8, "max_steps": 1, "micro_batch_per_device": 1})
        section.data.layout = "padded"
        section.lora.rank = 2
    c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changed.items()})
    return c


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    tiny.write_model(root / "model", layers=1, max_positions=160)
    hh, chats = [], []
    for number in range(32):
        opened, texts = f"\n\nHuman: q{number}?\n\nAssistant:", (f"yes {number}", f"no {number}")
        hh.append({name: f"{opened} {text}" for name, text in zip(("chosen", "rejected"), texts, strict=True)})
        asked = {"role": "user", "content": f"c{number}?"}
        pair = {
            name: [asked, {"role": "assistant", "content": text}]
            for name, text in zip(("chosen", "rejected"), texts, strict=True)
        }
        chats.append({"prompt": asked["content"], **pair})
    jsonl.write(root / "hh.jsonl", hh)
    jsonl.write(root / "chats.jsonl", chats)
    return root


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "w"
    found = divergence_study.Study(small(root), workdir).run()
    assert any((workdir / "compiled").iterdir()), "all stages share one folder of compiled programs"
    yield workdir, found
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.mark.slow
def test_every_objective_is_tuned_and_then_measured_with_every_seed(finished):
    workdir, found = finished
    assert [(run["objective"], run["seed"]) for run in found["tuned"]] == [("kl_policy_target", 0), ("dpo", 0)]
    assert [(run["objective"], run["seed"], run["split"]) for run in found["runs"]] == [
        ("kl_policy_target", 1, "test"),
        ("dpo", 1, "test"),
    ]
    for run in (*found["tuned"], *found["runs"]):
        prompts = 9 if run["split"] == "validation" else 6
        assert all(len(run[key]) == prompts for key in ("kind", "training", "held_out", "kl", "entropy", "tokens"))
    assert np.all(np.array(found["start"]["test"]["kl"]) == 0), "the start is no distance from itself"
    assert any(np.abs(run["kl"]).max() > 1e-3 for run in found["runs"]), "a policy that was trained has moved"
    assert not list(workdir.glob("test-*/model")) and not list(workdir.glob("test-*/run")), "weights are deleted"
    written = json.loads((workdir / "report" / "results.json").read_text())
    assert written == json.loads(json.dumps(found))


@pytest.mark.slow
def test_the_second_time_nothing_is_done_and_another_seed_adds_its_own_stages(root, finished, capsys, monkeypatch):
    workdir, found = finished
    trained = []
    train = divergence_study.trainer.run
    monkeypatch.setattr(divergence_study.trainer, "run", lambda *given: (trained.append(given), train(*given)))
    assert divergence_study.Study(small(root), workdir).run() == found
    assert not trained
    more = divergence_study.Study(small(root, objectives=("dpo",), seeds=(1, 2)), workdir).run()
    assert [config.seed for config, _ in trained] == [2] and len(more["runs"]) == 2
    assert more["runs"][0] == found["runs"][1]
    assert "done before" in capsys.readouterr().out


@pytest.mark.slow
def test_a_stage_that_is_stopped_goes_on(root, finished, monkeypatch):
    workdir, _ = finished
    c = small(root, objectives=("dpo",), seeds=(3,), align__train__max_steps=2)
    with resuming.signalled(monkeypatch, after=1):
        divergence_study.Study(c, workdir).run()
    found = divergence_study.Study(c, workdir).run()
    assert [run["seed"] for run in found["runs"]] == [3]


@pytest.mark.slow
def test_the_figures_are_made_of_the_results_file_alone(finished, tmp_path):
    workdir, found = finished
    for name in ("one", "other"):
        arguments = ["--results", str(workdir / "report" / "results.json"), "--out", str(tmp_path / name)]
        assert study_report.main(arguments) == 0
    for file in ("table.md", "frontier.svg", "differences.svg", "results.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes(), file
    assert "| dpo | 0.1, 0.01 |" in study_report.table(found)
    assert study_report.main(["--results", str(tmp_path / "absent"), "--out", str(tmp_path)]) == 2


def test_intervals_resample_seeds_and_prompts():
    values_SP = np.array([[0.0, 1.0, 0.0, 1.0], [2.0, 3.0, 2.0, 3.0]])
    mean, low, high = study_report.interval(values_SP)
    assert mean == 1.5 and low <= 0.5 and high >= 2.5, "two seeds that far apart leave the mean open"
    assert study_report.interval(values_SP, level=0.5)[1] > low
    assert study_report.wins(values_SP[:1], np.array([[0.0, 0.5, 1.0, 2.0]])).tolist() == [[0.5, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seeds": (0, 1)}, "tuning_seed=0 is one of seeds"),
        ({"objectives": ("dpo", "dpo")}, "objectives=.* none twice"),
        ({"objectives": ("dpoo",)}, "unknown loss 'dpoo'"),
        ({"grid__beta": (0.1, 0.2)}, "budgets must be equal"),
        ({"grid__learning_rate": (0.0,)}, "grid.learning_rate=.* above 0"),
        ({"completions__tokens": 64}, "no room for an end token in data.max_length=120"),
        ({"completions__per_prompt": 3}, "must be align.data.group_size=4"),
        ({"sizes__test": 1}, "intervals are over prompts"),
        ({"align__optim__b1": 2.0}, "align with dpo: .*optim.b1"),
    ],
)
def test_problems_are_listed_before_anything_starts(root, tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        divergence_study.Study(small(root, **changed), tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("size", ["small", "full"])
def test_both_sizes_are_sound_and_have_equal_budgets(size, tmp_path):
    c = recipe.get_config(size)
    study = pipeline.program(c)(c, tmp_path / "w")
    assert isinstance(study, divergence_study.Study)
    assert {len(list(study._points(name))) for name in c.objectives} == {4}
    assert pipeline.program({}) is pipeline.Pipeline
    with pytest.raises(ValueError, match="no size; give small or full"):
        recipe.get_config("large")


def test_objectives_differ_in_the_loss_alone(root, tmp_path):
    study = divergence_study.Study(small(root, objectives=tuple(recipe.get_config().objectives)), tmp_path / "w")
    made = {name: study._alignment(name, 0.3, 1e-3, 7, model="m", folder=tmp_path) for name in study.config.objectives}
    given = {name: (c.loss.beta, c.optim.learning_rate, c.seed, c.data.group_size) for name, c in made.items()}
    assert given == {name: (0.3, 1e-3, 7, 4 if name in recipe.DIVERGENCES else 2) for name in made}
    rest = {}
    for name, config in made.items():
        with config.unlocked():
            del config["loss"], config["reference"]  # SimPO has none
            config.data.group_size, config.data.train = 0, ""
        rest[name] = config.to_json()
    assert len(set(rest.values())) == 1


def test_checks_of_tasks_accept_and_refuse():
    told = {
        ("words", 2): ("Hot gas", "A big star"),
        ("list", 3): ("Red, green, blue.", "Red and green, blue"),
        ("capitals", 0): ("THE SUN IS HOT.", "The SUN"),
        ("short", 8): ("It is a star.", "It is a star that"),
    }
    for (check, count), (right, wrong) in told.items():
        task = {"check": check, "count": count}
        assert [study_prompts.reward(task, text) for text in (right, wrong, "")] == [1.0, 0.0, 0.0], check
    prompts = [row["prompt"][0]["content"] for row in study_prompts.tasks()]
    assert len(set(prompts)) == len(prompts)


def test_transcripts_that_are_no_conversation_are_left_out():
    turns = study_prompts.messages("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:")
    assert turns and [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert study_prompts.messages("\n\nHuman: a\n\nHuman: c\n\nAssistant:") is None
