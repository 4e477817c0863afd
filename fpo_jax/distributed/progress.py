"""Progress bars, on the terminal of the main process alone; where there is none, log lines say how far the work is.

A bar that is done within a second is never drawn. Log lines of `io.terminal` are written above the bars.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

import tqdm

from fpo_jax.distributed import process

_DELAY_S = 1.0  # of work, before a bar that is to go again is drawn
_stream: TextIO | None = None  # None = the standard error of the moment


def shown() -> bool:
    """Return whether this process has a terminal to draw a progress bar on."""
    return process.is_main_process() and _place().isatty()


def bar(
    items: Iterable | None = None, title: str | None = None, *, unit: str, kept: bool = False, **options: Any
) -> tqdm.tqdm:
    """Return a progress bar, which draws nothing where `shown` is False.

    Args:
        items: what is iterated over; None = the caller updates the bar.
        title: what is done.
        unit: what is counted.
        kept: the finished bar stays on the terminal.
        options: of tqdm: total, initial.
    """
    drawn = {"file": _place(), "dynamic_ncols": True, "disable": not shown(), "leave": kept}
    return tqdm.tqdm(items, title, unit=unit, delay=0 if kept else _DELAY_S, **drawn, **options)


@contextlib.contextmanager
def drawn_on(stream: TextIO) -> Iterator[None]:
    """Draw bars on a stream that is not the standard error of the moment, while that is sent elsewhere."""
    global _stream
    before, _stream = _stream, stream
    try:
        yield
    finally:
        _stream = before


def _place() -> TextIO:
    return sys.stderr if _stream is None else _stream
