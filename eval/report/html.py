"""A page as a list of blocks, written as Markdown (plots linked) or as one self-contained HTML file (plots inside)."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple


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


Block = Heading | Text | Table | Texts | Plot | Code


def markdown(blocks: Sequence[Block]) -> str:
    """Return the page as Markdown; plots are links to files beside it."""
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def html(blocks: Sequence[Block], folder: Path) -> str:
    """Return the page as HTML that needs no other file; plots are read from `folder`."""
    title = next(block.text for block in blocks if isinstance(block, Heading))
    body = "\n".join(_html(block, folder) for block in blocks)
    head = f'<meta charset="utf-8">\n{_VIEWPORT}\n<title>{escape(title)}</title>\n{_CSS}'
    return f'<!doctype html>\n<html lang="en">\n{head}\n{body}\n</html>\n'


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


def _html(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case Table(header, rows, right):
            kind = ' class="numbers"' if right else ""
            head = "".join(f"<th>{_inline(cell)}</th>" for cell in header)
            body = "\n".join(f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in row)}</tr>" for row in rows)
            return f'<div class="wide"><table{kind}>\n<tr>{head}</tr>\n{body}\n</table></div>'
        case Texts(header, rows):
            body = "".join(
                f'<div class="text"><b>{escape(name)}</b>{escape(text)}</div>'
                for row in rows
                for name, text in zip(header, row, strict=True)
            )
            return f'<div class="texts" style="--columns: {len(header)}">{body}</div>'
        case Plot(file, caption):
            data = base64.b64encode((folder / file).read_bytes()).decode()
            return f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}"></figure>'
        case Code(text):
            return f"<pre>{escape(text)}</pre>"


def _cell(text: str) -> str:
    """Return a text as a cell of a Markdown table."""
    text = escape(text, quote=False)
    for mark in "\\`*_[]|":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("\n", "<br>")


def _inline(text: str) -> str:
    """Escape, then turn `code` and **strong** into tags: between marks, every other part is marked."""
    text = escape(text, quote=False)
    for mark, tag in (("`", "code"), ("**", "strong")):
        parts = text.split(mark)
        text = "".join(f"<{tag}>{part}</{tag}>" if place % 2 else part for place, part in enumerate(parts))
    return text


_VIEWPORT = '<meta name="viewport" content="width=device-width, initial-scale=1">'
_CSS = """<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #22303f; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #e3e7ec; padding-bottom: .3rem; }
img { max-width: 100%; } figure { margin: 1rem 0; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .3rem .9rem .3rem 0; text-align: left; }
th { border-bottom: 2px solid #b9c1cb; } td { border-bottom: 1px solid #e3e7ec; vertical-align: top; }
table.numbers th:not(:first-child), table.numbers td:not(:first-child) { text-align: right; padding-left: 1.5rem; }
code, pre { font: 14px/1.45 ui-monospace, monospace; background: #f4f6f8; border-radius: 4px; }
code { padding: .1rem .3rem; } pre { padding: .8rem 1rem; overflow-x: auto; }
.wide { overflow-x: auto; }
.texts { display: grid; grid-template-columns: repeat(var(--columns), 1fr); gap: .5rem; margin: 1rem 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f6f8; border-radius: 4px;
        padding: .5rem .7rem; font-size: 14px; }
.text b { display: block; color: #5b6775; font-size: 12px; }
@media (max-width: 40rem) { .texts { grid-template-columns: 1fr; } body { margin: 1rem auto; } }
</style>"""
