"""How the package hangs together, in figures: `python -m tools.structure`.

Folders and files, imports between folders, circles among files, and what a reader of one training step reads: every
function of the project on the way from `train.py` to the loss of a DPO step, that is, on the stack when the step is
first traced and called while it is, with its lines, docstrings included.
"""

import ast
import collections
import importlib.util
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
LINKS = ("kernels", "eval", "configs")


def modules() -> dict[str, Path]:
    """Return the files of the package by dotted name."""
    found = {}
    for folder in ("fpo_jax", *LINKS):
        for path in sorted((REPO / folder).rglob("*.py")):
            parts = path.relative_to(REPO).with_suffix("").parts
            name = ".".join(parts if folder == "fpo_jax" else ("fpo_jax", *parts)).removesuffix(".__init__")
            found[name] = path
    return found


def imports(files: dict[str, Path]) -> dict[str, set[str]]:
    """Return which files each file imports."""
    needs = {}
    for module, path in files.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        needs[module] = {name if name in files else name.rpartition(".")[0] for name in names} & set(files) - {module}
    return needs


def room(module: str) -> str:
    """Return the folder of the package, or the file at its top."""
    return module.split(".")[1] if "." in module else module


def circles(needs: dict[str, set[str]]) -> set[str]:
    """Return the files that import themselves, by way of others."""
    left = set(needs)
    while True:
        needed = set().union(*(needs[module] for module in left))
        inside = {module for module in left if needs[module] & left and module in needed}
        if inside == left:
            return left
        left = inside


def depth(arrows: dict[str, set[str]]) -> int:
    """Return the length of the longest chain of imports between folders."""

    def of(name: str) -> int:
        return 1 + max((of(other) for other in arrows[name]), default=0)

    return max(map(of, arrows))


def read_for_one_step() -> dict[tuple[str, int], int]:
    """Return the lines of every function that leads to the loss of a DPO step, by file and first line."""
    from fpo_jax.trainer import train_step, trainer
    from tests import tiny

    seen: dict[tuple[str, int], int] = {}
    own = tuple(f"{REPO}/{folder}/" for folder in ("fpo_jax", *LINKS))

    def note(frame, event="call", _argument=None):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(own) and not code.co_name.startswith("<"):
            path = str(Path(code.co_filename).resolve().relative_to(REPO))
            last = max((line for *_, line in code.co_lines() if line), default=code.co_firstlineno)
            seen[path, code.co_firstlineno] = last - code.co_firstlineno + 1

    inner = train_step.train_step

    def traced(*arguments, **options):
        frame = sys._getframe()
        while frame is not None:
            note(frame)
            frame = frame.f_back
        sys.setprofile(note)
        try:
            return inner(*arguments, **options)
        finally:
            sys.setprofile(None)

    train_step.train_step = traced
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tiny.write_model(root / "model", layers=1)
        tiny.write_pairs(root / "pairs.jsonl", count=16)
        changes = {"loss__name": "dpo", "loss__alpha": None, "train__max_steps": 1, "data__eval": ""}
        changes |= {"mesh__data": 1, "mesh__fsdp": 1, "train__save_every": 1}
        trainer.run(tiny.config(root / "model", root / "pairs.jsonl", **changes), root / "run")
    return seen


def main() -> None:
    """Print the figures."""
    files = modules()
    needs = imports(files)
    arrows: dict[str, set[str]] = {room(module): set() for module in files}
    for module, names in needs.items():
        arrows[room(module)] |= {room(name) for name in names} - {room(module), "fpo_jax"}
    aside = {"fpo_jax", "configs"}
    arrows = {name: others - aside for name, others in arrows.items() if name not in aside}
    counts = collections.Counter(room(module) for module in files)
    print(f"rooms {len(arrows)}, imports between them {sum(map(len, arrows.values()))}, floors {depth(arrows)}")
    print(f"files in a circle of imports: {sorted(circles(needs)) or 'none'}")
    print("files: " + ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    lines = collections.Counter()
    for path in files.values():
        lines[path.relative_to(REPO).parts[0]] += path.read_text().count("\n")
    print("lines: " + ", ".join(f"{name} {count:,}" for name, count in lines.items()))
    if importlib.util.find_spec("pytest") is not None:  # tests/tiny.py makes the model
        seen = read_for_one_step()
        read = len({path for path, _ in seen})
        print(f"one DPO step: {len(seen)} functions in {read} files, {sum(seen.values()):,} lines")


if __name__ == "__main__":
    main()
