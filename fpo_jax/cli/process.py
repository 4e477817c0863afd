"""What a process does that is one of our programs alone, before it imports anything large."""

import os
import sys


def without_torch() -> None:
    """Keep transformers from importing torch, which takes it two seconds and 300 MB, and of which we use nothing."""
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType] # what is None cannot be imported
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is not there
