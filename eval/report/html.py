"""A page as a list of blocks, written as Markdown (plots linked) or as one self-contained HTML file (plots inside)."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import jinja2
import markupsafe


class Heading(NamedTuple):
    """A section title."""

    text: str
    level: int = 2


class Text(NamedTuple):
    """A paragraph; `code` and **strong** are the only markup."""

    text: str


class Table(NamedTuple):
    """Rows under a header; the first column is left-aligned, `right` says whether the others are right-aligned."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: bool = True


class Plot(NamedTuple):
    """A PNG in the report's folder."""

    file: str
    caption: str


class Texts(NamedTuple):
    """Texts side by side, shown as they are: what models and data wrote is never markup."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Code(NamedTuple):
    """Commands to copy."""

    text: str


_LOADER = jinja2.FileSystemLoader(Path(__file__).parent)
_PAGES = jinja2.Environment(loader=_LOADER, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
Block = Heading | Text | Table | Texts | Plot | Code


def markdown(blocks: Sequence[Block]) -> str:
    """Return the page as Markdown; plots are links to files beside it."""
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def html(blocks: Sequence[Block], folder: Path) -> str:
    """Return the page as HTML that needs no other file; plots are read from `folder`."""
    title = next(block.text for block in blocks if isinstance(block, Heading))
    files = [block.file for block in blocks if isinstance(block, Plot)]
    plots = {file: base64.b64encode((folder / file).read_bytes()).decode() for file in files}
    named = [(type(block).__name__, block) for block in blocks]
    return _PAGES.get_template("page.html").render(title=title, blocks=named, plots=plots, inline=_inline) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Text(text):
            return text
        case Table(header, rows, right):
            rule = [":--", *(["--:" if right else ":--"] * (len(header) - 1))]
            return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))
        case Texts(header, rows):
            cells = [[_cell(text) for text in row] for row in rows]
            return _markdown(Table(header, cells, right=False))
        case Plot(file, caption):
            return f"![{caption}]({file})"
        case Code(text):
            return f"```\n{text}\n```"


def _cell(text: str) -> str:
    """Return a text as a cell of a Markdown table."""
    text = escape(text, quote=False)
    for mark in "\\`*_[]|":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("\n", "<br>")


def _inline(text: str) -> markupsafe.Markup:
    """Escape, then turn `code` and **strong** into tags: between marks, every other part is marked."""
    text = escape(text, quote=False)
    for mark, tag in (("`", "code"), ("**", "strong")):
        parts = text.split(mark)
        text = "".join(f"<{tag}>{part}</{tag}>" if place % 2 else part for place, part in enumerate(parts))
    return markupsafe.Markup(text)
