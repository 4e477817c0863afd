"""Every recipe on every target of the acceptance list, compiled for real: writes docs/plan.md from the numbers.

    python -m benchmarks.plans --json runs/plans.json                    all that is not in the file yet
    python -m benchmarks.plans --json runs/plans.json --targets v5e-16   some of them
    python -m benchmarks.plans --json runs/plans.json --write            docs/plan.md from what the file holds

Needs the compilers of the targets (`make test-deviceless` installs them); one process can hold one kind of compiler, so
run it once with the TPU's and once with the GPU's. No weights, no data, no network: the models' sizes stand below.
"""

import argparse
import importlib
import json
import tempfile
import time
from pathlib import Path

import jax

from fpo_jax import models, plan
from fpo_jax.perf import hardware
from fpo_jax.plan import roofline, suggestions

DOCUMENT = Path(__file__).parent.parent / "docs" / "plan.md"
TARGETS = ("h100:4", "v5p-8", "v6e-8", "v5e-16")

# Sizes that the models' publishers state in their config.json files.
_MISTRAL = {"layers": 32, "width": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "ffn": 14336, "vocab_size": 32000}
MODELS = {
    "Mistral-7B-v0.1": models.ModelConfig(family="mistral", max_positions=32768, sliding_window=4096, **_MISTRAL),
    "Mistral-7B-Instruct-v0.2": models.ModelConfig(
        family="mistral", max_positions=32768, rope=models.Rope(theta=1e6), **_MISTRAL
    ),
    "Llama-3-8B": models.ModelConfig(
        family="llama", max_positions=8192, rope=models.Rope(theta=5e5), **(_MISTRAL | {"vocab_size": 128256})
    ),
    "Pythia-2.8B": models.ModelConfig(
        family="gpt_neox",
        layers=32,
        width=2560,
        heads=32,
        kv_heads=32,
        head_dim=80,
        ffn=10240,
        vocab_size=50304,
        max_positions=2048,
        activation="gelu",
        parallel_residual=True,
        rope=models.Rope(fraction=0.25),
    ),
}
RECIPES = {  # configs/NAME.py -> its model
    "mistral_base": "Mistral-7B-v0.1",
    "mistral_instruct": "Mistral-7B-Instruct-v0.2",
    "llama3_base": "Llama-3-8B",
    "llama3_instruct": "Llama-3-8B",
    "pythia_hh_pref": "Pythia-2.8B",
    "pythia_hh_rw": "Pythia-2.8B",
    "pythia_tldr_pref": "Pythia-2.8B",
    "pythia_tldr_rw": "Pythia-2.8B",
}


def main() -> None:
    """Compile what is asked for and not there yet; write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="what was found, kept from run to run")
    parser.add_argument("--targets", nargs="+", default=[])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.name}")
    arguments = parser.parse_args()
    found = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    for target in arguments.targets:
        for recipe in arguments.recipes:
            key = f"{recipe} {target}"
            if key not in found:
                found[key] = one(recipe, target, {})
                arguments.json.write_text(json.dumps(found, indent=1))
                print(key, found[key]["fits"], f"{found[key]['peak'] / 2**30:.2f} GiB", flush=True)
    if arguments.write:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(document(found))


def one(recipe: str, target: str, changes: dict[str, object]) -> dict:
    """Plan one recipe on one target, with some keys changed."""
    config = suggestions.changed(importlib.import_module(f"fpo_jax.configs.{recipe}").get_config(), changes)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        name, directory = config.model.path, Path(folder, RECIPES[recipe])
        directory.mkdir()
        directory.joinpath("config.json").write_text(json.dumps(models.to_hf_config(MODELS[RECIPES[recipe]])))
        config.model.path = str(directory)
        report = plan.run(config, target)
        text = report.text.replace(str(directory), name)
    outcome = report.outcome
    capacity = hardware.capacity(outcome.layout.mesh.devices.flat[0])
    seconds = roofline.estimate(outcome, capacity)
    return {
        "preset": config.mesh.preset,
        "mesh": dict(outcome.layout.mesh.shape),
        "layout": outcome.config.data.layout,
        "remat": outcome.config.model.remat,
        "micro_batch": outcome.config.train.micro_batch_per_device,
        "accumulation": outcome.accumulation,
        "batch": config.train.batch_size,
        "state": outcome.state,
        "peak": outcome.peak,
        "peak_of": max(outcome.programs, key=lambda program: program.peak).name,
        "limit": report.limit,
        "fits": report.fits,
        "remedy": report.suggestion.text if report.suggestion else "",
        "compile": {program.name: round(program.seconds, 1) for program in outcome.programs},
        "predicted": seconds.predicted,
        "best": seconds.best,
        "most": seconds.most,
        "steps": outcome.sizes.steps,
        "operations": outcome.operations,
        "text": text,
        "wall": round(time.perf_counter() - started, 1),
        "jax": jax.__version__,
    }


def document(found: dict) -> str:
    """Return docs/plan.md: a table for each target, and one plan in full."""
    parts = [_HEAD]
    for target in TARGETS:
        rows = [(recipe, found.get(f"{recipe} {target}")) for recipe in RECIPES]
        limit = next(row["limit"] for _, row in rows if row)
        parts.append(
            f"## {target}: {_gib(limit)} GiB a device\n\n{_TABLE}" + "".join(map(_row, *zip(*rows, strict=True)))
        )
    example = next(text for text in (row["text"] for row in found.values()) if text)
    return "\n".join([*parts, f"## One of them in full\n\n```\n{example}\n```\n"])


_HEAD = """# Plans of the recipes

What `fpo plan --config RECIPE --target TARGET` says of the eight recipes of the original, each with its global
batch. Written by `benchmarks/plans.py` from programs that the targets' compilers really compiled (two cores
with other work beside: compile times are upper bounds). Nothing here has run on the targets. Rows are the longest that
a recipe allows, with every position counted; real rows are shorter.

- **peak**: the most that a device holds in any program of the run, and which one.
- **s a step**: what `fpo plan` predicts; in brackets from perfect overlap at the data sheets' rates to none.
- **settings**: what the run settles for itself; the preset is the default, `fsdp`, everywhere.
"""
_TABLE = """| recipe | settings | micro-batches | state GiB | peak GiB | free | s a step | h a run | compiled in |
|---|---|---|---|---|---|---|---|---|
"""


def _row(recipe: str, plan_: dict | None) -> str:
    if plan_ is None:
        return f"| `{recipe}` | | | | not compiled | | | | |\n"
    predicted, steps = plan_["predicted"], plan_["steps"]
    hours = f"{steps * predicted / 3600:.2f}" if steps else "unknown"
    cells = (
        f"`{recipe}`",
        f"{plan_['layout']}, remat {plan_['remat']}",
        f"{plan_['accumulation']} of {plan_['micro_batch']} a device",
        _gib(plan_["state"]),
        f"{_gib(plan_['peak'])} ({plan_['peak_of']})",
        f"{1 - plan_['peak'] / plan_['limit']:.0%}" if plan_["fits"] else "**does not fit**",
        f"{predicted:.1f} ({plan_['best']:.1f} to {plan_['most']:.1f})",
        hours,
        f"{plan_['compile']['step']:.0f} s",
    )
    return f"| {' | '.join(cells)} |\n"


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f}"


if __name__ == "__main__":
    main()
