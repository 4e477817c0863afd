"""The collectives of a compiled program: kind, size, how often they run, along which axes of the mesh.

XLA's text of one device's program goes in, rows come out. An instruction inside a loop counts as often as the loop
runs; one split into a start and a done counts once. The program of several TPU slices is that of one of them: its
groups lie within the slice, and what crosses the data centre's network is received from a runtime by name.
"""

import itertools
import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

log = logging.getLogger("fpo_jax")
SLICES = "slices"  # what a collective goes along that crosses TPU slices, on whichever axes of the mesh they lie


class Collective(NamedTuple):
    """All instructions of one kind along the same axes."""

    kind: str  # a key of _SENT
    axes: tuple[str, ...]  # of the mesh; ("?",) where the groups follow none; (SLICES,) between TPU slices
    runs: int  # in one run of the program
    payload: int  # bytes of the whole array on each device, over all runs: gathered, before scattering, or reduced
    sent: int  # bytes that each device sends, over all runs, by the ring algorithm


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
    computations, entry = _computations(text)
    mesh = of_one_slice(mesh)
    totals: dict[tuple, list[int]] = defaultdict(lambda: [0, 0, 0])
    for instruction, times in _executed(computations, entry, 1):
        axes, size = _group(instruction, mesh)
        if size == 1:
            continue  # moves nothing
        kind = instruction.kind.replace("all-reduce-scatter", "reduce-scatter")
        payload = times * instruction.payload * (size if instruction.kind == "reduce-scatter" else 1)
        more = (times, payload, round(payload * _SENT[kind](size)))
        totals[kind, axes] = [old + new for old, new in zip(totals[kind, axes], more, strict=True)]
    rows = [Collective(kind, axes, *numbers) for (kind, axes), numbers in totals.items()]
    return sorted(rows, key=lambda row: -row.sent)


def of_one_slice(mesh: Mesh) -> Mesh:
    """Return the part of a mesh that lies in its first TPU slice: what a program is about."""
    slices = np.vectorize(lambda device: getattr(device, "slice_index", 0))(mesh.devices)
    places = np.nonzero(slices == slices.flat[0])
    return Mesh(mesh.devices[np.ix_(*[np.unique(along) for along in places])], mesh.axis_names)


class _Instruction(NamedTuple):
    opcode: str
    kind: str  # of the collective that it is or starts; "" for none
    payload: int  # bytes of its result
    text: str  # operands and attributes


_Computations = dict[str, dict[str, _Instruction]]  # name -> instructions by name, in order; the last one is the root

_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation|branch_computations|called_computations)="
    r"\{?((?:%[\w.-]+(?:, *)?)+)\}?"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_NAME = re.compile(r"%([\w.-]+)")
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_AMONG = re.compile(r'_xla_megascale_target="\{([\d,]+)\}')
_ARRAY = re.compile(r"\b(pred|bf16|f8\w*|[a-z]+\d+)\[([\d,]*)\]")


def _computations(text: str) -> tuple[_Computations, str]:
    found: _Computations = {}
    name = entry = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header.group(2)
            found[name] = {}
            entry = name if header.group(1) else entry
        elif name and (parts := _LINE.match(line)):
            own, result, opcode, rest = parts.groups()
            kind = _kind(opcode, rest)
            found[name][own] = _Instruction(opcode, kind, _bytes(result, opcode) if kind else 0, rest)
    return found, entry


def _kind(opcode: str, rest: str) -> str:
    """The collective that an instruction is, starts, or receives from another slice; "" for none."""
    if opcode == "recv" and (between := _BETWEEN_SLICES.search(rest)):
        kind = between.group(1).lower().replace("_", "-")
        return kind if kind in _SENT else "collective-permute"  # one slice to one other
    kind = opcode.removesuffix("-start")
    return kind if kind in _SENT else ""


def _executed(computations: _Computations, name: str, times: int) -> Iterator[tuple[_Instruction, int]]:
    """Every collective below a computation and how often it runs."""
    channels = set()  # the TPU's compiler spreads one collective over several fusions
    for instruction in computations[name].values():
        if instruction.kind:
            yield instruction, times
            continue
        factor = _trips(instruction, computations) if instruction.opcode == "while" else 1
        for called in [one for names in _CALLED.findall(instruction.text) for one in _NAME.findall(names)]:
            for inner, often in _executed(computations, called, times * factor):
                if instruction.opcode == "fusion":
                    channel = (inner.kind, inner.payload, _attribute(inner.text, "channel_id"))
                    if channel in channels:
                        continue
                    channels.add(channel)
                    if called.startswith("all-reduce-scatter"):  # the TPU's reduce-scatter; the slice comes after it
                        inner = inner._replace(kind="all-reduce-scatter")
                yield inner, often


def _trips(loop: _Instruction, computations: _Computations) -> int:
    """How often a loop runs: what XLA says, else the bound of its counter over the counter's step."""
    if known := _TRIPS.search(loop.text):
        return int(known.group(1))
    condition, body = (computations[_attribute(loop.text, part)] for part in ("condition", "body"))
    compare, root = list(condition.values())[-1], list(body.values())[-1]
    try:
        counter, bound = (condition[name] for name in _NAME.findall(compare.text)[:2])
        index = int(_attribute(counter.text, "index"))
        following = body[_NAME.findall(root.text)[index]]
        steps = [_constant(body[name]) for name in _NAME.findall(following.text)[:2]]
        step = next(number for number in steps if number is not None)
        limit = _constant(bound)
        assert limit is not None and following.opcode == "add"
        return -(-limit // step)
    except (KeyError, ValueError, IndexError, StopIteration, AssertionError):
        log.warning("a loop of the compiled program runs an unknown number of times; its collectives count once")
        return 1


def _constant(instruction: _Instruction) -> int | None:
    """The value of an integer constant; None for any other instruction."""
    value = instruction.text.split(")")[0]
    return int(value) if instruction.opcode == "constant" and value.isdigit() else None


def _attribute(text: str, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.-]+)", text)
    return found.group(1) if found else ""


def _bytes(result: str, opcode: str) -> int:
    """Bytes of an instruction's result; what a start returns beside it (its operands, counters) does not count."""
    if opcode == "recv":
        result = _elements(result)[0]
    elif opcode.endswith("-start") and opcode != "all-reduce-start" and result.startswith("("):
        result = _elements(result)[1]
    elif opcode == "all-reduce-start" and result.startswith("(("):
        result = _elements(result)[1]
    return sum(_bits(dtype) * _count(dims) // 8 for dtype, dims in _ARRAY.findall(result))


def _elements(tuple_text: str) -> list[str]:
    """The elements of a tuple type, which may be tuples."""
    parts, depth, start = [], 0, 1
    for position, letter in enumerate(tuple_text):
        depth += (letter in "({[") - (letter in ")}]")
        if (letter == "," and depth == 1) or depth == 0:
            parts.append(tuple_text[start:position].strip())
            start = position + 1
    return parts


def _bits(dtype: str) -> int:
    return 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])


def _count(dims: str) -> int:
    return int(np.prod([int(size) for size in dims.split(",") if size], dtype=np.int64))


def _group(instruction: _Instruction, mesh: Mesh) -> tuple[tuple[str, ...], int]:
    """The axes along which an instruction's groups lie, and how many devices (or slices) a group has."""
    if instruction.opcode == "recv":
        among = _AMONG.search(instruction.text)
        return (SLICES,), len(_ints(among.group(1))) if among else 2
    if instruction.kind == "collective-permute":
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
