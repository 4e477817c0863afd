"""Runs on one device that are stopped and go on, in one process."""

import contextlib

import jax
import numpy as np
import pytest

from fpo_jax import checkpoint
from fpo_jax.distributed import preemption
from fpo_jax.perf import profiler
from fpo_jax.trainer import compiled_step, metric_logger, trainer


def whole(config, workdir):
    """Run without a stop."""
    config.mesh.data = config.mesh.fsdp = config.mesh.tensor = 1
    trainer.run(config, workdir, devices=jax.devices()[:1])


def stopped(config, workdir, monkeypatch, *, after, then=None):
    """Run, stop as by a signal during step `after`, and run again to the end, as configured `then` or as before."""
    with signalled(monkeypatch, after=after):
        whole(config, workdir)
    whole(then or config, workdir)


@contextlib.contextmanager
def signalled(monkeypatch, *, after):
    """Send a signal during step `after` of the run in the body; the run ends with that step saved."""
    begun = [0]
    with monkeypatch.context() as patch:
        patch.setattr(profiler.Trace, "before", lambda self, number: begun.append(number))
        patch.setattr(preemption.StopRequest, "agreed", lambda self: "SIGTERM" if begun[-1] >= after else None)
        with pytest.raises(preemption.Stopped, match=f"saved step {after} of "):
            yield


def compile_once(monkeypatch):
    """Let runs of one configuration, however far each goes, share their compiled programs."""
    compiled, build = {}, compiled_step.CompiledStep._compile

    def once(program, first, batch):
        key = (program.name, str(jax.tree.map(lambda leaf: (leaf.shape, leaf.sharding), (first, batch))))
        if key not in compiled:
            compiled[key] = build(program, first, batch)
        return compiled[key]

    monkeypatch.setattr(compiled_step.CompiledStep, "_compile", once)


def outcome(workdir):
    """Step, weights and metrics of a run, to be compared bit by bit."""
    weights, meta = checkpoint.restore_params(workdir, None)
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(weights)]
    return meta["step"], leaves, (workdir / metric_logger.METRICS_FILE).read_bytes()
