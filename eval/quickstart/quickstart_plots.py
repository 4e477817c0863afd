"""The quickstart's plots: metrics of two runs and counted answers in, PNG files out. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEFORE, AFTER, GRID, TEXT = "#8c96a3", "#1a66c2", "#e3e7ec", "#22303f"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": "#b9c1cb",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "legend.frameon": False,
    "figure.dpi": 110,
    "savefig.facecolor": "white",
}
SMOOTHING_STEPS = 15  # moving average drawn over the single steps

Line = dict[str, Any]  # one line of metrics.jsonl


def success(path: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Plot success rates with 95 % intervals: all held-out prompts, and by number of digits.

    Args:
        path: PNG to write.
        before: a summary's success["before"]: rate, low, high, by_digits.
        after: the same after alignment.
    """
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(9, 3.6), width_ratios=(1, 1.7), sharey=True, layout="constrained"
        )
        for place, (rates, colour) in enumerate(((before, BEFORE), (after, AFTER))):
            left.bar(place, 100 * rates["rate"], width=0.62, color=colour)
            left.errorbar(place, 100 * rates["rate"], yerr=_spread(rates), color=TEXT, capsize=5, linewidth=1.4)
            left.annotate(
                f"{100 * rates['rate']:.1f} %",
                (place, 100 * rates["high"] + 2),
                ha="center",
                va="bottom",
                weight="bold",
            )
        left.set_xticks([0, 1], ["before", "after"])
        left.set_xlim(-0.6, 1.6)
        left.grid(axis="x", visible=False)
        left.set_title("All held-out prompts")
        left.set_ylabel("correct answers, %")
        left.set_ylim(0, 112)  # room for a label above 100 %
        left.set_yticks(range(0, 101, 20))
        for rates, colour, label in ((before, BEFORE, "before"), (after, AFTER, "after")):
            digits = sorted(rates["by_digits"], key=int)
            points = [rates["by_digits"][key] for key in digits]
            right.errorbar(
                [int(key) for key in digits],
                [100 * point["rate"] for point in points],
                yerr=[[_spread(point)[side][0] for point in points] for side in (0, 1)],
                color=colour,
                marker="o",
                markersize=5,
                capsize=3,
                linewidth=1.8,
                label=label,
            )
            right.set_xticks([int(key) for key in digits])
        right.set_title("By length of the prompt")
        right.set_xlabel("digits to sort")
        right.legend(loc="lower left")
        figure.savefig(path)
        plt.close(figure)


def alignment(path: Path, lines: Sequence[Line]) -> None:
    """Plot loss, margin and reward accuracy of the alignment: single steps, their average, and held-out groups."""
    import matplotlib.pyplot as plt

    panels = (
        ("loss", "Loss", "divergence from the target"),
        ("rewards/margins", "Margin", "implied reward, chosen − rejected"),
        ("rewards/accuracies", "Reward accuracy", "groups in the right order, %"),
    )
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.3), layout="constrained")
        for panel, (name, title, unit) in zip(axes, panels, strict=True):
            scale = 100 if name == "rewards/accuracies" else 1
            curve(panel, lines, name, scale=scale, colour=AFTER, label="training batches")
            points = [(line["step"], scale * line[f"eval_{name}"]) for line in lines if f"eval_{name}" in line]
            panel.plot(*zip(*points, strict=True), color="#d9822b", marker="o", markersize=4.5, label="held-out groups")
            panel.set_title(title)
            panel.set_ylabel(unit)
            panel.set_xlabel("step")
        axes[0].set_ylim(bottom=0)
        axes[0].legend(loc="upper right")
        axes[2].set_ylim(top=101)
        figure.savefig(path)
        plt.close(figure)


def pretraining(path: Path, lines: Sequence[Line]) -> None:
    """Plot the loss of the pretraining."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, panel = plt.subplots(figsize=(6, 3), layout="constrained")
        curve(panel, lines, "loss", scale=1, colour=BEFORE, label="training batches")
        panel.set_title("Pretraining on imperfect demonstrations")
        panel.set_ylabel("nats per token")
        panel.set_xlabel("step")
        panel.set_ylim(bottom=0)
        figure.savefig(path)
        plt.close(figure)


def curve(panel, lines: Sequence[Line], name: str, *, scale: float, colour: str, label: str) -> None:
    """Draw single steps faintly and their moving average (fewer at the ends) on top."""
    points = [(line["step"], scale * line[name]) for line in lines if line.get(name) is not None]
    steps, values = [step for step, _ in points], [value for _, value in points]
    half = min(SMOOTHING_STEPS, len(values) // 4) // 2
    windows = [values[max(0, place - half) : place + half + 1] for place in range(len(values))]
    panel.plot(steps, values, color=colour, alpha=0.25, linewidth=0.9)
    panel.plot(steps, [sum(window) / len(window) for window in windows], color=colour, linewidth=2, label=label)


def _spread(rates: dict[str, Any]) -> list[list[float]]:
    """Distances to the interval's ends in points, as errorbar wants them."""
    return [[100 * (rates["rate"] - rates["low"])], [100 * (rates["high"] - rates["rate"])]]
