"""The programs of a run driven by hand, as its loop drives them: for benchmarks that count and time updates."""

import time
from pathlib import Path

import jax
import numpy as np

from fpo_jax import config as configuration
from fpo_jax import data, sharding, types
from fpo_jax.perf import flops, hardware
from fpo_jax.trainer import auto_settings, batch_shapes, kept_logits, run_inputs, run_schedule, train_step


class Updates:
    """Reference pass and updates of one configuration on one device; a metric is read one update late."""

    def __init__(self, config: configuration.Config, inputs: run_inputs.Inputs, model: Path):
        """Plan and load; nothing is compiled yet."""
        grid = sharding.make_layout(**config.mesh, devices=jax.devices()[:1])
        facts, holds = auto_settings.measured(inputs, ways=1), hardware.capacity(jax.devices()[0])
        limit = auto_settings.memory_limit(grid, holds)
        self.settled = auto_settings.settle(config, facts, grid, limit=limit, capacity=holds)
        config = self.settled.config
        self._config, self._inputs, self.plan = config, inputs, run_schedule.build(config, inputs, devices=1)
        self.programs = kept_logits.steps_of(
            config,
            run_schedule.blueprint(config, inputs, self.plan),
            grid,
            largest=batch_shapes.largest(self.plan.schedule, self.plan.steps),
            accumulation=self.plan.accumulation,
            capacity=holds,
        )
        self._state = self.programs.state.init(self._load(model))
        self._references = np.zeros(inputs.train.prepared.rewards_BK.shape, np.float32)
        self._pending: dict | None = None
        self.losses: list[float] = []

    def _load(self, source: Path) -> types.PyTree:
        return self.programs.state.load(source)

    def score(self, *, keep: bool = True) -> float:
        """Run the reference pass; returns its seconds for one batch of groups, compilation left out.

        Args:
            keep: whether the weights as they are now become the reference.
        """
        prepared = self._inputs.train.prepared
        rows = self.plan.schedule.parts
        batches = run_schedule.sequential_schedule(
            self._config,
            prepared,
            self._inputs.model_config,
            batch_size=rows,
            longest=self.plan.schedule.buckets[-1],
            sizes=self.plan.schedule.sizes,
        )
        started, scored, weights = 0.0, 0, self.programs.state.all_params(self._state)
        for number in range(batches.steps_per_epoch):
            if number == 1:  # the first one is compiled
                started = time.perf_counter()
            placed = self.programs.batches.place(data.batch_at(batches, number), stacked=False)
            scores, ids = jax.device_get(self.programs.logprobs(weights, placed)), data.group_ids(batches, number)
            if keep:
                self._references[ids[ids >= 0]] = scores[ids >= 0]
            scored += int(np.count_nonzero(ids >= 0)) if number else 0
        return (time.perf_counter() - started) / max(scored, 1) * self._config.train.batch_size

    def update(self, number: int) -> None:
        """Dispatch an update, counted from 0, and read the loss of the one before."""
        batch = data.batch_at(self.plan.schedule, number)
        real = batch.row_ids_B >= 0
        references = self._references[np.where(real, batch.row_ids_B, 0)]
        batch = batch._replace(reference_logps_BK=np.where(real[:, None], references, np.float32(0)))
        stacked = train_step.stack_micro_batches(batch, accumulation=self.plan.accumulation)
        self._state, pairs = self.programs.train(self._state, self.programs.batches.place(stacked, stacked=True))
        self.read()
        self._pending = pairs

    def wait(self) -> None:
        """Wait for the state after the newest update."""
        jax.block_until_ready(self._state)

    def operations(self, number: int) -> int:
        """Return the operations that the rows of an update need, padding included."""
        return flops.train_step(self._inputs.model_config, self.work(number))

    def work(self, number: int) -> flops.Work:
        """Return what the rows of an update hold, padding included."""
        sizes = data.row_sizes(self.plan.schedule, number)
        return flops.work([sizes.length] * sizes.rows, sizes.rows * sizes.scored, sliding_window=None)

    def read(self) -> None:
        """Wait for the newest update."""
        if self._pending is not None:
            value, count = jax.device_get(self._pending["loss"])
            self.losses.append(float(value / count))
        self._pending = None
