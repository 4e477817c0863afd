"""Metrics of a run's evaluation data under the weights of one step. All processes compute; the first alone logs."""

import logging
import math
import time
from collections.abc import Callable

import jax
import numpy as np

from fpo_jax import config as configuration
from fpo_jax import data, losses, types
from fpo_jax.trainer import metric_logger, reference_logprobs, steps

log = logging.getLogger("fpo_jax")


class Evaluation:
    """The evaluation data of one run."""

    def __init__(
        self,
        config: configuration.Config,
        loss: losses.Loss,
        batches: data.Schedule | None,
        compiled: steps.Steps,
        references: np.ndarray | None,
    ):
        """Take the parts of the run; nothing is computed yet. `references` [groups, K] are of the evaluation data."""
        self._config, self._loss, self._steps = config, loss, compiled
        self._batches, self._references = batches, references

    def __call__(self, number: int, weights: types.PyTree, check: Callable[[], None]) -> dict[str, float]:
        """Log and return the metrics, none without evaluation data.

        Args:
            number: the step that the weights come from.
            weights: the policy's, whole.
            check: called before every batch, and may raise.
        """
        if self._batches is None:
            return {}
        started, batches = time.perf_counter(), self._batches
        positions = self._steps.batches.positions(batches.parts)

        def means(batch_kl: float) -> dict[str, float]:
            total = None
            for index in range(batches.steps_per_epoch):
                check()
                batch = reference_logprobs.attach(data.batch_at(batches, index, positions), self._references)
                placed = self._steps.batches.place(batch, stacked=False)
                pairs = self._steps.evaluate((weights, np.float32(batch_kl)), placed)
                total = metric_logger.add(total, jax.device_get(pairs))
            assert total is not None
            return metric_logger.means(total)

        numbers = means(0.0)
        if self._loss.needs_batch_kl:  # known at the end of a pass alone
            numbers = means(numbers["reference_kl"])
        if self._loss.sft_weight:
            numbers["loss"] += self._loss.sft_weight * numbers["sft_loss"]
        if self._config.stage == "sft":
            numbers["perplexity"] = math.exp(numbers["sft_loss"])
        log.info(
            "evaluation at step %d  %s  %.1f s", number, metric_logger.shown(numbers), time.perf_counter() - started
        )
        return {f"eval_{name}": value for name, value in numbers.items()}
