"""The report's plots: metrics of a run, or models of a pipeline, in; PNG files out. Needs matplotlib."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fpo_jax.eval.quickstart.quickstart_plots import AFTER, BEFORE, STYLE, TEXT, curve

HELD_OUT = "#d9822b"
PANELS = (  # metric, title, unit, factor
    ("loss", "Loss", "per group or token", 1),
    ("rewards/margins", "Margin", "chosen − rejected", 1),
    ("rewards/accuracies", "Reward accuracy", "groups in order, %", 100),
    ("reference_kl", "Log-ratio to the reference", "nats per completion", 1),
    ("perplexity", "Perplexity", "of held-out completions", 1),
    ("completions/reward", "Reward of the answers", "reward model's score", 1),
    ("completions/win_rate", "Win rate against the start", "%", 100),
    ("completions/length", "Length of the answers", "tokens", 1),
    ("grad_norm", "Gradient norm", "before clipping", 1),
)


_SIDES = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))  # of a point, for its name


class Point(NamedTuple):
    """One model in a plane."""

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None


def curves(path: Path, lines: Sequence[dict[str, Any]]) -> bool:
    """Plot what a run's metrics have of PANELS; return whether there is anything."""
    import matplotlib.pyplot as plt

    shown = [panel for panel in PANELS if any(panel[0] in line or f"eval_{panel[0]}" in line for line in lines)]
    if not shown:
        return False
    rows = -(-len(shown) // 3)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, 3, figsize=(10.5, 3.1 * rows), squeeze=False)
        figure.set_layout_engine("constrained", h_pad=0.12)  # inches, between "step" and the title of the panel below
        for panel in axes.flat[len(shown) :]:
            panel.set_visible(False)
        for panel, (name, title, unit, scale) in zip(axes.flat, shown, strict=False):
            if any(line.get(name) is not None for line in lines):
                curve(panel, lines, name, scale=scale, colour=AFTER, label="training batches")
            points = [(x["step"], scale * x[f"eval_{name}"]) for x in lines if x.get(f"eval_{name}") is not None]
            if points:
                panel.plot(*zip(*points, strict=True), color=HELD_OUT, marker="o", markersize=4.5, label="evaluation")
            panel.set_title(title)
            panel.set_ylabel(unit)
            panel.set_xlabel("step")
            panel.locator_params(axis="x", nbins=5, integer=True)
        named = [axis.get_legend_handles_labels() for axis in axes.flat]
        handles = {
            label: handle for pair in named for handle, label in zip(*pair, strict=True)
        }  # one of each, above all panels
        figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=2)
        figure.savefig(path)
        plt.close(figure)
    return True


def _name(figure, panel, points: Sequence[Point], *, all_of_them: bool) -> None:
    """Write names beside points, the first's and the last's before the others', none over another, a line or the axes.

    Args:
        figure: whose plot it is.
        panel: the plot.
        points: of it.
        all_of_them: a name that finds no place stands farther off, as the first and the last do; else it is left out.
    """
    figure.canvas.draw()  # now places are known
    figure.set_layout_engine("none")
    renderer, taken = figure.canvas.get_renderer(), []
    places = [panel.transData.transform((one.x, one.y)) for one in points]
    lines = [line.get_transform().transform_path(line.get_path()) for line in panel.lines if len(line.get_xdata()) > 1]
    ends = (0, len(points) - 1)
    for number in sorted(range(len(points)), key=lambda number: (number not in ends, number)):
        one = points[number]
        label = panel.annotate(
            one.name, (one.x, one.y), xytext=(0, 0), textcoords="offset points", fontsize=8, color=TEXT
        )
        rings = range(1, 9 if all_of_them or number in ends else 2)
        for right, up, away in ((right, up, away) for away in rings for right, up in _SIDES):
            label.set_horizontalalignment({1: "left", 0: "center", -1: "right"}[right])
            label.set_verticalalignment({1: "bottom", 0: "center", -1: "top"}[up])
            label.xyann = (6 * away * right, 5 * away * up)
            box = label.get_window_extent(renderer).padded(1)
            inside = panel.bbox.contains(box.x0, box.y0) and panel.bbox.contains(box.x1, box.y1)
            over = any(box.overlaps(other) for other in taken) or any(box.contains(*place) for place in places)
            over = over or any(line.intersects_bbox(box, filled=False) for line in lines)
            if inside and not over:
                taken.append(box)
                break
        else:
            if not all_of_them:
                label.remove()


def plane(path: Path, points: Sequence[Point], *, x: str, y: str, joined: bool) -> None:
    """Plot models in a plane, the first of them as what the others are compared with.

    Args:
        path: PNG to write.
        points: at least one.
        x: label of the horizontal axis.
        y: label of the vertical axis.
        joined: they are one run's, in the order of its steps.
    """
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, panel = plt.subplots(figsize=(6.5, 4), layout="constrained")
        if joined:
            panel.plot([one.x for one in points], [one.y for one in points], color=AFTER, linewidth=1.2, alpha=0.5)
        for place, one in enumerate(points):
            spread = None if one.low is None or one.high is None else [[one.y - one.low], [one.high - one.y]]
            colour = BEFORE if place == 0 else AFTER
            panel.errorbar(one.x, one.y, yerr=spread, color=colour, marker="o", markersize=5, capsize=3)
        panel.margins(x=0.25, y=0.15)  # room for the names
        panel.set_xlabel("\n".join(textwrap.wrap(x, 60)))
        panel.set_ylabel("\n".join(textwrap.wrap(y, 40)))
        _name(figure, panel, points, all_of_them=not joined)
        figure.savefig(path)
        plt.close(figure)
