"""Whether the logits of a step stay in memory from its forward to its backward pass: where that is faster, and fits.

Kept logits save one of four products (6NDV operations instead of 8NDV) and cost memory traffic. Both follow from the
device's data sheet; whether they fit follows from the compiled step.
"""

from typing import Any

import jax

from fpo_jax import config as configuration
from fpo_jax import sharding, types
from fpo_jax.models import params
from fpo_jax.perf import hardware
from fpo_jax.trainer import compiled_step, forward, run_schedule, steps
from fpo_jax.trainer.batch_shapes import Shape

LOGIT_BYTES = 16  # of traffic: float32, written by the product, read for the maximum, for the sum and for the gradient
_MIB = 2**20


def steps_of(
    config: configuration.Config,
    blueprint: run_schedule.Blueprint,
    layout: sharding.Layout,
    *,
    largest: Shape,
    accumulation: int,
    capacity: hardware.Capacity | None,
) -> steps.Steps:
    """Return the steps of a run; what was settled about the logits is one of their `choices`.

    Args:
        config: `kernel.kept_logits_mib` None asks for a decision, which `capacity` None cannot have.
        blueprint: of the run.
        layout: of the mesh.
        largest: of the batches of steps.
        accumulation: micro-batches of a step.
        capacity: of a device.

    Raises:
        ValueError: as `steps.build`.
    """
    made = steps.build(config, blueprint, layout)
    wanted = forward.kept_logits(config, blueprint, layout)
    frozen = not params.trains_head(blueprint.model_config, blueprint.adapter)  # needs as few products without
    if config.kernel.kept_logits_mib is not None or wanted is None or capacity is None or frozen:
        return made
    width, needed = blueprint.model_config.width, least_width(capacity)
    assert layout.mesh is not None
    lent = hardware.lent(layout.mesh.devices.flat[0], capacity)
    free = lent - made.state.bytes_on_device()
    if width >= needed and wanted < free:
        free = lent - peak(made, config, largest, accumulation)
    again = "logits: computed again in the backward pass;"
    if width < needed:
        made.choices.append(
            f"{again} keeping them pays from a width of {needed:,.0f} on here, and the model's is {width:,}"
        )
    elif wanted > free:
        made.choices.append(
            f"{again} keeping them takes {_mib(wanted)} a device, and {_mib(max(free, 0))} are free beside the step"
        )
    else:
        kept = config.copy_and_resolve_references()
        kept.kernel.kept_logits_mib = -(-wanted // _MIB)
        made = steps.build(kept, blueprint, layout)
        made.choices.append(
            f"logits: kept for the backward pass, {_mib(wanted)} of {_mib(free)} that are free a device"
        )
    return made


def least_width(capacity: hardware.Capacity) -> float:
    """Return the width D of a model from which on a product that is not computed again outweighs the traffic."""
    return LOGIT_BYTES * capacity.flops / capacity.bandwidth / 2


def abstract_batch(
    made: steps.Steps, config: configuration.Config, shape: Shape, per_device: int, *, accumulation=None
) -> types.Batch:
    """Return shapes, dtypes and shardings of a batch of `per_device` groups or rows, with `accumulation` in front."""
    return made.batches.abstract(
        per_device * made.layout.data_parallel_degree,
        group_size=config.data.group_size,
        length=shape.length,
        scored=shape.scored,
        places=shape.places,
        accumulation=accumulation,
    )


def traced(program: compiled_step.CompiledStep, first: Any, batch: Any) -> jax.stages.Traced:
    """Trace a program for the devices that its abstract arguments are placed on.

    Raises:
        ValueError: it needs cuDNN to be compiled, which is not here.
    """
    try:
        return hardware.trace_for(program.jitted, first, batch)
    except RuntimeError as error:
        if "cuDNN" not in str(error):
            raise
        raise ValueError(
            f"cuDNN attention needs cuDNN's library to be compiled ({error}); run pip install 'jax[cuda13]', or set"
            " model.attention=xla for another memory and speed."
        ) from error


def peak(made: steps.Steps, config: configuration.Config, largest: Shape, accumulation: int) -> int:
    """Return the bytes of a device that the largest step takes; more than there are where the compiler refuses it."""
    batch = abstract_batch(made, config, largest, config.train.micro_batch_per_device, accumulation=accumulation)
    step = traced(made.train, made.state.abstract(), batch)
    try:
        return hardware.peak_of(hardware.compile_traced(step, made.mesh), made.mesh.devices.flat[0])
    except jax.errors.JaxRuntimeError:  # the step itself does not fit, and its own compilation says so
        return 2**62


def _mib(count: int) -> str:
    return f"{count / _MIB:,.0f} MiB"
