"""The programs of a run, compiled for devices that need not exist: memory, collectives, operations, seconds.

configuration, devices -> Outcome. The programs are those of `steps.Steps`, at their largest shapes.
"""

import functools
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from fpo_jax import config as configuration
from fpo_jax import sharding
from fpo_jax.perf import flops, hardware
from fpo_jax.plan import traffic
from fpo_jax.plan.collectives import Collective, collectives
from fpo_jax.trainer import auto_settings, batch_shapes, kept_logits, steps, train_state

TRAIN_STEP, EVALUATION, REFERENCE = "step", "evaluation", "reference pass"
REFERENCE_EVAL = "reference pass, eval"  # where its batches are larger than those of the training data

# The compiler of a TPU refuses a program that is too large and says what it needs.
_TOO_LARGE = re.compile(r"memory required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Program(NamedTuple):
    """Memory of one program, bytes on each device."""

    name: str
    arguments: int  # parameters, optimiser state and batch
    temporaries: int  # gradients, activations, gathered weights, workspaces
    beside: int  # what lives on while it runs: moments during an evaluation
    host: int  # in the host's memory, per device
    seconds: float  # to compile
    compiled: bool  # False where the compiler refused it for its size

    @property
    def peak(self) -> int:
        """Most bytes that a device holds while the program runs."""
        return self.arguments + self.temporaries + self.beside


class Outcome(NamedTuple):
    """What a configuration becomes on some devices."""

    config: configuration.Config
    layout: sharding.Layout
    sizes: batch_shapes.Sizes
    accumulation: int
    choices: list[str]
    parameters: int  # bytes on each device
    state: int  # bytes on each device, parameters included
    gradients: int  # bytes of the float32 sums on each device, part of the step's temporaries
    programs: list[Program]
    collectives: list[Collective]  # of a step
    operations: int  # of a mean step over all devices, recomputation included
    fp8_operations: int  # of them, products of 8-bit floating-point numbers
    scoring_operations: int  # of one batch of the reference pass; 0 without
    moved: int  # bytes that the step's kernels without a matrix product read and write on each device
    candidates: list[auto_settings.Candidate]  # that were chosen from, the chosen one first

    @property
    def peak(self) -> int:
        """Most bytes that a device holds in any program."""
        return max(program.peak for program in self.programs)

    def too_large(self, limit: int) -> list[str]:
        """Names of the programs that need more than `limit` bytes a device."""
        return [program.name for program in self.programs if not program.compiled or program.peak > limit]


def compile_all(
    config: configuration.Config,
    devices: Sequence[Any],
    *,
    known: batch_shapes.Known | None = None,
    limit: int | None = None,
    rest: bool = True,
    sizes: batch_shapes.Sizes | None = None,
) -> Outcome:
    """Settle what is automatic, and compile the programs of a run at their largest shapes.

    Args:
        config: of the run.
        devices: what to compile for.
        known: what is read of the run; None = it is read here.
        limit: bytes that programs get of a device; None = unknown.
        rest: also the other programs where the step needs more than `limit`.
        sizes: of a run in which nothing is automatic; None = they are found here.

    Raises:
        ValueError: the configuration cannot run on these devices.
    """
    layout = sharding.make_layout(**config.mesh, devices=devices)
    capacity, ways = hardware.capacity(devices[0]), layout.data_parallel_degree
    settled = auto_settings.Settled(config, [], [])
    if sizes is None:
        known = known or batch_shapes.read(config)
        facts = auto_settings.bounded(known, ways=ways)
        if known.inputs is not None:
            facts = auto_settings.measured(known.inputs, ways=ways)
        settled = auto_settings.settle(config, facts, layout, limit=limit, capacity=capacity)
        config, sizes = settled.config, batch_shapes.sizes(settled.config, known, ways=ways)
    accumulation = sizes.accumulation
    made = kept_logits.steps_of(
        config, sizes.blueprint, layout, largest=sizes.train_step, accumulation=accumulation, capacity=capacity
    )
    choices = [*settled.choices, *made.choices]
    if config.optim.offload and not knows_host_memory(devices[0]):
        choices.append(
            "optim.offload: the compiler of absent GPUs knows no host memory; compiled with the moments on the device,"
            " so that the peak is a bound from above"
        )
    state = made.state.abstract()
    parameters = train_state.bytes_on_device(state.params)
    moments = made.state.bytes_on_device() - parameters
    found: list[Program] = []
    links: list[Collective] = []
    operations = fp8_operations = scoring_operations = moved = 0
    for name, program, first, batch, beside in _runs(config, sizes, made, state, accumulation, moments):
        model_config = sizes.blueprint.model_config
        if name in (REFERENCE, REFERENCE_EVAL):
            model_config = sizes.blueprint.reference or model_config
        start = time.perf_counter()
        traced = kept_logits.traced(program, first, batch)
        counted = flops.traced(traced.jaxpr.jaxpr, sliding_window=model_config.windows)
        row, text = _compile(name, traced, first, batch, beside, start)
        found.append(row)
        operations = round(counted * sizes.filled) if name == TRAIN_STEP else operations
        scoring_operations = counted if name == REFERENCE else scoring_operations
        if name == TRAIN_STEP and row.compiled:
            fp8_operations = round(sizes.filled * flops.traced(traced.jaxpr.jaxpr, fp8=True))
            links, moved = collectives(text, mesh=made.mesh), traffic.moved(text)
        too_large = not row.compiled or (limit is not None and row.peak > limit)
        if name == TRAIN_STEP and too_large and not rest:
            break
    return Outcome(
        config,
        layout,
        sizes,
        accumulation,
        choices,
        parameters,
        made.state.bytes_on_device(),
        made.state.gradient_bytes(),
        found,
        links,
        operations,
        fp8_operations,
        scoring_operations,
        moved,
        settled.candidates,
    )


def knows_host_memory(device: Any) -> bool:
    """Whether programs compiled for a device can keep arguments in the host's memory: not those for an absent GPU."""
    return any(memory.kind == sharding.HOST for memory in device.addressable_memories())


def _runs(config, sizes: batch_shapes.Sizes, made: steps.Steps, state, accumulation: int, moments: int):
    """Yield name, program, abstract arguments and the bytes beside it."""
    batch, train = functools.partial(kept_logits.abstract_batch, made, config), config.train
    largest = batch(sizes.train_step, train.micro_batch_per_device, accumulation=accumulation)
    yield TRAIN_STEP, made.train, state, largest, 0
    if sizes.evaluation is not None:
        yield (
            EVALUATION,
            made.evaluate,
            made.state.abstract_evaluated(),
            batch(sizes.evaluation, train.eval_batch_per_device),
            moments,
        )
    # The reference runs before there is an optimiser, or an adapter.
    beside = 0 if sizes.blueprint.reference is None else train_state.bytes_on_device(state.params)
    for name, shape in ((REFERENCE, sizes.scoring), (REFERENCE_EVAL, sizes.scoring_eval)):
        if shape is not None:
            scored = batch(shape, config.reference.batch_per_device)
            yield name, made.logprobs, made.state.abstract_reference(), scored, beside


def _compile(name: str, traced: jax.stages.Traced, first, batch, beside: int, start: float) -> tuple[Program, str]:
    """Compile, and read memory and text."""
    arguments = train_state.bytes_on_device((first, batch))
    mesh = jax.tree.leaves(first)[0].sharding.mesh
    try:
        compiled = hardware.compile_traced(traced, mesh)
    except jax.errors.JaxRuntimeError as error:
        needed = _TOO_LARGE.search(str(error))
        if needed is None:
            raise
        total = int(float(needed.group(1)) * _UNITS[needed.group(2)])
        return Program(name, arguments, total - arguments, beside, 0, time.perf_counter() - start, False), ""
    seconds, memory, text = time.perf_counter() - start, compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    peak = hardware.peak_of(compiled, mesh.devices.flat[0])
    host = memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes
    return Program(name, arguments, peak - arguments, beside, host, seconds, True), text
