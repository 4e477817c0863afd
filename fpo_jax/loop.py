"""Runs a job: reference log-probs, updates, evaluations, checkpoints. The impure end of everything.

The workdir holds: config.json, audit.json, metrics.jsonl, timing.jsonl, reference/, checkpoints/, model_source/.
Starting again with the same workdir goes on from the newest checkpoint, bit for bit on the same devices.
"""

import contextlib
import json
import logging
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import tqdm

from fpo_jax import (
    checkpoint,
    data,
    execution,
    hf,
    job,
    metrics,
    params,
    programs,
    reference,
    shapes,
    sharding,
    step,
)
from fpo_jax import config as configuration

log = logging.getLogger("fpo_jax")

# Allowed relative difference of a recomputed reference log-prob: rounding of another batch shape or device, no more.
REFERENCE_RTOL = {"float32": 1e-4, "bfloat16": 2e-2}
SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "grad_norm", "learning_rate")


class NonFinite(Exception):
    """The loss or the gradient is not finite and the configuration says stop."""


def run(config: configuration.Config, workdir: Path, *, devices: Sequence | None = None) -> None:
    """Train as configured, resuming from the newest checkpoint in `workdir`.

    Args:
        config: from a file of configs/.
        workdir: the run's folder; made when absent.
        devices: what to build the mesh of; None = all of them.

    Raises:
        ValueError: the configuration, the data or the model cannot be used; nothing has been changed.
        execution.Stopped: a signal asked to stop; the state is saved.
        NonFinite: loss or gradient not finite.
    """
    with execution.StopRequest() as stop:
        inputs = job.prepare(config)
        layout = sharding.make_layout(**config.mesh, devices=jax.devices() if devices is None else devices)
        plan = job.plan(config, inputs, devices=layout.row_ways)
        compiled = programs.Programs(config, job.blueprint(inputs, plan), layout)
        job.claim_workdir(config, workdir, inputs)
        one = _Run(config, workdir, inputs, plan, compiled, stop)
        one.announce()
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
    ):
        self.config, self.workdir, self.inputs, self.plan = config, workdir, inputs, plan
        self.programs, self.stop = compiled, stop
        self.fingerprints = _fingerprints(inputs)
        self.writers: metrics.Writers | None = None
        self.nonfinite_in_a_row = 0
        self.clock = 0.0  # when the device was last known to be idle or at a step's end

    def announce(self) -> None:
        """Say everything about the run before anything expensive: what a reader needs to trust or to stop it."""
        config, plan, mesh = self.config, self.plan, self.programs.mesh
        changed = configuration.difference(configuration.default().to_dict(), config.to_dict())
        log.info("configuration, where it differs from the default:\n  %s", "\n  ".join(changed))
        shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        log.info("mesh: %s over %d %s devices", shape, mesh.size, mesh.devices.flat[0].device_kind)
        count, state = params.count(self.inputs.model_config), execution.mib(self.programs.state_bytes())
        log.info("model: %s, %s parameters, %s of state per device", self.inputs.source, f"{count:,}", state)
        for choice in self.programs.choices:
            log.info(choice)
        for name, dataset in (("train", self.inputs.train), ("eval", self.inputs.evaluation)):
            if dataset is not None:
                log.info("%s: %s", name, dataset.audit.text())
        log.info("one row as the model gets it, scored tokens between ⟦ and ⟧:\n%s", self.inputs.train.sample)
        log.info(
            "plan: %d updates of %d groups (%d an epoch) in %d micro-batches each; warm-up %d, decay over %d; %d"
            " compilation%s of the update: %s",
            plan.steps,
            config.train.batch_size,
            plan.schedule.steps_per_epoch,
            plan.accumulation,
            plan.warmup,
            plan.horizon,
            len(self.plan.shapes),
            "s" * (len(self.plan.shapes) > 1),
            ", ".join(f"T={length} R={scored}" for length, scored in self.plan.shapes),
        )

    def train(self) -> None:
        """Load or resume, then update until the plan is done."""
        checkpointer = checkpoint.Checkpointer(self.workdir, keep=self.config.train.keep_checkpoints)
        with contextlib.closing(checkpointer):
            last = checkpointer.latest_step()
            if last is not None:
                self._check_same(checkpointer.meta(last))
                if last >= self.plan.steps:
                    log.info("finished: %s holds step %d of %d", self.workdir, last, self.plan.steps)
                    return
            weights = self.programs.load(self.inputs.source)
            self._copy_source()
            references = self._references(weights)
            if last is None:
                state = self.programs.fresh_state(weights)
            else:
                del weights  # the reference; the policy comes from the checkpoint
                state = checkpointer.restore(last, self.programs.abstract_state())
                log.info("resumed from step %d of %d", last, self.plan.steps)
            self.writers = metrics.Writers(
                self.workdir,
                resume_step=-1 if last is None else last,
                tensorboard=self.config.logging.tensorboard,
                wandb_project=self.config.logging.wandb_project or None,
                config=self.config.to_dict(),
            )
            with contextlib.closing(self.writers):
                if last is None:
                    self._evaluate(0, state.params, references[1])
                self._updates(state, references, checkpointer)
        log.info(
            "compilations: train %d, eval %d, reference %d; peak host memory %s",
            self.programs.train.compilations,
            self.programs.evaluate.compilations,
            self.programs.score.compilations,
            execution.mib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
        )

    def _updates(self, state: shapes.TrainState, references, checkpointer: checkpoint.Checkpointer) -> None:
        assert self.writers is not None
        train, total, first = self.config.train, self.plan.steps, int(state.step) + 1
        bar = tqdm.tqdm(total=total, initial=first - 1, unit="step", disable=not _terminal(), dynamic_ncols=True)
        pending = None  # the previous update, whose metrics are read while this one runs
        self.clock = time.perf_counter()
        with contextlib.closing(bar):
            for number in range(first, total + 1):
                batch = _with_reference(data.batch_at(self.plan.schedule, number - 1), references[0])
                stacked = step.stack_micro_batches(batch, accumulation=self.plan.accumulation)
                compilations = self.programs.train.compilations
                state, pairs = self.programs.train(state, self.programs.place(stacked, stacked=True))
                if pending is not None:
                    self._record(*pending, bar)
                if compilations != self.programs.train.compilations:
                    self.clock = time.perf_counter()  # compiling is not part of a step's time
                pending = (number, pairs, batch)
                evaluating = number == total or (train.eval_every and number % train.eval_every == 0)
                saving = number == total or number % train.save_every == 0 or self.stop.requested
                if evaluating or saving:
                    self._record(*pending, bar)
                    pending = None
                    if evaluating:
                        self._evaluate(number, state.params, references[1])
                    if saving:
                        self.writers.sync()
                        checkpointer.save(number, state, self._meta(number))
                    self.clock = time.perf_counter()
                if self.stop.requested and saving and number < total:
                    checkpointer.wait()
                    raise execution.Stopped(
                        f"{self.stop.requested}: saved step {number} of {total}; the same command goes on."
                    )
            checkpointer.wait()

    def _record(self, number: int, pairs: step.Pairs, batch: shapes.Batch, bar: tqdm.tqdm) -> None:
        """Wait for an update, write its numbers, and stop the run where it must not go on.

        Raises:
            NonFinite: the update was not finite, and the configuration says stop or too many came in a row.
        """
        assert self.writers is not None
        numbers = metrics.means(jax.device_get(pairs))
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        bad = numbers.pop("nonfinite") > 0
        groups = batch.row_ids_B[batch.row_ids_B >= 0].tolist()
        self.writers.write(number, numbers, rows=groups if bad else None)
        valid, padded = int(batch.valid_NT.sum()), batch.valid_NT.size
        timing = {
            "seconds": seconds,
            "valid_tokens_per_s": valid / seconds,
            "padded_tokens_per_s": padded / seconds,
            "padding_share": 1.0 - valid / padded,
        }
        self.writers.write(number, timing, timing=True)
        bar.update(1)
        self.nonfinite_in_a_row = self.nonfinite_in_a_row + 1 if bad else 0
        if bad:
            names = [self.inputs.train.prepared.sources[group] for group in groups]
            fact = (
                f"step {number}: loss or gradient is not finite; the update was not applied; data: {', '.join(names)}"
            )
            if self.config.train.on_nonfinite == "stop" or self.nonfinite_in_a_row >= self.config.train.max_nonfinite:
                raise NonFinite(
                    f"{fact}. {self.nonfinite_in_a_row} in a row; the newest checkpoint is sound. Look at these rows,"
                    " lower optim.learning_rate, or set train.on_nonfinite='skip'."
                )
            log.warning(fact)
        elif number % self.config.train.log_every == 0:
            if bar.disable:
                log.info("step %d/%d  %s  %.2f s", number, self.plan.steps, _shown(numbers), seconds)
            else:
                bar.set_postfix_str(_shown(numbers))

    def _evaluate(self, number: int, weights: shapes.PyTree, references: np.ndarray | None) -> None:
        if self.inputs.evaluation is None:
            return
        assert self.writers is not None
        started, total = time.perf_counter(), None
        batches = self._in_order(self.inputs.evaluation.prepared, self.config.train.eval_batch_per_device)
        for index in range(batches.steps_per_epoch):
            batch = _with_reference(data.batch_at(batches, index), references)
            pairs = self.programs.evaluate(weights, self.programs.place(batch, stacked=False))
            total = metrics.add(total, jax.device_get(pairs))
        assert total is not None
        numbers = metrics.means(total)
        numbers["loss"] += self.inputs.loss.sft_weight * numbers["sft_loss"]
        self.writers.write(number, {f"eval_{name}": value for name, value in numbers.items()})
        log.info("evaluation at step %d  %s  %.1f s", number, _shown(numbers), time.perf_counter() - started)

    def _references(self, weights: shapes.PyTree) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Reference log-probs of the train and eval groups [groups, K], from disk or computed now; None if unused."""
        if not self.inputs.loss.needs_reference:
            return None, None
        program, digest = self.programs.score, self.fingerprints["model"]
        if self.config.reference.path:
            source = hf.local_dir(self.config.reference.path)
            weights, program = self.programs.load_other(source)
            digest = hf.weights_fingerprint(source)
        train, evaluation = self.inputs.train, self.inputs.evaluation
        return (
            self._reference("train", train.prepared, weights, program, digest),
            None if evaluation is None else self._reference("eval", evaluation.prepared, weights, program, digest),
        )

    def _reference(
        self, name: str, prepared: data.Prepared, weights: shapes.PyTree, program: execution.Program, digest: str
    ) -> np.ndarray:
        config = self.config
        parts = {
            "weights": digest,
            "data": prepared.fingerprint(),
            "temperature": self.inputs.loss.temperature,
            "param_dtype": config.model.param_dtype,
            "compute_dtype": config.model.compute_dtype,
        }
        folder = Path(config.reference.cache_dir or self.workdir / "reference")
        path = folder / f"{name}-{reference.fingerprint(parts)[:16]}.safetensors"
        batches = self._in_order(prepared, config.reference.batch_per_device)

        def score(batch: shapes.Batch) -> np.ndarray:
            return jax.device_get(program(weights, self.programs.place(batch, stacked=False)))

        def chosen(numbers: Sequence[int]) -> Iterator[shapes.Batch]:
            return self.stop.checked(data.batch_at(batches, number) for number in numbers)

        if not path.exists():
            started = time.perf_counter()
            everything = chosen(range(batches.steps_per_epoch))
            bar = tqdm.tqdm(everything, f"reference {name}", batches.steps_per_epoch, disable=not _terminal())
            reference.save(path, reference.compute(score, iter(bar), groups=prepared.groups), parts)
            seconds = time.perf_counter() - started
            log.info("reference log-probs of %s: %d groups in %.1f s", name, prepared.groups, seconds)
        stored = reference.load(path)
        again = chosen(reference.verification_steps(batches.steps_per_epoch))
        off = reference.verify(stored, score, again, rtol=REFERENCE_RTOL[config.model.compute_dtype], path=path)
        log.info("reference log-probs of %s: %s, verified to %.2g nats", name, path.name, off)
        return stored

    def _in_order(self, prepared: data.Prepared, per_device: int) -> data.Schedule:
        """Every group once, in the order of the data."""
        return job.sequential_schedule(self.config, prepared, batch_size=per_device * self.programs.layout.row_ways)

    def _meta(self, number: int) -> dict:
        return {
            "config": json.loads(self.config.to_json()),
            "fingerprints": self.fingerprints,
            "groups_seen": number * self.config.train.batch_size,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
        }

    def _check_same(self, meta: dict) -> None:
        """Refuse to go on with other content; what the checkpoint counted goes on."""
        changed = [name for name, now in self.fingerprints.items() if meta["fingerprints"].get(name) != now]
        if changed:
            raise ValueError(
                f"{', '.join(changed)} changed since step {meta['step']} of {self.workdir}: the content is not what the"
                " run began with. Restore it, or use another --workdir."
            )
        self.nonfinite_in_a_row = meta["nonfinite_in_a_row"]

    def _copy_source(self) -> None:
        """Keep config and tokenizer files in the workdir, so that export needs nothing else."""
        target = self.workdir / checkpoint.SOURCE_FOLDER
        if not target.exists():
            temporary = target.with_suffix(".tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            hf.copy_companions(self.inputs.source, temporary)
            temporary.rename(target)


def _fingerprints(inputs: job.Inputs) -> dict[str, str]:
    """What must be the same for a checkpoint to be resumed."""
    return {
        "model": hf.weights_fingerprint(inputs.source),
        "train data": inputs.train.prepared.fingerprint(),
        "eval data": "" if inputs.evaluation is None else inputs.evaluation.prepared.fingerprint(),
    }


def _with_reference(batch: shapes.Batch, references: np.ndarray | None) -> shapes.Batch:
    """Fill in the reference log-probs of the batch's groups; padding groups keep zeros."""
    if references is None:
        return batch
    real_B = batch.row_ids_B >= 0
    logps_BK = np.where(real_B[:, None], references[np.where(real_B, batch.row_ids_B, 0)], np.float32(0))
    return batch._replace(reference_logps_BK=logps_BK)


def _shown(numbers: dict[str, float]) -> str:
    return "  ".join(f"{name} {numbers[name]:.4g}" for name in SHOWN if name in numbers)


def _terminal() -> bool:
    return sys.stderr.isatty()
