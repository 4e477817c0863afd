"""Rows from wherever they lie: a file, a directory, a saved data set, the hub.

What flows in: a source as the user wrote it. What flows out: (place, row) pairs, the place being "file:line" or
"name[index]". A row that cannot be parsed comes out as the `BadRow` that says why; a source that cannot be read on is a
ValueError. A line ends at LF, never at U+2028, and what a file holds is told by its first characters, then by its name.

The cells of a CSV file are texts, and an empty one is null.
"""

import csv
import itertools
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fpo_jax.config import choices
from fpo_jax.data import tabular_files
from fpo_jax.io import jsonl, terminal

_DATA_SUFFIX = re.compile(r"\.(jsonl?|ndjson|gz|csv|tsv|txt|parquet|pq|arrow|feather|zip|zst|bz2|xz|xlsx?|tar|tgz)$")
_ABOUT = ("dataset_info.json", "dataset_infos.json")  # of a copy of a hub data set, about its rows
_ENTRY = re.compile(r"(?P<source>.+?)(@(?P<split>[^@=/]+))?=(?P<value>[^=]+)")
log = logging.getLogger("fpo_jax")

LARGEST_LIST = 2**30  # bytes of a JSON list, which is held as a whole; of a gzip stream those that it unpacks to
_DELIMITERS = {"csv": ",", "tsv": "\t"}
_NAMED = 8  # files in a message
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def rows(source: str, *, split: str | None, data_dir: str | None, revision: str | None) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) from whatever `source` is; see `formats.read` for the arguments.

    Raises:
        ValueError: nothing there, a damaged gzip stream or JSON list, an option that does not apply to the source.
    """
    path = Path(source).expanduser()
    if path.exists() and (data_dir or revision):
        raise ValueError(f"data_dir and revision apply to hub data sets only, and {source!r} is local; leave them out")
    if path.is_dir():
        yield from _saved_rows(path, split) if _is_saved(path) else _directory_rows(path, split)
    elif path.exists():
        if split:
            raise ValueError(f"split={split!r} applies to directories and hub data sets, and {source!r} is one file")
        yield from _file_rows(path)
    elif _is_hub_name(source):
        yield from _hub_rows(source, split, data_dir, revision)
    else:
        raise ValueError(f"no file or directory {source!r} (a hub data set is named owner/name)")


def files(source: str, *, split: str | None, data_dir: str | None, revision: str | None) -> list[Path]:
    """Return the files whose bytes say what `rows` yields, arguments and errors as there; none where it is unknown."""
    path = Path(source).expanduser()
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file()) if _is_saved(path) else _chosen(path, split)
    if path.exists():
        return [path]
    if not _is_hub_name(source) or not split:
        return []
    return [Path(file["filename"]) for file in _hub_table(source, split, data_dir, revision).cache_files]


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def _is_hub_name(source: str) -> bool:
    return bool(_HUB_NAME.fullmatch(source)) and not _DATA_SUFFIX.search(source) and not source.startswith(".")


def _directory_rows(path: Path, split: str | None) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a folder's files in the order of their names; of folders below it if it has none itself."""
    chosen = _chosen(path, split)
    if len(chosen) > 1 and not split:
        names = ", ".join(file.relative_to(path).as_posix() for file in chosen)
        log.info("%s: no split is named, and all of its %d files are read: %s", path, len(chosen), names)
    for file in chosen:
        yield from _file_rows(file)


def _chosen(path: Path, split: str | None) -> list[Path]:
    """Return the files of a folder that are read."""
    found: list[Path] = []
    for below in (path.iterdir(), path.rglob("*")):
        found = [file for file in sorted(below) if _holds_rows(file, path)]
        chosen = [file for file in found if not split or _is_of_split(file.relative_to(path), split)]
        if chosen:
            break
    else:
        there = [file.relative_to(path).as_posix() for file in found or sorted(path.rglob("*")) if file.is_file()]
        what = f"{split}.* or {split}-*, nor one below a folder {split}," if split else "with rows"
        described = ", ".join(there[:_NAMED]) + (f" and {len(there) - _NAMED} more" if len(there) > _NAMED else "")
        raise ValueError(
            f"the directory {str(path)!r} has no file {what} of {tabular_files.READ}; it has {described or 'none'}"
        )
    kinds = {file.relative_to(path).as_posix(): tabular_files.named(file) for file in chosen}
    if len(set(kinds.values())) > 1:
        described = ", ".join(f"{name} ({kind})" for name, kind in itertools.islice(kinds.items(), _NAMED))
        raise ValueError(
            f"the directory {str(path)!r} mixes kinds of files, {described}; name one of them, or take the others away"
        )
    return chosen


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
        choices.check("split", split or "", [str(name) for name in saved])
        saved = saved[split or ""]
    elif split:
        raise ValueError(f"split={split!r}, but the data set saved in {str(path)!r} has no splits; leave it out")
    yield from ((f"{path}[{index}]", row) for index, row in enumerate(saved))


def _hub_rows(name: str, split: str | None, data_dir: str | None, revision: str | None) -> Iterator[tuple[str, Any]]:
    if not split:
        raise ValueError(f"the hub data set {name!r} needs a split, for example split='train'")
    table = _hub_table(name, split, data_dir, revision)
    yield from ((f"{name}[{index}]", row) for index, row in enumerate(table))


def _hub_table(name: str, split: str, data_dir: str | None, revision: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, split=split, data_dir=data_dir, revision=revision)
    except Exception as error:  # the library raises a dozen types here, from DNS to a missing split
        if terminal.is_ours(error):
            raise
        cause = " ".join(str(error).split())[:300]
        raise ValueError(
            f"there is no local path {name!r}, and the hub data set of that name cannot be loaded ({split!r}): {cause}"
        ) from error


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    kind = tabular_files.kind(path)
    if kind == "json":
        return _json_rows(path)
    return _csv_rows(path, delimiter=_DELIMITERS[kind]) if kind in _DELIMITERS else tabular_files.rows(path, kind)


def _csv_rows(path: Path, *, delimiter: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of a table with a header."""
    csv.field_size_limit(jsonl.LONGEST_LINE)
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
                yield place, jsonl.BadRow(f"{len(cells)} cells under a header of {len(header)} columns")
            elif cells:
                yield place, {name: cell or None for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise ValueError(
            f"{path}:{begins}: broken CSV ({error}); write the table again, with its quotes doubled"
        ) from error


def _decoded(path: Path) -> Iterator[str]:
    for number, line in jsonl.lines(path):
        jsonl.check_length(path, number, line)
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason}); save the table as UTF-8") from error


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of a JSON list or of JSON Lines, whichever the first character says."""
    lines = jsonl.lines(path)
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        return
    number, line = first
    if line.lstrip().startswith(b"["):
        whole = jsonl.parse(_joined(path, line, lines), strict=False)
        if isinstance(whole, jsonl.BadRow):
            raise ValueError(f"{path}:{number + whole.line - 1}: {whole}")
        yield from ((f"{path}[{index}]", row) for index, row in enumerate(whole))
        return
    for number, line in itertools.chain([first], lines):
        jsonl.check_length(path, number, line)
        if line.strip():
            yield f"{path}:{number}", jsonl.parse(line.rstrip(b"\r\n"), strict=False)


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


def entry(text: str) -> tuple[str, str | None, str] | None:
    """Take "source=value" or "source@split=value" apart; None where it is neither.

    >>> entry("org/name@train=0.5"), entry("./x@y/z.jsonl=prompt"), entry("name")
    (('org/name', 'train', '0.5'), ('./x@y/z.jsonl', None, 'prompt'), None)
    """
    match = _ENTRY.fullmatch(text)
    return match and (match["source"], match["split"], match["value"])
