"""The import order of the package is a list, and every module keeps to it."""

import ast
import subprocess
import sys

import pytest

from tests.paths import REPO

# a module imports only from those above it
LAYERS = [
    "shapes",
    "files",
    "locking",
    "integrity",
    "hosts",
    "config",
    "chat",
    "data",
    "kernels",
    "sharding",
    "attention",
    "model",
    "params",
    "flops",
    "hf",
    "logps",
    "losses",
    "recipes",
    "rewarding",
    "optim",
    "guards",
    "measures",
    "step",
    "reference",
    "sample",
    "space",
    "checkpoint",
    "metrics",
    "execution",
    "profiling",
    "job",
    "scorers",
    "programs",
    "scoring",
    "answering",
    "evaluation",
    "topologies",
    "plan",
    "announcement",
    "loop",
]
FORBIDDEN = {"torch", "tensorflow", "eval", "kernels"}  # `kernels` and `eval` only by their own paths
KERNEL_IMPORTS = {"jax", "numpy", "fpo_jax", "collections", "dataclasses", "functools", "math", "typing"}


def imported(path):
    """Dotted names that a file imports, with the name taken from a package: `from fpo_jax import x` -> fpo_jax.x."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} uses a relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def own_layer(name):
    parts = name.split(".")
    return parts[1] if parts[0] == "fpo_jax" and len(parts) > 1 else None


def sources():
    package = REPO / "fpo_jax"
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        if (relative.parts[0] != "kernels" and relative.name != "__init__.py") or len(relative.parts) > 1:
            yield path, relative.parts[0].removesuffix(".py")


def test_every_module_stands_in_the_list():
    assert {layer for _, layer in sources()} - {"kernels"} <= set(LAYERS)


def test_imports_point_one_way():
    wrong = []
    for path, layer in sources():
        for name, line in imported(path):
            other = own_layer(name)
            if other in LAYERS and other != layer and LAYERS.index(other) > LAYERS.index(layer):
                wrong.append(f"{path.relative_to(REPO)}:{line} {layer} imports {other}")
            if name.split(".")[0] in FORBIDDEN:
                wrong.append(f"{path.relative_to(REPO)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_kernels_import_jax_and_numpy_only():
    wrong = []
    for path in sorted((REPO / "kernels").glob("*.py")):
        for name, line in imported(path):
            root = name.split(".")[0]
            if root not in KERNEL_IMPORTS or (root == "fpo_jax" and own_layer(name) != "kernels"):
                wrong.append(f"{path.name}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_kernels_is_a_link_without_init():
    assert (REPO / "fpo_jax" / "kernels").is_symlink()
    assert (REPO / "fpo_jax" / "kernels").readlink().as_posix() == "../kernels"
    assert not (REPO / "kernels" / "__init__.py").exists()


@pytest.mark.slow  # a fresh interpreter imports jax and transformers
def test_importing_everything_touches_no_device_and_no_torch():
    code = (
        "import importlib, sys\n"
        "from jax._src import xla_bridge\n"
        f"for name in {LAYERS!r}:\n"
        "    if name != 'kernels': importlib.import_module('fpo_jax.' + name)\n"
        "assert not xla_bridge.backends_are_initialized(), 'a device was opened'\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_pickle_and_no_eval_in_the_product():
    banned = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    wrong = []
    for folder in ("fpo_jax", "kernels", "eval", "configs"):
        for path in sorted((REPO / folder).rglob("*.py")):
            tree = ast.parse(path.read_text())
            wrong += [f"{path}:{line}" for name, line in imported(path) if name.split(".")[0] in banned]
            calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
            wrong += [f"{path}:{call.lineno}" for call in calls if call.func.id in {"eval", "exec"}]
    assert not wrong, wrong
