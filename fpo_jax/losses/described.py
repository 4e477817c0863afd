"""A settled loss in words and as a record: its canonical name, its equation, its reference and every option."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fpo_jax.losses.f_divergences import DIVERGENCES
from fpo_jax.losses.loss import Loss
from fpo_jax.losses.preference_losses import LETTERS, OBJECTIVES
from fpo_jax.losses.scores import SCORES
from fpo_jax.losses.targets import TARGETS

# Names that TRL has too, and uses otherwise (DPOConfig.loss_type, CPOConfig.loss_type, its other trainers).
IN_TRL: Mapping[str, str] = MappingProxyType(
    {
        "sigmoid": "DPO, with a reference and sums of log-probs (here dpo), or CPO in its CPOTrainer (here cpo)",
        "hinge": "SLiC's hinge max(0, 1 - β(Δ_w - Δ_l)), with a reference and sums of log-probs",
        "ipo": "means over tokens, Δ/|y|, with 1/(2β); here sums, as in the paper",
        "exo": "exo_pair: labels (1-ε, ε), ε = 1e-3 (here exo with epsilon=1e-3 normalize=True)",
        "alphapo": "AlphaPO of arXiv 2501.03884 (here alphapo_length); here the α-divergence, as in f-PO's code",
        "cpo": "λ times the NLL per token; here λ times its sum",
        "kto": "unpaired answers, and z from mismatched pairs; here the pairs of a group, and z of the step",
    }
)


def equation(loss: Loss) -> str:
    """Return the loss in letters, with what its p and q are."""
    if loss.name in OBJECTIVES:
        row = OBJECTIVES[loss.name]
        return row.equation if row.of_scores else f"{row.equation}; {LETTERS}"
    score, target = SCORES[loss.options["score"]], TARGETS[loss.options["target"]]
    return f"{DIVERGENCES[loss.name].equation}; p = softmax(s), {score.equation}; {target.equation}"


def described(loss: Loss) -> dict[str, Any]:
    """Return what a run records of its loss, as JSON values; an infinite option is text.

    >>> from fpo_jax.losses.registry import resolve
    >>> record = described(resolve("ipo"))
    >>> record["name"], record["reference"], record["options"]["tau"]
    ('ipo', True, 0.1)
    """
    options = {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in loss.options.items()
    }
    return {"name": loss.name, "equation": equation(loss), "reference": loss.needs_reference, "options": options}


def in_words(name: str, loss: Loss) -> str:
    """Return what a name stands for, in lines.

    Args:
        name: what was asked for.
        loss: what it is with all its options.
    """
    reference = "a reference" if loss.needs_reference else "no reference"
    lines = [f"{name} is {loss.name}, with {reference}", f"    {equation(loss)}", f"    {settings(loss.options)}"]
    if name in IN_TRL:
        lines.append(f"    not what TRL calls {name}: there {IN_TRL[name]}")
    return "\n".join(lines)


def settings(options: Mapping[str, Any]) -> str:
    """Return options as key=value; "no option" where there are none.

    >>> settings({"beta": 2.0, "target": "rewards"})
    'beta=2, target=rewards'
    """
    described = (
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in options.items()
    )
    return ", ".join(described) or "no option"
