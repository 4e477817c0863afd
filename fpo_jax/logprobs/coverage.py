"""What runs where, as a table: the answers of `select`, for every accelerator and mesh.

python -m fpo_jax.logprobs.coverage          the table of docs/performance.md and kernels/README.md
python -m fpo_jax.logprobs.coverage --full   one line for each target, mesh and layout
"""

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from fpo_jax.kernels.lm_head import spec as specs
from fpo_jax.logprobs.dispatch import HeadShapes, Selection, Target, select

TARGETS = {
    "H100": Target("gpu", "NVIDIA H100 80GB HBM3", "9.0"),
    "H200": Target("gpu", "NVIDIA H200", "9.0"),
    "A100": Target("gpu", "NVIDIA A100-SXM4-80GB", "8.0"),
    "L40S": Target("gpu", "NVIDIA L40S", "8.9"),
    "B200": Target("gpu", "NVIDIA B200", "10.0"),
    "GB200": Target("gpu", "NVIDIA GB200", "10.0"),
    "MI300X": Target("gpu", "AMD Instinct MI300X", "gfx942"),
    "v4": Target("tpu", "TPU v4"),
    "v5e": Target("tpu", "TPU v5 lite"),
    "v5p": Target("tpu", "TPU v5"),
    "v6e": Target("tpu", "TPU v6 lite"),
    "v7x": Target("tpu", "TPU7x"),
    "CPU": Target("cpu"),
}
MESHES = {  # name -> devices along data, fsdp, tensor; zero2 differs from fsdp in what it gathers, not in the head
    "one device": (1, 1, 1),
    "data": (8, 1, 1),
    "fsdp": (1, 8, 1),
    "zero2": (1, 8, 1),
    "tensor": (1, 1, 8),
    "fsdp+tensor": (1, 4, 2),
}
LAYOUTS = ("padded", "packed", "shared")
SHAPES = HeadShapes(tokens=65536, width=4096, vocab=128256)  # Llama-3-8B
JAX = "0.12.0"


class Cell(NamedTuple):
    """Of one target, mesh and layout of rows."""

    target: str
    mesh: str
    layout: str
    choice: Selection


def cells() -> Iterator[Cell]:
    """Ask `select` for everything, in bfloat16; needs 8 devices of any kind, for the shape of a mesh alone."""
    for target, described in TARGETS.items():
        for mesh, sizes in MESHES.items():
            devices = np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes)
            placement = specs.Placement(
                Mesh(devices, ("data", "fsdp", "tensor")), ("data", "fsdp"), "tensor", ("fsdp",)
            )
            choice = select(target=described, shapes=SHAPES, dtype="bfloat16", placement=placement, jax_version=JAX)
            for layout in LAYOUTS:  # completions are told by their slots: which layout it is does not enter
                yield Cell(target, mesh, layout, choice)


def table() -> str:
    """Return Markdown: a row for each answer, with the targets, meshes and layouts that get it."""
    answers: dict[tuple[str, str, str], dict[str, list[Cell]]] = {}
    for cell in cells():
        choice, own = cell.choice, TARGETS[cell.target]
        kind = own.device_kind or own.platform
        reason = choice.reason.replace(f"auto on {kind}: ", "").replace(f"auto on {own.platform}: ", "")
        reason, _, loss = reason.rpartition("; loss ")
        answer = f"`{choice.implementation}`", loss, reason
        answers.setdefault(answer, {}).setdefault(cell.target, []).append(cell)
    lines = ["| target | mesh | layout | log-probs | loss | reason |", "|---" * 6 + "|"]
    for answer, found in answers.items():
        for targets in _alike(found):
            same = found[targets[0]]
            meshes, layouts = (
                list(dict.fromkeys(names)) for names in zip(*((c.mesh, c.layout) for c in same), strict=True)
            )
            assert len(same) == len(meshes) * len(layouts)
            where = [
                "every" if len(names) == len(everything) else ", ".join(names)
                for names, everything in ((meshes, MESHES), (layouts, LAYOUTS))
            ]
            lines.append(f"| {' | '.join([', '.join(targets), *where, *answer])} |")
    return "\n".join(lines)


def _alike(found: dict[str, list[Cell]]) -> list[list[str]]:
    """Targets that get an answer on the same meshes and layouts."""
    groups: dict[tuple, list[str]] = {}
    for target, own in found.items():
        groups.setdefault(tuple((cell.mesh, cell.layout) for cell in own), []).append(target)
    return list(groups.values())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="one line for each target, mesh and layout")
    jax.config.update("jax_num_cpu_devices", 8)
    if not parser.parse_args().full:
        print(table())
        return
    for target, mesh, layout, choice in cells():
        inside = "loss inside" if choice.fuse_loss else "loss apart"
        print(f"{target:8}{mesh:13}{layout:8}{choice.implementation:15}{inside:13}{choice.reason}")


if __name__ == "__main__":
    main()
