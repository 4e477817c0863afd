"""Evaluations of a run: metrics of the evaluation data and of the answers to prompts, under the weights of one update.

All processes compute; the first alone logs and writes. When an evaluation is due is the loop's business.
"""

import logging
import math
import time
from collections.abc import Callable

import jax
import numpy as np

from fpo_jax import answering, data, execution, job, losses, metrics, programs, reference, shapes
from fpo_jax import config as configuration

log = logging.getLogger("fpo_jax")


class Evaluation:
    """What one run evaluates; false where that is nothing."""

    def __init__(
        self,
        config: configuration.Config,
        loss: losses.Loss,
        batches: data.Schedule | None,
        compiled: programs.Programs,
        stop: execution.StopRequest,
        answers: answering.Answers | None,
    ):
        """Take the parts of the run; nothing is computed yet."""
        self._config, self._loss, self._programs, self._stop = config, loss, compiled, stop
        self._batches, self._answers = batches, answers

    def __bool__(self) -> bool:
        return self._batches is not None or self._answers is not None

    def __call__(
        self,
        number: int,
        weights: shapes.PyTree,
        references: np.ndarray | None,
        *,
        writers: metrics.Writers | metrics.Silent,
        check: Callable[[], None] | None = None,
    ) -> dict[str, float]:
        """Write and return the metrics of the evaluation data and of the answers to prompts.

        Args:
            number: the update that the weights come from.
            weights: the policy's, whole.
            references: of the evaluation data [groups, K], None where the loss needs none.
            writers: where the numbers go.
            check: called before every batch; None = stop for a signal, unless the score of this evaluation says whether
                the checkpoint is the best.

        Raises:
            execution.Stopped: a signal has arrived; nothing is written.
        """
        check = check or self._check_stop
        found = self._of_data(number, weights, references, check)
        if self._answers is not None:
            numbers, table = self._answers(number, weights, check)
            found |= numbers
            writers.table(number, answering.FOLDER, *table)
        if found:
            writers.write(number, found)
        return found

    def check_best(self, found: dict[str, float]) -> None:
        """Refuse a metric that the first evaluation does not have, as no pair of its data has a preference.

        Raises:
            ValueError: the names there are.
        """
        name = self._config.train.keep_best
        if name and name not in found:
            raise ValueError(f"train.keep_best={name!r} is no metric of this run; choose from {', '.join(found)}.")

    def score(self, found: dict[str, float]) -> float | None:
        """Return what tells the best checkpoint, higher is better; None where the run keeps none."""
        name = self._config.train.keep_best
        if not name:
            return None
        return job.DIRECTIONS[name] * found[name]

    def _check_stop(self) -> None:
        if not self._config.train.keep_best and (name := self._stop.agreed()):
            raise execution.Stopped(name)

    def _of_data(
        self, number: int, weights: shapes.PyTree, references: np.ndarray | None, check: Callable[[], None]
    ) -> dict[str, float]:
        if self._batches is None:
            return {}
        started, batches = time.perf_counter(), self._batches
        positions = self._programs.positions(batches.parts)

        def means(batch_kl: float) -> dict[str, float]:
            total = None
            for index in range(batches.steps_per_epoch):
                check()
                batch = reference.attach(data.batch_at(batches, index, positions), references)
                placed = self._programs.place(batch, stacked=False)
                pairs = self._programs.evaluate((weights, np.float32(batch_kl)), placed)
                total = metrics.add(total, jax.device_get(pairs))
            assert total is not None
            return metrics.means(total)

        numbers = means(0.0)
        if self._loss.needs_batch_kl:  # known at the end of a pass alone
            numbers = means(numbers["reference_kl"])
        if self._loss.sft_weight:
            numbers["loss"] += self._loss.sft_weight * numbers["sft_loss"]
        if self._config.stage == "sft":
            numbers["perplexity"] = math.exp(numbers["sft_loss"])
        log.info("evaluation at step %d  %s  %.1f s", number, metrics.shown(numbers), time.perf_counter() - started)
        return {f"eval_{name}": value for name, value in numbers.items()}
