"""The model card of an export: what the hub reads at its head, base model, licence, loss, citation.

The licence is the one that the card of the base model names, where that card lies beside its weights here or in the
hub's cache; nothing is fetched. `fpo report` writes a longer card from the same parts, with results.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub

from fpo_jax import __version__

FILE = "README.md"
REPORTED = Path("report") / "model_card.md"  # in a workdir, where `fpo report` wrote one
_LICENCE = ("license", "license_name", "license_link")
_BETAS = ("beta", "beta_pi", "tau")  # what losses call their β
CITATION = """\
@article{han2024fpo,
  title   = {f-PO: Generalizing Preference Optimization with f-divergence Minimization},
  author  = {Han, Jiaqi and Jiang, Mingjian and Song, Yuxuan and Ermon, Stefano and Xu, Minkai},
  journal = {arXiv preprint arXiv:2410.21662},
  year    = {2024},
}"""


def of_export(workdir: Path, config: Mapping[str, Any], *, step: int, library: str = "transformers") -> str:
    """Return the card of an export: that of `fpo report` where the run has one, else a short one.

    Args:
        workdir: of the run.
        config: of the run, as its checkpoints hold it.
        step: of the checkpoint.
        library: that reads the export, `transformers` or `peft`.
    """
    if library == "transformers" and (workdir / REPORTED).is_file():
        return (workdir / REPORTED).read_text(encoding="utf-8")
    path = workdir / "config.json"
    resolved = json.loads(path.read_text(encoding="utf-8")).get("resolved_loss", {}) if path.is_file() else {}
    licence = base_licence(config["model"])
    about = summary(config, resolved.get("options", {})).removesuffix(".")
    return "\n".join(
        [
            front_matter(config, licence, library=library) + f"# {workdir.name}",
            "",
            f"{about}, step {step}.",
            "",
            f"Licence: {licence_text(licence)}",
            "",
            "```",
            CITATION,
            "```",
            "",
        ]
    )


def summary(config: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """Return one sentence about a run.

    Args:
        config: of the run.
        options: of its loss, as it ran.
    """
    betas = ", ".join(f"`{name}` = {options[name]:g}" for name in _BETAS if isinstance(options.get(name), (int, float)))
    return (
        f"`{base(config)}` after {config['stage']} with the loss `{config['loss']['name']}`"
        f"{f', β: {betas}' if betas else ''}; trained with fpo_jax {__version__}."
    )


def licence_text(licence: Mapping[str, str]) -> str:
    """Return one sentence about the licence of the base model."""
    if licence:
        return f"The base model's card says `{licence['license']}`; the weights here are derived from it."
    return "No card of the base model lies here; look its licence up, and name it at `license:` above."


def base(config: Mapping[str, Any]) -> str:
    """Name the model a run started from; of a directory here only the last part is anyone else's business."""
    return public(config["model"]["path"])


def base_licence(model: Mapping[str, Any]) -> dict[str, str]:
    """Return `license`, `license_name` and `license_link` of the base model's card, {} where it says none.

    Args:
        model: section `model` of config.json.
    """
    name = model["path"]
    path = Path(name).expanduser() / FILE
    if not path.is_file():
        try:
            cached = huggingface_hub.try_to_load_from_cache(name, FILE, revision=model.get("revision") or None)
        except ValueError:  # a directory that is gone is no name of the hub
            cached = None
        if not isinstance(cached, str):
            return {}
        path = Path(cached)
    head = re.match(r"---\r?\n(.*?)\n---", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = dict(re.findall(r"^(\w+):[ \t]*([^\r\n]+?)[ \t]*\r?$", head[1], re.MULTILINE)) if head else {}
    plain = {key: found[key].strip("\"'") for key in _LICENCE if key in found}
    return plain if re.fullmatch(r"[\w.+-]+", plain.get("license", "")) else {}


def public(path: str) -> str:
    """Return a hub name, or the last part of a path here."""
    return Path(path).name if Path(path).is_absolute() or Path(path).exists() else path


def front_matter(config: Mapping[str, Any], licence: Mapping[str, str], *, library: str = "transformers") -> str:
    """Return the head of a model card as the hub reads it.

    Args:
        config: of the run.
        licence: from `base_licence`.
        library: that reads the model.
    """
    data = config["data"]["train"]
    lines = ["---", f"library_name: {library}", f"base_model: {json.dumps(base(config))}"]
    lines += [f"{key}: {json.dumps(value)}" for key, value in licence.items()]
    if data and "/" in data and not Path(data).is_absolute() and not Path(data).exists():
        lines += ["datasets:", f"- {json.dumps(data)}"]
    tags = ["f-po", "preference-optimization", config["stage"], config["loss"]["name"]]
    return "\n".join([*lines, "tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---", "", ""])
