"""Releases that are known to work, beside those that are installed: `python -m fpo_jax.versions`.

Known good are those of requirements/pythonX.Y.txt, which `make quickstart` installs and `make lock` renews. Exit codes:
0 all direct dependencies are those; 1 some are not, which may work as well; 2 there is no list for this Python.
"""

import importlib.metadata
import re
import sys
from pathlib import Path

from fpo_jax.io import terminal

_LOCKS = Path(__file__).parent / "requirements"


def known_good(python: str) -> dict[str, str]:
    """Return name -> release of every package, for a Python such as 3.11; empty where there is no list."""
    path = _LOCKS / f"python{python}.txt"
    return dict(re.findall(r"^([\w.-]+)==(\S+)", path.read_text(), re.MULTILINE)) if path.is_file() else {}


def direct() -> list[str]:
    """Return the packages that fpo_jax itself names, but for those of its extras."""
    required = importlib.metadata.requires("fpo_jax") or []
    return sorted(_name(one) for one in required if "extra ==" not in one)


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].replace("_", "-").lower()


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def main() -> int:
    """Print the table; return the exit code."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    good = known_good(python)
    if not good:
        print(f"no releases are known good for Python {python}; the lists are those of {_LOCKS}")
        return 2
    installed = {name: _installed(name) for name in direct()}
    rows = [(name, own, good[name], "" if own == good[name] else "differs") for name, own in installed.items()]
    others = sum(bool(note) for *_, note in rows)
    print(terminal.table([(f"Python {python}", "installed", "known good", ""), *rows]))
    print(f"{others} of {len(rows)} differ" if others else "all are known good")
    return 1 if others else 0


if __name__ == "__main__":
    sys.exit(main())
