"""Files that appear whole or not at all."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write(path: Path, text: str) -> Path:
    """Write a text beside its place, move it there, and return the place; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    return temporary.replace(path)


def write_json(path: Path, value: Any) -> Path:
    """Write JSON for people to read; a number that is not finite is a fault of ours."""
    return write(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    """Write JSON Lines."""
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
