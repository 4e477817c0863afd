"""Verification of a run's checkpoints by all of its processes: process 0 chooses the step, each digests a share of it.

    process 0: a step's files ──► each process: its share, balanced by size ──► process 0: what is wrong, the next step

It decides nothing itself: what a good step is stands in integrity.py.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fpo_jax import distributed
from fpo_jax.checkpoint import integrity


def newest_good(folder: Path) -> integrity.Choice | None:
    """Choose the newest step that may be restored; every process calls this and reads its share of the files.

    Args:
        folder: with a folder of every step, the same for all processes.

    Returns:
        The choice of integrity.newest_good in process 0, None in the others.

    Raises:
        ValueError: as integrity.newest_good, in every process.
    """
    choice, refusal = None, None
    if distributed.is_main_process():
        try:
            choice = integrity.newest_good(folder, compare=_ask)
        except (ValueError, OSError) as error:
            refusal = error
        distributed.share("")  # the others need not wait for another step
    else:
        while task := distributed.share("")[0]:
            number, files = json.loads(task)
            _compare(folder / number, files)
    with distributed.together():
        if refusal is not None:
            raise refusal
    return choice


def _ask(step: Path, files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Have every process compare its share of a step; called by process 0."""
    distributed.share(json.dumps([step.name, files]))
    return _compare(step, files)


def _compare(step: Path, files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Compare this process's share, and return what is wrong with the files of all shares, in their order."""
    shares = distributed.balanced({name: entry["bytes"] for name, entry in files.items()})
    mine = integrity.compare(step, {name: files[name] for name in shares[distributed.process_index()]})
    wrong: dict[str, str] = {}
    for text in distributed.share(json.dumps(mine)):
        wrong |= json.loads(text)
    return {name: wrong[name] for name in files if name in wrong}
