"""Tables and plots of a study of objectives, from its results.json alone.

    python -m fpo_jax.eval.pipeline.study_report --results docs/studies/which-f.json --out docs/studies

What flows in: one entry per run with a number per prompt, as `divergence_study` writes it. What flows out: the same
file, table.md, frontier.svg and differences.svg. Every interval resamples seeds and prompts together; those of the
differences to DPO are simultaneous over all objectives (Bonferroni).
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from fpo_jax.eval.quickstart import quickstart_plots
from fpo_jax.eval.report import html, report
from fpo_jax.io import atomic_io, terminal

BASELINE = "dpo"
RESAMPLES = 4000
_TASK = "task"


def interval(values_SP: Float[np.ndarray, "S P"], *, level: float = 0.95) -> tuple[float, float, float]:
    """Return (mean, low, high) of a mean over seeds and prompts, both resampled (the pigeonhole bootstrap).

    Args:
        values_SP: one number per seed and prompt.
        level: of the percentile interval, in (0, 1).

    >>> interval(np.ones((3, 5)))
    (1.0, 1.0, 1.0)
    """
    random = np.random.default_rng(0)
    # how often each seed and each prompt is drawn
    seeds_RS, prompts_RP = (random.multinomial(size, [1 / size] * size, RESAMPLES) for size in values_SP.shape)
    means = ((seeds_RS @ values_SP) * prompts_RP).sum(axis=1) / values_SP.size
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(values_SP.mean()), float(low), float(high)


def wins(ours_SP: Float[np.ndarray, "S P"], theirs_SP: Float[np.ndarray, "#S P"]) -> Float[np.ndarray, "S P"]:
    """Return 1 where ours is higher, 0.5 where they are equal, else 0."""
    return 0.5 * (1 + np.sign(ours_SP - theirs_SP))


def summaries(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return every metric of every objective: (mean, low, high), and of some the standard deviation over seeds.

    Args:
        results: what `Study.run` returns.
    """
    start, runs = results["start"]["test"], results["runs"]
    talk = np.array([kind != _TASK for kind in start["kind"]])
    by_name = {name: [run for run in runs if run["objective"] == name] for name in results["settings"]["objectives"]}
    found = {"start": _summary([start], start, None, talk)}
    others = max(1, len(by_name) - 1)
    for name, own in by_name.items():
        found[name] = _summary(own, start, by_name.get(BASELINE), talk)
        found[name] |= results["chosen"][name]
        if BASELINE in by_name and name != BASELINE:
            for metric in ("held_out", "kl", "entropy"):
                difference = _matrix(own, metric) - _matrix(by_name[BASELINE], metric)
                found[name][f"{metric} to {BASELINE}"] = interval(difference, level=1 - 0.05 / others)
    return found


def _summary(own: list, start: Mapping[str, Any], baseline: list | None, talk_P: np.ndarray) -> dict[str, Any]:
    held_SP = _matrix(own, "held_out")
    found: dict[str, Any] = {name: interval(_matrix(own, name)) for name in ("training", "held_out", "kl", "entropy")}
    found |= {name: interval(_matrix(own, name)) for name in ("tokens", "ended")}
    found["talk"] = interval(held_SP[:, talk_P]) if talk_P.any() else None
    # a task's reward is standardised: above the mean of successes and failures is a success
    found["solved"] = interval((held_SP[:, ~talk_P] > 0).astype(float)) if (~talk_P).any() else None
    found["win_start"] = interval(wins(held_SP, np.array([start["held_out"]])))
    found["win_baseline"] = interval(wins(held_SP, _matrix(baseline, "held_out"))) if baseline else None
    found["seeds"] = float(held_SP.mean(axis=1).std(ddof=1)) if len(own) > 1 else None
    for n in (1, 2):
        found[f"distinct_{n}"] = float(np.mean([run[f"distinct_{n}"] for run in own]))
    margins_SP = _matrix(own, "pair_margins")
    if margins_SP.size:
        found["accuracy"] = interval(wins(margins_SP, np.zeros_like(margins_SP)))
        sure_SP = 1 / (1 + np.exp(-np.abs(margins_SP)))
        found["overconfidence"] = interval(sure_SP - wins(margins_SP, np.zeros_like(margins_SP)))
    return found


def table(results: Mapping[str, Any]) -> str:
    """Return the main table and the one of the grid as Markdown."""
    found = summaries(results)
    header = ["objective", "β, rate", "held-out reward", "SD of seeds", "tasks solved", "win against the start"]
    header += [
        "win against DPO",
        "KL (nats)",
        "entropy a token",
        "distinct-2",
        "tokens",
        "pairs in order",
        "overconfidence",
    ]
    rows = [
        [
            name,
            f"{one['beta']:g}, {one['learning_rate']:g}" if "beta" in one else "",
            _shown(one["held_out"], "+.2f"),
            "" if one["seeds"] is None else f"{one['seeds']:.2f}",
            _shown(one["solved"], ".0%"),
            "" if name == "start" else _shown(one["win_start"], ".0%"),
            "" if name in ("start", BASELINE) else _shown(one["win_baseline"], ".0%"),
            _shown(one["kl"], ".2f"),
            _shown(one["entropy"], ".2f"),
            f"{one['distinct_2']:.3f}",
            f"{one['tokens'][0]:.1f}",
            _shown(one.get("accuracy"), ".0%"),
            _shown(one.get("overconfidence"), "+.2f"),
        ]
        for name, one in found.items()
    ]
    grid = [
        [run["objective"], f"{run['beta']:g}", f"{run['learning_rate']:g}"]
        + [f"{np.mean(run[key]):+.3f}" for key in ("training", "held_out")]
        + [f"{np.mean(run['kl']):.2f}", f"{np.mean(run['entropy']):.2f}", str(run["largest_grad_norm"])]
        + ["chosen" if _is_chosen(run, results) else ""]
        for run in results["tuned"]
    ]
    names = [
        "objective",
        "β",
        "rate",
        "training reward",
        "held-out reward",
        "KL",
        "entropy",
        "largest gradient norm",
        "",
    ]
    blocks = [html.Heading("Test prompts", 2), html.Table(header, rows)]
    return html.markdown([*blocks, html.Heading("The grid, on validation prompts", 2), html.Table(names, grid)])


def write(results: Mapping[str, Any], folder: Path) -> str:
    """Write results.json, table.md and both plots; return where they are."""
    report.require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    atomic_io.write_json(folder / "results.json", results)
    atomic_io.write(folder / "table.md", table(results))
    found = summaries(results)
    _frontier(folder / "frontier.svg", results, found)
    _differences(folder / "differences.svg", found)
    return str(folder)


def _frontier(path: Path, results: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Plot reward and entropy against KL: points of the grid small, chosen points with the range over seeds."""
    import matplotlib.pyplot as plt

    names = [name for name in found if name != "start"]
    with plt.rc_context({**quickstart_plots.STYLE, "svg.hashsalt": "study"}):
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
        colours = plt.get_cmap("tab20")(np.linspace(0, 1, max(2, len(names))))[: len(names)]
        for panel, metric, title in zip(
            axes, ("held_out", "entropy"), ("Held-out reward", "Entropy a token"), strict=True
        ):
            for name, colour in zip(names, colours, strict=True):
                grid = [run for run in results["tuned"] if run["objective"] == name]
                points = [(np.mean(run["kl"]), np.mean(run[metric])) for run in grid]
                panel.scatter(*zip(*points, strict=True), color=colour, s=12, alpha=0.5)
                own = [run for run in results["runs"] if run["objective"] == name]
                kl_S, value_S = (_matrix(own, key).mean(axis=1) for key in ("kl", metric))
                panel.errorbar(
                    kl_S.mean(),
                    value_S.mean(),
                    xerr=[[kl_S.mean() - kl_S.min()], [kl_S.max() - kl_S.mean()]],
                    yerr=[[value_S.mean() - value_S.min()], [value_S.max() - value_S.mean()]],
                    color=colour,
                    marker="D" if name in ("dpo", "bpo", "simpo") else "o",
                    label=name,
                )
            panel.axhline(np.mean(results["start"]["test"][metric]), color="#8c96a3", linewidth=1, linestyle=":")
            panel.set_title(title)
            panel.set_xlabel("KL(policy || start), nats a completion")
            panel.set_xscale("symlog", linthresh=1.0)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _differences(path: Path, found: Mapping[str, Any]) -> None:
    """Plot the difference of every objective to DPO with its simultaneous interval."""
    import matplotlib.pyplot as plt

    metrics = {
        f"held_out to {BASELINE}": "Held-out reward",
        f"kl to {BASELINE}": "KL",
        f"entropy to {BASELINE}": "Entropy",
    }
    names = [name for name, one in found.items() if f"kl to {BASELINE}" in one]
    with plt.rc_context({**quickstart_plots.STYLE, "svg.hashsalt": "study"}):
        figure, axes = plt.subplots(1, 3, figsize=(11, 4.2), sharey=True, layout="constrained")
        for panel, (metric, title) in zip(axes, metrics.items(), strict=True):
            for place, name in enumerate(names):
                mean, low, high = found[name][metric]
                panel.errorbar(
                    mean, place, xerr=[[max(0, mean - low)], [max(0, high - mean)]], fmt="o", color="#1a66c2"
                )
            panel.axvline(0, color="#8c96a3", linewidth=1)
            panel.set_title(f"{title}: difference to DPO")
        axes[0].set_yticks(range(len(names)), names)
        axes[0].invert_yaxis()
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _matrix(runs: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return np.array([run[name] for run in runs], float)


def _is_chosen(run: Mapping[str, Any], results: Mapping[str, Any]) -> bool:
    return all(run[key] == value for key, value in results["chosen"][run["objective"]].items())


def _shown(found: tuple[float, float, float] | None, form: str) -> str:
    return "" if found is None else f"{found[0]:{form}} ({found[1]:{form}}, {found[2]:{form}})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write tables and plots as the command line says."""
    parser = argparse.ArgumentParser(prog="study_report", description=__doc__)
    parser.add_argument("--results", type=Path, required=True, help="results.json of a study")
    parser.add_argument("--out", type=Path, required=True, help="folder of table.md and of the plots")
    options = parser.parse_args(arguments)
    try:
        terminal.say(write(atomic_io.read_json(options.results), options.out))
    except (ValueError, OSError) as error:
        terminal.refuse("study_report", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
