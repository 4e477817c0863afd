"""The answer of a plan as text."""

from collections.abc import Sequence

from fpo_jax import sharding
from fpo_jax.io import terminal
from fpo_jax.models import params
from fpo_jax.perf import flops, hardware
from fpo_jax.plan import roofline, suggestions
from fpo_jax.plan.compilation import TRAIN_STEP, Outcome

_GIB = 2**30
_CANDIDATES = 8  # that are shown


def text(
    target: str,
    outcome: Outcome,
    *,
    capacity: hardware.Capacity | None,
    limit: int | None,
    suggestion: suggestions.Suggestion | None,
    remedied: Outcome | None,
    tried: Sequence[tuple[suggestions.Suggestion, int]],
) -> str:
    """Return the whole answer: what runs, memory, verdict, collectives, operations, time, assumptions."""
    assert outcome.layout.mesh is not None
    parts = [
        _run(target, outcome),
        *_candidates(outcome),
        _memory(outcome),
        _verdict(outcome, capacity, limit, suggestion, remedied, tried),
    ]
    if outcome.programs[0].compiled:
        parts += [_collectives(outcome), _cost(outcome, capacity)]
    return "\n\n".join(parts)


def _run(target: str, outcome: Outcome) -> str:
    config, sizes, mesh = outcome.config, outcome.sizes, outcome.layout.mesh
    assert mesh is not None
    rows = _rows(outcome)
    model_config = sizes.blueprint.model_config
    count = f"{params.count(model_config):,} parameters"
    count += f" ({params.active(model_config):,} for each token)" if model_config.experts else ""
    shape = sizes.train_step
    filled = "" if sizes.filled == 1 else f" in the largest, {sizes.filled:.0%} of them in the mean"
    lines = [
        f"plan for {target}: {mesh.size} x {mesh.devices.flat[0].device_kind}; mesh {sharding.described(mesh)}",
        f"model: {config.model.path}, {count} in {config.model.param_dtype}, computed in"
        f" {config.model.compute_dtype}; remat {config.model.remat}",
        f"step: {config.train.batch_size} groups x {config.data.group_size} "
        f"{'=' if config.data.layout == 'padded' else 'in'} {rows} rows of T={shape.length} (R="
        f"{shape.scored} scored) in {outcome.accumulation} micro-batches; {rows * shape.length:,} tokens{filled}",
        f"shapes: {sizes.origin}",
        *[line.split("\n")[0] for line in outcome.choices],
    ]
    return "\n".join(lines)


def _candidates(outcome: Outcome) -> list[str]:
    """The table that the settings were chosen from."""
    if not outcome.candidates:
        return []
    rows = [("settings, the chosen ones first", "micro-batch", "s a step", "GiB per device")]
    for one in outcome.candidates[:_CANDIDATES]:
        memory = f"at least {_gib(one.needed)}" if one.peak is None else _gib(one.peak)
        rows.append((f"remat {one.remat}", str(one.micro_batch), f"{one.seconds:.3g}", memory))
    left = len(outcome.candidates) - _CANDIDATES
    return [terminal.table(rows) + (f"\nand {left} that take longer" if left > 0 else "")]


def _rows(outcome: Outcome) -> int:
    """Rows of a step; where they hold groups, of the largest."""
    config = outcome.config
    if config.data.layout == "padded":
        return config.train.batch_size * config.data.group_size
    return outcome.accumulation * config.train.micro_batch_per_device * outcome.layout.data_parallel_degree


def _memory(outcome: Outcome) -> str:
    rows = [("GiB per device", "state", "batch", "temporaries", "beside it", "peak", "host", "compiled in")]
    for program in outcome.programs:
        state = outcome.state if program.name == TRAIN_STEP else program.arguments
        state = min(state, program.arguments)
        rows.append(
            (
                program.name,
                _gib(state),
                _gib(program.arguments - state),
                _gib(program.temporaries),
                _gib(program.beside),
                _gib(program.peak),
                _gib(program.host),
                f"{program.seconds:.0f} s" if program.compiled else "refused",
            )
        )
    note = f"of the step's temporaries {_gib(outcome.gradients)} are the float32 sums of the gradients"
    return f"{terminal.table(rows)}\n{note}"


def _verdict(outcome, capacity, limit, suggestion, remedied, tried) -> str:
    if limit is None:
        return "capacity: unknown for this kind of device"
    share = "" if limit == capacity.memory else f" of {_gib(capacity.memory)}"
    lines = [f"capacity: {_gib(limit)} GiB{share} per device"]
    if too_large := outcome.too_large(limit):
        over = ", ".join(f"{p.name} by {_gib(p.peak - limit)}" for p in outcome.programs if p.name in too_large)
        lines.append(f"does not fit: {over} GiB")
        lines += [f"  nor does {one.text}: {_gib(peak)} GiB" for one, peak in tried]
        if suggestion is None:
            lines.append("nothing that was tried fits; use a smaller model, shorter rows or more devices.")
        else:
            lines.append(f"the first remedy that fits: {suggestion.text}: {_gib(remedied.peak)} GiB")
        return "\n".join(lines)
    lines.append(f"fits: {_gib(outcome.peak)} GiB, {1 - outcome.peak / limit:.0%} free")
    return "\n".join(lines)


def _collectives(outcome: Outcome) -> str:
    if not outcome.collectives:
        return "collectives: none"
    rows = [("collectives of a step", "along", "runs", "GiB", "GiB sent per device")]
    for row in outcome.collectives:
        rows.append((row.kind, " ".join(row.axes), f"{row.runs:,}", _gib(row.payload), _gib(row.sent)))
    return terminal.table(rows)


def _cost(outcome: Outcome, capacity: hardware.Capacity | None) -> str:
    assert outcome.layout.mesh is not None
    sizes, devices = outcome.sizes, outcome.layout.mesh.size
    needed = _model_operations(outcome)
    line = f"operations of a step: {outcome.operations:.3g}, recomputation included; the model's own: "
    line += ", ".join(f"{value:.3g} on {name} tokens" for name, value in needed.items())
    if capacity is None:
        return line
    seconds = roofline.estimate(outcome, capacity)

    def share(value: int, limit: float) -> str:
        return f"{value / (limit * devices * capacity.flops):.0%}"

    shares = [
        f"{name} {share(value, seconds.predicted)}, at most {share(value, seconds.best)}"
        for name, value in needed.items()
    ]
    steps = 1000 if sizes.steps is None else sizes.steps
    what = "1,000 steps (plan.groups is unset)" if sizes.steps is None else f"the run of {steps:,} steps"
    hours = f"{steps * seconds.predicted / 3600:.2f} h, at least {steps * seconds.best / 3600:.2f} h"
    scoring = ""
    if sizes.scoring_batches is not None:
        alone = sizes.scoring_batches * outcome.scoring_operations / devices / capacity.flops / 3600
        scoring = f", before it the reference pass over {sizes.groups:,} groups {alone:.2f} h"
    return "\n".join(
        [
            line,
            f"a step takes about {seconds.predicted:.2f} s; {seconds.best:.2f} s if everything overlaps (computing"
            f" {seconds.compute:.2f} s, memory {seconds.memory:.2f} s, links {seconds.links:.2f} s by the data sheet),"
            f" {seconds.most:.2f} s if nothing does (products {seconds.products:.2f} s, other kernels"
            f" {seconds.kernels:.2f} s, links {seconds.links:.2f} s, of which the schedule exposes"
            f" {seconds.exposed:.2f} s)",
            f"MFU: {'; '.join(shares)} (reference pass apart)",
            f"{what}: about {hours}{scoring}",
            "assumed: " + "; ".join(roofline.ASSUMPTIONS),
        ]
    )


def _model_operations(outcome: Outcome) -> dict[str, int]:
    """What the mathematics of a step needs, on padded and, where they are known, on valid tokens."""
    sizes = outcome.sizes
    model_config, loss = sizes.blueprint.model_config, sizes.blueprint.loss
    rows = round(_rows(outcome) * sizes.filled)
    lengths, scored = [sizes.train_step.length] * rows, [sizes.train_step.scored] * rows
    done = {"padded": flops.work(lengths, scored, sliding_window=model_config.windows)}
    if sizes.valid is not None:
        done["valid"] = sizes.valid
    options = {"extra_forward": loss.needs_batch_kl, "adapter": sizes.blueprint.adapter}
    return {name: flops.train_step(model_config, work, **options) for name, work in done.items()}


def _gib(count: int) -> str:
    return f"{count / _GIB:.2f}"
