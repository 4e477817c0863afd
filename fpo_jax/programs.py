"""The compiled programs of a run and where their state lives: mesh, shardings, scorer, optimiser, three steps.

Built once from a configuration before any weight is read; nothing here decides when a program runs.
"""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from fpo_jax import attention, execution, hf, job, logps, model, optim, params, shapes, sharding, step
from fpo_jax import config as configuration


class Programs:
    """`train(state, batch)`, `evaluate(params, batch)`, `score(params, batch)`, each compiled once per batch shape."""

    def __init__(self, config: configuration.Config, inputs: job.Inputs, plan: job.Plan, mesh: Mesh):
        """Settle implementations and shardings.

        Raises:
            ValueError: the mesh does not divide the parameters; an implementation cannot run here.
        """
        self.mesh, self._dtype, self._model = mesh, jnp.dtype(config.model.param_dtype), inputs.model_config
        rate = optim.schedule(
            kind=config.optim.schedule, peak=config.optim.learning_rate, warmup=plan.warmup, horizon=plan.horizon
        )
        self._optimizer = optim.optimizer(
            rate,
            b1=config.optim.b1,
            b2=config.optim.b2,
            eps=config.optim.eps,
            weight_decay=config.optim.weight_decay,
            clip_norm=config.optim.clip_norm,
            decay_mask=params.decay_mask(self._model),
        )
        self.scorer, self.choices = _scorer(config, inputs, plan, mesh)
        self.param_shardings = _param_shardings(self._model, self._dtype, mesh)
        self.state_shardings = self._state_shardings()
        update = functools.partial(
            step.train_step, scorer=self.scorer, loss=inputs.loss, optimizer=self._optimizer, rate=rate
        )
        self.train = execution.Program(
            "train_step", step.jit_train_step(update, mesh=mesh, state_shardings=self.state_shardings)
        )
        evaluate = functools.partial(step.eval_step, scorer=self.scorer, loss=inputs.loss)
        self.evaluate = execution.Program(
            "eval_step", step.jit_eval_step(evaluate, mesh=mesh, param_shardings=self.param_shardings)
        )
        self.score = _score_program(self.scorer, mesh, self.param_shardings)

    def place(self, batch: shapes.Batch, *, stacked: bool) -> shapes.Batch:
        """Put this process's part of a batch on its devices; `stacked` batches have A in front."""
        placement = sharding.batch_sharding(self.mesh, stacked=stacked)
        return shapes.Batch(*(jax.make_array_from_process_local_data(placement, leaf) for leaf in batch))

    def load(self, source: Path) -> shapes.PyTree:
        """Read the run's model from a Hugging Face directory onto the mesh."""
        return hf.load_params(source, self._model, dtype=self._dtype, shardings=self.param_shardings)

    def load_other(self, source: Path) -> tuple[shapes.PyTree, execution.Program]:
        """Read another model (a reference of its own) and make the program that scores with it."""
        config = hf.read_config(source)
        shardings = _param_shardings(config, self._dtype, self.mesh)
        scorer = dataclasses.replace(self.scorer, config=config)
        weights = hf.load_params(source, config, dtype=self._dtype, shardings=shardings)
        return weights, _score_program(scorer, self.mesh, shardings)

    def fresh_state(self, weights: shapes.PyTree) -> shapes.TrainState:
        """Return the state before the first update."""
        opt_state = jax.jit(self._optimizer.init, out_shardings=self.state_shardings.opt_state)(weights)
        return shapes.TrainState(weights, opt_state, jax.device_put(np.int32(0), self.state_shardings.step))

    def abstract_state(self) -> shapes.TrainState:
        """Return shapes, dtypes and shardings of the state."""
        weights = params.abstract(self._model, self._dtype)
        opt_state = jax.eval_shape(self._optimizer.init, weights)
        state = shapes.TrainState(weights, opt_state, jax.ShapeDtypeStruct((), jnp.int32))
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, self.state_shardings
        )

    def state_bytes(self) -> int:
        """Return the bytes of parameters and optimiser state on one device."""
        leaves = jax.tree.leaves(self.abstract_state())
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)

    def _state_shardings(self) -> shapes.TrainState:
        """The optimiser's moments live where their parameters do; its counters everywhere."""
        alone = sharding.replicated(self.mesh)
        moments = optax.tree_utils.tree_map_params(
            self._optimizer,
            lambda _, place: place,
            jax.eval_shape(self._optimizer.init, params.abstract(self._model, self._dtype)),
            self.param_shardings,
            transform_non_params=lambda _: alone,
        )
        return shapes.TrainState(self.param_shardings, moments, alone)


def _param_shardings(config: model.ModelConfig, dtype: np.dtype, mesh: Mesh) -> shapes.PyTree:
    return sharding.param_shardings(params.logical_axes(config), params.abstract(config, dtype), mesh=mesh)


def _score_program(scorer: step.Scorer, mesh: Mesh, param_shardings: shapes.PyTree) -> execution.Program:
    score = functools.partial(step.score_step, scorer=scorer)
    return execution.Program("reference pass", step.jit_eval_step(score, mesh=mesh, param_shardings=param_shardings))


def _scorer(
    config: configuration.Config, inputs: job.Inputs, plan: job.Plan, mesh: Mesh
) -> tuple[step.Scorer, list[str]]:
    """Settle which attention and which head implementation run, once; returns the choices and their reasons as text."""
    platform, dtype = mesh.devices.flat[0].platform, config.model.compute_dtype
    choose = functools.partial(
        attention.choose, config.model.attention, platform=platform, dtype=dtype, head_dim=inputs.model_config.head_dim
    )
    every = [choose(positions=length) for length in plan.schedule.buckets]
    attends, attention_reason = min(every, key=lambda choice: choice[0] != "xla")  # one that takes every row length
    shards = sharding.batch_devices(mesh)
    rows = config.train.micro_batch_per_device * shards * config.data.group_size
    head = {
        "target": logps.Target.of(mesh.devices.flat[0]),
        "shapes": logps.HeadShapes(
            tokens=rows * max(scored for _, scored in plan.shapes),
            width=inputs.model_config.width,
            vocab=inputs.model_config.vocab_size,
        ),
        "dtype": dtype,
        "head_dtype": config.model.param_dtype,
        "requested": config.kernel.implementation,
        "fuse_loss": config.kernel.fuse_loss,
        "placement": sharding.head_placement(mesh),
    }
    workspace = config.kernel.workspace_mib * 2**20
    explained = logps.explain(**head, workspace_bytes=workspace)
    choice = logps.choose(**head)
    scorer = step.Scorer(
        config=inputs.model_config,
        compute_dtype=dtype,
        remat=config.model.remat,
        attention=attends,
        implementation=choice.implementation,
        fuse_loss=choice.fuse_loss,
        interpret=choice.interpret,
        workspace_bytes=workspace,
        placement=sharding.head_placement(mesh),
        temperature=inputs.loss.temperature,
        batch_sharding=sharding.batch_sharding(mesh, stacked=False),
    )
    return scorer, [f"attention: {attends} ({attention_reason})", explained]
