"""The one digest of values: what a file, a folder or a stored reply is known by."""

import hashlib
import json
from typing import Any


def of(value: Any) -> str:
    """Return the sha256 (hex) of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
