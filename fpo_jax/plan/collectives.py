"""The collectives of a compiled program: kind, size, how often they run, along which axes of the mesh.

XLA's text of one device's program goes in, rows come out. An instruction inside a loop counts as often as the loop
runs; one split into a start and a done counts once. The program of several TPU slices is that of one of them: its
groups lie within the slice, and what crosses the data centre's network is received from a runtime by name.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from fpo_jax.plan import execution, hlo

SLICES = "slices"  # what a collective goes along that crosses TPU slices, on whichever axes of the mesh they lie


class Collective(NamedTuple):
    """All instructions of one kind along the same axes."""

    kind: str  # a key of _SENT
    axes: tuple[str, ...]  # of the mesh; ("?",) where the groups follow none; (SLICES,) between TPU slices
    runs: int  # in one run of the program
    payload: int  # bytes of the whole array on each device, over all runs: gathered, before scattering, or reduced
    sent: int  # bytes that each device sends, over all runs, by the ring algorithm
    hidden: int = 0  # of them, bytes that the schedule sends while other work runs


# kind -> bytes that a device sends to the others in a group of n, by the ring algorithm, per byte of payload
_SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: 1,
}


def collectives(text: str, *, mesh: Mesh) -> list[Collective]:
    """Return the collectives of a compiled program, summed up by kind and axes, largest traffic first.

    Args:
        text: `compiled.as_text()`.
        mesh: what it was compiled for.
    """
    computations, entry = hlo.parse(text)
    mesh = of_one_slice(mesh)
    totals: dict[tuple, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for running in execution.run(computations, entry):
        for found in _found(running, computations):
            axes, size = _group(found, mesh)
            if size == 1:
                continue  # moves nothing
            kind = found.kind.replace("all-reduce-scatter", "reduce-scatter")
            payload = running.times * found.payload * (size if found.kind == "reduce-scatter" else 1)
            sent = round(payload * _SENT[kind](size))
            more = (running.times, payload, sent, sent if found.hidden else 0)
            totals[kind, axes] = [old + new for old, new in zip(totals[kind, axes], more, strict=True)]
    rows = [Collective(kind, axes, *numbers) for (kind, axes), numbers in totals.items()]
    return sorted(rows, key=lambda row: -row.sent)


def is_collective(instruction: hlo.Instruction) -> bool:
    """Return whether an instruction is a collective, starts one or waits for one."""
    return instruction.opcode.removesuffix("-start").removesuffix("-done") in _SENT


def of_one_slice(mesh: Mesh) -> Mesh:
    """Return the part of a mesh that lies in its first TPU slice: what a program is about."""
    slices = np.vectorize(lambda device: getattr(device, "slice_index", 0))(mesh.devices)
    places = np.nonzero(slices == slices.flat[0])
    return Mesh(mesh.devices[np.ix_(*[np.unique(along) for along in places])], mesh.axis_names)


_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_AMONG = re.compile(r'_xla_megascale_target="\{([\d,]+)\}')


class _Found(NamedTuple):
    """A collective in the text."""

    kind: str  # a key of _SENT, or all-reduce-scatter: the TPU's reduce-scatter, the slice comes after it
    payload: int  # bytes of its result
    hidden: bool  # other work runs between its start and its end
    instruction: hlo.Instruction


def _kind(instruction: hlo.Instruction) -> str:
    """The collective that an instruction is, starts, or receives from another slice; "" for none."""
    if instruction.opcode == "recv" and (between := _BETWEEN_SLICES.search(instruction.text)):
        kind = between.group(1).lower().replace("_", "-")
        return kind if kind in _SENT else "collective-permute"  # one slice to one other
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in _SENT else ""


def _found(running: execution.Running, computations: hlo.Computations) -> Iterator[_Found]:
    """Every collective of a computation, those inside its fusions among them."""
    spread: dict[tuple, list[_Found]] = defaultdict(list)  # the TPU's compiler spreads one over several fusions
    for instruction in running.computation.instructions.values():
        if kind := _kind(instruction):
            yield _Found(kind, _bytes(instruction), running.beside_work(instruction), instruction)
        elif instruction.opcode not in execution.FLOW:
            for inner, fused in execution.inside(instruction, computations):
                if kind := _kind(inner):
                    kind = "all-reduce-scatter" if fused.startswith("all-reduce-scatter") else kind
                    one = _Found(kind, _bytes(inner), running.beside_work(instruction), inner)
                    spread[kind, one.payload, inner.attribute("channel_id")].append(one)
    for parts in spread.values():
        yield parts[0]._replace(hidden=parts[0].hidden or len(parts) > 1)


def _bytes(instruction: hlo.Instruction) -> int:
    """Bytes of an instruction's result; what a start returns beside it (its operands, counters) does not count."""
    opcode, result = instruction.opcode, instruction.result
    if opcode == "recv":
        result = hlo.elements(result)[0]
    elif opcode.endswith("-start") and opcode != "all-reduce-start" and result.startswith("("):
        result = hlo.elements(result)[1]
    elif opcode == "all-reduce-start" and result.startswith("(("):
        result = hlo.elements(result)[1]
    return hlo.bytes_of(result)


def _group(found: _Found, mesh: Mesh) -> tuple[tuple[str, ...], int]:
    """The axes along which an instruction's groups lie, and how many devices (or slices) a group has."""
    instruction = found.instruction
    if instruction.opcode == "recv":
        among = _AMONG.search(instruction.text)
        return (SLICES,), len(_ints(among.group(1))) if among else 2
    if found.kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", instruction.text)
        groups = _lists(pairs.group(1) + "}" if pairs else "")
        moved = {axis for pair in groups for axis in _differing(pair, mesh)}
        return tuple(axis for axis in mesh.axis_names if axis in moved), 2 if moved else 1
    groups = _replica_groups(instruction.text, mesh)
    wanted = {frozenset(group) for group in groups}
    for count in range(len(mesh.axis_names) + 1):
        for axes in itertools.combinations([axis for axis in mesh.axis_names if mesh.shape[axis] > 1], count):
            if wanted == _groups_along(axes, mesh):
                return axes, len(groups[0])
    return ("?",), len(groups[0])


def _groups_along(axes: tuple[str, ...], mesh: Mesh) -> set[frozenset[int]]:
    positions = np.arange(mesh.size).reshape(mesh.devices.shape)
    last = [mesh.axis_names.index(axis) for axis in axes]
    moved = np.moveaxis(positions, last, range(-len(last), 0)).reshape(-1, int(np.prod([mesh.shape[a] for a in axes])))
    return {frozenset(row.tolist()) for row in moved}


def _differing(pair: list[int], mesh: Mesh) -> list[str]:
    first, second = (np.unravel_index(device, mesh.devices.shape) for device in pair)
    return [axis for axis, a, b in zip(mesh.axis_names, first, second, strict=True) if a != b]


_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:\([^)]*\))? ?\{([^}]*)\}")
_LISTED = re.compile(r"replica_groups=\{(.*?\})?\}")


def _replica_groups(text: str, mesh: Mesh) -> list[list[int]]:
    """Devices of each group, from any of the three ways XLA writes them; none listed means all devices."""
    everyone = [list(range(mesh.size))]
    if iota := _IOTA.search(text):
        shape, reshape, order = (_ints(part) for part in iota.groups())
        devices = np.arange(int(np.prod(reshape))).reshape(reshape)
        return devices.transpose(order or range(len(reshape))).reshape(shape).tolist()
    if named := _NAMED.search(text):
        sizes = {key: int(size) for key, size in re.findall(r"'([^']+)'=(\d+)", named.group(1))}
        chosen = re.findall(r"'([^']+)'", named.group(2))
        devices = np.arange(int(np.prod(list(sizes.values())))).reshape(list(sizes.values()))
        last = [list(sizes).index(key) for key in chosen]
        return (
            np.moveaxis(devices, last, range(-len(last), 0))
            .reshape(-1, int(np.prod([sizes[k] for k in chosen])))
            .tolist()
        )
    listed = _LISTED.search(text)
    return _lists(listed.group(1) or "") or everyone if listed else everyone


def _lists(text: str) -> list[list[int]]:
    """The inner lists of {0,1},{2,3}."""
    return [_ints(inner) for inner in re.findall(r"\{([\d, ]+)\}", text)]


def _ints(text: str | None) -> list[int]:
    return [int(number) for number in (text or "").split(",") if number.strip()]
