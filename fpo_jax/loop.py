"""Wires everything for one run: the only impure file.

    config -> loss, model, data, mesh -> reference log-probs -> updates with evaluation and checkpoints -> workdir

The workdir holds: config.json, audit.json, metrics.jsonl, timing.jsonl, reference/, checkpoints/, model_source/.
Starting again with the same workdir goes on from the newest checkpoint.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import tqdm
from jax.sharding import Mesh

from fpo_jax import (
    chat,
    checkpoint,
    data,
    hf,
    logps,
    losses,
    metrics,
    model,
    optim,
    params,
    reference,
    shapes,
    sharding,
    step,
)
from fpo_jax import config as configuration

log = logging.getLogger("fpo_jax")

# Allowed relative difference of a recomputed reference log-prob: rounding of another batch shape or device, no more.
REFERENCE_RTOL = {"float32": 1e-4, "bfloat16": 2e-2}


class Stopped(Exception):
    """SIGTERM or SIGINT arrived; the state is saved and the same command goes on from there."""


class NonFinite(Exception):
    """The loss or the gradient is not finite and the configuration says stop."""


class Inputs(NamedTuple):
    """What a run reads before it touches a device."""

    loss: losses.Loss
    source: Path
    model_config: model.ModelConfig
    train: data.Prepared
    evaluation: data.Prepared | None


class Plan(NamedTuple):
    """The sizes of a run."""

    accumulation: int
    steps_per_epoch: int
    steps: int
    warmup: int
    horizon: int


class Program:
    """A jitted `f(first, batch)` compiled ahead of its first call, once per batch shape."""

    def __init__(self, name: str, jitted: jax.stages.Wrapped):
        """Take the function to compile; `name` is for the log."""
        self.name, self._jitted = name, jitted
        self._compiled: dict[tuple, jax.stages.Compiled] = {}

    def __call__(self, first, batch: shapes.Batch):
        """Run on the batch, compiling when its shape is new."""
        key = (batch.tokens_NT.shape, batch.targets_NR.shape)
        if key not in self._compiled:
            start = time.perf_counter()
            self._compiled[key] = self._jitted.lower(first, batch).compile()
            memory = self._compiled[key].memory_analysis()
            size = f", {_mib(memory.argument_size_in_bytes)} arguments + {_mib(memory.temp_size_in_bytes)} temporaries"
            log.info(
                "compiled %s for rows of %d tokens, %d scored, in %.1f s%s per device",
                self.name,
                key[0][-1],
                key[1][-1],
                time.perf_counter() - start,
                size if memory else "",
            )
        return self._compiled[key](first, batch)

    @property
    def compilations(self) -> int:
        """Number of batch shapes compiled so far."""
        return len(self._compiled)


def run(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Train as configured, resuming from the newest checkpoint in `workdir`.

    Raises:
        ValueError: the configuration, the data or the model cannot be used; nothing has been changed.
        Stopped: a signal asked to stop; the state is saved.
        NonFinite: loss or gradient not finite.
    """
    with _StopRequest() as stop:
        inputs = prepare(config)
        claim_workdir(config, workdir, inputs)
        mesh = sharding.make_mesh(**config.mesh, devices=jax.devices())
        _Run(config, workdir, inputs, mesh, stop).train()


def prepare(config: ml_collections.ConfigDict) -> Inputs:
    """Check the configuration and read model config, tokenizer and data; touches no device and writes nothing."""
    problems, loss = [], None
    try:
        loss = losses.resolve(config.loss.name, **configuration.loss_options(config))
    except ValueError as error:
        problems.append(str(error))
    configuration.validate(config, extra=problems)
    assert loss is not None
    source = hf.local_dir(config.model.path, revision=config.model.revision)
    model_config = hf.read_config(source)
    if config.data.max_length > model_config.max_positions:
        raise ValueError(
            f"data.max_length={config.data.max_length} exceeds the model's window of {model_config.max_positions}"
            f" tokens ({source}); use at most {model_config.max_positions}."
        )
    tokenizer = chat.load_tokenizer(
        config.tokenizer.path or str(source), chat_template=config.tokenizer.chat_template, rule=config.data.rule
    )
    hf.check_vocabulary(len(tokenizer), model_config)
    train = _read(config, tokenizer, config.data.train, config.data.train_split, config.data.train_rows, "train")
    evaluation = None
    if config.data.eval:
        evaluation = _read(config, tokenizer, config.data.eval, config.data.eval_split, config.data.eval_rows, "eval")
    return Inputs(loss, source, model_config, train, evaluation)


def claim_workdir(config: ml_collections.ConfigDict, workdir: Path, inputs: Inputs) -> None:
    """Write the run's identity into the workdir, or check that it is the same run's.

    Raises:
        ValueError: the workdir belongs to another configuration; lists what differs.
    """
    path = workdir / "config.json"
    mine = json.loads(config.to_json())
    if path.exists():
        changed = configuration.difference(json.loads(path.read_text()), mine, ignore=configuration.RESUMABLE)
        if changed:
            raise ValueError(
                f"{workdir} holds a run with another configuration:\n  "
                + "\n  ".join(changed)
                + "\nuse another --workdir, or give the old values to go on with that run."
            )
    elif workdir.is_dir() and (workdir / checkpoint.FOLDER).exists():
        raise ValueError(f"{workdir} holds checkpoints but no config.json; use another --workdir.")
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(mine, indent=2) + "\n")
    audits = {"train": inputs.train.audit.as_dict()}
    if inputs.evaluation is not None:
        audits["eval"] = inputs.evaluation.audit.as_dict()
    (workdir / "audit.json").write_text(json.dumps(audits, indent=2) + "\n")


class _Run:
    """One run's objects and its loop."""

    def __init__(self, config, workdir: Path, inputs: Inputs, mesh: Mesh, stop: "_StopRequest"):
        self.config, self.workdir, self.inputs, self.mesh, self.stop = config, workdir, inputs, mesh, stop
        self.devices = sharding.batch_devices(mesh)
        self.plan = plan(config, groups=len(inputs.train), devices=self.devices)
        abstract = params.abstract(inputs.model_config, jnp.dtype(config.model.param_dtype))
        self.param_shardings = sharding.param_shardings(
            params.logical_axes(inputs.model_config), abstract, mesh=mesh
        )
        rate = optim.schedule(
            kind=config.optim.schedule,
            peak=config.optim.learning_rate,
            warmup=self.plan.warmup,
            horizon=self.plan.horizon,
        )
        self.optimizer = optim.optimizer(
            rate,
            b1=config.optim.b1,
            b2=config.optim.b2,
            eps=config.optim.eps,
            weight_decay=config.optim.weight_decay,
            clip_norm=config.optim.clip_norm,
            decay_mask=params.decay_mask(inputs.model_config),
        )
        self.state_shardings = self._state_shardings(abstract)
        self.scorer, reasons = _scorer(config, inputs, mesh)
        bound = functools.partial(step.eval_step, scorer=self.scorer, loss=inputs.loss)
        self.eval_program = Program(
            "eval_step", step.jit_eval_step(bound, mesh=mesh, param_shardings=self.param_shardings)
        )
        self.score_program = Program(
            "reference pass",
            step.jit_eval_step(
                functools.partial(step.score_step, scorer=self.scorer),
                mesh=mesh,
                param_shardings=self.param_shardings,
            ),
        )
        update = functools.partial(
            step.train_step, scorer=self.scorer, loss=inputs.loss, optimizer=self.optimizer, rate=rate
        )
        self.train_program = Program(
            "train_step", step.jit_train_step(update, mesh=mesh, state_shardings=self.state_shardings)
        )
        self._announce(reasons, abstract)

    def train(self) -> None:
        """Load or resume, then update until the plan is done."""
        checkpointer = checkpoint.Checkpointer(self.workdir, keep=self.config.train.keep_checkpoints)
        with contextlib.closing(checkpointer):
            last = checkpointer.latest_step()
            fingerprints = self._fingerprints()
            meta = {} if last is None else checkpointer.meta(last)
            if last is not None:
                self._check_same(meta["fingerprints"], fingerprints, last)
            weights = self._load_weights()
            self._copy_source()
            references = self._references(weights)
            if last is None:
                state = self._fresh_state(weights)
            else:
                abstract = self._abstract_state()
                del weights
                state = checkpointer.restore(last, abstract)
                log.info("resumed from step %d of %d", last, self.plan.steps)
            writers = metrics.Writers(
                self.workdir,
                resume_step=-1 if last is None else last,
                tensorboard=self.config.logging.tensorboard,
                wandb_project=self.config.logging.wandb_project,
                config=self.config.to_dict(),
            )
            with contextlib.closing(writers):
                if last is None:
                    self._evaluate(0, state.params, references, writers)
                self._updates(state, meta, fingerprints, references, checkpointer, writers)
        log.info(
            "compilations: train %d, eval %d, reference %d; peak host memory %s",
            self.train_program.compilations,
            self.eval_program.compilations,
            self.score_program.compilations,
            _mib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
        )

    def _updates(self, state, meta, fingerprints, references, checkpointer, writers) -> None:
        train, total = self.config.train, self.plan.steps
        streak = meta.get("nonfinite_in_a_row", 0)
        pending = None  # the previous update's metrics, read while this one runs
        saved = int(state.step)
        bar = tqdm.tqdm(total=total, initial=saved, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)

        def settle():
            nonlocal pending, streak
            if pending is not None:
                number, pairs, batch, started = pending
                pending = None
                streak = self._record(number, pairs, batch, started, streak, writers, bar)

        with contextlib.closing(bar):
            for number in range(saved + 1, total + 1):
                started = time.perf_counter()
                batch = self._train_batch(number - 1, references[0])
                state, pairs = self.train_program(state, self._place(batch, stacked=True))
                settle()
                pending = (number, pairs, batch, started)
                due = self.config.train.eval_every and number % train.eval_every == 0
                if due or number == total:
                    settle()
                    self._evaluate(number, state.params, references, writers)
                stopping = self.stop.requested
                if number % train.save_every == 0 or number == total or stopping:
                    settle()
                    writers.sync()
                    checkpointer.save(
                        number,
                        state,
                        {
                            "config": json.loads(self.config.to_json()),
                            "fingerprints": fingerprints,
                            "examples_seen": number * train.batch_size,
                            "nonfinite_in_a_row": streak,
                        },
                    )
                    saved = number
                if stopping and number < total:
                    checkpointer.wait()
                    raise Stopped(f"{self.stop.requested}: saved step {saved} of {total}; the same command goes on.")
            checkpointer.wait()

    def _record(self, number, pairs, batch, started, streak, writers, bar) -> int:
        """Write one update's numbers; returns how many updates in a row were not finite."""
        numbers = metrics.means(jax.device_get(pairs))
        seconds = time.perf_counter() - started
        bad = numbers.pop("nonfinite") > 0
        if bad:
            rows = batch.row_ids_B[batch.row_ids_B >= 0].tolist()
            numbers["nonfinite_rows"] = rows
            # JSON has no NaN; the fact is in nonfinite_rows.
            numbers = {name: None if isinstance(value, float) and not np.isfinite(value) else value
                       for name, value in numbers.items()}
        writers.write(number, numbers)
        valid, padded = int(batch.valid_NT.sum()), batch.valid_NT.size
        timing = {
            "seconds": seconds,
            "valid_tokens_per_s": valid / seconds,
            "padded_tokens_per_s": padded / seconds,
            "padding_share": 1.0 - valid / padded,
        }
        writers.write(number, timing, timing=True)
        streak = streak + 1 if bad else 0
        if bad and (self.config.train.on_nonfinite == "stop" or streak >= self.config.train.max_nonfinite):
            raise NonFinite(
                f"step {number}: loss or gradient is not finite ({streak} in a row); rows of the batch:"
                f" {rows}. The update was not applied and the newest checkpoint is sound. Look at these"
                " rows in the data, lower optim.learning_rate, or set train.on_nonfinite='skip'."
            )
        bar.update(1)
        if bad:
            log.warning("step %d: loss or gradient is not finite, update skipped; rows %s", number, rows)
        elif number % self.config.train.log_every == 0 and bar.disable:
            shown = ("loss", "rewards/accuracies", "rewards/margins", "grad_norm", "learning_rate")
            text = "  ".join(f"{name} {numbers[name]:.4g}" for name in shown if name in numbers)
            log.info("step %d/%d  %s  %.2f s", number, self.plan.steps, text, seconds)
        return streak

    def _evaluate(self, number: int, weights, references, writers) -> None:
        if self.inputs.evaluation is None:
            return
        started, total = time.perf_counter(), None
        for batch in self._sequential(self.inputs.evaluation, self.config.train.eval_batch_per_device):
            batch = _with_reference(batch, references[1])
            total = metrics.add(total, jax.device_get(self.eval_program(weights, self._place(batch, stacked=False))))
        assert total is not None
        numbers = metrics.means(total)
        if self.inputs.loss.sft_weight:
            numbers["loss"] += self.inputs.loss.sft_weight * numbers["sft_loss"]
        writers.write(number, {f"eval_{name}": value for name, value in numbers.items()})
        shown = ("loss", "rewards/accuracies", "rewards/margins")
        text = "  ".join(f"{name} {numbers[name]:.4g}" for name in shown if name in numbers)
        log.info("evaluation at step %d  %s  %.1f s", number, text, time.perf_counter() - started)

    def _references(self, weights) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Reference log-probs of the train and eval groups [groups, K], from disk or computed now; None if unused."""
        if not self.inputs.loss.needs_reference:
            return None, None
        path = self.config.reference.path
        source, scorer, program = self.inputs.source, self.scorer, self.score_program
        if path is not None:
            source = hf.local_dir(path)
            scorer = dataclasses.replace(self.scorer, config=hf.read_config(source))
            shardings = _param_shardings(scorer.config, self.config, self.mesh)
            weights = hf.load_params(source, scorer.config, dtype=_dtype(self.config.model.param_dtype), shardings=shardings)
            program = _score_program(scorer, self.mesh, shardings)
        digest = hf.weights_fingerprint(source)
        train, evaluation = self.inputs.train, self.inputs.evaluation
        return (
            self._reference("train", train, weights, program, digest),
            None if evaluation is None else self._reference("eval", evaluation, weights, program, digest),
        )

    def _reference(self, name: str, prepared: data.Prepared, weights, program: Program, digest: str) -> np.ndarray:
        config = self.config
        parts = {
            "weights": digest,
            "data": prepared.fingerprint(),
            "temperature": self.inputs.loss.temperature,
            "compute_dtype": config.model.compute_dtype,
        }
        folder = Path(config.reference.cache_dir) if config.reference.cache_dir else self.workdir / "reference"
        path = folder / f"{name}-{reference.fingerprint(parts)[:16]}.safetensors"

        def score(batch):
            return jax.device_get(program(weights, self._place(batch, stacked=False)))

        def batches(groups=None):
            size = config.reference.batch_per_device * self.devices
            return self.stop.checked(_sequential(prepared, size, config, groups))

        if not path.exists():
            started = time.perf_counter()
            total = -(-len(prepared) // (config.reference.batch_per_device * self.devices))
            bar = tqdm.tqdm(batches(), f"reference {name}", total, disable=not sys.stderr.isatty(), unit="batch")
            reference.save(path, reference.compute(score, bar, groups=len(prepared)), parts)
            log.info("reference log-probs of %s: %d groups in %.1f s", name, len(prepared), time.perf_counter() - started)
        stored = reference.load(path)
        rows = reference.verification_rows(len(prepared))
        off = reference.verify(stored, score, batches(rows), rtol=REFERENCE_RTOL[config.model.compute_dtype], path=path)
        log.info("reference log-probs of %s: %s, %d groups recomputed, off by %.2g nats", name, path.name, len(rows), off)
        return stored

    def _train_batch(self, index: int, references: np.ndarray | None) -> shapes.Batch:
        """Update number `index` (from 0) as [A, ...] leaves: this process's part of it."""
        config = self.config
        batch = data.batch_at(
            self.inputs.train,
            step=index,
            batch_size=config.train.batch_size,
            seed=config.seed,
            shuffle=config.data.shuffle,
            last_batch=config.data.last_batch,
            buckets=_buckets(config),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return step.stack_micro_batches(_with_reference(batch, references), accumulation=self.plan.accumulation)

    def _place(self, batch: shapes.Batch, *, stacked: bool) -> shapes.Batch:
        placement = sharding.batch_sharding(self.mesh, stacked=stacked)
        return shapes.Batch(*(jax.make_array_from_process_local_data(placement, leaf) for leaf in batch))

    def _load_weights(self):
        return hf.load_params(
            self.inputs.source,
            self.inputs.model_config,
            dtype=_dtype(self.config.model.param_dtype),
            shardings=self.param_shardings,
        )

    def _fresh_state(self, weights) -> shapes.TrainState:
        opt_state = jax.jit(self.optimizer.init, out_shardings=self.state_shardings.opt_state)(weights)
        return shapes.TrainState(weights, opt_state, jax.device_put(np.int32(0), self.state_shardings.step))

    def _abstract_state(self) -> shapes.TrainState:
        abstract = params.abstract(self.inputs.model_config, _dtype(self.config.model.param_dtype))
        opt_state = jax.eval_shape(self.optimizer.init, abstract)
        state = shapes.TrainState(abstract, opt_state, jax.ShapeDtypeStruct((), jnp.int32))
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, self.state_shardings
        )

    def _fingerprints(self) -> dict[str, str]:
        """What must be the same for a checkpoint to be resumed."""
        evaluation = self.inputs.evaluation
        return {
            "model": hf.weights_fingerprint(self.inputs.source),
            "train data": self.inputs.train.fingerprint(),
            "eval data": "" if evaluation is None else evaluation.fingerprint(),
        }

    def _copy_source(self) -> None:
        """Keep config and tokenizer files in the workdir, so that export needs nothing else."""
        target = self.workdir / checkpoint.SOURCE_FOLDER
        if not target.exists():
            temporary = target.with_suffix(".tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            hf.copy_companions(self.inputs.source, temporary)
            temporary.rename(target)


def plan(config: ml_collections.ConfigDict, *, groups: int, devices: int) -> Plan:
    """Work out accumulation, steps and warm-up.

    Args:
        config: the run's configuration.
        groups: groups in the training data.
        devices: ways a batch is cut over the mesh.

    Raises:
        ValueError: the batch does not divide, or there is less than one batch of data.
    """
    train = config.train
    per_pass = train.micro_batch_per_device * devices
    if train.batch_size % per_pass:
        near = sorted({max(1, train.batch_size // per_pass) * per_pass, (train.batch_size // per_pass + 1) * per_pass})
        raise ValueError(
            f"train.batch_size={train.batch_size} is not divisible by train.micro_batch_per_device="
            f"{train.micro_batch_per_device} x {devices} devices = {per_pass}; use {' or '.join(map(str, near))}."
        )
    per_epoch = data.steps_per_epoch(groups, batch_size=train.batch_size, last_batch=config.data.last_batch)
    if per_epoch == 0:
        raise ValueError(
            f"{groups} training groups are less than one batch of {train.batch_size}; lower train.batch_size or set"
            " data.last_batch='pad'."
        )
    whole = max(1, round(train.epochs * per_epoch))
    steps = whole if train.max_steps is None else min(whole, train.max_steps)
    horizon = whole if config.optim.decay_over == "epochs" else steps
    warmup = optim.warmup_steps(
        fraction=config.optim.warmup_fraction, steps=config.optim.warmup_steps, horizon=horizon
    )
    return Plan(train.batch_size // per_pass, per_epoch, steps, warmup, horizon)


class _StopRequest:
    """Turns SIGTERM and SIGINT into a flag that the loop reads between updates; a second signal acts at once."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[int, Callable] = {}

    def __enter__(self) -> "_StopRequest":
        with contextlib.suppress(ValueError):  # not the main thread: the caller's handlers stay
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, _frame) -> None:
        self.requested = signal.Signals(number).name
        signal.signal(number, self._previous[number])

    def checked(self, batches: Iterable[shapes.Batch]) -> Iterator[shapes.Batch]:
        """Pass batches through until a signal arrives."""
        for batch in batches:
            if self.requested:
                raise Stopped(f"{self.requested} before the first update; the same command starts again.")
            yield batch
