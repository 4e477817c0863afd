"""The wheel holds fpo_jax and its kernels and nothing else at top level."""

import subprocess
import sys
import zipfile

import pytest

from tests.paths import REPO

pytestmark = pytest.mark.slow  # builds a wheel and starts a fresh interpreter


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools", minversion="77", reason="the test extra brings setuptools>=77")
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    source.mkdir()
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, check=True).stdout
    for name in filter(None, tracked.decode().split("\0")):
        path = REPO / name
        if not path.exists() and not path.is_symlink():
            continue  # deleted in the working tree
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            target.symlink_to(path.readlink())
        else:
            target.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(root)]
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    return next(root.glob("*.whl"))


def test_top_level_is_fpo_jax_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fpo_jax"}
    in_tree = {f"fpo_jax/kernels/{path.name}" for path in (REPO / "kernels").glob("*.py")}
    assert in_tree and in_tree <= set(names)
    packages = {path.relative_to(REPO).as_posix() for path in (REPO / "fpo_jax").rglob("*.py")}
    assert packages <= set(names), "a module is missing from the wheel"


def test_installed_wheel_imports_beside_transformers(wheel, tmp_path):
    """The unpacked wheel alone on the path, with the dependencies of this environment but not its checkout."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import sys; sys.path = [p for p in sys.path if p not in ('', sys.argv[2])]; sys.path.insert(0, sys.argv[1])\n"
        "import fpo_jax, fpo_jax.kernels.chunked, fpo_jax.loop, transformers\n"
        "assert fpo_jax.__file__.startswith(sys.argv[1]) and fpo_jax.kernels.chunked.__file__.startswith(sys.argv[1])\n"
        "assert transformers.PreTrainedTokenizerFast and transformers.LlamaConfig()\n"
        "assert not {'kernels', 'eval', 'configs'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site"), str(REPO)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
