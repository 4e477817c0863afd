"""Columns of a row: those that a format reads, and those that it leaves, which are noted and never passed over.

What flows in: a row and the sets of columns that a format takes. What flows out: the columns that are read, notes of
the others, and one warning of those that would change what the model is asked.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fpo_jax.io.jsonl import BadRow

log = logging.getLogger("fpo_jax")

MISSING = "missing or null"  # begins what is said of a row that lacks a column
NOT_USED = "column_not_used:"  # begins a note; the column's name ends it
# what other trainers and sets have for the model to see, or weigh a row by
TELLING = ("system", "system_prompt", "history", "functions", "documents", "chat_template_kwargs", "margin")
TELLING += ("weight", "image", "images", "audio", "audios", "video", "videos")


def used(row: Mapping[str, Any], column_sets: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    """Return the columns that make a row what it is: the set of which it lacks fewest, the first of several.

    Raises:
        BadRow: it lacks one of every set.
    """
    names = min(column_sets, key=lambda names: sum(row.get(name) is None for name in names))
    require(row, *names)
    return {name: row[name] for name in names}


def require(row: Mapping[str, Any], *names: str) -> None:
    """Refuse a row that lacks one of the columns.

    Raises:
        BadRow: it does, or the value could not be parsed.
    """
    if missing := [name for name in names if row.get(name) is None]:
        raise BadRow(f"{MISSING}: {', '.join(missing)}; wanted {', '.join(names)}; found {', '.join(row) or 'none'}")
    for name in names:
        if isinstance(row[name], BadRow):
            raise row[name]


def unused(row: Mapping[str, Any], *used: str) -> list[str]:
    """Return the other columns that say something.

    >>> unused({"prompt": "p", "functions": [], "system": "Be brief.", "margin": None}, "prompt")
    ['system']
    """
    return [name for name, value in row.items() if name not in used and not _is_empty(value)]


def warn(source: str, format: str, noted: Mapping[str, Sequence[str]]) -> None:
    """Log one line about noted columns that would change what the model is asked, or how much a row counts."""
    found = {name: len(noted[NOT_USED + name]) for name in TELLING if NOT_USED + name in noted}
    if found:
        described = ", ".join(f"{name} ({count} rows)" for name, count in found.items())
        where = " (a system text is used where the prompt is messages without a system turn)" * ("system" in found)
        log.warning(
            "%s: format %r does not use the columns %s%s; write them into the prompt, or drop them.",
            source, format, described, where,
        )  # fmt: skip


def _is_empty(value: Any) -> bool:
    return not value.strip() if isinstance(value, str) else value in (None, [], {})
