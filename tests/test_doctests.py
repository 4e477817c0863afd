"""Every example of a docstring, in a process of its own: the shape checks hide the functions they wrap from doctest."""

import os
import subprocess
import sys

from tests import compiling
from tests.paths import REPO

RUN = """
import doctest, importlib, sys
for name in sys.argv[1:]:
    failed, tried = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert tried, f"no example of {name} was run"
    print(name, failed)
"""


def test_every_example_is_true():
    paths = {path: path for folder in ("fpo_jax", "eval", "tools") for path in (REPO / folder).rglob("*.py")}
    paths |= {path: REPO / "fpo_jax" / path.relative_to(REPO) for path in (REPO / "kernels").rglob("*.py")}
    names = [
        ".".join(name.relative_to(REPO).with_suffix("").parts)
        for path, name in paths.items()
        if ">>> " in path.read_text()
    ]
    environment = os.environ | {"PYTHONPATH": str(REPO), "XLA_FLAGS": compiling.flags(devices=8)}
    done = subprocess.run([sys.executable, "-c", RUN, *names], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == sorted(f"{name} 0" for name in names), done.stdout
