"""The import order of the package is a list, and every module keeps to it."""

import ast
import re
import subprocess
import sys

import pytest

from tests.paths import REPO

# a folder, or a file at the top, imports only from those above it
LAYERS = [
    "types",
    "io",
    "versions",
    "config",
    "tokenization",
    "distributed",
    "kernels",
    "sharding",
    "data",
    "losses",
    "recipes",
    "attention",
    "models",
    "perf",
    "checkpoint",
    "hf",
    "logprobs",
    "optimizer",
    "inference",
    "trainer",
    "plan",
    "cli",
    "eval",
]
LINKS = ("kernels", "eval", "configs")  # of the package to the folders beside it
FORBIDDEN = {"torch", "tensorflow", "eval", "kernels", "configs"}  # the last three only as parts of fpo_jax
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
    """Every file of the package with its dotted name."""
    for folder in ("fpo_jax", *LINKS):
        for path in sorted((REPO / folder).rglob("*.py")):
            parts = path.relative_to(REPO).with_suffix("").parts
            yield path, ".".join(parts if folder == "fpo_jax" else ("fpo_jax", *parts)).removesuffix(".__init__")


def test_every_file_stands_in_the_list():
    found = {own_layer(name) for _, name in sources()} - {None, "configs"}
    assert found == set(LAYERS)


def test_imports_point_one_way():
    wrong = []
    for path, module in sources():
        layer = own_layer(module)
        for name, line in imported(path):
            other = own_layer(name)
            if {layer, other} <= set(LAYERS) and LAYERS.index(other) > LAYERS.index(layer):
                wrong.append(f"{path.relative_to(REPO)}:{line} {layer} imports {other}")
            if name.split(".")[0] in FORBIDDEN:
                wrong.append(f"{path.relative_to(REPO)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_import_goes_in_a_circle():
    """Not even between the files of a folder, and not for types alone."""
    modules = {module for _, module in sources()}
    needs = {}
    for path, module in sources():
        found = {name if name in modules else name.rpartition(".")[0] for name, _ in imported(path)}
        needs[module] = (found & modules) - {module}
        if path.name != "__init__.py":  # a package that hands on a file's names is imported by files beside it
            assert module.rpartition(".")[0] not in needs[module] or module.count(".") == 1, (
                f"{module} imports its folder"
            )
    done = set()
    while ready := {module for module in modules - done if needs[module] <= done}:
        done |= ready
    assert not modules - done, f"a circle among {sorted(modules - done)}"


def test_packages_only_hand_names_on():
    for path, _ in sources():
        if path.name == "__init__.py" and path.parent.name != "fpo_jax":  # whose names are imported at their first use
            tree = ast.parse(path.read_text())
            kinds = (ast.Import, ast.ImportFrom, ast.Assign, ast.Expr)
            assert all(isinstance(node, kinds) for node in tree.body), f"{path} holds an implementation"


def test_kernels_import_jax_and_numpy_only():
    wrong = []
    for path in sorted((REPO / "kernels").rglob("*.py")):
        for name, line in imported(path):
            root = name.split(".")[0]
            if root not in KERNEL_IMPORTS or (root == "fpo_jax" and own_layer(name) != "kernels"):
                wrong.append(f"{path.name}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_every_pallas_kernel_stands_in_kernels():
    """`splash` calls one that jax brings."""
    calls = [path for path, _ in sources() if re.search(r"(pallas_call|plgpu.kernel)\(", path.read_text())]
    assert calls and all(path.is_relative_to(REPO / "kernels") for path in calls), calls


def test_folders_beside_the_package_are_parts_of_it():
    for name in LINKS:
        assert (REPO / "fpo_jax" / name).readlink().as_posix() == f"../{name}"
        assert not (REPO / name / "__init__.py").exists(), "it would be importable under two names"


@pytest.mark.slow  # a fresh interpreter imports jax and transformers
def test_importing_everything_touches_no_device_and_no_torch():
    code = (
        "import importlib, sys\n"
        "from jax._src import xla_bridge\n"
        f"for name in {sorted(module for _, module in sources() if not module.endswith('__main__'))!r}:\n"
        "    importlib.import_module(name)\n"
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
