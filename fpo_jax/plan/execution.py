"""What of a compiled program runs, and how often: its computations by control flow, loops counted.

    for running in execution.run(*hlo.parse(text)): ...

An instruction inside a loop runs as often as the loop turns, all branches of a conditional count, and a fusion is one
instruction of the computation that it stands in: `inside` has what it is made of, and what a start runs.
"""

import logging
from collections.abc import Iterator
from typing import NamedTuple

from fpo_jax.models import dispatch
from fpo_jax.plan import hlo, trip_counts

log = logging.getLogger("fpo_jax")
FLOW = {
    "while",
    "conditional",
    "call",
    "async-start",
}  # opcodes that run other computations, instruction by instruction
# opcodes that do nothing on the device by themselves
IDLE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
IDLE |= {"opt-barrier", "optimization-barrier", "domain", "send", "send-done", "recv", "recv-done"}


class Running(NamedTuple):
    """A computation, and how often the program runs it."""

    computation: hlo.Computation
    times: int

    def beside_work(self, start: hlo.Instruction) -> bool:
        """Whether the schedule has other work between an instruction and the one that waits for its result."""
        if not start.opcode.endswith(("-start", "recv")):
            return False
        after = False
        for instruction in self.computation.instructions.values():
            if after and instruction.opcode.endswith("-done") and start.name in instruction.operands:
                return False
            if after and works(instruction):
                return True
            after |= instruction.name == start.name
        return False


def works(instruction: hlo.Instruction) -> bool:
    """Whether an instruction keeps the device busy by itself or by what it runs."""
    return instruction.opcode not in IDLE and not instruction.opcode.endswith(("-start", "-done"))


def run(computations: hlo.Computations, entry: str) -> Iterator[Running]:
    """Yield every computation that runs by control flow; one that several instructions run comes as often.

    A loop whose turns cannot be told counts once, with a warning; further rounds of a mixture of experts count nowhere.
    """
    yield from _run(computations, entry, trip_counts.Scope(computations, entry), 1)


def _run(computations: hlo.Computations, name: str, scope: trip_counts.Scope, times: int) -> Iterator[Running]:
    yield Running(computations[name], times)
    for instruction in computations[name].instructions.values():
        if instruction.opcode not in FLOW:
            continue
        if any(f"jit({name})" in instruction.text for name in dispatch.SELDOM):
            continue
        turns = scope.trips(instruction) if instruction.opcode == "while" else 1
        if turns is None:
            log.warning("a loop of the compiled program runs an unknown number of times; what is in it counts once")
            turns = 1
        for called, inner in scope.inside(instruction):
            yield from _run(computations, called, inner, times * turns)


def inside(instruction: hlo.Instruction, computations: hlo.Computations) -> Iterator[tuple[hlo.Instruction, str]]:
    """Yield the instructions that a fusion or a start is made of, each with the name of its computation."""
    for name in instruction.called:
        for inner in computations[name].instructions.values():
            yield inner, name
            if inner.opcode == "fusion":
                yield from inside(inner, computations)
