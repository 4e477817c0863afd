"""How often the loops of a compiled program run.

Where XLA does not say it, the count follows from where the counter starts, what a turn adds to it and what the
condition compares it with. Copies, tuples, fusions, calls and outer loops may stand between; values that hang on the
program's arguments are not known.
"""

import dataclasses
import logging
import re
from collections.abc import Iterator, Sequence
from typing import TypeGuard

from fpo_jax.plan import hlo

log = logging.getLogger("fpo_jax")


@dataclasses.dataclass(frozen=True)
class Integer:
    """A constant; or, with `element`, what a loop carries at that place of its tuple, plus a constant."""

    element: int | None
    plus: int


@dataclasses.dataclass(frozen=True)
class _Compare:
    """A comparison of two integers."""

    direction: str
    left: Integer
    right: Integer


_Value = Integer | _Compare | tuple | None  # None = not known

_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SCALAR = re.compile(r"(pred|[su]\d+)\[\]")
_SAME = {"copy", "copy-start", "copy-done", "bitcast", "convert", "reshape", "opt-barrier", "optimization-barrier"}
_MIRRORED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE", "EQ": "EQ"}


class Scope:
    """The integers of a computation that are known, given its arguments."""

    def __init__(self, computations: hlo.Computations, name: str, arguments: Sequence[_Value] = ()):
        """Evaluate nothing yet."""
        self._computations, self._computation = computations, computations[name]
        self._arguments = arguments
        self._known: dict[str, _Value] = {}

    @property
    def root(self) -> _Value:
        """The value that the computation returns."""
        return self.value(self._computation.root)

    def value(self, name: str) -> _Value:
        """Return the value of an instruction."""
        if name not in self._known:
            instruction = self._computation.instructions.get(name)
            self._known[name] = None if instruction is None else self._evaluate(instruction)
        return self._known[name]

    def trips(self, loop: hlo.Instruction) -> int | None:
        """Return how often a loop of this computation runs; None where that cannot be told."""
        if known := _TRIPS.search(loop.text):
            return int(known.group(1))
        compare, following, initial = self._condition(loop), self._after_a_turn(loop), self._initial(loop)
        if not isinstance(compare, _Compare):
            return None

        def settled(value: Integer) -> Integer:
            """The constant that an element has in every turn."""
            if value.element is None or _at(following, value.element) != Integer(value.element, 0):
                return value
            start = _at(initial, value.element)
            return Integer(None, start.plus + value.plus) if _is_constant(start) else value

        direction, counter, limit = compare.direction, settled(compare.left), settled(compare.right)
        if counter.element is None:
            direction, counter, limit = _MIRRORED[direction], limit, counter
        if counter.element is None or limit.element is not None:
            return None
        step, start = _at(following, counter.element), _at(initial, counter.element)
        if not isinstance(step, Integer) or step.element != counter.element:
            return None
        if not _is_constant(start):
            log.warning("a loop of the compiled program starts at an unknown number; its turns are counted from 0")
            start = Integer(None, 0)
        return _count(direction, start.plus + counter.plus, step.plus, limit.plus)

    def inside(self, instruction: hlo.Instruction) -> Iterator[tuple[str, "Scope"]]:
        """Yield the computations that an instruction runs by control flow, each with what is known there."""
        arguments: list[_Value] = [self.value(name) for name in instruction.operands]
        if instruction.opcode == "while":
            arguments = [self._unchanged(instruction)]
        elif instruction.opcode == "conditional":
            arguments = []  # each branch has an operand of its own
        for name in instruction.called:
            yield name, Scope(self._computations, name, arguments)

    def _evaluate(self, instruction: hlo.Instruction) -> _Value:
        opcode = instruction.opcode
        if not _SCALAR.match(instruction.result) and not instruction.result.startswith("("):
            return None
        if opcode == "constant":
            value = instruction.text.split(")")[0]
            return Integer(None, int(value)) if re.fullmatch(r"-?\d+", value) else None
        if opcode == "parameter":
            number = int(instruction.text.split(")")[0])
            return self._arguments[number] if number < len(self._arguments) else None
        if opcode == "while":
            return self._unchanged(instruction)
        operands = [self.value(name) for name in instruction.operands]
        if opcode in _SAME:
            return operands[0]
        if opcode == "tuple":
            return tuple(operands)
        if opcode == "get-tuple-element":
            return _at(operands[0], int(instruction.attribute("index")))
        if opcode in ("fusion", "call"):
            return Scope(self._computations, instruction.called[0], operands).root
        return _combined(instruction, operands)

    def _condition(self, loop: hlo.Instruction) -> _Value:
        return Scope(self._computations, loop.attribute("condition"), [_carried(loop)]).root

    def _after_a_turn(self, loop: hlo.Instruction) -> _Value:
        return Scope(self._computations, loop.attribute("body"), [_carried(loop)]).root

    def _initial(self, loop: hlo.Instruction) -> _Value:
        return self.value(loop.operands[0])

    def _unchanged(self, loop: hlo.Instruction) -> _Value:
        """What a loop carries, where every turn leaves it as it was."""
        initial, following = self._initial(loop), self._after_a_turn(loop)
        if not isinstance(initial, tuple) or not isinstance(following, tuple):
            return None
        turns = enumerate(zip(initial, following, strict=True))
        return tuple(start if after == Integer(place, 0) else None for place, (start, after) in turns)


def _carried(loop: hlo.Instruction) -> _Value:
    """What the body and the condition of a loop get."""
    if not loop.result.startswith("("):
        return Integer(0, 0)
    return tuple(Integer(place, 0) for place in range(len(hlo.elements(loop.result))))


def _at(value: _Value, place: int) -> _Value:
    """The element of a tuple; of a loop that carries no tuple all of it."""
    if isinstance(value, Integer):
        return value if place == 0 else None
    return value[place] if isinstance(value, tuple) and place < len(value) else None


def _is_constant(value: _Value) -> TypeGuard[Integer]:
    return isinstance(value, Integer) and value.element is None


def _combined(instruction: hlo.Instruction, operands: list[_Value]) -> _Value:
    """Sum, difference or comparison of two integers."""
    if len(operands) != 2:
        return None
    left, right = operands
    if not isinstance(left, Integer) or not isinstance(right, Integer):
        return None
    if instruction.opcode == "compare":
        return _Compare(instruction.attribute("direction"), left, right)
    if instruction.opcode == "add" and None in (left.element, right.element):
        return Integer(right.element if left.element is None else left.element, left.plus + right.plus)
    if instruction.opcode == "subtract" and right.element is None:
        return Integer(left.element, left.plus - right.plus)
    return None


def _count(direction: str, start: int, step: int, limit: int) -> int | None:
    """Turns of `while start DIRECTION limit: start += step`; None where they have no end."""
    if direction in ("GT", "GE"):
        start, step, limit = -start, -step, -limit
    if direction in ("LE", "GE"):
        limit += 1
    if direction == "NE":
        return (limit - start) // step if step and (limit - start) % step == 0 and (limit - start) * step >= 0 else None
    if direction == "EQ":
        return None
    if start >= limit:
        return 0
    return -(-(limit - start) // step) if step > 0 else None
