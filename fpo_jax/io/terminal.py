r"""What people are shown: errors, results and logs, with whatever a stranger wrote in them.

Data, templates, servers and file names may hold characters that a terminal obeys (colours, its title, its clipboard),
that turn the direction of writing, or that cannot be written at all. They are shown as Python writes them in a text:
ESC becomes \x1b. What is longer than anybody reads is cut in its middle.
"""

import contextlib
import errno
import logging
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from types import MappingProxyType, TracebackType
from typing import TextIO

LONGEST = 20_000  # characters of one line of the log
LONGEST_ERROR = 4_000
DETAIL = MappingProxyType({"detail": True})  # extra= of a record that is for run.log and other handlers, not for stderr
# control characters but for tab and line feed, ends of lines that only some programs see, turns of direction, and
# halves of surrogate pairs
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_REMEDIES = {
    errno.ENOSPC: "make room, or give a place on another disk",
    errno.EDQUOT: "make room, or give a place on another disk",
    errno.EROFS: "give a place on a disk that can be written",
    errno.EACCES: "give a place that this user may use",
    errno.EPERM: "give a place that this user may use",
    errno.ENOTDIR: "give a folder, or the path of a new one",
    errno.EEXIST: "give a folder, or the path of a new one",
    errno.EISDIR: "give a file",
    errno.ENOENT: "give a place that exists",
    errno.ELOOP: "give what the link was to lead to",
    errno.ENAMETOOLONG: "give a shorter path",
}


def shown(text: object, *, longest: int | None = LONGEST) -> str:
    r"""Return a text as a terminal or a log may have it.

    Args:
        text: anything; its str() is taken.
        longest: characters after which it is cut in its middle; None = never.

    >>> print(shown("a\x1b[2J\nb"))
    a\x1b[2J
    b
    >>> shown("x" * 100, longest=20)
    'xxxxxxxxxx ... 80 characters ... xxxxxxxxxx'
    """
    whole = str(text)
    if longest is not None and len(whole) > longest:
        half = longest // 2
        whole = f"{whole[:half]} ... {len(whole) - 2 * half:,} characters ... {whole[-half:]}"
    return _OBEYED.sub(lambda match: match[0].encode("unicode_escape").decode(), whole)


def sentence(error: BaseException) -> str:
    """Return what an error says to the person who started the program: fact, limit, remedy."""
    if isinstance(error, OSError) and error.errno is not None:
        what = f"{error.filename} cannot be used" if error.filename else "a file cannot be written or read"
        remedy = _REMEDIES.get(error.errno, "mend that, or give another place")
        return shown(f"{what} ({error.strerror}); {remedy}.", longest=LONGEST_ERROR)
    return shown(str(error) or type(error).__name__, longest=LONGEST_ERROR)


def is_ours(error: BaseException) -> bool:
    """Return whether an error is of a class of ours, as a signal's is; no handler of a library's errors may take it."""
    return type(error).__module__.startswith("fpo_jax.")


def first_line(error: BaseException) -> str:
    """Return the first line of what a library says, or the kind of its error where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def table(rows: Iterable[Sequence[str]]) -> str:
    """Return rows, the header among them, as text in columns: the first to the left, the others to the right."""
    lines = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def say(text: object) -> None:
    """Print a result."""
    with _bars_aside(sys.stdout):
        print(shown(text, longest=None), flush=True)


def refuse(program: str, error: object) -> None:
    """Print why a program ends, on its standard error."""
    described = sentence(error) if isinstance(error, BaseException) else shown(error, longest=LONGEST_ERROR)
    print(f"{program}: {described}", file=sys.stderr)


class Formatter(logging.Formatter):
    """A formatter whose lines are `shown`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return shown(super().format(record))


class _BesideBars(logging.StreamHandler):
    """Writes lines above the progress bars, which are drawn again below them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        with _bars_aside(self.stream):
            super().emit(record)


@contextlib.contextmanager
def _bars_aside(stream: TextIO) -> Iterator[None]:
    """Take progress bars away while something is written; without tqdm there are none."""
    tqdm = sys.modules.get("tqdm")
    with contextlib.nullcontext() if tqdm is None else tqdm.tqdm.external_write_mode(file=stream):
        yield


def log_to_stderr(*, prefix: str = "") -> None:
    """Send the log to the standard error, our own from INFO on, of others the warnings; and what ends the program."""
    handler = _BesideBars(sys.stderr)
    handler.addFilter(lambda record: not getattr(record, "detail", False))
    handler.setFormatter(Formatter(f"{prefix}%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("fpo_jax").setLevel(logging.INFO)
    sys.excepthook = _unforeseen


def _unforeseen(_kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
    print(shown("".join(traceback.format_exception(error))), end="", file=sys.stderr)


def _clean(record: logging.LogRecord) -> bool:
    record.msg, record.args = shown(record.getMessage()), ()
    return True


logging.getLogger("fpo_jax").addFilter(_clean)  # whoever handles our records, in a notebook too
