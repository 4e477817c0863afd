"""Trains a model: reference log-probs, steps, evaluations, checkpoints. The impure end of everything.

The workdir holds: config.json, audit.json, metrics.jsonl, timing.jsonl, run.log, reference/, checkpoints/,
model_source/, and, of large data, data/. Starting again with the same workdir resumes from the newest checkpoint, bit
for bit on the same devices. Of several processes all compute, and the first alone writes the files, but for its part of
the checkpoints.
"""

import contextlib
import functools
import logging
import math
import resource
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from fpo_jax import checkpoint, data, distributed, sharding
from fpo_jax import config as configuration
from fpo_jax.distributed import exit_reporter, preemption, watchdog, workdir_lock
from fpo_jax.io import run_log
from fpo_jax.perf import hardware, profiler
from fpo_jax.trainer import (
    adapters,
    auto_settings,
    batch_shapes,
    callbacks,
    compiled_step,
    export,
    kept_logits,
    metric_logger,
    reference_logprobs,
    run_inputs,
    run_schedule,
    run_summary,
    run_workdir,
    sample_completions,
    start_checks,
    train_step,
)
from fpo_jax.trainer.callbacks import NonFinite

__all__ = ["NonFinite", "Trainer", "run"]

log = logging.getLogger("fpo_jax")


def run(
    config: configuration.Config,
    workdir: Path,
    *,
    devices: Sequence | None = None,
    profile: range = range(0),
    extend: bool = False,
) -> None:
    """Train as configured, stopping for SIGTERM and SIGINT with everything saved; arguments and errors of `Trainer`."""
    with preemption.StopRequest(begun=False) as stop:
        Trainer(config, workdir, devices=devices, profile=profile, stop=stop, extend=extend).train()


class Trainer:
    """Trains one model as a configuration says.

        trainer = fpo_jax.Trainer(fpo_jax.load_config("mistral_base"), "runs/mistral")
        trainer.train()
        trainer.save_pretrained("exported")

    Making one reads data and tokenizer and settles every choice; it touches no weight, and writes nothing but the
    tokenised data where they are worth keeping.
    """

    def __init__(
        self,
        config: configuration.Config,
        workdir: Path | str,
        *,
        devices: Sequence | None = None,
        profile: range = range(0),
        stop: preemption.StopRequest | None = None,
        extra: Sequence[callbacks.Callback] = (),
        train_dataset: Iterable[Mapping[str, Any]] | None = None,
        eval_dataset: Iterable[Mapping[str, Any]] | None = None,
        extend: bool = False,
    ):
        """Read the inputs, make the mesh, and jit the steps.

        Args:
            config: from `fpo_jax.load_config` or a file of configs/.
            workdir: the run's folder; made when absent, resumed when not.
            devices: what to build the mesh of; None = all of them.
            profile: numbers of the steps to trace into `workdir/profile`.
            stop: what turns signals into a request, entered by the caller; None = signals end the process.
            extra: callbacks of your own, called after ours.
            train_dataset: rows with the columns of a data format, as a list of dicts or a `datasets.Dataset`, in the
                place of `data.train`; a run resumes when their content is the same.
            eval_dataset: the same in the place of `data.eval`.
            extend: go on to more steps than the workdir's run was to make, also where that changes its learning rates.

        Raises:
            ValueError: the configuration, the data or the model cannot be used, or another run is in the workdir;
                nothing has been changed; `data/` may hold the tokenised data.
        """
        given = {"train": train_dataset, "eval": eval_dataset}
        rows = {
            name: list(found) if isinstance(found, Iterator) else found
            for name, found in given.items()
            if found is not None
        }
        config = run_inputs.with_rows(config, rows) if rows else config
        self.config, self.workdir = config, Path(workdir)
        self._extend, self._said = extend, run_log.Collector()
        with self._said.collecting():
            self._prepare(config, rows, devices=devices, profile=profile, stop=stop, extra=extra)

    def _prepare(
        self,
        config: configuration.Config,
        rows: run_inputs.Rows,
        *,
        devices: Sequence | None,
        profile: range,
        stop: preemption.StopRequest | None,
        extra: Sequence[callbacks.Callback],
    ) -> None:
        """Read the inputs, make the mesh, and jit the steps; arguments and errors as those of the class."""
        self._extra, stop = tuple(extra), stop or preemption.StopRequest()
        with distributed.together():
            if not start_checks.place_problems("--workdir", self.workdir):  # else it is told with all the others
                workdir_lock.peek(self.workdir)
            inputs = run_inputs.prepare(config, workdir=self.workdir, rows=rows)
        self._fingerprints = run_workdir.fingerprints(inputs)
        compiled_step.keep_compiled(config.train.compilation_cache)
        distributed.agree(run_workdir.identity(config) | self._fingerprints)
        stop.begin(lambda: exit_reporter.resumption(self.workdir / checkpoint.FOLDER))
        with distributed.together():
            layout = sharding.make_layout(**config.mesh, devices=jax.devices() if devices is None else devices)
            assert layout.mesh is not None
            holds = hardware.capacity(layout.mesh.devices.flat[0])
            facts = auto_settings.measured(inputs, ways=layout.data_parallel_degree)
            limit = auto_settings.memory_limit(layout, holds)
            settled = auto_settings.settle(config, facts, layout, limit=limit, capacity=holds)
            self._settled = auto_settings.chosen(config, settled.config)
            config, sizes = settled.config, facts.sizes(settled.config.data.layout)
            schedule = run_schedule.build(config, inputs, devices=layout.data_parallel_degree, sizes=sizes)
            trace = profiler.Trace(profile, self.workdir, last=schedule.steps)
            steps = kept_logits.steps_of(
                config,
                run_schedule.blueprint(config, inputs, schedule),
                layout,
                largest=batch_shapes.largest(schedule.schedule, schedule.steps),
                accumulation=schedule.accumulation,
                capacity=holds,
            )
            steps.choices[:0] = settled.choices
            self._sample_completions = None
            if config.completions.count:
                self._sample_completions = sample_completions.SampleCompletions(
                    config, self.workdir, inputs, layout=steps.layout
                )
        distributed.agree(self._settled)  # where one has less memory than the others
        meter = profiler.Meter(
            inputs.model_config,
            devices=steps.mesh.size,
            peak=None if holds is None or config.model.compute_dtype == "float32" else holds.flops,
            extra_forward=inputs.loss.needs_batch_kl,
            adapter=steps.forward_fn.adapter,
        )
        self._trace = trace
        self._positions = steps.batches.positions(schedule.schedule.parts, accumulation=schedule.accumulation)
        self._run = callbacks.Run(config, inputs, schedule, steps, stop, meter)

    def train(self) -> None:
        """Train to the end, resuming from the newest checkpoint of the workdir.

        Raises:
            ValueError: another run is in the workdir; what it reads has changed since; it does not fit.
            preemption.Stopped: a signal asked to stop; the state is saved.
            NonFinite: loss or gradient not finite; what the last applied step left is saved.
            checkpoint.SaveFailed: the disk takes no checkpoint.
        """
        run, total = self._run, self._run.schedule.steps
        with self._opened() as checkpointer:
            last = self._newest(checkpointer)
            due = last is None or self._lacks_evaluation(last)
            if last is not None and last >= total and not due:
                log.info("finished: %s holds step %d of %d", self.workdir, last, total)
                return
            evaluating = self._load(checkpointer, last)
            with self._writing(last):
                if due:
                    saved = "nothing had been updated" if last is None else f"step {last} is saved"
                    check = functools.partial(run.stop.check, f"{saved}; the same command goes on.")
                    evaluating.evaluate(run, last or 0, check)
                    check()  # the first step may take minutes to compile
                self._loop(checkpointer)
                run.writers.write(total, run.meter.overall(), timing=True)
        log.info("since the start: %s", profiler.shown(run.meter.overall()))
        log.info(
            "compilations: train %d, eval %d, reference %d; peak host memory %s",
            run.steps.train.compilations,
            run.steps.evaluate.compilations,
            run.steps.logprobs.compilations,
            compiled_step.mib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
        )

    def evaluate(self) -> dict[str, float]:
        """Return the metrics of the evaluation data, and of sample completions, under the newest checkpoint.

        Without a checkpoint they are those of the model that the run starts from. Nothing is logged as a step's.
        """
        with self._opened() as checkpointer:
            last = self._newest(checkpointer)
            return self._load(checkpointer, last).evaluate(self._run, last or 0)

    def save_pretrained(
        self, directory: Path | str, *, step: int | str | None = None, dtype: str | None = None
    ) -> None:
        """Write a checkpoint as a Hugging Face model directory; arguments and errors as those of `export.export`."""
        log.info(export.export(self.workdir, Path(directory), step=step, dtype=dtype))

    def _loop(self, checkpointer: checkpoint.Checkpointer) -> None:
        """Take every step that is left; whatever else happens is a callback's."""
        run, total = self._run, self._run.schedule.steps
        assert run.state is not None
        run.clock.restart()
        try:
            for step in range(int(run.state.step) + 1, total + 1):
                run.call("on_step_begin", step)
                with run.clock.part("data"):
                    batch = self._batch(step)
                run.state, pairs = run.steps.train(run.state, batch)
                run.call("on_step_end", step, pairs)
                if run.asked and (step < total or not run.whole):
                    checkpointer.wait()
                    raise preemption.Stopped(f"{run.asked}: saved step {step} of {total}; the same command goes on.")
            checkpointer.wait()
        except Exception as error:
            run.call("on_error", error)
            raise
        finally:
            run.call("on_train_end")

    def _batch(self, step: int):
        """Return the micro-batches of a step, on the devices."""
        schedule = self._run.schedule
        batch = data.batch_at(schedule.schedule, step - 1, self._positions)
        batch = reference_logprobs.attach(batch, self._run.references[0])
        stacked = train_step.stack_micro_batches(batch, accumulation=schedule.accumulation)
        return self._run.steps.batches.place(stacked, stacked=True)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[checkpoint.Checkpointer]:
        """Hold the workdir for this run alone, and open its checkpoints."""
        run, train = self._run, self.config.train
        with contextlib.ExitStack() as held:
            with distributed.together():
                if distributed.is_main_process():
                    held.enter_context(workdir_lock.hold(self.workdir))
                    collecting = held.enter_context(contextlib.ExitStack())
                    collecting.enter_context(self._said.collecting())
                    run_workdir.keep_source(self.config, self.workdir, run.inputs)
                    length = {"steps": run.schedule.steps, "extend": self._extend}
                    run_workdir.claim_workdir(self.config, self.workdir, run.inputs, settled=self._settled, **length)
                    collecting.close()
                    held.enter_context(run_log.written(self.workdir / run_log.FILE, self._said))
            distributed.check_shared(self.workdir)
            run.stop.connect(run.steps.mesh)
            run_summary.log_summary(self.config, run.config, run.inputs, run.schedule, run.steps)
            log.info("details: %s, config.json and audit.json beside it", self.workdir / run_log.FILE)
            keep = {"keep": train.keep_checkpoints, "keep_best": bool(train.keep_best)}
            held.enter_context(watchdog.watching(train.hang_timeout, self.workdir / checkpoint.FOLDER))
            checkpointer = held.enter_context(contextlib.closing(checkpoint.Checkpointer(self.workdir, **keep)))
            with distributed.guard():
                yield checkpointer

    def _newest(self, checkpointer: checkpoint.Checkpointer) -> int | None:
        """Return the newest step, which every process has and which was trained on what is read now."""
        last = checkpointer.latest_step()
        distributed.agree({"newest checkpoint": last, "steps of the run": self._run.schedule.steps})
        if last is not None:
            meta = checkpointer.meta(last)
            with distributed.together():
                self._check_same(meta)
        return last

    def _load(self, checkpointer: checkpoint.Checkpointer, last: int | None) -> callbacks.Evaluating:
        """Load or resume the state, compute the reference's log-probs, and set up the callbacks."""
        run, state = self._run, self._run.steps.state
        with distributed.together():
            checkpointer.check_space(state.abstract())
        weights = state.load(run.inputs.source)
        start = weights if run.inputs.adapter is None else state.with_adapter(weights, run.inputs.adapter)
        reference = reference_logprobs.ReferencePass(
            run.config, self.workdir, run.inputs, run.schedule, run.steps, run.stop, run.meter
        )
        scored = start if adapters.in_reference(run.config) else weights
        run.references = reference(scored, fingerprints=self._fingerprints)
        del scored
        with watchdog.unhurried():
            if last is None:
                run.state = state.init(start)
            else:
                del start
                if not state.adapted:
                    weights = None  # the reference; the policy comes from the checkpoint
                restored = checkpointer.restore(last, state.abstract())
                skipped = min(run.skipped, self.config.train.max_nonfinite - 1)
                run.state = state.resume(restored, weights, skipped=skipped)
                log.info("resumed from step %d of %d", last, run.schedule.steps)
        evaluating = callbacks.Evaluating(run)
        run.callbacks = (
            *([callbacks.SampleCompletions(self._sample_completions)] if self._sample_completions else []),
            callbacks.MetricLogging(run),
            callbacks.Profiling(self._trace),
            callbacks.Preemption(),
            evaluating,
            callbacks.Checkpointing(checkpointer, self._fingerprints),
        )
        run.extra = self._extra
        return evaluating

    @contextlib.contextmanager
    def _writing(self, last: int | None) -> Iterator[None]:
        """Open the metric logger of the first process, after the lines of the step that is resumed."""
        with distributed.together():
            if distributed.is_main_process():
                self._run.writers = metric_logger.Writers(
                    self.workdir,
                    resume_step=-1 if last is None else last,
                    tensorboard=self.config.logging.tensorboard,
                    wandb_project=self.config.logging.wandb_project or None,
                    config=self._run.config.to_dict(),
                )
        with contextlib.closing(self._run.writers):
            yield
        self._run.writers = metric_logger.Silent()

    def _lacks_evaluation(self, step: int) -> bool:
        """Whether a signal came in the evaluation after a step that is saved."""
        if not self._run.evaluates(step) or (
            self._run.schedule.evaluation is None and self._sample_completions is None
        ):
            return False
        metrics_file = self.workdir / metric_logger.METRICS_FILE
        lacks = distributed.is_main_process() and not metric_logger.has_evaluation(metrics_file, step)
        return any(distributed.share("lacks" if lacks else ""))

    def _check_same(self, meta: dict) -> None:
        """Refuse to go on with other content; what the checkpoint counted goes on."""
        before, run = meta["fingerprints"], self._run
        changed = [name for name, now in self._fingerprints.items() if before.get(name, now) != now]
        if changed:
            raise ValueError(
                f"{', '.join(changed)} changed since step {meta['step']} of {self.workdir}: the content is not what the"
                " run began with. Restore it, or use another --workdir."
            )
        run.skipped = meta["nonfinite_in_a_row"]
        run.best = -math.inf if meta["best"] is None else meta["best"]
