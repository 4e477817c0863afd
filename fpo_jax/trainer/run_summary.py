"""What the first lines of a run say, before anything expensive: what a reader needs to trust it or to stop it.

A terminal of 80 columns gets about ten lines; run.log and other handlers also get the whole of each: configuration,
audit, every choice.
"""

import logging
import textwrap
from typing import Any

from fpo_jax import config as configuration
from fpo_jax import data, distributed, losses, sharding
from fpo_jax.data import group_packing
from fpo_jax.distributed import watchdog
from fpo_jax.io import terminal
from fpo_jax.models import params
from fpo_jax.perf import hardware
from fpo_jax.trainer import adapters, compiled_step, run_inputs, run_schedule, steps

log = logging.getLogger("fpo_jax")

_UPDATES = 64  # on which shares are counted
_WIDTH = 80  # columns of the summary
_SETTLED = ("layout:", "remat ", "attention:", "log-probs:", "logits:")  # choices that a terminal gets
_EMPTY = 0.1  # share of rows without a group from which on a remedy is named


def log_summary(
    config: configuration.Config,
    settled: configuration.Config,
    inputs: run_inputs.Inputs,
    plan: run_schedule.RunSchedule,
    compiled: steps.Steps,
) -> None:
    """Log the summary, after the details: configuration, loss, mesh, model, choices, data, one row and the plan.

    Args:
        config: as it was given.
        settled: the same, in which nothing is automatic.
        inputs: of the run.
        plan: its steps.
        compiled: its programs.
    """
    _log_details(config, settled, inputs, plan, compiled)
    for part in summary(config, inputs, plan, compiled):
        log.info(part)


def summary(
    config: configuration.Config, inputs: run_inputs.Inputs, plan: run_schedule.RunSchedule, compiled: steps.Steps
) -> list[str]:
    """Return the summary for a terminal, in parts of one line or a few; arguments as for `log_summary`."""
    audit = inputs.train.audit
    adapter = compiled.forward_fn.adapter
    state = compiled_step.mib(compiled.state.bytes_on_device())
    described = losses.in_words(config.loss.name, inputs.loss).split("\n")
    used = f" ({params.active(inputs.model_config):,} for each token)" if inputs.model_config.experts else ""
    micro = f" in {plan.accumulation} micro-batches each" if plan.accumulation > 1 else ""
    evaluated = "" if inputs.evaluation is None else f", {inputs.evaluation.audit.groups:,} to evaluate"
    dropped = {reason: len(places) for reason, places in audit.dropped.items() if places}
    left_out = "; dropped: " + ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()) if dropped else ""
    found = [
        f"run: {config.stage}, {plan.steps:,} steps of {config.train.batch_size} groups"
        f" ({plan.schedule.steps_per_epoch:,} an epoch){micro}, warm-up {plan.warmup}",
        f"model: {inputs.source}, {params.count(inputs.model_config):,} parameters{used}, {state} of state per device",
        *([] if adapter is None else [adapters.in_words(config, adapter, needs_reference=inputs.loss.needs_reference)]),
        _mesh_in_words(compiled),
        f"data: {audit.groups:,} groups of {audit.group_size} to train on{evaluated}, {audit.scored_tokens:,} of"
        f" {audit.tokens:,} tokens trained{left_out}",
        *([ties_in_words(inputs.loss, audit)] if audit.ties else []),
        *(f"warning: {warning}" for warning in audit.warnings),
        f"loss: {described[0]}",
        *described[1:],
    ]
    choices = [choice.split("\n")[0] for choice in compiled.choices if choice.startswith(_SETTLED)]
    return [*map(_wrapped, found), *map(_shortened, choices), _example(inputs.train.sample)]


def _wrapped(line: str) -> str:
    """Return a line in lines of the summary's width; what is longer than one is whole, as a path must be."""
    indent = " " * (len(line) - len(line.lstrip()) or 2)
    first = indent if line.startswith(" ") else ""
    settings: Any = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(line.strip(), _WIDTH, initial_indent=first, subsequent_indent=indent, **settings)


def _shortened(line: str) -> str:
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 4].rpartition(' ')[0]} ..."


def _example(sample: str) -> str:
    """Return what stands around the first token that is trained, in one line."""
    before, bracket, after = sample.replace("\n", "↵").partition("⟦")
    room = _WIDTH - len("example: ... ...")
    head = before if len(before) <= room // 2 else f"...{before[-(room // 2) :]}"
    tail = bracket + after
    room = _WIDTH - len("example: ") - len(head)
    return f"example: {head}{tail if len(tail) <= room else tail[: room - 4] + ' ...'}"


def _mesh_in_words(compiled: steps.Steps) -> str:
    mesh = compiled.mesh
    processes = "" if distributed.process_count() == 1 else f" of {distributed.process_count()} processes"
    return f"mesh: {sharding.described(mesh)} over {mesh.size} {mesh.devices.flat[0].device_kind} devices{processes}"


def _log_details(
    config: configuration.Config,
    settled: configuration.Config,
    inputs: run_inputs.Inputs,
    plan: run_schedule.RunSchedule,
    compiled: steps.Steps,
) -> None:
    """Log the whole; arguments as for `log_summary`."""

    def detail(text: str, *values: object) -> None:
        log.info(text, *values, extra=terminal.DETAIL)

    mesh = compiled.mesh
    changed = configuration.difference(configuration.default().to_dict(), config.to_dict())
    detail("configuration, where it differs from the default:\n  %s", "\n  ".join(changed))
    detail("loss: %s", losses.in_words(config.loss.name, inputs.loss))
    device = mesh.devices.flat[0]
    if device.platform == "gpu":
        taken, variable = 100 * hardware.memory_share(), hardware.MEMORY_VARIABLE
        detail("memory: JAX takes %.0f %% of each GPU; %s sets another share", taken, variable)
    for choice in compiled.choices:
        detail(choice)
    for name, dataset in (("train", inputs.train), ("eval", inputs.evaluation)):
        if dataset is not None:
            detail("%s: %s", name, dataset.audit.text())
    if inputs.train.audit.ties:
        detail(ties_in_words(inputs.loss, inputs.train.audit))
    detail(watchdog.in_words(config.train.hang_timeout))
    detail("one row as the model gets it, scored tokens between ⟦ and ⟧:\n%s", inputs.train.sample)
    detail(
        "plan: %d steps of %d groups (%d an epoch) in %d micro-batches each; warm-up %d, decay over %d; %d"
        " compilation%s of the step: %s%s",
        plan.steps,
        config.train.batch_size,
        plan.schedule.steps_per_epoch,
        plan.accumulation,
        plan.warmup,
        plan.total_steps,
        len(plan.shapes),
        "s" * (len(plan.shapes) > 1),
        ", ".join(f"T={length} R={scored}" for length, scored in plan.shapes),
        rows_in_words(settled, plan, devices=compiled.layout.data_parallel_degree),
    )


def ties_in_words(loss: losses.Loss, audit: data.Audit) -> str:
    """Say how many groups have no single best completion, and what the loss makes of them."""
    winners = {
        "uniform": "the best of a group share the label",
        "first": "the first of the best is trained on as the chosen",
        "second": "the last of the best is trained on as the chosen",
    }
    policy = loss.options.get("tie_policy")
    made = "" if policy is None else f"tie_policy={policy}: {winners[str(policy)]}"
    if loss.options.get("target") == "rewards":
        made = "equal rewards are equal targets" + (f"; for the margin γ {made}" if made else "")
    elif loss.of_scores:
        made = "pairs of equal rewards are left out"
    return f"reward ties: {audit.ties:,} of {audit.groups:,} groups share their highest reward; {made}"


def rows_in_words(config: configuration.Config, plan: run_schedule.RunSchedule, *, devices: int) -> str:
    """What rows that hold groups save, or would, and what they waste.

    Args:
        config: of the run.
        plan: its steps.
        devices: ways a batch is cut over the mesh.
    """
    schedule, layout, numbers = plan.schedule, config.data.layout, range(min(plan.steps, _UPDATES))
    rows, sizes = schedule.rows, [data.row_sizes(schedule, number) for number in numbers]
    held, taken = (sum(size.texts.sum() for size in sizes), sum(size.rows * size.length for size in sizes))
    if rows is None:
        described = f"; layout {layout}: {1 - held / taken:.1%} padding"
        if not config.data.packing:
            other = "shared" if schedule.prepared.group_size > 1 else "packed"
            share = sum(data.tokens_once(schedule, number) for number in numbers) / taken
            described += (
                f"; data.layout={other} would hold the same in {share:.0%} of the positions and its own padding"
            )
        return described
    whole = sum(size.sequence_tokens for size in sizes)
    used = [len(rows.groups[number]) for number in numbers]
    return (
        f"; layout {layout}: up to {rows.count} rows of up to {rows.packing.places} groups,"
        f" {held / whole:.0%} of the sequences' tokens are computed, {1 - held / taken:.1%} padding"
        f"{_empty_rows(config.train.micro_batch_per_device, used, rows.packing, devices)}"
    )


def _empty_rows(per_device: int, used: list[int], packing: group_packing.Packing, devices: int) -> str:
    """Say how many rows hold no group, where that is much, and what leaves fewer."""

    def empty(per_device: int) -> float:
        blocks = packing._replace(multiple=per_device * devices)
        return 1 - sum(used) / sum(group_packing.blocks(count, blocks) for count in used)

    share = empty(per_device)
    if share <= _EMPTY:
        return ""
    devices_described = f" ({per_device} on each of {devices} devices)" if devices > 1 else ""
    described = (
        f"; {share:.0%} of the rows hold no group, as they come in blocks of {per_device * devices}{devices_described}"
    )
    smaller = range(per_device - 1, 0, -1)
    better = next((one for one in smaller if empty(one) <= _EMPTY), min(smaller, key=empty, default=per_device))
    if empty(better) < share:
        return f"{described}: train.micro_batch_per_device={better} would leave about {empty(better):.0%}"
    return f"{described}: a smaller data.row_length makes more rows, mesh.tensor and fewer devices make smaller blocks"
