"""Whether a run fits on a target, and what it would cost there: compiled for real, on any machine.

    report = plan.run(config, "h100:4")
    print(report.text);  report.fits

Needs the model's config.json, but neither its weights nor the data nor the accelerators. What is compiled is what the
loop would run: the step, the evaluation and the reference pass of `steps.build`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from fpo_jax import config as configuration
from fpo_jax.perf import hardware
from fpo_jax.plan import compilation, report, suggestions
from fpo_jax.trainer import batch_shapes


class Report(NamedTuple):
    """The answer to `fpo plan`."""

    outcome: compilation.Outcome
    limit: int | None  # bytes that programs may use on a device; None = unknown
    suggestion: suggestions.Suggestion | None  # the first that fits, where the configuration does not
    remedied: compilation.Outcome | None
    tried: list[tuple[suggestions.Suggestion, int]]  # those that do not fit, and their peak
    text: str

    @property
    def fits(self) -> bool:
        """Whether every program fits; also where the limit is unknown."""
        return self.limit is None or not self.outcome.too_large(self.limit)


def main(config: configuration.Config, target: str) -> int:
    """Print the plan; returns the exit code: 0, or 2 where the run does not fit."""
    hardware.lend_memory()
    if target != hardware.HERE:
        jax.config.update("jax_platforms", "cpu")  # opens no device, and waits for none
    report = run(config, target)
    print(report.text)
    return 0 if report.fits else 2


def run(
    config: configuration.Config,
    target: str,
    *,
    devices: Callable[[str], Sequence[Any]] = hardware.all_devices,
    capacity: Callable[[Any], hardware.Capacity | None] = hardware.capacity,
) -> Report:
    """Compile a run for a target, and look for a remedy where it does not fit.

    Args:
        config: from a file of configs/.
        target: "h100:4", "h100:2x8", "v5e-16", "v5e-2x16", ..., "here".
        devices: target -> its devices.
        capacity: device -> what it holds and does.

    Raises:
        ValueError: the target is unknown or its compiler missing; the configuration cannot run on it.
    """
    found = devices(target)
    holds = capacity(found[0])
    limit = None if holds is None else hardware.lent(found[0], holds)
    known = batch_shapes.read(config)
    outcome = compilation.compile_all(config, found, known=known, limit=limit)
    suggestion = remedied = None
    tried: list[tuple[suggestions.Suggestion, int]] = []
    if limit is not None and (too_large := outcome.too_large(limit)):
        for candidate in suggestions.ladder(
            outcome.config, target, too_large, host_memory=compilation.knows_host_memory(found[0])
        ):
            try:
                other = compilation.compile_all(
                    suggestions.changed(outcome.config, candidate.changes),
                    devices(candidate.target),
                    known=known,
                    limit=limit,
                    rest=False,
                )
            except ValueError:
                continue  # the batch or a weight does not divide
            if not other.too_large(limit):
                suggestion, remedied = candidate, other
                break
            tried.append((candidate, other.peak))
    text = report.text(
        target, outcome, capacity=holds, limit=limit, suggestion=suggestion, remedied=remedied, tried=tried
    )
    return Report(outcome, limit, suggestion, remedied, tried, text)
