"""Draw the pictures of docs/images/ from runs of the quickstart: `python tools/doc_pictures.py`, in the checkout.

It needs matplotlib and these runs, which take some minutes on two cores:

    fpo quickstart --workdir runs/quickstart
    fpo train --config quickstart --workdir runs/quickstart/align-hot --config.optim.learning_rate=0.02
    fpo train --config quickstart --workdir runs/quickstart/align-cold --config.optim.learning_rate=1e-5
    fpo train --config quickstart --workdir runs/quickstart/align-sharp --config.loss.beta_r=0.05
"""

import shutil
from pathlib import Path

from fpo_jax.eval.quickstart.quickstart_plots import STYLE
from fpo_jax.io import jsonl

RUNS, IMAGES = Path("runs/quickstart"), Path("docs/images")
COMPARED = {  # folder -> label, colour
    "align-alpha": ("healthy", "#1a66c2"),
    "align-hot": ("rate 40 times too high", "#c0392b"),
    "align-cold": ("rate 50 times too low", "#8c96a3"),
    "align-sharp": ("β_r a tenth", "#d9822b"),
}
PANELS = (  # metric of the evaluations, title, unit
    ("eval_rewards/accuracies", "Reward accuracy", "groups in the right order, %"),
    ("eval_rewards/margins", "Margin", "chosen − rejected"),
    ("eval_logps/chosen", "Log-prob of chosen", "nats per completion"),
    ("eval_sft_loss", "NLL of chosen, without the red run", "nats per token"),
)


def main() -> None:
    """Copy the plots of the quickstart's report and draw the sick runs beside the healthy one."""
    import matplotlib.pyplot as plt

    IMAGES.mkdir(parents=True, exist_ok=True)
    for name in ("success.png", "alignment.png"):
        shutil.copyfile(RUNS / "report" / name, IMAGES / name)
    runs = {
        label: (jsonl.read(RUNS / folder / "metrics.jsonl"), colour) for folder, (label, colour) in COMPARED.items()
    }
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
        for panel, (name, title, unit) in zip(axes.flat, PANELS, strict=True):
            scale = 100 if name.endswith("accuracies") else 1
            for label, (lines, colour) in runs.items():
                if "without" in title and "high" in label:
                    continue  # it would press the others onto one line
                points = [(line["step"], scale * line[name]) for line in lines if name in line]
                panel.plot(
                    *zip(*points, strict=True), color=colour, marker="o", markersize=4, linewidth=1.8, label=label
                )
            panel.set_title(title)
            panel.set_ylabel(unit)
            panel.set_xlabel("step")
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        figure.savefig(IMAGES / "sick.png")
        plt.close(figure)


if __name__ == "__main__":
    main()
