"""What the kernels of a compiled program read and write, those without a matrix product.

    traffic.moved(text) -> bytes on each device in one run of the program

Norms, activations, casts, copies, sums of gradients and the optimiser are bound by memory: their time is their bytes
over its bandwidth. A fusion reads its operands and writes its results once; of an array that it slices, or updates in
place, only the slice. Kernels that multiply matrices (dots, convolutions, calls of a library or of a kernel of ours)
are bound by their products, and collectives by the links: neither counts here.
"""

from collections.abc import Iterator

from fpo_jax.plan import collectives, execution, hlo

_PRODUCTS = {"dot", "convolution", "custom-call", "ragged-dot"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_SAME = {"bitcast", "reshape"}
_ON_CHIP = "S(1)"  # in the layout of an array that the TPU's compiler keeps in a core's own memory


def moved(text: str) -> int:
    """Return the bytes that kernels without a matrix product move through a device's memory."""
    computations, entry = hlo.parse(text)
    return sum(
        running.times * _moved_by(instruction, running.computation, computations)
        for running in execution.run(computations, entry)
        for instruction in running.computation.instructions.values()
        if instruction.opcode == "copy-start" or execution.works(instruction)
    )


def _moved_by(instruction: hlo.Instruction, computation: hlo.Computation, computations: hlo.Computations) -> int:
    if instruction.opcode in execution.FLOW | _PRODUCTS or collectives.is_collective(instruction):
        return 0
    if instruction.opcode != "fusion":
        return _written(instruction, computation) + sum(
            _read_by(instruction, name, _bytes(computation.instructions[name]))
            for name in dict.fromkeys(instruction.operands)
            if name in computation.instructions
        )
    if any(inner.opcode in _PRODUCTS for inner, _ in execution.inside(instruction, computations)):
        return 0
    fused = computations[instruction.called[0]]
    sources = [one for one in fused.instructions.values() if one.opcode == "parameter"]
    return sum(_read(source, fused) for source in sources) + sum(_written(root, fused) for root in _roots(fused))


def _read(source: hlo.Instruction, fused: hlo.Computation) -> int:
    """Bytes that a fusion reads of one of its operands."""
    whole = _bytes(source)
    parts = 0
    for user in fused.instructions.values():
        if source.name in user.operands:
            parts += _read(user, fused) if user.opcode in _SAME else _read_by(user, source.name, whole)
    return min(parts, whole)


def _read_by(user: hlo.Instruction, name: str, whole: int) -> int:
    """Bytes that an instruction reads of an operand."""
    if user.operands[0] == name and user.opcode in _SLICES:
        return _bytes(user)
    return 0 if user.operands[0] == name and user.opcode == "dynamic-update-slice" else whole


def _written(root: hlo.Instruction, computation: hlo.Computation) -> int:
    """Bytes that an instruction writes: what it puts into an array that it updates in place, else all of its result."""
    while root.opcode in _SAME and root.operands and root.operands[0] in computation.instructions:
        root = computation.instructions[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
        return _bytes(computation.instructions[root.operands[1]])
    result = hlo.elements(root.result)[0] if root.opcode == "copy-start" else root.result
    return hlo.bytes_of(result, without=_ON_CHIP)


def _roots(fused: hlo.Computation) -> Iterator[hlo.Instruction]:
    """What a fusion returns."""
    root = fused.instructions[fused.root]
    if root.opcode != "tuple":
        yield root
        return
    for name in root.operands:
        yield fused.instructions[name]


def _bytes(instruction: hlo.Instruction) -> int:
    return hlo.bytes_of(instruction.result, without=_ON_CHIP)
