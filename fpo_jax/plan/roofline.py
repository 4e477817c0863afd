"""How long a step would take at the rates of the data sheets: a bound from below, with its assumptions in words.

seconds at best = max(compute, memory, links)      everything overlaps
seconds at most = max(compute, memory) + links     no transfer hides behind computing
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from fpo_jax.models import params
from fpo_jax.perf import hardware
from fpo_jax.plan.collectives import SLICES, Collective, of_one_slice
from fpo_jax.plan.compilation import Outcome

ASSUMPTIONS = (
    "matrix products run at the data sheet's dense bfloat16 rate, and the devices share them evenly",
    "memory traffic: each pass over the layers reads their gathered weights once, each micro-batch adds to the gradient"
    " sums, the optimiser reads and writes its state; activations are not counted",
    "collectives send (n-1)/n of an array (all-reduce twice) at the full rate of a device's links, one after the other",
    "transfers to and from the host's memory, the input pipeline, evaluations and checkpoints cost nothing",
)


class Estimate(NamedTuple):
    """Seconds of one step."""

    compute: float
    memory: float
    links: float

    @property
    def best(self) -> float:
        """Everything overlaps."""
        return max(self)

    @property
    def most(self) -> float:
        """Transfers between devices hide behind nothing."""
        return max(self.compute, self.memory) + self.links


def estimate(outcome: Outcome, capacity: hardware.Capacity) -> Estimate:
    """Return the seconds that a mean step takes at least in each resource."""
    assert outcome.layout.mesh is not None
    mesh = outcome.layout.mesh
    linked = np.vectorize(hardware.linked)(of_one_slice(mesh).devices)
    sent = sum(row.sent / _rate(row, mesh.axis_names, linked, capacity) for row in outcome.collectives)
    links = sent * outcome.sizes.filled
    return Estimate(
        outcome.operations / mesh.size / capacity.flops, memory_traffic(outcome) / capacity.bandwidth, links
    )


def memory_traffic(outcome: Outcome) -> int:
    """Return the bytes that a step moves through a device's memory, activations left out."""
    assert outcome.layout.mesh is not None
    config, model_config = outcome.config, outcome.sizes.blueprint.model_config
    matrices = sum(math.prod(entry.shape) for entry in params.entries(model_config) if entry.stacked and entry.decay)
    weights = matrices * jax.numpy.dtype(config.model.compute_dtype).itemsize // outcome.layout.mesh.shape["tensor"]
    passes = 3 if config.model.remat == "none" else 4  # forward, again, and two products per weight backward
    per_micro_batch = passes * weights + 2 * outcome.gradients
    micro_batches = outcome.accumulation * outcome.sizes.filled
    return round(micro_batches * per_micro_batch) + 2 * outcome.state + outcome.gradients


def _rate(row: Collective, axis_names: Sequence[str], linked: np.ndarray, capacity: hardware.Capacity) -> float:
    """Bytes/s of a device's slowest connection along the axes of a collective; `linked` has every device's group."""
    if SLICES in row.axes:
        return capacity.network
    index = tuple(slice(None) if axis in row.axes or "?" in row.axes else 0 for axis in axis_names)
    return capacity.network if len(np.unique(linked[index])) > 1 else capacity.link
