"""Where the real inputs of the tests are: `$FPO_SHARED/data`, else `../shared/data` beside the checkout."""

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


def shared_data(*parts: str) -> Path:
    """Path below the shared data folder; skips the calling test, saying why, where it is absent."""
    root = Path(os.environ.get("FPO_SHARED", REPO.parent / "shared")) / "data"
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(
            f"real test input {'/'.join(parts)} is absent: no {root} (set FPO_SHARED to the folder that holds data/)"
        )
    return path
