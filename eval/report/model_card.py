"""The model card of a run with its results, to lie as README.md beside the exported model.

Head, licence, summary and citation are those of `fpo_jax.trainer.model_card`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fpo_jax.eval.report import html
from fpo_jax.eval.report.html import Block, Code, Heading, Table, Text
from fpo_jax.trainer import model_card as parts


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
    licence = parts.base_licence(config["model"])
    card: list[Block] = [
        Heading(workdir.name, 1),
        Text(parts.summary(config, _options(workdir))),
        Heading("Licence"),
        Text(parts.licence_text(licence)),
        Heading("Data"),
        Table(["part", "source", "groups", "tokens"], _data(config, audits), right=False),
        *found,
        Heading("Training"),
        settings,
        costs,
        Heading("Citation"),
        Code(parts.CITATION),
    ]
    return parts.front_matter(config, licence) + html.markdown(card)


def _options(workdir: Path) -> Mapping[str, Any]:
    """Return the options of the loss as it ran."""
    config = json.loads((workdir / "config.json").read_text())
    return config.get("resolved_loss", {}).get("options", {})


def _data(config: Mapping[str, Any], audits: Mapping[str, Any]) -> list[list[str]]:
    data, rows = config["data"], []
    for name, part in audits.items():
        sources = [parts.public(entry) for entry in data["mixer"]] if name == "train" and data.get("mixer") else []
        source = ", ".join(sources) or parts.public(data[name])
        dropped = sum(len(places) for places in part.get("dropped", {}).values())
        note = f" ({dropped:,} dropped)" if dropped else ""
        rows.append([name, f"`{source}`", f"{part['groups']:,} of {part['group_size']}{note}", f"{part['tokens']:,}"])
    return rows
