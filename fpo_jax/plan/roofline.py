"""How long a step takes: a bound from below, a prediction, and no overlap at all, with their assumptions in words.

work      = products + kernels                              the device does one thing after the other
best      = max(compute, memory, links)                     everything overlaps, at the data sheet's rates
predicted = work + exposed + max(links - exposed - work, 0) what the schedule hides behind work is hidden
most      = work + links                                    nothing overlaps
"""

from typing import NamedTuple

import jax

from fpo_jax.perf import flops, hardware
from fpo_jax.plan import links
from fpo_jax.plan.collectives import of_one_slice
from fpo_jax.plan.compilation import Outcome

ASSUMPTIONS = (
    "the devices share the matrix products evenly; at best they run at the data sheet's dense rate, else at"
    f" {hardware.REACHED:.0%} of it, what an H200 reached",
    "memory at best: each pass over the layers reads their gathered weights once, each micro-batch adds to the gradient"
    " sums, the optimiser reads and writes its state; else every kernel without a product reads its operands and writes"
    " its results at the data sheet's bandwidth",
    "collectives send (n-1)/n of an array (all-reduce twice), one after the other: a ring over hosts on as many network"
    " adapters as it has members in a host, on a TPU slice on the ports along the axes that its groups lie along",
    "a transfer is hidden where the compiled schedule has work between its start and its end",
    "transfers to and from the host's memory, the input pipeline, evaluations and checkpoints cost nothing",
)


class Estimate(NamedTuple):
    """Seconds of one step."""

    compute: float  # matrix products at the data sheet's rate
    memory: float  # what has to be moved in any case
    links: float
    kernels: float  # those without a product
    exposed: float  # of the links, what the schedule leaves without work beside it

    @property
    def products(self) -> float:
        """Matrix products at the rate that is reached."""
        return self.compute / hardware.REACHED

    @property
    def best(self) -> float:
        """Everything overlaps, at the rates of the data sheets."""
        return max(self.compute, self.memory, self.links)

    @property
    def predicted(self) -> float:
        """Kernels run one after the other; transfers hide where the schedule lets them, as long as the work lasts."""
        work = self.products + self.kernels
        return work + self.exposed + max(self.links - self.exposed - work, 0.0)

    @property
    def most(self) -> float:
        """Nothing overlaps."""
        return self.products + self.kernels + self.links


def estimate(outcome: Outcome, capacity: hardware.Capacity) -> Estimate:
    """Return the seconds that a mean step takes in each resource."""
    assert outcome.layout.mesh is not None
    mesh, filled = of_one_slice(outcome.layout.mesh), outcome.sizes.filled
    rates = [links.rate(row, mesh, capacity) for row in outcome.collectives]
    sent = sum(row.sent / rate for row, rate in zip(outcome.collectives, rates, strict=True))
    hidden = sum(row.hidden / rate for row, rate in zip(outcome.collectives, rates, strict=True))
    return Estimate(
        compute=capacity.seconds(outcome.operations, fp8=outcome.fp8_operations) / outcome.layout.mesh.size,
        memory=memory_traffic(outcome) / capacity.bandwidth,
        links=sent * filled,
        kernels=outcome.moved * filled / capacity.bandwidth,
        exposed=(sent - hidden) * filled,
    )


def memory_traffic(outcome: Outcome) -> int:
    """Return the bytes that a step moves through a device's memory at least: no activations."""
    assert outcome.layout.mesh is not None
    config, model_config = outcome.config, outcome.sizes.blueprint.model_config
    itemsize = jax.numpy.dtype(config.model.compute_dtype).itemsize
    weights = itemsize * sum(flops.weights_on_a_device(model_config, outcome.layout.mesh))
    passes = 3 if config.model.remat == "none" else 4  # forward, again, and two products per weight backward
    per_micro_batch = passes * weights + 2 * outcome.gradients
    micro_batches = outcome.accumulation * outcome.sizes.filled
    return round(micro_batches * per_micro_batch) + 2 * outcome.state + outcome.gradients
