"""What to change, in which order, when a configuration does not fit.

Smaller batches of the programs that are too large, then more recomputation, then moments in bfloat16, then moments in
the host's memory, each keeping what came before; then more devices of the same kind, with the smaller batches alone.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from fpo_jax import config as configuration
from fpo_jax.perf import hardware
from fpo_jax.plan.compilation import EVALUATION, REFERENCE, REFERENCE_EVAL, TRAIN_STEP

_BATCHES = {
    TRAIN_STEP: "train.micro_batch_per_device",
    EVALUATION: "train.eval_batch_per_device",
    REFERENCE: "reference.batch_per_device",
    REFERENCE_EVAL: "reference.batch_per_device",
}
_MEMORY = (("model.remat", "full"), ("optim.state_dtype", "bfloat16"), ("optim.offload", True))  # of the step
_DOUBLINGS = 3  # up to eight times the devices


class Suggestion(NamedTuple):
    """Another way to run the same job."""

    target: str
    changes: Mapping[str, object]  # dotted key -> value

    @property
    def text(self) -> str:
        """As arguments of `fpo plan`."""
        return " ".join(
            [f"--target {self.target}", *(f"--config.{key}={value}" for key, value in self.changes.items())]
        )


def ladder(
    config: configuration.Config, target: str, too_large: Sequence[str], *, host_memory: bool = True
) -> Iterator[Suggestion]:
    """Yield what to try, one after the other.

    Args:
        config: that does not fit.
        target: what it does not fit on.
        too_large: names of the programs that need too much.
        host_memory: whether the target's compiler can show what keeping moments there saves.
    """
    changes: dict[str, object] = {}
    fields = {field: int(configuration.value_at(config, field)) for field in (_BATCHES[name] for name in too_large)}
    while any(size > 1 for size in fields.values()):
        fields = {field: max(1, size // 2) for field, size in fields.items()}
        changes |= {field: size for field, size in fields.items() if size != configuration.value_at(config, field)}
        yield Suggestion(target, dict(changes))
    if TRAIN_STEP in too_large:
        for field, value in _MEMORY:
            if configuration.value_at(config, field) != value and (host_memory or field != "optim.offload"):
                changes[field] = value
                yield Suggestion(target, dict(changes))
    more: str | None = target
    for _ in range(_DOUBLINGS):
        more = hardware.larger(more)
        if more is None:
            return
        yield Suggestion(more, {key: value for key, value in changes.items() if key in _BATCHES.values()})


def changed(config: configuration.Config, changes: Mapping[str, object]) -> configuration.Config:
    """Return a copy of a configuration with other values for some dotted keys."""
    other = copy.deepcopy(config)
    other.update_from_flattened_dict(changes)
    return other
