"""The model card of a run, to lie as README.md beside the exported model: base model, licence, data, loss, citation.

The licence is the one that the card of the base model names, where that card lies beside its weights here or in the
hub's cache; nothing is fetched.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub

from fpo_jax import __version__
from fpo_jax.eval.report import html
from fpo_jax.eval.report.html import Block, Code, Heading, Table, Text

_LICENCE = ("license", "license_name", "license_link")
_CARD = "README.md"
_BETAS = ("beta", "beta_pi", "tau")  # what losses call their β
CITATION = """\
@article{han2024fpo,
  title   = {f-PO: Generalizing Preference Optimization with f-divergence Minimization},
  author  = {Han, Jiaqi and Jiang, Mingjian and Song, Yuxuan and Ermon, Stefano and Xu, Minkai},
  journal = {arXiv preprint arXiv:2410.21662},
  year    = {2024},
}"""


def text(
    workdir: Path,
    config: Mapping[str, Any],
    audits: Mapping[str, Any],
    found: Sequence[Block],
    settings: Table,
    costs: Table,
) -> str:
    """Return the card.

    Args:
        workdir: of the run.
        config: config.json.
        audits: audit.json, without empty parts.
        found: what the report says of results and loss.
        settings: what differs from the default.
        costs: time and speed.
    """
    licence, options = base_licence(config["model"]), _options(workdir)
    betas = ", ".join(f"`{name}` = {options[name]:g}" for name in _BETAS if isinstance(options.get(name), (int, float)))
    card: list[Block] = [
        Heading(workdir.name, 1),
        Text(
            f"`{base(config)}` after {config['stage']} with the loss `{config['loss']['name']}`"
            f"{f', β: {betas}' if betas else ''}; trained with fpo_jax {__version__}."
        ),
        Heading("Licence"),
        Text(
            f"The base model's card says `{licence['license']}`; the weights here are derived from it."
            if licence
            else "No card of the base model lies here; look its licence up, and name it at `license:` above."
        ),
        Heading("Data"),
        Table(["part", "source", "groups", "tokens"], _data(config, audits), right=False),
        *found,
        Heading("Training"),
        settings,
        costs,
        Heading("Citation"),
        Code(CITATION),
    ]
    return _front_matter(config, licence) + html.markdown(card)


def base(config: Mapping[str, Any]) -> str:
    """Name the model a run started from; of a directory here only the last part is anyone else's business."""
    return _public(config["model"]["path"])


def base_licence(model: Mapping[str, Any]) -> dict[str, str]:
    """Return `license`, `license_name` and `license_link` of the base model's card, {} where it says none.

    Args:
        model: section `model` of config.json.
    """
    name = model["path"]
    path = Path(name).expanduser() / _CARD
    if not path.is_file():
        try:
            cached = huggingface_hub.try_to_load_from_cache(name, _CARD, revision=model.get("revision") or None)
        except ValueError:  # a directory that is gone is no name of the hub
            cached = None
        if not isinstance(cached, str):
            return {}
        path = Path(cached)
    head = re.match(r"---\r?\n(.*?)\n---", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = dict(re.findall(r"^(\w+):[ \t]*([^\r\n]+?)[ \t]*\r?$", head[1], re.MULTILINE)) if head else {}
    plain = {key: found[key].strip("\"'") for key in _LICENCE if key in found}
    return plain if re.fullmatch(r"[\w.+-]+", plain.get("license", "")) else {}


def _options(workdir: Path) -> Mapping[str, Any]:
    """Return the options of the loss as it ran."""
    config = json.loads((workdir / "config.json").read_text())
    return config.get("resolved_loss", {}).get("options", {})


def _data(config: Mapping[str, Any], audits: Mapping[str, Any]) -> list[list[str]]:
    data, rows = config["data"], []
    for name, part in audits.items():
        sources = [_public(entry) for entry in data["mixer"]] if name == "train" and data.get("mixer") else []
        source = ", ".join(sources) or _public(data[name])
        dropped = sum(len(places) for places in part.get("dropped", {}).values())
        note = f" ({dropped:,} dropped)" if dropped else ""
        rows.append([name, f"`{source}`", f"{part['groups']:,} of {part['group_size']}{note}", f"{part['tokens']:,}"])
    return rows


def _public(path: str) -> str:
    return Path(path).name if Path(path).is_absolute() or Path(path).exists() else path


def _front_matter(config: Mapping[str, Any], licence: Mapping[str, str]) -> str:
    """Return the head of a model card as the hub reads it."""
    data = config["data"]["train"]
    lines = ["---", "library_name: transformers", f"base_model: {json.dumps(base(config))}"]
    lines += [f"{key}: {json.dumps(value)}" for key, value in licence.items()]
    if data and "/" in data and not Path(data).is_absolute() and not Path(data).exists():
        lines += ["datasets:", f"- {json.dumps(data)}"]
    tags = ["f-po", "preference-optimization", config["stage"], config["loss"]["name"]]
    return "\n".join([*lines, "tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---", "", ""])
