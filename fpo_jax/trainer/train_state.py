"""The train state of a run on its mesh: shapes, dtypes, where every array lives, and how it begins or is resumed."""

import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from fpo_jax import config as configuration
from fpo_jax import hf, sharding, types
from fpo_jax.models import nf4, params
from fpo_jax.optimizer import eight_bits
from fpo_jax.trainer import run_schedule


class StateSharding:
    """Makes the state of one run, and says where its arrays live: `params`, `shardings` (all of it), `reference`."""

    def __init__(
        self,
        config: configuration.Config,
        blueprint: run_schedule.Blueprint,
        mesh: Mesh,
        optimizer: optax.GradientTransformationExtraArgs,
    ):
        """Place parameters, moments and counters.

        Raises:
            ValueError: the mesh does not divide the parameters.
        """
        self._mesh, self._model, self._adapter = mesh, blueprint.model_config, blueprint.adapter
        self._trained = params.trained_entries(self._model, blueprint.adapter)
        self._frozen = params.frozen_entries(self._model, blueprint.adapter)
        self._seed = config.seed  # of a reward model's new head, and of an adapter
        self._dtype, self._optimizer = jnp.dtype(config.model.param_dtype), optimizer
        self.params = self._placed(self._trained)
        self._reference = blueprint.reference or self._model
        with configuration.about("reference.path"):  # any other model is placed by now
            self.reference = params.shardings(self._reference, mesh=self._mesh)
        self._reference_adapted = blueprint.reference_adapted
        if self._reference_adapted:
            self.reference = params.union(self._placed(self._frozen), self.params)
        elif blueprint.reference is None:
            self.reference = self._placed(params.entries(self._model))
        self.shardings = self._state_shardings(offload=config.optim.offload)

    def load(self, source: Path) -> types.PyTree:
        """Read the run's model from a Hugging Face directory onto the mesh."""
        places, key = params.shardings(self._model, mesh=self._mesh), jax.random.key(self._seed)
        return hf.load_params(
            source, self._model, dtype=self._dtype, shardings=places, key=key, held_as=self._quantised
        )

    def with_adapter(self, weights: types.PyTree, directory: Path) -> types.PyTree:
        """Return the weights with the adapter of a directory of PEFT, float32, which is read onto the mesh."""
        assert self._adapter is not None
        read = hf.load_peft(directory, self._model, self._adapter, shardings=self.params)
        return params.nest(params.flatten(weights) | params.flatten(read))

    def load_reference(self, source: Path) -> types.PyTree:
        """Read the model of a reference of its own onto the mesh."""
        return hf.load_params(source, self._reference, dtype=self._dtype, shardings=self.reference)

    def init(self, weights: types.PyTree) -> types.TrainState:
        """Return the state before the first step: weights to train, or the adapter beside them, else a fresh one."""
        trained, frozen = weights, None
        if self._adapter is not None:
            trained, frozen = self._trained_part(weights), self._frozen_part(weights)
        opt_state = jax.jit(self._optimizer.init, out_shardings=self.shardings.opt_state)(trained)
        return types.TrainState(trained, opt_state, self._count(0), frozen, self._count(0))

    def resume(self, state: types.TrainState, weights: types.PyTree | None, *, skipped: int = 0) -> types.TrainState:
        """Return a restored state with the weights below its adapter and its number of steps not applied in a row."""
        state = state._replace(skipped=self._count(skipped))
        return state if self._adapter is None else state._replace(frozen=self._frozen_part(weights))

    def all_params(self, state: types.TrainState) -> types.PyTree:
        """Return all weights that a forward pass reads."""
        return state.params if self._adapter is None else params.union(state.frozen, state.params)

    @property
    def adapted(self) -> bool:
        """Whether an adapter is trained and the weights below it are not."""
        return self._adapter is not None

    def _count(self, number: int) -> jax.Array:
        return jax.device_put(np.int32(number), self.shardings.step)

    def _trained_part(self, weights: types.PyTree) -> types.PyTree:
        """Return what is trained; an adapter that is not there is drawn, and adds nothing yet."""
        flat, places = params.flatten(weights), params.flatten(self.params)
        new = [row for row in self._trained if row.path not in flat]
        below = {row.path: row.path.removesuffix("_lora_m") for row in new if row.init == "magnitude"}

        def draw(key: jax.Array, matrices: dict[str, jax.Array]) -> dict[str, jax.Array]:
            return {
                row.path: params.magnitude(matrices[row.path][...], row)
                if row.path in matrices
                else params.initial(row, self._model, key)
                for row in new
            }

        matrices = {path: flat[of] for path, of in below.items()}
        drawing = jax.jit(draw, out_shardings={row.path: places[row.path] for row in new})
        drawn = drawing(jax.random.key(self._seed), matrices)
        old = {row.path: flat[row.path].astype(jnp.float32) for row in self._trained if row.path in flat}
        return params.nest(old | drawn)

    def _frozen_part(self, weights: types.PyTree) -> types.PyTree:
        flat = params.flatten(weights)
        return params.nest({row.path: flat[row.path] for row in self._frozen})

    def abstract(self) -> types.TrainState:
        """Return shapes, dtypes and shardings of the state."""
        weights = self._abstract(self._trained)
        opt_state = jax.eval_shape(self._optimizer.init, weights)
        frozen = None if self._adapter is None else self._abstract(self._frozen)
        count = jax.ShapeDtypeStruct((), jnp.int32)
        state = types.TrainState(weights, opt_state, count, frozen, count)
        return _placed_shapes(state, self.shardings)

    def abstract_reference(self) -> types.PyTree:
        """Return shapes, dtypes and shardings of the reference's parameters."""
        if self._reference_adapted:
            return self.all_params(self.abstract())
        if self._reference is self._model:
            return _placed_shapes(self._abstract(params.entries(self._model)), self.reference)
        return _placed_shapes(params.abstract(self._reference, self._dtype), self.reference)

    def abstract_evaluated(self) -> tuple[types.PyTree, jax.ShapeDtypeStruct]:
        """Return shapes, dtypes and shardings of what `evaluate` takes before the batch."""
        alone = sharding.replicated(self._mesh)
        return self.all_params(self.abstract()), jax.ShapeDtypeStruct((), jnp.float32, sharding=alone)

    def bytes_on_device(self) -> int:
        """Return the bytes of parameters and optimiser state in one device's own memory."""
        return bytes_on_device(self.abstract())

    def gradient_bytes(self) -> int:
        """Return the bytes of the gradients' float32 sums on one device."""
        placed = _placed_shapes(self._abstract(self._trained), self.params)
        return sum(4 * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(placed))

    def _state_shardings(self, *, offload: bool) -> types.TrainState:
        """The moments live where their parameters do, or in the hosts' memory; the counters everywhere."""
        alone = sharding.replicated(self._mesh)
        moments = optax.tree_utils.tree_map_params(
            self._optimizer,
            lambda moment, place: _places(moment, place.with_memory_kind(sharding.HOST) if offload else place),
            jax.eval_shape(self._optimizer.init, self._abstract(self._trained)),
            self.params,
            transform_non_params=lambda _: alone,
            is_leaf=eight_bits.holds,
        )
        frozen = None if self._adapter is None else self._placed(self._frozen)
        return types.TrainState(self.params, moments, alone, frozen, alone)

    def _abstract(self, entries: Sequence[params.Entry]) -> types.PyTree:
        """Return shapes and dtypes; what is trained beside frozen weights is float32, whatever they are."""
        dtype = jnp.dtype(jnp.float32) if self._adapter is not None and entries is self._trained else self._dtype
        return params.nest(
            {
                entry.path: nf4.abstract(entry, axis)
                if (axis := self._four_bit_axis(entry)) is not None
                else jax.ShapeDtypeStruct(entry.shape, dtype)
                for entry in entries
            }
        )

    def _placed(self, entries: Sequence[params.Entry]) -> types.PyTree:
        axes = params.nest({entry.path: entry.axes for entry in entries})
        shapes = params.nest({entry.path: jax.ShapeDtypeStruct(entry.shape, self._dtype) for entry in entries})
        places = params.flatten(sharding.param_shardings(axes, shapes, mesh=self._mesh))
        for entry in entries:
            if (axis := self._four_bit_axis(entry)) is not None:
                places[entry.path] = nf4.placed(places[entry.path], entry.shape, axis)
        return params.nest(places)

    def _four_bit_axis(self, entry: params.Entry) -> int | None:
        """Return the axis of the blocks of a matrix that is held in four bits; None of any other parameter."""
        held = self._adapter is not None and entry.path in self._adapter.quantised
        return params.four_bit_axis(entry, self._model) if held else None

    def _quantised(self, entry: params.Entry, whole: jax.Array) -> jax.Array | nf4.NF4:
        """Return a parameter as the state holds it; what was read is given up."""
        axis = self._four_bit_axis(entry)
        if axis is None:
            return whole
        assert isinstance(whole.sharding, jax.sharding.NamedSharding)
        return nf4.quantise_layers(whole, axis=axis, place=nf4.placed(whole.sharding, entry.shape, axis))


def _places(moment: types.PyTree, place: jax.sharding.NamedSharding) -> types.PyTree:
    """Where a moment lives: as its parameter; the scales of its blocks too, but along axes that they do not fill."""
    if not eight_bits.holds(moment):
        return place
    return eight_bits.EightBits(place, sharding.fitted(place, moment.scales.shape))


def bytes_on_device(tree: types.PyTree) -> int:
    """Return the bytes of placed arrays, abstract ones too, in one device's own memory."""
    leaves = [x for x in jax.tree.leaves(tree) if x.sharding.memory_kind != sharding.HOST]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _placed_shapes(tree: types.PyTree, places: types.PyTree) -> types.PyTree:
    """Return shapes and dtypes with where they live."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)
