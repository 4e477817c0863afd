"""Rows from wherever they lie: a file, a directory, a saved data set, the hub.

What flows in: a source as the user wrote it. What flows out: (place, row) pairs, the place being "file:line" or
"name[index]". A row that cannot be parsed comes out as the `BadRow` that says why; a source that cannot be read on is a
ValueError. A line ends at LF, never at U+2028, and what a file holds is told by its first characters, then by its name.

The cells of a CSV file are texts, and an empty one is null.
"""

import codecs
import collections
import csv
import gzip
import itertools
import json
import logging
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fpo_jax.data import tabular_files

_DATA_SUFFIX = re.compile(r"\.(jsonl?|ndjson|gz|csv|tsv|txt|parquet|pq|arrow|feather|zip|zst|bz2|xz|xlsx?|tar|tgz)$")
_ABOUT = ("dataset_info.json", "dataset_infos.json")  # of a copy of a hub data set, about its rows
_ENTRY = re.compile(r"(?P<source>.+?)(@(?P<split>[^@=/]+))?=(?P<value>[^=]+)")
log = logging.getLogger("fpo_jax")

LONGEST_LINE = 2**26  # bytes of one row
LARGEST_LIST = 2**30  # bytes of a JSON list, which is held as a whole; both count what a gzip stream unpacks to
_DELIMITERS = {"csv": ",", "tsv": "\t"}
_NAMED = 8  # files in a message
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class BadRow(ValueError):
    """A row that is not what its format says; `read` adds the file and line.

    A fault inside JSON stands as a value of this type where the faulty value would be, so that it is reported with its
    own row, and only if that value is used.
    """

    def __init__(self, fact: str, line: int = 1):
        super().__init__(fact)
        self.line = line  # within the text that was parsed, from 1


def rows(source: str, *, split: str | None, data_dir: str | None, revision: str | None) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) from whatever `source` is; see `records.read` for the arguments.

    Raises:
        ValueError: nothing there, a damaged gzip stream or JSON list, an option that does not apply to the source.
    """
    path = Path(source).expanduser()
    if path.exists() and (data_dir or revision):
        raise ValueError(f"data_dir and revision apply to hub data sets only, and {source!r} is local; leave them out")
    if path.is_dir():
        saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
        yield from _saved_rows(path, split) if saved else _directory_rows(path, split)
    elif path.exists():
        if split:
            raise ValueError(f"split={split!r} applies to directories and hub data sets, and {source!r} is one file")
        yield from _file_rows(path)
    elif _HUB_NAME.fullmatch(source) and not _DATA_SUFFIX.search(source) and not source.startswith("."):
        yield from _hub_rows(source, split, data_dir, revision)
    else:
        raise ValueError(f"no file or directory {source!r} (a hub data set is named owner/name)")


def _directory_rows(path: Path, split: str | None) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a folder's files in the order of their names; of folders below it if it has none itself."""
    found: list[Path] = []
    for below in (path.iterdir(), path.rglob("*")):
        found = [file for file in sorted(below) if _holds_rows(file, path)]
        chosen = [file for file in found if not split or _is_of_split(file.relative_to(path), split)]
        if chosen:
            break
    else:
        there = [file.relative_to(path).as_posix() for file in found or sorted(path.rglob("*")) if file.is_file()]
        what = f"{split}.* or {split}-*, nor one below a folder {split}," if split else "with rows"
        told = ", ".join(there[:_NAMED]) + (f" and {len(there) - _NAMED} more" if len(there) > _NAMED else "")
        raise ValueError(
            f"the directory {str(path)!r} has no file {what} of {tabular_files.READ}; it has {told or 'none'}"
        )
    kinds = {file.relative_to(path).as_posix(): tabular_files.named(file) for file in chosen}
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{name} ({kind})" for name, kind in itertools.islice(kinds.items(), _NAMED))
        raise ValueError(
            f"the directory {str(path)!r} mixes kinds of files, {told}; name one of them, or take the others away"
        )
    if len(chosen) > 1 and not split:
        log.info("%s: no split is named, and all of its %d files are read: %s", path, len(chosen), ", ".join(kinds))
    for file in chosen:
        yield from _file_rows(file)


def _holds_rows(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.is_file() and not hidden and tabular_files.named(file) is not None and file.name not in _ABOUT


def _is_of_split(name: Path, split: str) -> bool:
    """Whether a file below the directory is of the split: by its own name, or that of a folder it is in."""
    return bool(re.match(rf"{re.escape(split)}[.-]", name.name)) or split in name.parts[:-1]


def _saved_rows(path: Path, split: str | None) -> Iterator[tuple[str, Any]]:
    import datasets  # a second to import, and most sources are files

    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        check_choice("split", split or "", [str(name) for name in saved])
        saved = saved[split or ""]
    elif split:
        raise ValueError(f"split={split!r}, but the data set saved in {str(path)!r} has no splits; leave it out")
    yield from ((f"{path}[{index}]", row) for index, row in enumerate(saved))


def _hub_rows(name: str, split: str | None, data_dir: str | None, revision: str | None) -> Iterator[tuple[str, Any]]:
    import datasets

    if not split:
        raise ValueError(f"the hub data set {name!r} needs a split, for example split='train'")
    try:
        table = datasets.load_dataset(name, split=split, data_dir=data_dir, revision=revision)
    except Exception as error:  # the library raises a dozen types here, from DNS to a missing split
        cause = " ".join(str(error).split())[:300]
        raise ValueError(
            f"there is no local path {name!r}, and the hub data set of that name cannot be loaded ({split!r}): {cause}"
        ) from error
    yield from ((f"{name}[{index}]", row) for index, row in enumerate(table))


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    kind = tabular_files.kind(path)
    if kind == "json":
        return _json_rows(path)
    return _csv_rows(path, delimiter=_DELIMITERS[kind]) if kind in _DELIMITERS else tabular_files.rows(path, kind)


def _csv_rows(path: Path, *, delimiter: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of a table with a header."""
    csv.field_size_limit(LONGEST_LINE)
    reader = csv.reader(_decoded(path), delimiter=delimiter, strict=True)
    header: list[str] = []
    begins = 1
    try:
        for cells in reader:
            place, begins = f"{path}:{begins}", reader.line_num + 1
            if not header and cells:
                header = cells
                if len(set(header)) < len(header) or not all(header):
                    raise ValueError(f"{place}: the header needs one name for each column, none twice; it is {header}")
            elif cells and len(cells) != len(header):
                yield place, BadRow(f"{len(cells)} cells under a header of {len(header)} columns")
            elif cells:
                yield place, {name: cell or None for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise ValueError(
            f"{path}:{begins}: broken CSV ({error}); write the table again, with its quotes doubled"
        ) from error


def _decoded(path: Path) -> Iterator[str]:
    for number, line in _lines(path):
        _check_length(path, number, line)
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason}); save the table as UTF-8") from error


def _check_length(path: Path, number: int, line: bytes) -> None:
    if len(line) > LONGEST_LINE:
        raise ValueError(f"{path}:{number}: the line is longer than {LONGEST_LINE:,} bytes, which no row can be")


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of a JSON list or of JSON Lines, whichever the first character says."""
    lines = _lines(path)
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        return
    number, line = first
    if line.lstrip().startswith(b"["):
        whole = _loads(_joined(path, line, lines))
        if isinstance(whole, BadRow):
            raise ValueError(f"{path}:{number + whole.line - 1}: {whole}")
        yield from ((f"{path}[{index}]", row) for index, row in enumerate(whole))
        return
    for number, line in itertools.chain([first], lines):
        _check_length(path, number, line)
        if line.strip():
            yield f"{path}:{number}", _loads(line.rstrip(b"\r\n"))


def _joined(path: Path, first: bytes, more: Iterator[tuple[int, bytes]]) -> bytes:
    parts, size = [first], len(first)
    for _, part in more:
        parts.append(part)
        size += len(part)
        if size > LARGEST_LIST:
            raise ValueError(
                f"{path}: the JSON list has more than {LARGEST_LIST:,} bytes; write it as JSON Lines, which are read"
                " line by line"
            )
    return b"".join(parts)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line); a line beyond LONGEST_LINE comes in parts that are longer than that, bar the last."""
    number, whole = 0, True
    with path.open("rb") as plain:
        gzipped = path.suffix == ".gz" or plain.peek(2)[:2] == b"\x1f\x8b"
        stream = gzip.GzipFile(fileobj=plain) if gzipped else plain
        try:
            while line := stream.readline(LONGEST_LINE + 1):
                opens, number = number == 0, number + whole
                whole = line.endswith(b"\n")
                yield number, line.removeprefix(codecs.BOM_UTF8) if opens else line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            number -= not whole
            raise ValueError(
                f"{path}:{number + 1}: the gzip stream is cut or damaged after {number} whole lines ({error}); "
                "fetch the file again"
            ) from error


def _loads(text: bytes) -> Any:
    """Parse JSON, or return (not raise) the BadRow that says why it cannot be."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant)
    except UnicodeDecodeError as error:
        line, column = text.count(b"\n", 0, error.start), error.start - text.rfind(b"\n", 0, error.start)
        return BadRow(f"not UTF-8: byte 0x{text[error.start]:02x} at byte {column} of the line", line + 1)
    except json.JSONDecodeError as error:
        return BadRow(f"broken JSON: {error.msg.removesuffix(' at')} at column {error.colno}", error.lineno)
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, lists nested thousands deep
        return BadRow(f"broken JSON: {error}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any] | BadRow:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    twice = [key for key, count in collections.Counter(key for key, _ in pairs).items() if count > 1]
    return BadRow(f"the key {twice[0]!r} stands twice in one object")


def _constant(name: str) -> BadRow:
    return BadRow(f"{name} is not JSON")


def entry(text: str) -> tuple[str, str | None, str] | None:
    """Take "source=value" or "source@split=value" apart; None where it is neither.

    >>> entry("org/name@train=0.5"), entry("./x@y/z.jsonl=prompt"), entry("name")
    (('org/name', 'train', '0.5'), ('./x@y/z.jsonl', None, 'prompt'), None)
    """
    match = _ENTRY.fullmatch(text)
    return match and (match["source"], match["split"], match["value"])


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a name outside `choices`, listing them.

    Raises:
        ValueError: `value` is none of `choices`.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")
