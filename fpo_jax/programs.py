"""The compiled programs of a run and where their state lives: mesh, shardings, scorer, optimiser, three steps.

Built once from a configuration before any weight is read; nothing here decides when a program runs.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from fpo_jax import config as configuration
from fpo_jax import (
    execution,
    guards,
    hf,
    job,
    model,
    optim,
    params,
    scorers,
    shapes,
    sharding,
    step,
)


class Programs:
    """`train(state, batch)`, `evaluate((params, batch_kl), batch)`, `score(params, batch)`: compiled per batch shape.

    Each has the attention of its own rows; `score` is the model below the adapter, or a reference of its own.
    """

    def __init__(self, config: configuration.Config, blueprint: job.Blueprint, layout: sharding.Layout):
        """Settle implementations and shardings.

        Raises:
            ValueError: the mesh does not divide the parameters; an implementation cannot run here.
        """
        assert layout.mesh is not None
        self.layout, self.mesh, self._model = layout, layout.mesh, blueprint.model_config
        self._adapter, self._trained = blueprint.adapter, params.trained_rows(self._model, blueprint.adapter)
        self._frozen = params.frozen_rows(self._model, blueprint.adapter)
        self._packed, self._layout = config.data.packing, config.data.layout
        self._seed = config.seed  # of a reward model's new head
        self._dtype, mesh = jnp.dtype(config.model.param_dtype), layout.mesh
        self._blocks = held_blocks(mesh, process=jax.process_index())
        rate = optim.schedule(
            kind=config.optim.schedule,
            peak=config.optim.learning_rate,
            warmup=blueprint.warmup,
            horizon=blueprint.horizon,
        )
        guard = _guard(config)
        optimizer = optim.optimizer(
            rate,
            b1=config.optim.b1,
            b2=config.optim.b2,
            eps=config.optim.eps,
            weight_decay=config.optim.weight_decay,
            clip_norm=config.optim.clip_norm,
            decay_mask=params.nest({row.path: row.decay for row in self._trained}),
            state_dtype=config.optim.state_dtype,
        )
        self._optimizer = guard.watching(optimizer)
        self.scorer, self.choices = scorers.of_updates(config, blueprint, layout)
        evaluation_scorer, reference_scorer, told = scorers.of_passes(config, blueprint, layout, self.scorer)
        self.choices += told
        self.param_shardings = self._placed(self._trained)
        whole = self.param_shardings
        if self._adapter is not None:
            whole = params.union(self.param_shardings, self._placed(self._frozen))
        self._reference = blueprint.reference or self._model
        with configuration.about("reference.path"):  # any other model is placed by now
            self._reference_shardings = self._model_shardings(self._reference)
        self.state_shardings = self._state_shardings(offload=config.optim.offload)
        update = functools.partial(
            step.train_step,
            scorer=self.scorer,
            loss=blueprint.loss,
            optimizer=self._optimizer,
            rate=rate,
            places=self._places(compute_dtype=config.model.compute_dtype),
            guard=guard,
        )
        self.train = execution.Program(
            "train_step", step.jit_train_step(update, mesh=mesh, state_shardings=self.state_shardings)
        )
        evaluate = functools.partial(step.eval_step, scorer=evaluation_scorer, loss=blueprint.loss)
        evaluated = (whole, sharding.replicated(mesh))
        self.evaluate = execution.Program(
            "eval_step", step.jit_eval_step(evaluate, mesh=mesh, first_shardings=evaluated)
        )
        score = functools.partial(step.score_step, scorer=reference_scorer)
        self.score = execution.Program(
            "reference pass", step.jit_eval_step(score, mesh=mesh, first_shardings=self._reference_shardings)
        )

    def positions(self, parts: int, *, accumulation: int = 1) -> np.ndarray:
        """Return which parts of a batch this process builds, in the order in which `place` takes them."""
        places = np.arange(parts).reshape(accumulation, self.layout.row_ways, -1)
        return places[:, self._blocks].reshape(-1)

    def place(self, batch: shapes.Batch, *, stacked: bool) -> shapes.Batch:
        """Make one array over all processes' devices of their parts of a batch; `stacked` batches have A in front."""
        placement, axis = sharding.batch_sharding(self.mesh, stacked=stacked), int(stacked)

        def put(leaf: shapes.Array) -> jax.Array:
            leaf = np.asarray(leaf)
            size = leaf.shape[axis] // len(self._blocks)  # rows of a block

            def block(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None
                start = self._blocks.index((index[axis].start or 0) // size) * size
                return leaf[(*index[:axis], slice(start, start + size))]

            shape = (*leaf.shape[:axis], size * self.layout.row_ways, *leaf.shape[axis + 1 :])
            return jax.make_array_from_callback(shape, placement, block)

        return jax.tree.map(put, batch)

    def load(self, source: Path) -> shapes.PyTree:
        """Read the run's model from a Hugging Face directory onto the mesh."""
        places, key = self._model_shardings(self._model), jax.random.key(self._seed)
        return hf.load_params(source, self._model, dtype=self._dtype, shardings=places, key=key)

    def load_reference(self, source: Path) -> shapes.PyTree:
        """Read the model of a reference of its own onto the mesh."""
        return hf.load_params(source, self._reference, dtype=self._dtype, shardings=self._reference_shardings)

    def fresh_state(self, weights: shapes.PyTree) -> shapes.TrainState:
        """Return the state before the first update: weights to train, or an adapter that adds nothing yet to them."""
        trained, frozen = weights, None
        if self._adapter is not None:
            trained, frozen = self._trained_part(weights), self._frozen_part(weights)
        opt_state = jax.jit(self._optimizer.init, out_shardings=self.state_shardings.opt_state)(trained)
        return shapes.TrainState(trained, opt_state, self._count(0), frozen, self._count(0))

    def resumed(
        self, state: shapes.TrainState, weights: shapes.PyTree | None, *, skipped: int = 0
    ) -> shapes.TrainState:
        """Return a restored state with the weights below its adapter and its number of updates not applied in a row."""
        state = state._replace(skipped=self._count(skipped))
        return state if self._adapter is None else state._replace(frozen=self._frozen_part(weights))

    def whole(self, state: shapes.TrainState) -> shapes.PyTree:
        """Return all weights that a forward pass reads."""
        return state.params if self._adapter is None else params.union(state.frozen, state.params)

    @property
    def adapted(self) -> bool:
        """Whether an adapter is trained and the weights below it are not."""
        return self._adapter is not None

    def _count(self, number: int) -> jax.Array:
        return jax.device_put(np.int32(number), self.state_shardings.step)

    def _trained_part(self, weights: shapes.PyTree) -> shapes.PyTree:
        """Return what is trained, the adapter drawn anew."""
        flat, places = params.flatten(weights), params.flatten(self.param_shardings)
        new = [row for row in self._trained if row.path not in flat]

        def draw(key: jax.Array) -> dict[str, jax.Array]:
            return {row.path: params.initial(row, self._model, key) for row in new}

        drawn = jax.jit(draw, out_shardings={row.path: places[row.path] for row in new})(jax.random.key(self._seed))
        old = {row.path: flat[row.path].astype(jnp.float32) for row in self._trained if row.path in flat}
        return params.nest(old | drawn)

    def _frozen_part(self, weights: shapes.PyTree) -> shapes.PyTree:
        flat = params.flatten(weights)
        return params.nest({row.path: flat[row.path] for row in self._frozen})

    def abstract_state(self) -> shapes.TrainState:
        """Return shapes, dtypes and shardings of the state."""
        weights = self._abstract(self._trained)
        opt_state = jax.eval_shape(self._optimizer.init, weights)
        frozen = None if self._adapter is None else self._abstract(self._frozen)
        count = jax.ShapeDtypeStruct((), jnp.int32)
        state = shapes.TrainState(weights, opt_state, count, frozen, count)
        return _placed_shapes(state, self.state_shardings)

    def abstract_reference(self) -> shapes.PyTree:
        """Return shapes, dtypes and shardings of the reference's parameters."""
        return _placed_shapes(params.abstract(self._reference, self._dtype), self._reference_shardings)

    def abstract_evaluated(self) -> tuple[shapes.PyTree, jax.ShapeDtypeStruct]:
        """Return shapes, dtypes and shardings of what `evaluate` takes before the batch."""
        alone = sharding.replicated(self.mesh)
        return self.whole(self.abstract_state()), jax.ShapeDtypeStruct((), jnp.float32, sharding=alone)

    def abstract_batch(
        self, parts: int, *, group_size: int, length: int, scored: int, places: int = 1, accumulation: int | None = None
    ) -> shapes.Batch:
        """Return shapes, dtypes and shardings of a batch of T = `length`, R = `scored`; A in front.

        Args:
            parts: groups, or rows that hold groups.
            group_size: K.
            length: T.
            scored: R.
            places: groups that a row has places for.
            accumulation: A; None = no axis for it.
        """
        stack = () if accumulation is None else (accumulation,)
        place = sharding.batch_sharding(self.mesh, stacked=accumulation is not None)
        slotted = self._layout != "padded"
        per_row, per_group = (parts if slotted else parts * group_size,), (parts * places,)

        def array(shape, dtype) -> Any:
            return jax.ShapeDtypeStruct((*stack, *shape), jnp.dtype(dtype), sharding=place)

        segments = [array((*per_row, length), jnp.int32)] * (3 if self._layout == "shared" else 2)
        return shapes.Batch(
            tokens_NT=array((*per_row, length), jnp.int32),
            valid_NT=array((*per_row, length), bool),
            predictors_NR=array((*per_row, scored), jnp.int32),
            targets_NR=array((*per_row, scored), jnp.int32),
            scored_NR=array((*per_row, scored), bool),
            rewards_BK=array((*per_group, group_size), jnp.float32),
            reference_logps_BK=array((*per_group, group_size), jnp.float32),
            weight_B=array(per_group, jnp.float32),
            row_ids_B=array(per_group, jnp.int32),
            segments=shapes.Segments(*segments) if self._packed or slotted else None,
            slots_NR=array((*per_row, scored), jnp.int32) if slotted else None,
            ends_NP=array((*per_row, places * group_size), jnp.int32) if slotted else None,
        )

    def state_bytes(self) -> int:
        """Return the bytes of parameters and optimiser state in one device's own memory."""
        return bytes_on_device(self.abstract_state())

    def _state_shardings(self, *, offload: bool) -> shapes.TrainState:
        """The moments live where their parameters do, or in the hosts' memory; the counters everywhere."""
        alone = sharding.replicated(self.mesh)
        moments = optax.tree_utils.tree_map_params(
            self._optimizer,
            lambda _, place: place.with_memory_kind(sharding.HOST) if offload else place,
            jax.eval_shape(self._optimizer.init, self._abstract(self._trained)),
            self.param_shardings,
            transform_non_params=lambda _: alone,
        )
        frozen = None if self._adapter is None else self._placed(self._frozen)
        return shapes.TrainState(self.param_shardings, moments, alone, frozen, alone)

    def _model_shardings(self, config: model.ModelConfig) -> shapes.PyTree:
        abstract = params.abstract(config, self._dtype)
        return sharding.param_shardings(params.logical_axes(config), abstract, mesh=self.mesh)

    def _abstract(self, rows: Sequence[params.Row]) -> shapes.PyTree:
        """Return shapes and dtypes; what is trained beside frozen weights is float32, whatever they are."""
        dtype = jnp.dtype(jnp.float32) if self._adapter is not None and rows is self._trained else self._dtype
        return params.nest({row.path: jax.ShapeDtypeStruct(row.shape, dtype) for row in rows})

    def _placed(self, rows: Sequence[params.Row]) -> shapes.PyTree:
        axes = params.nest({row.path: row.axes for row in rows})
        return sharding.param_shardings(axes, self._abstract(rows), mesh=self.mesh)

    def _places(self, *, compute_dtype: str) -> step.Places:
        """Where the parts of an update hand over their results."""
        on_device = jax.tree.map(lambda place: place.with_memory_kind("device"), self.state_shardings.opt_state)
        gather = lambda weights: weights  # noqa: E731
        if self.layout.gather == "update":
            gather = functools.partial(self._gather_layers, compute_dtype=compute_dtype)
        return step.Places(
            gather=gather,
            cut=lambda grads: jax.lax.with_sharding_constraint(grads, self.param_shardings),
            fetch=lambda opt_state: jax.tree.map(jax.device_put, opt_state, on_device),
        )

    def _gather_layers(self, weights: shapes.PyTree, *, compute_dtype: str) -> shapes.PyTree:
        """Hold the layers' weights whole along fsdp. Matrices are cast first, as every use of them does."""
        whole = sharding.param_shardings(
            params.logical_axes(self._model), weights, mesh=self.mesh, rules=sharding.GATHERED_RULES
        )
        is_matrix = params.decay_mask(self._model)

        def gathered(x, place, matrix):
            return jax.lax.with_sharding_constraint(x.astype(compute_dtype) if matrix else x, place)

        return {**weights, "layers": jax.tree.map(gathered, weights["layers"], whole["layers"], is_matrix["layers"])}


def _guard(config: configuration.Config) -> guards.Guard:
    train = config.train
    weight = train.max_nonfinite if train.on_nonfinite == "stop" else 1
    return guards.Guard(train.max_nonfinite, weight=weight, sigmas=train.skip_spikes, window=train.spike_window)


def held_blocks(mesh: Mesh, *, process: int) -> list[int]:
    """Return which blocks of a batch's rows live on the devices of a process, ascending.

    The mesh cuts the rows in equal blocks. A process's blocks need not be neighbours (a TPU mesh follows the physical
    links), and processes that differ along `tensor` alone have the same.
    """
    ways = sharding.Layout(mesh).row_ways
    places = sharding.batch_sharding(mesh, stacked=False).devices_indices_map((ways,))
    return sorted({index[0].start or 0 for device, index in places.items() if device.process_index == process})


def bytes_on_device(tree: shapes.PyTree) -> int:
    """Return the bytes of placed arrays, abstract ones too, in one device's own memory."""
    leaves = [x for x in jax.tree.leaves(tree) if x.sharding.memory_kind != sharding.HOST]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _placed_shapes(tree: shapes.PyTree, places: shapes.PyTree) -> shapes.PyTree:
    """Return shapes and dtypes with where they live."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)
