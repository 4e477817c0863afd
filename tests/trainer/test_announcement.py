"""The first lines of a run: the loss with everything filled in, and what it makes of ties."""

import json

import pytest

from fpo_jax.trainer import run_summary
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("announcement")
    tiny.write_model(root / "model", layers=1)
    tiny.write_pairs(root / "pairs.jsonl", count=8)
    rows = [{"prompt": f"{i}: a?", "completions": [" ab", " cde"], "rewards": [1, int(i % 4 == 0)]} for i in range(8)]
    (root / "ties.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return root


def lines(caplog, folder, name, data="pairs.jsonl", **changed):
    """What a run says of a loss, before anything is compiled."""
    options = {"loss__alpha": None, "loss__beta_pi": None, "loss__name": name, "data__eval": ""}
    config = tiny.config(folder / "model", folder / data, **options | changed)
    inputs, plan, programs = tiny.built(config)
    caplog.clear()
    with caplog.at_level("INFO", logger="fpo_jax"):
        run_summary.log_summary(config, config, inputs, plan, programs)
    return caplog.text


@pytest.mark.parametrize(
    ("name", "changed", "expected"),
    [
        (
            "sigmoid",
            {"loss__beta": 0.1},
            [
                "loss: sigmoid is kl_target_policy, with no reference",
                "beta=0.1, gamma_beta_ratio=0.25",
                "not what TRL calls sigmoid: there DPO, with a reference",
            ],
        ),
        ("dpo", {}, ["loss: dpo is kl_target_policy, with a reference", "epsilon=0, normalize=False", "beta_pi=0.5"]),
        ("ipo", {}, ["loss: ipo is ipo, with a reference", "(Δ_w - Δ_l - 1/(2τ))²", "tau=0.1", "not what TRL calls"]),
    ],
)
def test_the_loss_is_said_with_all_its_options(caplog, folder, name, changed, expected):
    said = lines(caplog, folder, name, mesh__data=1, mesh__fsdp=1, **changed)
    for text in expected:
        assert text in said


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (
            None,
            "nothing moves for 20 times its slowest step, at least 600 s shows its stacks and ends with exit code 70",
        ),
        (90, "nothing moves for 90 s shows its stacks"),
        (0, "watchdog: off (train.hang_timeout=0)"),
    ],
)
def test_what_a_run_does_about_hanging_is_said(caplog, folder, seconds, expected):
    changed = {"mesh__data": 1, "mesh__fsdp": 1, "train__hang_timeout": seconds}
    assert expected in lines(caplog, folder, "dpo", **changed)


@pytest.mark.parametrize(
    ("name", "changed", "expected"),
    [
        ("dpo", {}, "tie_policy=uniform: the best of a group share the label"),
        ("dpo", {"loss__tie_policy": "second"}, "tie_policy=second: the last of the best is trained on as the chosen"),
        ("ipo", {"loss__tie_policy": "first"}, "tie_policy=first: the first of the best is trained on as the chosen"),
        ("exo-rw", {}, "equal rewards are equal targets"),
        (
            "jeffreys",
            {"loss__target": "rewards", "loss__score": "mean_logp"},
            "equal rewards are equal targets; for the margin γ tie_policy=uniform: the best of a group share the label",
        ),
        ("bradley_terry", {"stage": "reward"}, "pairs of equal rewards are left out"),
    ],
)
def test_ties_are_said_with_what_the_loss_makes_of_them(caplog, folder, name, changed, expected):
    one = {"mesh__data": 1, "mesh__fsdp": 1, **changed}
    assert f"reward ties: 2 of 8 groups share their highest reward; {expected}\n" in lines(
        caplog, folder, name, data="ties.jsonl", **one
    )
    assert "reward ties:" not in lines(caplog, folder, name, **one)


def test_the_summary_is_read_at_80_columns_in_about_ten_lines(caplog, folder):
    """What a terminal gets; the whole configuration and the audit are details."""
    lines(caplog, folder, "dpo", mesh__data=1, mesh__fsdp=1)
    shown = "\n".join(r.getMessage() for r in caplog.records if not getattr(r, "detail", False)).split("\n")
    assert 9 <= len(shown) <= 16
    assert all(len(line) <= 80 or line.startswith("model: ") for line in shown), shown
    assert [line.partition(":")[0] for line in shown if ": " in line and not line.startswith(" ")] == [
        "run",
        "model",
        "mesh",
        "data",
        "loss",
        "attention",
        "log-probs",
        "example",
    ]
    text = " ".join(line.strip() for line in shown)
    assert "Σ q (log q - log p)" in text and "beta_pi=0.5" in text and "⟦" in shown[-1]
    details = "\n".join(r.getMessage() for r in caplog.records if getattr(r, "detail", False))
    assert "data.max_length: 2048 -> 40" in details and "data audit, rule raw" in details


def test_a_long_example_is_cut_around_its_first_trained_token():
    shown = run_summary._example("p" * 500 + "⟦" + "c" * 500 + "⟧")
    assert len(shown) <= 80 and "p⟦c" in shown and shown.endswith(" ...")
    assert run_summary._example("a\nb⟦c⟧") == "example: a↵b⟦c⟧"
