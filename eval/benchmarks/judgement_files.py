"""Files of judgements -> checked rows; rows of numbers -> a table and a JSON file.

A file is a JSON list, JSON Lines or, where it ends in .csv, a table with a header; each gzipped or not. What the
scorers share is here; what a judgement means is theirs.
"""

import contextlib
import csv
import gzip
import io
import math
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fpo_jax.data import loading
from fpo_jax.distributed import workdir_lock
from fpo_jax.io import atomic_io, jsonl, terminal

# what only the judgements of one benchmark have, and who reads them; the first match counts
_SIGNS = (
    ("games", "Arena-Hard judgements", "fpo arena_hard"),
    ("g1_winner", "MT-Bench pairwise judgements", "fpo mt_bench"),
    ("score", "MT-Bench judgements", "fpo mt_bench"),
    ("preference", "AlpacaEval annotations", "fpo alpaca_eval"),
)
LARGEST_TABLE = 2**28  # bytes that a gzipped table may unpack to

Row = tuple[str, dict[str, Any]]  # place ("file:line" or "file[index]"), fields


def read(path: Path, *, fields: Sequence[str]) -> list[Row]:
    """Read every row of a file, in order.

    Args:
        path: the file.
        fields: what each row must have, null or not.

    Raises:
        ValueError: the file is missing, empty, cut or damaged, or a row lacks one of `fields`; names the row.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file; give a file of judgements.")
    csv_file = path.name.removesuffix(".gz").endswith(".csv")
    found = list(_csv_rows(path)) if csv_file else list(_json_rows(path))
    if not found:
        raise ValueError(f"{path} holds no row; give the judge's finished file.")
    require(found, fields)
    return found


def require(rows: Iterable[Row], fields: Sequence[str]) -> None:
    """Refuse rows that lack a field.

    Raises:
        ValueError: names the first such row, and what it seems to be.
    """
    for place, row in rows:
        missing = [field for field in fields if field not in row]
        if missing:
            raise ValueError(f"{place}: no field {', '.join(map(repr, missing))}; {_what(row)}")


def number(place: str, row: Mapping[str, Any], field: str) -> float:
    """Return a finite number of a row, as JSON or as text of a CSV file.

    Raises:
        ValueError: the field holds something else.
    """
    value = row[field]
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"{place}: {field}={value!r:.80} is no finite number; put the file right.")
    return found


def whole(place: str, row: Mapping[str, Any], field: str) -> int:
    """Return a whole number of a row, 0 or more.

    Raises:
        ValueError: the field holds something else.
    """
    found = number(place, row, field)
    if found < 0 or found != int(found):
        raise ValueError(f"{place}: {field}={row[field]!r:.80} is no whole number from 0 on; put the file right.")
    return int(found)


def text(place: str, row: Mapping[str, Any], field: str) -> str:
    """Return a text of a row.

    Raises:
        ValueError: the field holds something else.
    """
    if not isinstance(row[field], str):
        raise ValueError(f"{place}: {field}={row[field]!r:.80} is no text; put the file right.")
    return row[field]


def only(path: Path, rows: Iterable[Row], field: str, remedy: str) -> str:
    """Return the one value that a field has in all rows, "" where no row has the field.

    Raises:
        ValueError: there are several; `remedy` says what to do.
    """
    values = sorted({str(row[field]) for _, row in rows if field in row})
    if len(values) > 1:
        raise ValueError(f"{path} has {len(values)} values of {field}: {', '.join(values[:5])}; {remedy}")
    return values[0] if values else ""


def latest(rows: Iterable[Row], key: Callable[[Row], Hashable], counts: Callable[[Row], bool]) -> tuple[list[Row], int]:
    """Keep one row of each key: the last that counts, else the last; a run that was repeated leaves several.

    Returns:
        the rows in the order in which their keys first stand, and how many were left out.
    """
    kept: dict[Hashable, Row] = {}
    total = 0
    for row in rows:
        total += 1
        place = key(row)
        if place not in kept or counts(row) or not counts(kept[place]):
            kept[place] = row
    return list(kept.values()), total - len(kept)


def reserved(json: str) -> contextlib.AbstractContextManager[None]:
    """Keep other processes from the file `json`, "" for none."""
    return workdir_lock.beside(Path(json), option="--json") if json else contextlib.nullcontext()


def show(report: Mapping[str, Any], *, table: str, remarks: Iterable[str], json: str) -> None:
    """Print what was scored, after writing all of it to the file `json`, "" for none."""
    if json:
        atomic_io.write_json(Path(json), report)
    terminal.say(table)
    for line in remarks:
        terminal.say(line)


def _json_rows(path: Path) -> Iterable[Row]:
    for place, row in loading.rows(str(path), split=None, data_dir=None, revision=None):
        if isinstance(row, jsonl.BadRow):
            raise ValueError(f"{place}: {row}; cut the row off if its writer was killed, and judge it again.")
        if not isinstance(row, dict):
            raise ValueError(f"{place}: a row must be a JSON object, not {type(row).__name__}.")
        yield place, row


def _csv_rows(path: Path) -> Iterable[Row]:
    data = path.read_bytes()
    try:
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
                data = stream.read(LARGEST_TABLE + 1)
            if len(data) > LARGEST_TABLE:
                raise ValueError(f"it unpacks to more than {LARGEST_TABLE:,} bytes")
        content = data.decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(content, newline=""))
        rows = [(f"{path}:{reader.line_num}", row) for row in reader]
    except (OSError, EOFError, zlib.error, ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a table ({error}); fetch the file again.") from error
    for place, row in rows:
        if None in row or None in row.values():
            raise ValueError(f"{place}: not the {len(reader.fieldnames or ())} columns of the header; fetch it again.")
    return rows


def _what(row: Mapping[str, Any]) -> str:
    for sign, name, program in _SIGNS:
        if sign in row:
            return f"the file holds {name}, which {program} reads."
    return f"it has {', '.join(map(str, list(row)[:8])) or 'none'}."
