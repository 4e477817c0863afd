"""Every test that docs/reliability.md names is there, and its star says in which suite."""

import ast
import re

from tests.paths import REPO

NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)`(\\\*)?")


def marks(path):
    """Name -> whether every case is marked `faults`, of the functions in a file of tests."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name.lower().startswith(
            "test"
        ):
            marked = any(ast.unparse(decorator) == "pytest.mark.faults" for decorator in node.decorator_list)
            if isinstance(node, ast.ClassDef):
                found |= {one.name: marked for one in node.body if isinstance(one, ast.FunctionDef) and marked}
            else:
                found[node.name] = marked or found.get(node.name, False)
    return found


def test_every_test_that_the_matrix_names_exists_and_has_its_star():
    text = (REPO / "docs" / "reliability.md").read_text()
    named = NAMED.findall(text)
    assert len(named) > 60
    files = {name: marks(next((REPO / "tests").rglob(name))) for name, _, _ in named}
    wrong = [f"{file}::{test}" for file, test, star in named if files[file].get(test) != bool(star)]
    assert not wrong, "\n".join(wrong)


def test_the_matrix_has_every_row():
    rows = re.findall(r"^\| (\d+) \|", (REPO / "docs" / "reliability.md").read_text(), re.MULTILINE)
    assert len(rows) >= 43 and rows == [str(number) for number in range(1, len(rows) + 1)]
