"""A compiled program as XLA writes it: its computations and their instructions.

    computations, entry = hlo.parse(compiled.as_text())

An instruction keeps its text; operands, attributes and sizes are read from it when somebody asks.
"""

import re
from typing import NamedTuple

import numpy as np


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    result: str  # its type
    text: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return NAME.findall(_first_parenthesis(self.text))

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls."""
        return [name for names in _CALLED.findall(self.text) for name in NAME.findall(names)]

    def attribute(self, name: str) -> str:
        """Return the value of an attribute, without a leading %; "" for none."""
        found = re.search(rf"\b{name}=%?([\w.-]+)", self.text)
        return found.group(1) if found else ""


class Computation(NamedTuple):
    """Instructions by name, in the order of the schedule where the program has one."""

    instructions: dict[str, Instruction]
    root: str


Computations = dict[str, Computation]

NAME = re.compile(r"%([\w.-]+)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation|branch_computations|called_computations)="
    r"\{?((?:%[\w.-]+(?:, *)?)+)\}?"
)
_ARRAY = re.compile(r"\b(pred|bf16|f8\w*|[a-z]+\d+)\[([\d,]*)\](\{[^}]*\})?")


def parse(text: str) -> tuple[Computations, str]:
    """Return the computations of a program by name, and the name of the one that runs first."""
    found: Computations = {}
    name = entry = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header.group(2)
            found[name] = Computation({}, "")
            entry = name if header.group(1) else entry
        elif name and (parts := _LINE.match(line)):
            root, own, result, opcode, rest = parts.groups()
            found[name].instructions[own] = Instruction(own, opcode, result, rest)
            if root:
                found[name] = found[name]._replace(root=own)
    marked = {
        key: one if one.root else one._replace(root=next(reversed(one.instructions), "")) for key, one in found.items()
    }
    return marked, entry


def elements(tuple_type: str) -> list[str]:
    """Return the elements of a tuple type, which may be tuples."""
    parts, depth, start = [], 0, 1
    for position, letter in enumerate(tuple_type):
        depth += (letter in "({[") - (letter in ")}]")
        if (letter == "," and depth == 1) or depth == 0:
            parts.append(tuple_type[start:position].strip())
            start = position + 1
    return parts


def bytes_of(result: str, *, without: str = "") -> int:
    """Return the bytes of all arrays of a type; `without` leaves out those whose layout has this text."""
    return sum(
        _bits(dtype) * _count(dims) // 8
        for dtype, dims, layout in _ARRAY.findall(result)
        if not (without and without in layout)
    )


def _bits(dtype: str) -> int:
    return 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])


def _count(dims: str) -> int:
    return int(np.prod([int(size) for size in dims.split(",") if size], dtype=np.int64))


def _first_parenthesis(text: str) -> str:
    """What stands before the parenthesis that closes the one before the text."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match.group() == "(" else -1
        if depth < 0:
            return text[: match.start()]
    return text
