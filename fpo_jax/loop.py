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
import math
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
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
    attention,
    chat,
    checkpoint,
    data,
    execution,
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


class NonFinite(Exception):
    """The loss or the gradient is not finite and the configuration says stop."""


class Dataset(NamedTuple):
    """Token rows, what was found while making them, and one decoded row with its scored part marked."""

    prepared: data.Prepared
    audit: data.Audit
    sample: str


class Inputs(NamedTuple):
    """What a run reads before it touches a device."""

    loss: losses.Loss
    source: Path
    model_config: model.ModelConfig
    train: Dataset
    evaluation: Dataset | None


class Plan(NamedTuple):
    """The sizes of a run."""

    accumulation: int
    steps_per_epoch: int
    steps: int
    warmup: int
    horizon: int


def run(config: ml_collections.ConfigDict, workdir: Path, *, devices: Sequence[jax.Device] | None = None) -> None:
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
        inputs = prepare(config)
        claim_workdir(config, workdir, inputs)
        mesh = sharding.make_mesh(**config.mesh, devices=jax.devices() if devices is None else devices)
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
        config.tokenizer.path or source, chat_template=config.tokenizer.chat_template, eos_token=config.tokenizer.eos_token
    )
    hf.check_vocabulary(len(tokenizer), model_config)
    train = _dataset(config, "train", tokenizer, model_config.vocab_size)
    evaluation = _dataset(config, "eval", tokenizer, model_config.vocab_size) if config.data.eval else None
    return Inputs(loss, source, model_config, train, evaluation)


def _dataset(config: ml_collections.ConfigDict, name: str, tokenizer, vocab_size: int) -> Dataset:
    """Read and tokenise the train or eval data."""
    options = config.data
    rows = configuration.row_slice(options[f"{name}_rows"])
    records = data.read(
        options[name],
        format=options.format,
        split=options[f"{name}_split"],
        hh_split=options.hh_split,
        on_bad_row=options.on_bad_row,
        start=rows.start or 0,
        stop=rows.stop,
        data_dir=options.subfolder,
        revision=options.revision,
    )
    chat_only = {}
    if options.rule == "chat":
        chat_only = {
            "max_prompt_length": options.max_prompt_length,
            "truncate_together": options.truncate_together,
            "auto_insert_empty_system": options.auto_insert_empty_system,
        }
    prepared, audit = data.prepare(
        records,
        tokenizer,
        rule=options.rule,
        max_length=options.max_length,
        max_response_length=options.max_response_length,
        group_size=options.group_size,
        truncation_mode=options.truncation,
        on_empty_response=options.on_empty_response,
        on_long_prompt=options.on_long_prompt,
        on_identical=options.on_identical,
        buckets=_buckets(config),
        vocab_size=vocab_size,
        **chat_only,
    )
    return Dataset(prepared, audit, data.masked_sample(prepared, tokenizer))


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

    def __init__(
        self, config: ml_collections.ConfigDict, workdir: Path, inputs: Inputs, mesh: Mesh, stop: execution.StopRequest
    ):
        self.config, self.workdir, self.inputs, self.mesh, self.stop = config, workdir, inputs, mesh, stop
        self.devices = sharding.batch_devices(mesh)
        self.plan = plan(config, groups=inputs.train.prepared.groups, devices=self.devices)
        self.schedule = data.schedule(
            inputs.train.prepared,
            batch_size=config.train.batch_size,
            buckets=_buckets(config),
            seed=config.seed,
            shuffle=config.data.shuffle,
            last_batch=config.data.last_batch,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        self.param_shardings = _param_shardings(config, inputs.model_config, mesh)
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
        self.state_shardings = self._state_shardings()
        self.scorer = _scorer(config, inputs, mesh)
        self.score_program = _score_program(self.scorer, mesh, self.param_shardings)
        evaluate = functools.partial(step.eval_step, scorer=self.scorer, loss=inputs.loss)
        self.eval_program = execution.Program(
            "eval_step", step.jit_eval_step(evaluate, mesh=mesh, param_shardings=self.param_shardings)
        )
        update = functools.partial(
            step.train_step, scorer=self.scorer, loss=inputs.loss, optimizer=self.optimizer, rate=rate
        )
        self.train_program = execution.Program(
            "train_step", step.jit_train_step(update, mesh=mesh, state_shardings=self.state_shardings)
        )
        self._announce()

    def _announce(self) -> None:
        """Say everything about the run before anything expensive: what a reader needs to trust or to stop it."""
        config, plan = self.config, self.plan
        changed = configuration.difference(configuration.default().to_dict(), config.to_dict())
        log.info("configuration, where it differs from the default:\n  %s", "\n  ".join(changed))
        shape = ", ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
        log.info("mesh: %s over %d %s devices", shape, self.mesh.size, self.mesh.devices.flat[0].device_kind)
        abstract = self._abstract_state()
        per_device = sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves((abstract.params, abstract.opt_state))
        )
        count = params.count(self.inputs.model_config)
        log.info("model: %s, %s parameters, %s of state per device", self.inputs.source, f"{count:,}", execution.mib(per_device))
        for name, dataset in (("train", self.inputs.train), ("eval", self.inputs.evaluation)):
            if dataset is not None:
                log.info("%s: %s", name, dataset.audit.text())
        log.info("one row as the model gets it, scored tokens between ⟦ and ⟧:\n%s", self.inputs.train.sample)
        compiled = data.batch_shapes(self.schedule, steps=min(plan.steps, plan.steps_per_epoch))
        log.info(
            "plan: %d updates of %d groups (%d an epoch), %d micro-batches each, warm-up %d, decay over %d; %d batch shapes"
            " to compile: %s",
            plan.steps,
            config.train.batch_size,
            plan.steps_per_epoch,
            plan.accumulation,
            plan.warmup,
            plan.horizon,
            len(compiled),
            ", ".join(f"T={length} R={scored}" for length, scored in compiled),
        )

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
            execution.mib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
        )

    def _updates(self, state, meta, fingerprints, references, checkpointer, writers) -> None:
        train, total = self.config.train, self.plan.steps
        streak = meta.get("nonfinite_in_a_row", 0)
        pending = None  # the previous update's metrics, read while this one runs
        saved = int(state.step)
        bar = tqdm.tqdm(total=total, initial=saved, unit="step", disable=not _terminal(), dynamic_ncols=True)

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
                    raise execution.Stopped(f"{self.stop.requested}: saved step {saved} of {total}; the same command goes on.")
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
        batches = _in_order(
            self.inputs.evaluation.prepared, self.config, self.config.train.eval_batch_per_device * self.devices
        )
        for index in range(batches.steps_per_epoch):
            batch = _with_reference(data.batch_at(batches, index), references[1])
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
            shardings = _param_shardings(self.config, scorer.config, self.mesh)
            weights = hf.load_params(source, scorer.config, dtype=jnp.dtype(self.config.model.param_dtype), shardings=shardings)
            program = _score_program(scorer, self.mesh, shardings)
        digest = hf.weights_fingerprint(source)
        train, evaluation = self.inputs.train, self.inputs.evaluation
        return (
            self._reference("train", train.prepared, weights, program, digest),
            None if evaluation is None else self._reference("eval", evaluation.prepared, weights, program, digest),
        )

    def _reference(self, name: str, prepared: data.Prepared, weights, program: execution.Program, digest: str):
        config = self.config
        parts = {
            "weights": digest,
            "data": prepared.fingerprint(),
            "temperature": self.inputs.loss.temperature,
            "compute_dtype": config.model.compute_dtype,
        }
        folder = Path(config.reference.cache_dir) if config.reference.cache_dir else self.workdir / "reference"
        path = folder / f"{name}-{reference.fingerprint(parts)[:16]}.safetensors"
        batches = _in_order(prepared, config, config.reference.batch_per_device * self.devices)

        def score(batch: shapes.Batch) -> np.ndarray:
            return jax.device_get(program(weights, self._place(batch, stacked=False)))

        def chosen(numbers: Sequence[int]) -> Iterator[shapes.Batch]:
            return self.stop.checked(data.batch_at(batches, number) for number in numbers)

        if not path.exists():
            started = time.perf_counter()
            everything = chosen(range(batches.steps_per_epoch))
            bar = tqdm.tqdm(everything, f"reference {name}", batches.steps_per_epoch, disable=not _terminal())
            reference.save(path, reference.compute(score, bar, groups=prepared.groups), parts)
            log.info("reference log-probs of %s: %d groups, %.1f s", name, prepared.groups, time.perf_counter() - started)
        stored = reference.load(path)
        again = chosen(reference.verification_steps(batches.steps_per_epoch))
        off = reference.verify(stored, score, again, rtol=REFERENCE_RTOL[config.model.compute_dtype], path=path)
        log.info("reference log-probs of %s: %s, verified to %.2g nats", name, path.name, off)
        return stored

    def _train_batch(self, index: int, references: np.ndarray | None) -> shapes.Batch:
        """Update number `index` (from 0) as [A, ...] leaves: this process's part of it."""
        batch = _with_reference(data.batch_at(self.schedule, index), references)
        return step.stack_micro_batches(batch, accumulation=self.plan.accumulation)

    def _place(self, batch: shapes.Batch, *, stacked: bool) -> shapes.Batch:
        placement = sharding.batch_sharding(self.mesh, stacked=stacked)
        return shapes.Batch(*(jax.make_array_from_process_local_data(placement, leaf) for leaf in batch))

    def _load_weights(self):
        return hf.load_params(
            self.inputs.source,
            self.inputs.model_config,
            dtype=jnp.dtype(self.config.model.param_dtype),
            shardings=self.param_shardings,
        )

    def _fresh_state(self, weights) -> shapes.TrainState:
        opt_state = jax.jit(self.optimizer.init, out_shardings=self.state_shardings.opt_state)(weights)
        return shapes.TrainState(weights, opt_state, jax.device_put(np.int32(0), self.state_shardings.step))

    def _abstract_state(self) -> shapes.TrainState:
        abstract = self._abstract_params()
        opt_state = jax.eval_shape(self.optimizer.init, abstract)
        state = shapes.TrainState(abstract, opt_state, jax.ShapeDtypeStruct((), jnp.int32))
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, self.state_shardings
        )

    def _state_shardings(self) -> shapes.TrainState:
        """The optimiser's moments live where their parameters do; its counters everywhere."""
        alone = sharding.replicated(self.mesh)
        moments = optax.tree_utils.tree_map_params(
            self.optimizer,
            lambda _, place: place,
            jax.eval_shape(self.optimizer.init, self._abstract_params()),
            self.param_shardings,
            transform_non_params=lambda _: alone,
        )
        return shapes.TrainState(self.param_shardings, moments, alone)

    def _abstract_params(self):
        return params.abstract(self.inputs.model_config, jnp.dtype(self.config.model.param_dtype))

    def _fingerprints(self) -> dict[str, str]:
        """What must be the same for a checkpoint to be resumed."""
        evaluation = self.inputs.evaluation
        return {
            "model": hf.weights_fingerprint(self.inputs.source),
            "train data": self.inputs.train.prepared.fingerprint(),
            "eval data": "" if evaluation is None else evaluation.prepared.fingerprint(),
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
    full, rest = divmod(groups, train.batch_size)
    per_epoch = full + (config.data.last_batch == "pad" and rest > 0)
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


def _buckets(config: ml_collections.ConfigDict) -> tuple[int, ...]:
    return tuple(config.data.buckets) or (config.data.max_length,)


def _in_order(prepared: data.Prepared, config: ml_collections.ConfigDict, batch_size: int) -> data.Schedule:
    """Every group once, in the order of the data."""
    return data.schedule(
        prepared,
        batch_size=batch_size,
        buckets=_buckets(config),
        seed=0,
        shuffle=False,
        last_batch="pad",
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _with_reference(batch: shapes.Batch, references: np.ndarray | None) -> shapes.Batch:
    """Fill in the reference log-probs of the batch's groups; padding groups keep zeros."""
    if references is None:
        return batch
    real_B = batch.row_ids_B >= 0
    logps_BK = np.where(real_B[:, None], references[np.where(real_B, batch.row_ids_B, 0)], np.float32(0))
    return batch._replace(reference_logps_BK=logps_BK)


def _param_shardings(config: ml_collections.ConfigDict, model_config: model.ModelConfig, mesh: Mesh):
    abstract = params.abstract(model_config, jnp.dtype(config.model.param_dtype))
    return sharding.param_shardings(params.logical_axes(model_config), abstract, mesh=mesh)


def _scorer(config: ml_collections.ConfigDict, inputs: Inputs, mesh: Mesh) -> step.Scorer:
    """Settle which attention and which head implementation run, once, and log why."""
    platform = mesh.devices.flat[0].platform
    dtype = config.model.compute_dtype
    attention_name, reason = attention.choose(
        config.model.attention, platform=platform, dtype=dtype, head_dim=inputs.model_config.head_dim
    )
    log.info("attention: %s (%s)", attention_name, reason)
    rows = config.train.micro_batch_per_device * sharding.batch_devices(mesh) * config.data.group_size
    head = logps.HeadShapes(
        tokens=rows * config.data.max_length, width=inputs.model_config.width, vocab=inputs.model_config.vocab_size
    )
    implementation, reason = logps.choose(
        platform=platform,
        jax_version=jax.__version__,
        shapes=head,
        dtype=dtype,
        requested=config.kernel.implementation,
    )
    log.info("log-probs: %s (%s)", implementation, reason)
    return step.Scorer(
        config=inputs.model_config,
        compute_dtype=dtype,
        remat=config.model.remat,
        attention=attention_name,
        implementation=implementation,
        workspace_bytes=config.kernel.workspace_mib * 2**20,
        token_shards=sharding.batch_devices(mesh),
        temperature=inputs.loss.temperature,
    )


def _score_program(scorer: step.Scorer, mesh: Mesh, param_shardings) -> execution.Program:
    score = functools.partial(step.score_step, scorer=scorer)
    return execution.Program("reference pass", step.jit_eval_step(score, mesh=mesh, param_shardings=param_shardings))


def _terminal() -> bool:
    return sys.stderr.isatty()
