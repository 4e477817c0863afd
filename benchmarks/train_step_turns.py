"""What the sides of `benchmarks/train_step.py` share: the shapes of a comparison, and taking turns."""

import ctypes
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

BETA, SEED = 0.1, 0
_RESETS = Path("/proc/self/clear_refs")  # "5" written there lets VmHWM start anew


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of one comparison: `groups` prompts an update, each with `candidates` completions, the first preferred."""

    name: str
    vocab: int
    layers: int
    groups: int
    candidates: int
    prompt: int  # tokens
    completion: int
    width: int = 256
    ffn: int = 688
    heads: int = 8
    updates: int = 2  # of a round
    rounds: int = 5
    device: str = "cpu"  # cpu | gpu | tiny: a GPU's options on a CPU, to test them
    dtype: str = "float32"  # of matrix products
    rate: float = 1e-4
    micro: int = 0  # groups of a pass of ours; 0 = all of them
    trl_micro: int = 0  # pairs of a pass of TRL's; 0 = all of them
    remat: str = "none"  # model.remat of ours
    trl_remat: str = "none"  # none | full: gradient checkpointing of TRL
    fields: tuple[str, ...] = ()  # "key=value" of our configuration

    @property
    def on_gpu(self) -> bool:
        """Whether the options are those for a GPU."""
        return self.device != "cpu"

    def ids(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of the whole run: prompts [updates, B, P] and completions [updates, B, K, R]."""
        random = np.random.default_rng(SEED)
        count = (self.updates * (self.rounds + 1), self.groups)  # one round to compile in
        prompts = random.integers(3, self.vocab, (*count, self.prompt))
        return prompts, random.integers(3, self.vocab, (*count, self.candidates, self.completion))

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same as pairs for trainers of K = 2: prompts [updates, pairs, P], chosen and rejected [..., R].

        K candidates are K / 2 pairs of neighbours, so that every candidate is computed once.
        """
        prompts, completions = self.ids()
        halves = self.candidates // 2
        chosen, rejected = (completions[:, :, place::2].reshape(len(prompts), -1, self.completion) for place in (0, 1))
        return np.repeat(prompts, halves, axis=1), chosen, rejected


class Turns:
    """When this process may work, and what it reports."""

    def __init__(self, case: Case):
        """Keep the real stdout for reports; libraries print to stderr."""
        self._case, self._out = case, os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._losses: list[float] = []
        self._baseline = _status("VmRSS")
        self._started: float | None = None
        self._used = 0.0
        self._peaks: list[int] = []  # of the rounds, each since the one before it

    def before(self, update: int, finish=lambda: None, begin=lambda: None) -> None:
        """Call before every update, counted from 0; `finish` waits for those that still run.

        `begin` runs at the start of a round, before its clock.
        """
        if update % self._case.updates:
            return
        finish()
        self._report()
        if not sys.stdin.readline():
            sys.exit("the comparison ended")
        begin()
        self._started, self._used = time.perf_counter(), time.process_time()

    def losses(self, values: list[float]) -> None:
        """Note the losses of the next updates."""
        self._losses += values

    def reference(self, seconds: float) -> None:
        """Note the time of a reference pass over the groups of one update, until the next one."""
        self._say({"reference_seconds": seconds})

    def done(self, finish=lambda: None, device: Callable[[], dict] | None = None) -> None:
        """Call after the last update; `device` returns the name and the peak_bytes of an accelerator's memory."""
        finish()
        self._report()
        if device is not None:
            self._say(device())
            return
        peaks = self._peaks[1:] if _RESETS.exists() else self._peaks  # the peak of compiling is not that of updates
        self._say({"peak_bytes": max(peaks) - self._baseline})

    def _report(self) -> None:
        if self._started is None:
            self._say({"ready": True})
            return
        seconds = {"seconds": time.perf_counter() - self._started, "cpu_seconds": time.process_time() - self._used}
        self._say(seconds | {"losses": self._losses})
        self._losses = []
        self._peaks.append(_status("VmHWM"))
        if _RESETS.exists():
            ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps is no round's
            _RESETS.write_text("5")

    def _say(self, what: dict) -> None:
        print(json.dumps(what), file=self._out, flush=True)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
