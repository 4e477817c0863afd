"""Kinds of data files by their first bytes and names, and the rows of those that are tables of columns.

What flows in: a path. What flows out: the kind of the file, or (place, row) pairs of Parquet and Arrow files, a few
thousand rows in memory at once. JSON and CSV are the business of `loading`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BATCH = 1000  # rows of a Parquet file in memory at once
_SUFFIXES = {
    "json": (".json", ".jsonl", ".ndjson"),
    "csv": (".csv",),
    "tsv": (".tsv",),
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow", ".feather"),
}
KINDS = tuple(_SUFFIXES)
_GZIPPED = ("json", "csv", "tsv")  # read packed too
_MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}  # the last: a stream of Arrow
# first bytes -> what the file is, and the way out
_FOREIGN = {
    b"PK\x03\x04": ("a ZIP archive or an Excel workbook", "unpack it, or save the sheet as CSV"),
    b"\xd0\xcf\x11\xe0": ("an Excel workbook", "save the sheet as CSV"),
    b"\x28\xb5\x2f\xfd": ("packed by zstd", "unpack it with zstd -d"),
    b"BZh": ("packed by bzip2", "unpack it with bunzip2"),
    b"\xfd7zXZ\x00": ("packed by xz", "unpack it with unxz"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it"),
    b"SQLite format 3": ("an SQLite database", "write its table as CSV"),
    b"\x93NUMPY": ("a NumPy array", "write its rows as JSON Lines"),
    b"\x89HDF": ("an HDF5 file", "write its rows as JSON Lines"),
    b"\x80\x04\x95": ("a Python pickle", "write its rows as JSON Lines"),
    b"version https://git-lfs": ("a pointer of Git LFS, not the data", "fetch the file with git lfs pull"),
}
_ARCHIVES = (".tar", ".tar.gz", ".tgz")
READ = "JSON, JSON Lines, CSV and TSV, gzipped or not, Parquet and Arrow"


def named(path: Path) -> str | None:
    """Return the kind that a file's name says, None where it says none.

    >>> named(Path("a/train-00000-of-00001.parquet")), named(Path("b.jsonl.gz")), named(Path("README.md"))
    ('parquet', 'json', None)
    """
    packed = path.name.endswith(".gz")
    suffix = Path(path.name.removesuffix(".gz")).suffix
    found = next((kind for kind, suffixes in _SUFFIXES.items() if suffix in suffixes), None)
    return None if packed and found not in _GZIPPED else found


def kind(path: Path) -> str:
    """Return the kind of a file, by its first bytes before its name; what has neither is taken for JSON.

    Raises:
        ValueError: a kind that is not read here, with the way out.
    """
    with path.open("rb") as file:
        head = file.read(32)
    foreign = next((said for magic, said in _FOREIGN.items() if head.startswith(magic)), None)
    if path.name.endswith(_ARCHIVES):
        foreign = ("a tar archive", "unpack it")
    if foreign:
        raise ValueError(f"{path} is {foreign[0]}; {foreign[1]}. What is read: {READ}.")
    return next((found for magic, found in _MAGIC.items() if head.startswith(magic)), named(path) or "json")


def rows(path: Path, kind: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of a Parquet or Arrow file.

    Raises:
        ValueError: it is cut or damaged.
    """
    import pyarrow  # comes with datasets; a second to import, and most sources are JSON

    index = 0
    try:
        for batch in _parquet(path) if kind == "parquet" else _arrow(path):
            for row in batch.to_pylist():
                yield f"{path}[{index}]", row
                index += 1
    except (pyarrow.ArrowException, OSError) as error:
        cause = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} cannot be read as {kind.capitalize()} after {index} rows ({cause}); fetch the file again."
        ) from error


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as table:
        yield from table.iter_batches(batch_size=_BATCH)


def _arrow(path: Path) -> Iterator[Any]:
    """Yield the batches of a file or a stream; `datasets` writes streams."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as mapped:
        if mapped.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(mapped)
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            mapped.seek(0)
            yield from pyarrow.ipc.open_stream(mapped)
