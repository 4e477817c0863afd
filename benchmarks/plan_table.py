"""Operations, memory and time of the eight recipes on absent accelerators, padded and with shared prompts.

    python -m benchmarks.plan_table --json runs/plan_table.json --targets h100:4     compile what is not in the file yet
    python -m benchmarks.plan_table --json runs/plan_table.json                      the table of what it holds

What `benchmarks/plans.py` says of its compilers holds here. `longest` are rows of the longest groups that a recipe
allows, with as many groups a device and micro-batch in both layouts; where no limit separates prompt and completion,
the completion takes what the longest prompt leaves. `real` are the lengths of the sets of `benchmarks/layouts.py`, for
the recipes on chat and HH pairs; a row of shared prompts then takes several groups, and a device as many positions.
Operations are those of the compiled update, recomputation included.
"""

import argparse
import importlib
import json
from pathlib import Path

from benchmarks import layouts, plans
from fpo_jax.io import atomic_io

REAL = dict.fromkeys(("mistral_base", "mistral_instruct", "llama3_base", "llama3_instruct"), "pref_chat")
REAL["pythia_hh_pref"] = "hh_rlhf"
LAYOUTS = ("padded", "shared")
NAMES = {"h100:4": "4 x H100", "v5p-8": "v5p-8"}


def longest(recipe: str, layout: str) -> dict[str, object]:
    """Return what a recipe changes for rows of its longest groups."""
    data = importlib.import_module(f"fpo_jax.configs.{recipe}").get_config().data
    completion = data.max_completion_length or data.max_length - data.max_prompt_length
    changes: dict[str, object] = {"data.eval": "", "data.eval_split": ""}
    if layout == "shared":
        row = data.max_length - completion + data.group_size * completion
        changes |= {"data.layout": "shared", "data.row_length": row}
    return changes


def real(recipe: str, layout: str, folder: Path) -> dict[str, object]:
    """Return what a recipe changes to read one of the SETS."""
    of = layouts.SETS[REAL[recipe]]
    changes: dict[str, object] = {
        "data.eval": "",
        "data.eval_split": "",
        "data.format": of["format"],
        "data.layout": layout,
    }
    changes |= {"data.train": str(folder / of["train"]), "data.train_split": "", "data.subfolder": ""}
    changes |= {"plan.groups": None, "tokenizer.eos_token": of["eos"]}
    if recipe.startswith("mistral"):  # whose vocabulary is too small for the set's own
        return changes | {"tokenizer.path": str(folder / "tokenizers" / "mistral-v1.model")}
    return changes | {"tokenizer.path": str(folder / of["tokenizer"]), "tokenizer.chat_template": ""}


def table(found: dict[str, dict]) -> str:
    """Rows as Markdown; a ratio is padded over shared."""
    lines = [
        "| recipe | lengths | target | PFLOP: padded, shared | ratio | peak GiB a device | s an update at best |",
        "|---" * 7 + "|",
    ]
    for key, shared in found.items():
        recipe, lengths, target, layout = key.split(" ")
        padded = found.get(f"{recipe} {lengths} {target} padded")
        if layout == "padded" or padded is None:
            continue
        work, peak, best = ((padded[name], shared[name]) for name in ("operations", "peak", "best"))
        cells = (
            f"`{recipe}`",
            lengths,
            NAMES.get(target, target),
            f"{work[0] / 1e15:.2f}, {work[1] / 1e15:.2f}",
            f"{work[0] / work[1]:.2f}",
            f"{peak[0] / 2**30:.1f}, {peak[1] / 2**30:.1f}",
            f"{best[0]:.2f}, {best[1]:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Compile what is asked for and not there yet; print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="what was found, kept from run to run")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the SETS' files")
    parser.add_argument("--targets", nargs="+", default=[], choices=NAMES)
    parser.add_argument("--recipes", nargs="+", default=list(plans.RECIPES), choices=plans.RECIPES)
    parser.add_argument("--lengths", nargs="+", default=["longest", "real"], choices=("longest", "real"))
    options = parser.parse_args()
    found = json.loads(options.json.read_text()) if options.json.exists() else {}
    for target in options.targets:
        for recipe in options.recipes:
            for layout in LAYOUTS:
                for lengths in options.lengths:
                    if lengths == "real" and recipe not in REAL:
                        continue
                    changes = longest(recipe, layout) if lengths == "longest" else real(recipe, layout, options.data)
                    key = f"{recipe} {lengths} {target} {layout}"
                    if key not in found:
                        found[key] = plans.one(recipe, target, changes)
                        if lengths == "real" and "measured on the data" not in found[key]["text"]:
                            raise RuntimeError(f"{key}: the data were not read:\n{found[key]['text']}")
                        atomic_io.write_json(options.json, found)
                        print(key, f"{found[key]['wall']:.0f} s", flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
