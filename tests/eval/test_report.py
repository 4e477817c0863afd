"""What a report says of a run: the verdict with its warnings, each by its rule, the plots and the model card."""

import itertools
import json
import re

import pytest

from fpo_jax import config as configuration
from fpo_jax import losses
from fpo_jax.eval.report import html, report, report_plots, verdict
from fpo_jax.io import jsonl
from fpo_jax.trainer import model_card
from tests.paths import REPO

AUDIT = {"groups": 200, "group_size": 2, "ties": 0, "tokens": 9_000, "dropped": {}, "noted": {}}


def evaluations(**changed):
    """Three evaluations of a healthy run; what is changed has a value for each."""
    found = {
        "loss": (0.69, 0.60, 0.55), "rewards/accuracies": (0.5, 0.6, 0.7), "rewards/margins": (0.0, 0.1, 0.2),
        "reference_kl": (0.0, -0.5, -1.5), "sft_loss": (2.0, 2.0, 2.1),
    } | changed  # fmt: skip
    return [{"step": 10 * n, **{f"eval_{name}": values[n] for name, values in found.items()}} for n in range(3)]


def answers(rewards, texts=None):
    return [
        {"prompt": f"p{n}", "completion": f"a{n}" if texts is None else texts[n], "reward": reward}
        for n, reward in enumerate(rewards)
    ]


def rate(mean, low, high, equal=None):
    one = {"mean": mean, "low": low, "high": high}
    return {"win_rate": one, "length_controlled_win_rate": one | {"mean": mean if equal is None else equal}}


def said(lines, audit=AUDIT, sampled=None, summaries=()):
    blocks = verdict.of_run(lines, {"train": audit, "eval": audit}, sampled, summaries)
    return html.markdown(blocks)


def warned(text):
    return re.findall(r"^\*\*Warning, ([\w -]+)\*\*", text, re.MULTILINE)


class TestVerdict:
    def test_a_healthy_run_in_a_sentence_without_a_warning(self):
        text = said(evaluations())
        assert "**The order of held-out completions improved**: 50.0% → 70.0% of 200 groups" in text
        assert "(95 % interval 63.3% to 75.9%)" in text, "Wilson's of 140 in 200"
        assert "a log-ratio of -1.5 nats per completion" in text
        assert "No warning" in text and all(name in text for name in verdict.RULES)

    def test_a_small_change_is_not_called_one(self):
        assert "did not change by more than chance" in said(evaluations(**{"rewards/accuracies": (0.5, 0.5, 0.53)}))
        assert "got worse" in said(evaluations(**{"rewards/accuracies": (0.9, 0.8, 0.7)}))

    def test_groups_with_a_tie_do_not_count(self):
        assert "70.0% of 170 groups" in said(evaluations(), audit=AUDIT | {"ties": 30})

    def test_rewards_of_answers_come_first_prompt_by_prompt(self):
        pair = answers([0.0, 1.0, 2.0, 3.0]), answers([1.0, 2.1, 2.9, 4.0])
        assert "**The answers improved**: mean reward +1 (95 % interval +0.92 to +1.08) over 4 prompts" in said(
            evaluations(), sampled=pair
        )

    def test_what_has_no_interval_says_so(self):
        lines = [{"step": 0, "eval_perplexity": 9.0}, {"step": 5, "eval_perplexity": 6.0}]
        assert "**Held-out perplexity improved**: 9 → 6 between step 0 and step 5; an interval would" in said(lines)
        assert "has none; `fpo kl`" in said(lines) and "no evaluation" in said([])

    @pytest.mark.parametrize(
        ("name", "at", "beyond"),
        [
            ("collapse", {"sft_loss": (2.0, 2.2, 2.5)}, {"sft_loss": (2.0, 2.2, 2.51)}),
            ("collapse", {"completions/ended": (0.95, 0.9, 0.851)}, {"completions/ended": (0.95, 0.9, 0.84)}),
            ("length drift", {"completions/length": (100, 110, 125)}, {"completions/length": (100, 110, 126)}),
            ("length drift", {"completions/length": (100, 90, 75)}, {"completions/length": (100, 90, 74)}),
            ("over-optimisation", {"loss": (0.7, 0.6, 0.619)}, {"loss": (0.7, 0.6, 0.621)}),
            (
                "over-optimisation",
                {"completions/reward": (0.0, 1.0, 0.81)},
                {"completions/reward": (0.0, 1.0, 0.79)},
            ),
        ],
    )
    def test_a_warning_is_raised_where_its_rule_says(self, name, at, beyond):
        assert warned(said(evaluations(**at))) == []
        assert warned(said(evaluations(**beyond))) == [name]

    def test_ties(self):
        assert warned(said(evaluations(), audit=AUDIT | {"ties": 40})) == []
        assert warned(said(evaluations(), audit=AUDIT | {"ties": 41})) == ["ties"]

    def test_answers_that_are_alike_are_a_collapse(self):
        before = answers([0, 0, 0, 0])
        assert warned(said(evaluations(), sampled=(before, answers([0, 0, 0, 1], ["a", "a", "b", "b"])))) == []
        assert warned(said(evaluations(), sampled=(before, answers([0, 0, 0, 1], ["a"] * 4)))) == ["collapse"]

    def test_a_reward_that_a_judge_does_not_see_is_hacked(self):
        lost, even = rate(0.4, 0.31, 0.49), rate(0.45, 0.38, 0.51)
        assert warned(said(evaluations(), summaries=[lost])) == ["reward hacking"]
        assert warned(said(evaluations(), summaries=[even])) == []
        falls = evaluations(**{"rewards/margins": (0.2, 0.1, 0.0)})
        assert warned(said(falls, summaries=[lost])) == [], "nothing rose"
        assert warned(said(evaluations(), summaries=[rate(0.7, 0.6, 0.8, equal=0.61)])) == []
        assert warned(said(evaluations(), summaries=[rate(0.7, 0.6, 0.8, equal=0.59)])) == ["reward hacking"]

    def test_a_pipeline_compares_every_alignment_with_the_start(self):
        start = {"mean_reward": 0.0, "mean_characters": 100, "distinct_answers": 1.0}
        one = {"mean_characters": 130, "distinct_answers": 0.9, "kl": {"mean": 3.2, "low": 3, "high": 4}} | rate(
            0.6, 0.5, 0.7
        )
        one["change"] = {"mean": 0.5, "low": 0.3, "high": 0.7}
        text = html.markdown(verdict.of_pipeline({"start": start, "dpo-seed0": one}))
        assert "`dpo-seed0`: improved mean reward +0.500 (95 % interval +0.300 to +0.700)" in text
        assert "at a KL of 3.2 nats from the start" in text and warned(text) == ["length drift"]

    def test_the_documentation_has_every_rule_with_its_number(self):
        text = (REPO / "docs" / "curves.md").read_text().partition("## The verdict")[2].partition("\n## ")[0]
        rows = dict(re.findall(r"^\| ([\w -]+) \| (.*) \|$", text, re.MULTILINE))
        assert rows.keys() - {"warning"} == set(verdict.RULES)
        for name, number in (
            ("collapse", f"{verdict.FORGOTTEN} nats"),
            ("collapse", f"{100 * verdict.ALIKE:.0f} %"),
            ("collapse", f"{100 * verdict.ENDED:.0f} points"),
            ("length drift", f"{100 * verdict.DRIFT:.0f} %"),
            ("reward hacking", f"{100 * verdict.LENGTH_BOUGHT:.0f} points"),
            ("ties", f"{100 * verdict.TIED:.0f} %"),
            ("over-optimisation", f"{100 * verdict.LOST:.0f} %"),
        ):
            assert number in rows[name], (name, number)


@pytest.fixture
def workdir(tmp_path):
    """The files of a run on data of the hub, from a model that has a card."""
    model = tmp_path / "base"
    model.mkdir()
    (model / "README.md").write_text("---\nlanguage: en\nlicense: llama3.2\nlicense_link: 'L'\n---\nlicense: no\n")
    c = configuration.default()
    c.model.path, c.data.train, c.loss.name, c.loss.beta_pi = str(model), "org/pairs", "dpo", 0.3
    workdir = tmp_path / "mine"
    workdir.mkdir()
    loss = losses.described(losses.resolve("dpo", beta_pi=0.3))
    (workdir / "config.json").write_text(json.dumps(json.loads(c.to_json()) | {"resolved_loss": loss}))
    (workdir / "audit.json").write_text(
        json.dumps({"train": AUDIT | {"dropped": {"empty": ["1", "2"]}}, "eval": AUDIT})
    )
    training = [{"step": n + 1, "loss": 0.7 - n / 100, "rewards/margins": n / 50, "grad_norm": 1.0} for n in range(20)]
    jsonl.write(workdir / "metrics.jsonl", [*evaluations()[:1], *training, *evaluations()[1:]])
    jsonl.write(workdir / "timing.jsonl", [{"step": 1, "seconds": 0.5}])
    return workdir


class TestPage:
    def test_the_verdict_opens_it_then_curves_cost_and_details(self, workdir):
        pytest.importorskip("matplotlib", reason="the report extra is not installed")
        page = report.run(report.Options(workdir=workdir))
        headings = re.findall(r"^## (.*)$", (page.parent / "report.md").read_text(), re.MULTILINE)
        assert headings == [
            "Verdict", "Before and after", "Curves", "What it cost", "Time and speed", "Loss", "Configuration",
            "Audit of the data",
        ]  # fmt: skip

    def test_the_card_has_licence_data_loss_beta_and_citation(self, workdir):
        pytest.importorskip("matplotlib", reason="the report extra is not installed")
        card = (report.run(report.Options(workdir=workdir)).parent / "model_card.md").read_text()
        head = card.split("---\n")[1]
        assert 'license: "llama3.2"\nlicense_link: "L"\n' in head and '- "org/pairs"' in head
        assert "loss `dpo`, β: `beta_pi` = 0.3" in card and "says `llama3.2`" in card
        assert "| train | `org/pairs` | 200 of 2 (2 dropped) | 9,000 |" in card
        assert "arXiv:2410.21662" in card and "**The order of held-out completions improved**" in card

    @pytest.mark.parametrize("card", [None, "no head", "---\nlicense: a b\n---\n", "---\nlanguage: en\n---\n"])
    def test_a_licence_that_is_not_there_is_not_made_up(self, workdir, card):
        path = workdir.parent / "base" / "README.md"
        path.unlink() if card is None else path.write_text(card)
        assert model_card.base_licence({"path": str(path.parent), "revision": ""}) == {}

    def test_names_in_a_plane_overlap_no_name_line_or_axis(self, tmp_path, monkeypatch):
        plt = pytest.importorskip("matplotlib.pyplot", reason="the report extra is not installed")
        drawn = []
        monkeypatch.setattr(plt, "close", drawn.append)
        points = [report_plots.Point(f"{100 * n} (123 tokens)", n / 50, n / 70) for n in range(12)]
        for joined in (True, False):
            report_plots.plane(tmp_path / "p.png", points, x="distance " * 12, y="reward " * 9, joined=joined)
            figure = drawn.pop()
            labels, renderer = figure.axes[0].texts, figure.canvas.get_renderer()
            boxes = [label.get_window_extent(renderer) for label in labels]
            assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
            assert {points[0].name, points[-1].name} <= {label.get_text() for label in labels}
            assert joined or len(labels) == 12
            panel = figure.axes[0].bbox
            assert all(panel.contains(box.x0, box.y0) and panel.contains(box.x1, box.y1) for box in boxes)
            if joined:
                line = figure.axes[0].lines[0]
                path = line.get_transform().transform_path(line.get_path())
                assert not any(path.intersects_bbox(box, filled=False) for box in boxes)
            for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
                box = axis.label.get_window_extent(renderer)
                assert figure.bbox.contains(box.x0, box.y0) and figure.bbox.contains(box.x1, box.y1)
