"""What a run does beside its steps: objects of one small interface, which the loop calls in a fixed order.

A callback reads and changes the `Run` that it is given. The order is that of `Trainer`: a step's numbers are written
before an evaluation begins, and the checkpoint after an evaluation holds what it found.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Callable

import jax
import numpy as np
import tqdm

from fpo_jax import checkpoint, data, distributed, types
from fpo_jax import config as configuration
from fpo_jax.distributed import preemption, progress, watchdog
from fpo_jax.io import terminal
from fpo_jax.perf import profiler
from fpo_jax.trainer import (
    best_checkpoint,
    evaluator,
    metric_logger,
    metrics,
    run_inputs,
    run_schedule,
    sample_completions,
    steps,
)

log = logging.getLogger("fpo_jax")

Writers = metric_logger.Writers | metric_logger.Silent


class NonFinite(distributed.CollectiveError):
    """The loss or the gradient is not finite and the configuration says stop; or too many steps were skipped."""


@dataclasses.dataclass
class Run:
    """What a run has and where it is: what callbacks share."""

    config: configuration.Config
    inputs: run_inputs.Inputs
    schedule: run_schedule.RunSchedule
    steps: steps.Steps
    stop: preemption.StopRequest
    meter: profiler.Meter
    state: types.TrainState | None = None  # after the newest step
    references: tuple[np.ndarray | None, np.ndarray | None] = (None, None)  # log-probs of the train and eval groups
    writers: Writers = dataclasses.field(default_factory=metric_logger.Silent)
    clock: profiler.Split = dataclasses.field(default_factory=lambda: profiler.Split("data", "device"))
    callbacks: tuple["Callback", ...] = ()
    extra: tuple["Callback", ...] = ()  # a user's, called after ours, which may take their time
    recorded: int = 0  # the last step whose numbers are known
    skipped: int = 0  # steps in a row that were not applied
    best: float = -math.inf  # score of the best checkpoint so far
    asked: str = ""  # why the run is to stop
    whole: bool = True  # whether the last evaluation came to its end

    def call(self, event: str, *arguments: object) -> None:
        """Call a method of every callback, in order."""
        for callback in self.callbacks:
            getattr(callback, event)(self, *arguments)
        if self.extra:
            with watchdog.unhurried():
                for callback in self.extra:
                    getattr(callback, event)(self, *arguments)

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation belongs to a step."""
        every = self.config.train.eval_every
        return step == self.schedule.steps or bool(every and step % every == 0)

    def weights(self) -> types.PyTree:
        """Return all weights that a forward pass reads."""
        assert self.state is not None
        return self.steps.state.all_params(self.state)


class Callback:
    """Does nothing at any event; a subclass does something at some."""

    def on_step_begin(self, run: Run, step: int) -> None:
        """Step `step`, counted from 1, is about to begin."""

    def on_step_end(self, run: Run, step: int, pairs: metrics.Pairs) -> None:
        """A step was dispatched; `run.state` is what it leaves, and its metrics are still on the devices."""

    def on_flush(self, run: Run) -> None:
        """Something is about to begin that needs the numbers of every step so far."""

    def on_evaluate(self, run: Run, step: int, found: dict[str, float], check: Callable[[], None]) -> None:
        """The evaluation data was evaluated; `found` may be added to, and `check` raises where a signal has come."""

    def on_save(self, run: Run, step: int) -> None:
        """A checkpoint was handed over."""

    def on_error(self, run: Run, error: Exception) -> None:
        """The loop ends by an error."""

    def on_train_end(self, run: Run) -> None:
        """The loop has ended, or ends by an error."""


class MetricLogging(Callback):
    """Writes every step's numbers, one step behind the devices, and stops a run that must not go on."""

    def __init__(self, run: Run):
        """Nothing is shown before the first step."""
        self._pending: tuple[int, metrics.Pairs] | None = None
        self._compilations = run.steps.train.compilations
        self._bar: tqdm.tqdm | None = None
        self._still = 0  # steps in a row whose gradient was nothing

    def on_step_end(self, run: Run, step: int, pairs: metrics.Pairs) -> None:
        """Write the step before, whose numbers arrived while this one was dispatched."""
        if self._bar is None:
            self._bar = progress.bar(total=run.schedule.steps, initial=step - 1, unit="step", kept=True)
        self.on_flush(run)
        if self._compilations != run.steps.train.compilations:
            self._compilations = run.steps.train.compilations
            run.clock.restart()  # compiling is not part of a step's time
        self._pending = step, pairs

    def on_flush(self, run: Run) -> None:
        """Wait for the newest step and write its numbers.

        Raises:
            NonFinite: it was not finite, and the configuration says stop or too many came in a row.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._record(run, *pending)

    def on_evaluate(self, run: Run, step: int, found: dict[str, float], check: Callable[[], None]) -> None:
        """Write an evaluation's numbers."""
        if found:
            run.writers.write(step, found)

    def on_train_end(self, run: Run) -> None:
        """Close the progress bar; tell where the run has stopped to learn."""
        if self._bar is not None:
            self._bar.close()
        if self._still:
            log.warning(
                "the last %d of %d steps had a gradient norm of exactly 0 and taught nothing; where the loss is not"
                " meant to reach its end, lower optim.learning_rate.",
                self._still,
                run.recorded,
            )

    def _record(self, run: Run, step: int, pairs: metrics.Pairs) -> None:
        assert self._bar is not None
        with run.clock.part("device"):
            numbers = metric_logger.means(jax.device_get(pairs))
        timing = run.clock.lap()
        batches = run.schedule.schedule
        watchdog.measured(timing["seconds"])
        timing |= run.meter.step(data.row_sizes(batches, step - 1), seconds=timing["seconds"])
        bad = numbers.pop("nonfinite") > 0
        spike = numbers.get("spike", 0.0) > 0
        ids = data.group_ids(batches, step - 1)
        groups = ids[ids >= 0].tolist() if bad or spike else None
        run.writers.write(step, numbers, rows=groups, why="nonfinite" if bad else "spike")
        run.writers.write(step, timing, timing=True)
        self._bar.update(1)
        run.skipped = run.skipped + 1 if bad or spike else 0
        run.recorded = step
        self._still = self._still + 1 if numbers.get("grad_norm") == 0.0 else 0
        if groups is not None:
            self._skipped(run, step, numbers, groups, bad=bad)
        elif step % run.config.train.log_every == 0:
            line = metric_logger.shown(numbers)
            log.info(
                "step %d/%d  %s  %.2f s",
                step,
                run.schedule.steps,
                line,
                timing["seconds"],
                extra=None if self._bar.disable else terminal.DETAIL,
            )
            if not self._bar.disable:
                self._bar.set_postfix_str(metric_logger.in_brief(numbers))

    def _skipped(self, run: Run, step: int, numbers: dict[str, float], groups: list[int], *, bad: bool) -> None:
        """Say which step was skipped and on which data, and stop the run where it must not go on."""
        names = ", ".join(run.inputs.train.prepared.sources[group] for group in groups)
        what = "is not finite"
        if not bad:
            what = f"is a spike (loss {numbers['loss']:.4g}, gradient norm {numbers['grad_norm']:.4g})"
        fact = f"step {step}: loss or gradient {what}; the step was not applied; data: {names}"
        stops = bad and run.config.train.on_nonfinite == "stop"
        if stops or run.skipped >= run.config.train.max_nonfinite:
            raise NonFinite(
                f"{fact}. {run.skipped} in a row; the newest checkpoint is sound and holds what step"
                f" {step - run.skipped} left. Look at these rows, lower optim.learning_rate, or set"
                f" {'train.on_nonfinite=skip' if bad else 'train.skip_spikes=0 in another workdir'}."
            )
        log.warning(fact)


class Profiling(Callback):
    """Traces some steps into the workdir."""

    def __init__(self, trace: profiler.Trace):
        """Take what traces, and the steps that it is for."""
        self._trace = trace

    def on_step_begin(self, run: Run, step: int) -> None:
        """Begin the trace with idle devices."""
        if self._trace.begins(step):
            run.call("on_flush")
        self._trace.before(step)

    def on_step_end(self, run: Run, step: int, pairs: metrics.Pairs) -> None:
        """End the trace once its last step has been computed."""
        if self._trace.ends(step):
            run.call("on_flush")
            self._trace.close()

    def on_train_end(self, run: Run) -> None:
        """Close a trace that was not ended."""
        self._trace.close()


class Preemption(Callback):
    """Asks whether a signal has come, in every process at the same points."""

    def on_step_end(self, run: Run, step: int, pairs: metrics.Pairs) -> None:
        """Ask before what takes long."""
        run.asked = run.stop.agreed() or ""

    def on_save(self, run: Run, step: int) -> None:
        """Ask again after it."""
        run.asked = run.asked or run.stop.agreed() or ""


class Evaluating(Callback):
    """Evaluates every `train.eval_every` steps and at the end."""

    def __init__(self, run: Run):
        """Take what is evaluated; nothing is computed yet."""
        self._evaluate = evaluator.Evaluation(
            run.config, run.inputs.loss, run.schedule.evaluation, run.steps, run.references[1]
        )

    def evaluate(self, run: Run, step: int, check: Callable[[], None] | None = None) -> dict[str, float]:
        """Evaluate and tell every callback what was found.

        Args:
            run: whose weights.
            step: the step that they come from.
            check: called before every batch; None = stop for a signal, unless the score of this evaluation says whether
                the checkpoint is the best.
        """

        def stop() -> None:
            watchdog.moved()
            if not run.config.train.keep_best and (name := run.stop.agreed()):
                raise preemption.Stopped(name)

        found = self._evaluate(step, run.weights(), check or stop)
        run.call("on_evaluate", step, found, check or stop)
        return found

    def on_step_end(self, run: Run, step: int, pairs: metrics.Pairs) -> None:
        """Evaluate where it is due; a signal ends it, and the checkpoint that follows knows."""
        run.whole = True
        if run.evaluates(step):
            run.call("on_flush")
            try:
                self.evaluate(run, step)
            except preemption.Stopped as stopped:
                run.asked, run.whole = str(stopped), False
            run.clock.restart()


class SampleCompletions(Callback):
    """Draws completions of the fixed prompts at every evaluation."""

    def __init__(self, sample: sample_completions.SampleCompletions):
        """Take the prompts."""
        self._sample = sample

    def on_evaluate(self, run: Run, step: int, found: dict[str, float], check: Callable[[], None]) -> None:
        """Draw the completions and add their metrics."""
        numbers, table = self._sample(step, run.weights(), check)
        found |= numbers
        run.writers.table(step, sample_completions.FOLDER, *table)


class Checkpointing(Callback):
    """Saves every `train.save_every` steps, at the end, at a signal, and where an evaluation is the best so far."""

    def __init__(self, checkpointer: checkpoint.Checkpointer, fingerprints: dict[str, str]):
        """Take what saves, and the fingerprints of what the run reads."""
        self._checkpointer, self._fingerprints = checkpointer, fingerprints
        self._score: float | None = None

    def on_step_begin(self, run: Run, step: int) -> None:
        """Forget the evaluation before the first step, which no checkpoint belongs to."""
        self._score = None

    def on_evaluate(self, run: Run, step: int, found: dict[str, float], check: Callable[[], None]) -> None:
        """Keep what tells the best checkpoint; errors as those of `best_checkpoint.score`."""
        self._score = best_checkpoint.score(run.config, found)

    def on_step_end(self, run: Run, step: int, pairs: metrics.Pairs) -> None:
        """Save where it is due."""
        score, self._score = self._score, None
        train, last = run.config.train, step == run.schedule.steps
        due = last or step % train.save_every == 0 or bool(run.asked) or not run.whole
        due = due or (score is not None and score > run.best) or self._checkpointer.failing()
        if not due:
            return
        run.call("on_flush")
        run.best = run.best if score is None else max(score, run.best)
        run.writers.sync()
        save = self._checkpointer.commit if run.asked or last or not train.async_save else self._checkpointer.save
        assert run.state is not None
        save(step, run.state, self._meta(run, step), score=score)
        run.clock.restart()
        run.call("on_save", step)

    def on_error(self, run: Run, error: Exception) -> None:
        """Save what the last applied step left, where too many after it were not: the newest state still is that."""
        if isinstance(error, NonFinite):
            good = run.recorded - run.skipped
            self._checkpointer.wait()
            if good > (self._checkpointer.latest_step() or 0):
                run.skipped = 0
                run.writers.sync()
                assert run.state is not None
                self._checkpointer.save(good, run.state, self._meta(run, good))
                self._checkpointer.wait()

    def _meta(self, run: Run, step: int) -> dict:
        return {
            "config": json.loads(run.config.to_json()),
            "fingerprints": self._fingerprints,
            "groups_seen": step * run.config.train.batch_size,
            "nonfinite_in_a_row": run.skipped,
            "best": run.best if math.isfinite(run.best) else None,
        }
