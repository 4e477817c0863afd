"""Rewards that a reward model cannot be trained on, found at the start."""

import numpy as np

from fpo_jax import config as configuration
from fpo_jax import data, losses


def check(loss: losses.Loss, train: data.Prepared, evaluation: data.Prepared | None) -> None:
    """Refuse labels outside [0, 1] or without a difference that a reward model could learn; other losses take any.

    Raises:
        ValueError: names the first example.
    """
    if not loss.of_scores:
        return
    for name, prepared in (("data.train", train), ("data.eval", evaluation)):
        if prepared is None:
            continue
        with configuration.about(name):
            if loss.minimum_completions == 1:
                _check_range(loss, prepared)
            if prepared is train:
                _check_difference(loss, prepared)


def _check_range(loss: losses.Loss, prepared: data.Prepared) -> None:
    rewards_B = prepared.rewards_BK[:, 0]
    outside = np.flatnonzero((rewards_B < 0) | (rewards_B > 1))
    if outside.size:
        raise ValueError(
            f"{prepared.sources[outside[0]]}: the label {rewards_B[outside[0]]:g} is outside [0, 1]"
            f" ({outside.size} of {prepared.groups} are), and loss {loss.name!r} takes probabilities; scale them,"
            " or use bradley_terry on pairs."
        )


def _check_difference(loss: losses.Loss, prepared: data.Prepared) -> None:
    rewards_BK = prepared.rewards_BK
    compared = rewards_BK.reshape(1, -1) if loss.minimum_completions == 1 else rewards_BK
    if (compared.max(axis=1) > compared.min(axis=1)).any():
        return
    if loss.minimum_completions == 1:
        fact = f"all {prepared.groups} labels are {rewards_BK[0, 0]:g}, from {prepared.sources[0]} on; give both kinds"
    else:
        fact = f"in none of {prepared.groups} groups, from {prepared.sources[0]} on, do the rewards differ; give pairs"
    raise ValueError(f"{fact}, or loss {loss.name!r} has nothing to tell apart.")
