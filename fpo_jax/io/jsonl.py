"""JSON Lines: the one reader and the one writer of the project.

A line ends at LF alone: U+2028, U+2029 and U+0085 are text, where `str.splitlines` would cut. A line is bounded, so
that no file takes all memory; an error names file and line. Half a surrogate pair is written as its JSON escape, since
UTF-8 has no bytes for it.
"""

import codecs
import collections
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from fpo_jax.io import atomic_io

LONGEST_LINE = 2**26  # bytes of one row; of a gzip stream those that it unpacks to


class BadRow(ValueError):
    """A row that is not what its format says; the reader adds the file and line.

    A fault inside JSON stands as a value of this type where the faulty value would be, unless the parser is strict, so
    that it is reported with its own row, and only if that value is used.
    """

    def __init__(self, fact: str, line: int = 1):
        super().__init__(fact)
        self.line = line  # within the text that was parsed, from 1


class Appended(NamedTuple):
    """What a file holds that grows line by line."""

    rows: list[dict[str, Any]]  # of its whole lines
    whole: int  # bytes of its whole lines
    cut: int  # bytes of the last line, where a kill left it half written; 0 = it is whole


def read(path: Path) -> list[dict[str, Any]]:
    """Read a file of objects.

    Raises:
        ValueError: the file is missing, or a line is no object; names the line.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing.")
    return [_object(path, number, line) for number, line in lines(path) if line.strip()]


def read_appended(path: Path) -> Appended:
    """Read a file that grows line by line, and may end in half a line; without a file there is nothing.

    Raises:
        ValueError: a line other than the last is no object; names the line.
    """
    rows: list[dict[str, Any]] = []
    whole, fault = 0, None
    for number, line in lines(path) if path.exists() else ():
        if fault:
            raise fault
        try:
            if not line.endswith(b"\n"):
                raise ValueError(f"{path}:{number}: the line has no end.")
            rows.append(_object(path, number, line))
        except ValueError as error:
            fault = error
            continue
        whole += len(line)
    return Appended(rows, whole, path.stat().st_size - whole if fault else 0)


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) of a file, gzipped or not.

    A line beyond LONGEST_LINE comes in parts that are longer than that, bar the last; `check_length` refuses it.
    """
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


def check_length(path: Path, number: int, line: bytes) -> None:
    """Refuse what `lines` gave in parts.

    Raises:
        ValueError: the line is longer than LONGEST_LINE.
    """
    if len(line) > LONGEST_LINE:
        raise ValueError(f"{path}:{number}: the line is longer than {LONGEST_LINE:,} bytes, which no row can be")


def parse(text: bytes, *, strict: bool = True) -> Any:
    """Parse JSON in which no key stands twice in an object, and no NaN or Infinity.

    Args:
        text: UTF-8.
        strict: raise what is wrong; otherwise it is returned, in the place of the faulty value.

    Raises:
        BadRow: strict, and something is wrong.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any] | BadRow:
        found = dict(pairs)
        if len(found) == len(pairs):
            return found
        twice = [key for key, count in collections.Counter(key for key, _ in pairs).items() if count > 1]
        return fault(f"the key {twice[0]!r} stands twice in one object")

    def fault(fact: str, line: int = 1) -> BadRow:
        if strict:
            raise BadRow(fact, line)
        return BadRow(fact, line)

    try:
        return json.loads(
            text.decode("utf-8"), object_pairs_hook=unique, parse_constant=lambda name: fault(f"{name} is not JSON")
        )
    except BadRow:
        raise
    except UnicodeDecodeError as error:
        line, column = text.count(b"\n", 0, error.start), error.start - text.rfind(b"\n", 0, error.start)
        return fault(f"not UTF-8: byte 0x{text[error.start]:02x} at byte {column} of the line", line + 1)
    except json.JSONDecodeError as error:
        return fault(f"broken JSON: {error.msg.removesuffix(' at')} at column {error.colno}", error.lineno)
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, lists nested thousands deep
        return fault(f"broken JSON: {error}")


def line(row: Any) -> bytes:
    """Return a row as it is written; a number that is not finite is a fault of ours.

    Raises:
        ValueError: it is longer than any reader takes.
    """
    # what "backslashreplace" writes for half a surrogate pair is its escape in JSON
    text = json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"
    if len(text) > LONGEST_LINE:
        raise ValueError(
            f"a row of {len(text):,} bytes is longer than the {LONGEST_LINE:,} of a line; ask for fewer texts in it."
        )
    return text


def append(file: IO[bytes], row: Any) -> None:
    """Write a row behind the others of an open file, to the disk's cache."""
    try:
        file.write(line(row))
        file.flush()
    except OSError as error:
        error.filename = error.filename or file.name
        raise


def write(path: Path, rows: Iterable[Any]) -> Path:
    """Write a file, which appears whole or not at all, and return its place."""
    return atomic_io.write_bytes(path, b"".join(map(line, rows)))


def _object(path: Path, number: int, text: bytes) -> dict[str, Any]:
    check_length(path, number, text)
    try:
        found = parse(text.rstrip(b"\r\n"))
    except BadRow as error:
        raise ValueError(f"{path}:{number}: {error}; put the line right, or make the file again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}:{number}: a line must be a JSON object, not {type(found).__name__}; make it again.")
    return found
