"""Which process this is, of how many, and the key-value store that they share. Opens no device."""

import contextlib
import time
from typing import Any

import jax
from jax._src import distributed  # jax exports neither the client nor the count before a device is opened


class CollectiveError(Exception):
    """Raised by every process at the same point: none of them waits for another that has gone."""


def process_count() -> int:
    """Return the number of processes of this run; 1 before `start`."""
    return distributed.global_state.num_processes


def process_index() -> int:
    """Return the number of this process, from 0."""
    return distributed.global_state.process_id


def is_main_process() -> bool:
    """Return whether this is process 0: the one that writes files, logs and shows progress."""
    return process_index() == 0


def put(key: str, value: str) -> bool:
    """Store a value that all processes can read; False where the key has one already."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(_PREFIX + key, value)
        return True
    return False


def get(key: str, *, timeout_s: float) -> str | None:
    """Wait for a value; None when the time is over.

    Raises:
        JaxRuntimeError: process 0, which keeps the store, is gone.
    """
    end = time.monotonic() + timeout_s
    while True:
        left_ms = max(1, int(1000 * (end - time.monotonic())))
        try:
            return _client().blocking_key_value_get(_PREFIX + key, left_ms)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if time.monotonic() >= end:
            return None


_PREFIX = "fpo_jax/"


def _client() -> Any:
    return distributed.global_state.client
