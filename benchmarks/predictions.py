"""Every step time that the project has measured on an accelerator, beside what `fpo plan` predicts for it.

    python -m benchmarks.predictions --json runs/predictions.json                 compile what is not in the file yet
    python -m benchmarks.predictions --json runs/predictions.json --only 0 8      some of them
    python -m benchmarks.predictions --json runs/predictions.json --table         the table of what it holds

The measurements are those of docs/lab-notes. Each one's batches are made anew and its step is compiled for the device
that it ran on, which need not be here; the compiler of the target is (`make test-deviceless` installs it). Measured
before logits were kept for the backward pass, so that they are computed again here, too. The aim is a ratio within
15 % of 1.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import random_model, train_step_gpu, train_step_sides, utilisation
from fpo_jax import config as configuration
from fpo_jax import data
from fpo_jax.io import atomic_io
from fpo_jax.perf import hardware
from fpo_jax.plan import compilation, roofline
from fpo_jax.trainer import batch_shapes, run_inputs, run_schedule

AIM = 0.15


class Measured(NamedTuple):
    """A step that ran."""

    what: str  # layers, layout where it is not shared, attention, remat, groups or rows a pass
    seconds: float
    run: Callable[[], tuple[configuration.Config, run_inputs.Inputs]]
    target: str = "h200:1"


def drawn(*, micro: int, layers=16, layout="shared", remat="dots", attention="cudnn", fields: tuple[str, ...] = ()):
    """Return how to make the run of `benchmarks/utilisation.py` with such options."""

    def make() -> tuple[configuration.Config, run_inputs.Inputs]:
        options = argparse.Namespace(
            layers=layers, remat=remat, attention=attention, layout=layout, groups=64, micro=micro, fields=fields
        )
        config = utilisation.configured(options)
        shape = random_model.mistral(layers)
        prepared = utilisation.pairs(options.groups * 4, shape.vocab_size)
        return config, run_inputs.Inputs(
            run_inputs.check(config), Path("drawn"), shape, run_inputs.Dataset(prepared, None, ""), None
        )

    return make


def compared(name: str, **changes):
    """Return how to make our run with shared prompts of a case of `benchmarks/train_step.py --device gpu`."""

    def make() -> tuple[configuration.Config, run_inputs.Inputs]:
        (case,) = (one for one in train_step_gpu.CASES if one.name == name)
        case = dataclasses.replace(case, **changes)
        shape = random_model.mistral(case.layers, vocab=case.vocab, width=case.width)
        return train_step_sides.our_inputs(case, Path("drawn"), shape, "shared")

    return make


_ZERO2 = ("mesh.preset=zero2",)
_MOMENTS = ("optim.state_dtype=bfloat16",)
MEASURED = (
    Measured("16 layers, padded, cuDNN, dots, 4", 9.66, drawn(micro=4, layout="padded")),
    Measured("16 layers, blocks of XLA, full, 2", 5.74, drawn(micro=2, attention="chunked", remat="full")),
    Measured("16 layers, cuDNN, none, 2", 3.30, drawn(micro=2, remat="none")),
    Measured("16 layers, cuDNN, dots, 2", 3.12, drawn(micro=2)),
    Measured("16 layers, cuDNN, dots, 4", 2.96, drawn(micro=4)),
    Measured("16 layers, cuDNN, dots, 4, zero2", 2.90, drawn(micro=4, fields=_ZERO2)),
    Measured("16 layers, Mosaic, dots, 4, zero2", 2.64, drawn(micro=4, attention="mosaic", fields=_ZERO2)),
    Measured("32 layers, Mosaic, dots, 2", 5.37, drawn(layers=32, micro=2, attention="mosaic", fields=_MOMENTS)),
    Measured("12 layers, 8 pairs of 1,536 + 512, dots, 8", 0.627, compared("mistral long", remat="dots", micro=8)),
)


def predict(measured: Measured) -> dict:
    """Compile the step and return its times in seconds."""
    config, inputs = measured.run()
    config.kernel.kept_logits_mib = 0
    devices = hardware.all_devices(measured.target)
    outcome = compilation.compile_all(config, devices, sizes=_sizes(config, inputs, ways=len(devices)))
    capacity = hardware.capacity(devices[0])
    assert capacity is not None
    seconds = roofline.estimate(outcome, capacity)
    return {
        "measured": measured.seconds,
        **{name: getattr(seconds, name) for name in ("predicted", "best", "most", "products", "kernels")},
        "operations": outcome.operations,
        "length": outcome.sizes.train_step.length,
        "micro_batches": outcome.accumulation,
        "compiled_in": outcome.programs[0].seconds,
        "choices": outcome.choices,
    }


def _sizes(config: configuration.Config, inputs: run_inputs.Inputs, *, ways: int) -> batch_shapes.Sizes:
    """The shapes of steps alone."""
    plan, filled = run_schedule.build(config, inputs, devices=ways), 1.0
    if plan.schedule.rows is not None:
        used = [data.row_sizes(plan.schedule, number).rows for number in range(plan.steps)]
        filled = float(np.mean(used)) / plan.schedule.parts
    return batch_shapes.Sizes(
        blueprint=run_schedule.blueprint(config, inputs, plan),
        train_step=batch_shapes.largest(plan.schedule, plan.steps),
        accumulation=plan.accumulation,
        filled=filled,
        evaluation=None,
        scoring=None,
        scoring_eval=None,
        scoring_batches=None,
        groups=inputs.train.prepared.groups,
        steps=plan.steps,
        valid=None,
        origin="the batches of the measurement",
    )


def table(found: dict[str, dict]) -> str:
    """Return the times as Markdown."""
    lines = ["| step | measured s | predicted s | ratio | at best | no overlap |", "|---" * 6 + "|"]
    for what, row in found.items():
        ratio = row["predicted"] / row["measured"]
        marked = f"{ratio:.2f}" if abs(ratio - 1) <= AIM else f"**{ratio:.2f}**"
        lines.append(
            f"| {what} | {row['measured']:.2f} | {row['predicted']:.2f} | {marked} | {row['best']:.2f}"
            f" | {row['most']:.2f} |"
        )
    within = sum(abs(row["predicted"] / row["measured"] - 1) <= AIM for row in found.values())
    return "\n".join([*lines, "", f"{within} of {len(found)} within {AIM:.0%}"])


def main() -> None:
    """Compile what is asked for and not there yet; print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="what was found, kept from run to run")
    parser.add_argument("--only", nargs="+", type=int, default=list(range(len(MEASURED))), help="places in MEASURED")
    parser.add_argument("--table", action="store_true", help="compile nothing")
    options = parser.parse_args()
    found = json.loads(options.json.read_text()) if options.json.exists() else {}
    for number in [] if options.table else options.only:
        if MEASURED[number].what not in found:
            found[MEASURED[number].what] = one = predict(MEASURED[number])
            atomic_io.write_json(options.json, found)
            print(
                f"{MEASURED[number].what}: {one['predicted']:.2f} s, compiled in {one['compiled_in']:.0f} s", flush=True
            )
    print(table({one.what: found[one.what] for one in MEASURED if one.what in found}))


if __name__ == "__main__":
    main()
