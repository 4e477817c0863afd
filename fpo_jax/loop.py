"""Runs a job: reference log-probs, updates, evaluations, checkpoints. The impure end of everything.

The workdir holds: config.json, audit.json, metrics.jsonl, timing.jsonl, reference/, checkpoints/, model_source/.
Starting again with the same workdir goes on from the newest checkpoint, bit for bit on the same devices. Of several
processes all compute, and the first alone writes the files, but for its part of the checkpoints.
"""

import contextlib
import functools
import json
import logging
import math
import resource
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import tqdm

from fpo_jax import (
    announcement,
    answering,
    checkpoint,
    data,
    evaluation,
    execution,
    hosts,
    job,
    locking,
    measures,
    metrics,
    profiling,
    programs,
    reference,
    scoring,
    shapes,
    sharding,
    step,
    topologies,
)
from fpo_jax import config as configuration
from fpo_jax.hosts import witness
from fpo_jax.plan import kept, sizes

log = logging.getLogger("fpo_jax")


class NonFinite(hosts.Everywhere):
    """The loss or the gradient is not finite and the configuration says stop; or too many updates were skipped."""


def run(
    config: configuration.Config,
    workdir: Path,
    *,
    devices: Sequence | None = None,
    profile: range = range(0),
) -> None:
    """Train as configured, resuming from the newest checkpoint in `workdir`.

    Args:
        config: from a file of configs/.
        workdir: the run's folder; made when absent.
        devices: what to build the mesh of; None = all of them.
        profile: numbers of the updates to trace into `workdir/profile`.

    Raises:
        ValueError: the configuration, the data or the model cannot be used; nothing has been changed.
        execution.Stopped: a signal asked to stop; the state is saved.
        NonFinite: loss or gradient not finite; what the last applied update left is saved.
        checkpoint.SaveFailed: the disk takes no checkpoint.
    """
    with execution.StopRequest(begun=False) as stop, contextlib.ExitStack() as held:
        with hosts.together():
            inputs = job.prepare(config)
            fingerprints = job.fingerprints(inputs)
        execution.keep_compiled(config.train.compilation_cache)
        hosts.agree(job.identity(config) | fingerprints)
        stop.begin(lambda: witness.resumption(workdir / checkpoint.FOLDER))
        with hosts.together():
            layout = sharding.make_layout(**config.mesh, devices=jax.devices() if devices is None else devices)
            plan = job.plan(config, inputs, devices=layout.row_ways)
            trace = profiling.Trace(profile, workdir, last=plan.steps)
            assert layout.mesh is not None
            compiled = kept.programs_of(
                config,
                job.blueprint(config, inputs, plan),
                layout,
                largest=sizes.largest(plan.schedule, plan.steps),
                accumulation=plan.accumulation,
                capacity=topologies.capacity(layout.mesh.devices.flat[0]),
            )
            answers = None
            if config.answers.count:
                answers = answering.Answers(config, workdir, inputs, layout=compiled.layout)
            if hosts.first():
                held.enter_context(locking.hold(workdir))
                job.keep_source(config, workdir, inputs)
                job.claim_workdir(config, workdir, inputs)
        hosts.check_shared(workdir)
        stop.connect(compiled.mesh)
        one = _Run(config, workdir, inputs, plan, compiled, stop, fingerprints, trace, answers)
        announcement.announce(config, inputs, plan, compiled)
        one.train()


class _Run:
    """One run's objects and its loop."""

    def __init__(
        self,
        config: configuration.Config,
        workdir: Path,
        inputs: job.Inputs,
        plan: job.Plan,
        compiled: programs.Programs,
        stop: execution.StopRequest,
        fingerprints: dict[str, str],
        trace: profiling.Trace,
        answers: answering.Answers | None,
    ):
        self.config, self.workdir, self.inputs, self.plan = config, workdir, inputs, plan
        self.programs, self.stop, self.fingerprints, self.trace = compiled, stop, fingerprints, trace
        self.evaluation = evaluation.Evaluation(config, inputs.loss, plan.evaluation, compiled, stop, answers)
        self.positions = compiled.positions(plan.schedule.parts, accumulation=plan.accumulation)
        self.writers: metrics.Writers | metrics.Silent = metrics.Silent()
        self.nonfinite_in_a_row = 0  # updates that were not applied, spikes too
        self.recorded = 0  # the last update whose numbers are known
        self.best = -math.inf  # score of the best checkpoint so far
        self.split = profiling.Split("data", "device")  # of an update's time: making its batch, waiting for it
        device, wide = compiled.mesh.devices.flat[0], config.model.compute_dtype == "float32"
        holds = topologies.capacity(device)
        self.meter = profiling.Meter(
            inputs.model_config,
            devices=compiled.mesh.size,
            peak=None if holds is None or wide else holds.flops,
            extra_forward=inputs.loss.needs_batch_kl,
            adapted=compiled.adapted,
        )

    def train(self) -> None:
        """Load or resume, then update until the plan is done."""
        checkpointer = checkpoint.Checkpointer(
            self.workdir, keep=self.config.train.keep_checkpoints, keep_best=bool(self.config.train.keep_best)
        )
        with contextlib.closing(checkpointer), hosts.guard():
            last = checkpointer.latest_step()
            hosts.agree({"newest checkpoint": last, "updates of the run": self.plan.steps})
            due = True  # an evaluation before the next update
            if last is not None:
                meta = checkpointer.meta(last)
                with hosts.together():
                    self._check_same(meta)
                due = self._lacks_evaluation(last)
                if last >= self.plan.steps and not due:
                    log.info("finished: %s holds step %d of %d", self.workdir, last, self.plan.steps)
                    return
            with hosts.together():
                checkpointer.check_space(self.programs.abstract_state())
            weights = self.programs.load(self.inputs.source)
            reference_pass = scoring.ReferencePass(
                self.config, self.workdir, self.inputs, self.plan, self.programs, self.stop, self.meter
            )
            references = reference_pass(weights, fingerprints=self.fingerprints)
            if last is None:
                state = self.programs.fresh_state(weights)
            else:
                if not self.programs.adapted:
                    weights = None  # the reference; the policy comes from the checkpoint
                state = checkpointer.restore(last, self.programs.abstract_state())
                skipped = min(self.nonfinite_in_a_row, self.config.train.max_nonfinite - 1)
                state = self.programs.resumed(state, weights, skipped=skipped)
                log.info("resumed from step %d of %d", last, self.plan.steps)
            with hosts.together():
                if hosts.first():
                    self.writers = self._open_writers(last)
            with contextlib.closing(self.writers):
                if due:
                    saved = "nothing had been updated" if last is None else f"step {last} is saved"
                    check = functools.partial(self.stop.check, f"{saved}; the same command goes on.")
                    found = self._evaluate(last or 0, state, references, check)
                    self.evaluation.check_best(found)
                self._updates(state, references, checkpointer)
                self.writers.write(self.plan.steps, self.meter.overall(), timing=True)
        log.info("since the start: %s", profiling.shown(self.meter.overall()))
        log.info(
            "compilations: train %d, eval %d, reference %d; peak host memory %s",
            self.programs.train.compilations,
            self.programs.evaluate.compilations,
            self.programs.score.compilations,
            execution.mib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
        )

    def _open_writers(self, last: int | None) -> metrics.Writers:
        return metrics.Writers(
            self.workdir,
            resume_step=-1 if last is None else last,
            tensorboard=self.config.logging.tensorboard,
            wandb_project=self.config.logging.wandb_project or None,
            config=self.config.to_dict(),
        )

    def _lacks_evaluation(self, number: int) -> bool:
        """Whether a signal came in the evaluation after an update that is saved."""
        if not self._evaluates(number) or not self.evaluation:
            return False
        lacks = hosts.first() and not metrics.has_evaluation(self.workdir / metrics.METRICS_FILE, number)
        return any(hosts.share("lacks" if lacks else ""))

    def _evaluate(
        self, number: int, state: shapes.TrainState, references, check: Callable[[], None] | None = None
    ) -> dict[str, float]:
        weights = self.programs.whole(state)
        return self.evaluation(number, weights, references[1], writers=self.writers, check=check)

    def _evaluates(self, number: int) -> bool:
        every = self.config.train.eval_every
        return number == self.plan.steps or bool(every and number % every == 0)

    def _updates(self, state: shapes.TrainState, references, checkpointer: checkpoint.Checkpointer) -> None:
        train, total, first = self.config.train, self.plan.steps, int(state.step) + 1
        bar = tqdm.tqdm(
            total=total, initial=first - 1, unit="step", disable=not execution.progress_shown(), dynamic_ncols=True
        )
        pending = None  # the previous update, whose metrics are read while this one runs
        self.split.restart()
        good = self._keeping_what_is_good(lambda: state, checkpointer)
        with contextlib.closing(bar), contextlib.closing(self.trace), good:
            for number in range(first, total + 1):
                if self.trace.begins(number) and pending is not None:
                    self._record(*pending, bar)
                    pending = None
                self.trace.before(number)
                with self.split.part("data"):
                    batch = data.batch_at(self.plan.schedule, number - 1, self.positions)
                    batch = reference.attach(batch, references[0])
                    stacked = step.stack_micro_batches(batch, accumulation=self.plan.accumulation)
                    placed = self.programs.place(stacked, stacked=True)
                compilations = self.programs.train.compilations
                state, pairs = self.programs.train(state, placed)
                if pending is not None:
                    self._record(*pending, bar)
                if compilations != self.programs.train.compilations:
                    self.split.restart()  # compiling is not part of an update's time
                pending = (number, pairs)
                if self.trace.ends(number):
                    self._record(*pending, bar)
                    pending = None
                    self.trace.close()
                asked = self.stop.agreed()
                evaluating, whole = self._evaluates(number), True
                saving = number == total or number % train.save_every == 0 or asked or checkpointer.failing()
                if evaluating or saving:
                    if pending is not None:
                        self._record(*pending, bar)
                    pending = None
                    score = None
                    if evaluating:
                        try:
                            score = self.evaluation.score(self._evaluate(number, state, references))
                        except execution.Stopped as stopped:
                            asked, whole = str(stopped), False
                        saving = saving or not whole or (score is not None and score > self.best)
                    if saving:
                        self.best = self.best if score is None else max(score, self.best)
                        self.writers.sync()
                        waits = asked or number == total or not train.async_save
                        save = checkpointer.commit if waits else checkpointer.save
                        save(number, state, self._meta(number), score=score)
                    self.split.restart()
                asked = asked or (self.stop.agreed() if saving else None)
                if asked and (number < total or not whole):
                    checkpointer.wait()
                    raise execution.Stopped(f"{asked}: saved step {number} of {total}; the same command goes on.")
            checkpointer.wait()

    def _record(self, number: int, pairs: measures.Pairs, bar: tqdm.tqdm) -> None:
        """Wait for an update, write its numbers, and stop the run where it must not go on.

        Raises:
            NonFinite: the update was not finite, and the configuration says stop or too many came in a row.
        """
        with self.split.part("device"):
            numbers = metrics.means(jax.device_get(pairs))
        timing = self.split.lap()
        timing |= self.meter.update(data.row_sizes(self.plan.schedule, number - 1), seconds=timing["seconds"])
        bad = numbers.pop("nonfinite") > 0
        ids = data.group_ids(self.plan.schedule, number - 1)
        groups = ids[ids >= 0].tolist()
        spike = numbers.get("spike", 0.0) > 0
        self.writers.write(number, numbers, rows=groups if bad or spike else None, why="nonfinite" if bad else "spike")
        self.writers.write(number, timing, timing=True)
        bar.update(1)
        self.nonfinite_in_a_row = self.nonfinite_in_a_row + 1 if bad or spike else 0
        self.recorded = number
        if bad or spike:
            names = [self.inputs.train.prepared.sources[group] for group in groups]
            what = (
                "is not finite"
                if bad
                else f"is a spike (loss {numbers['loss']:.4g}, gradient norm {numbers['grad_norm']:.4g})"
            )
            fact = f"step {number}: loss or gradient {what}; the update was not applied; data: {', '.join(names)}"
            stops = bad and self.config.train.on_nonfinite == "stop"
            if stops or self.nonfinite_in_a_row >= self.config.train.max_nonfinite:
                raise NonFinite(
                    f"{fact}. {self.nonfinite_in_a_row} in a row; the newest checkpoint is sound and holds what step"
                    f" {number - self.nonfinite_in_a_row} left. Look at these rows, lower optim.learning_rate, or set"
                    f" {'train.on_nonfinite=skip' if bad else 'train.skip_spikes=0 in another workdir'}."
                )
            log.warning(fact)
        elif number % self.config.train.log_every == 0:
            if bar.disable:
                log.info("step %d/%d  %s  %.2f s", number, self.plan.steps, metrics.shown(numbers), timing["seconds"])
            else:
                bar.set_postfix_str(metrics.shown(numbers))

    @contextlib.contextmanager
    def _keeping_what_is_good(
        self, newest: Callable[[], shapes.TrainState], checkpointer: checkpoint.Checkpointer
    ) -> Iterator[None]:
        """Save what the last applied update left, where too many after it were not: the newest state still is that."""
        try:
            yield
        except NonFinite:
            good = self.recorded - self.nonfinite_in_a_row
            checkpointer.wait()
            if good > (checkpointer.latest_step() or 0):
                self.nonfinite_in_a_row = 0
                self.writers.sync()
                checkpointer.save(good, newest(), self._meta(good))
                checkpointer.wait()
            raise

    def _meta(self, number: int) -> dict:
        return {
            "config": json.loads(self.config.to_json()),
            "fingerprints": self.fingerprints,
            "groups_seen": number * self.config.train.batch_size,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            "best": self.best if math.isfinite(self.best) else None,
        }

    def _check_same(self, meta: dict) -> None:
        """Refuse to go on with other content; what the checkpoint counted goes on."""
        before = meta["fingerprints"]
        changed = [name for name, now in self.fingerprints.items() if before.get(name, now) != now]
        if changed:
            raise ValueError(
                f"{', '.join(changed)} changed since step {meta['step']} of {self.workdir}: the content is not what the"
                " run began with. Restore it, or use another --workdir."
            )
        self.nonfinite_in_a_row = meta["nonfinite_in_a_row"]
        self.best = -math.inf if meta["best"] is None else meta["best"]
