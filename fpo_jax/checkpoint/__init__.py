"""Checkpoints that survive kills and damage.

manager       saves and restores train states, parameters and meta data
sealing       digests and seal in the course of orbax's saves
integrity     digests of what was written, and their check
verification  the check of a run's checkpoints, divided over its processes
disk_space    whether a save will fit
"""

from fpo_jax.checkpoint.manager import (
    ATTEMPTS,
    BEST,
    FOLDER,
    SOURCE_FOLDER,
    Checkpointer,
    SaveFailed,
    restore_params,
)

__all__ = ["ATTEMPTS", "BEST", "FOLDER", "SOURCE_FOLDER", "Checkpointer", "SaveFailed", "restore_params"]
