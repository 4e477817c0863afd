"""What it costs to check every update: one with the skip rule and one without, in turns, on the same model and batch.

    python benchmarks/guard.py --width 256 --layers 4 --rounds 30

Prints a JSON object: the median seconds of both, of the skip rule that looks for spikes too, and the medians of the
differences within a round relative to the update without, in seconds and in CPU seconds, beside what the compiler
counts of operations and bytes, which no other work on the machine disturbs. The one without is compiled with `isfinite`
taken as true, so that the compiler drops every choice between new and old state. `host_calls` counts what the compiled
program with the skip rule asks the host for; it is 0.
"""

import argparse
import functools
import json
import re
import statistics
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from fpo_jax import attention, losses, models, types
from fpo_jax.models import params
from fpo_jax.optimizer import adamw, skip_step
from fpo_jax.trainer import forward, train_step

VOCAB = 2048


def batch(*, groups: int, length: int) -> types.Batch:
    """Return A = 1 micro-batch of random pairs whose second half is scored."""
    random, rows, scored = np.random.default_rng(0), 2 * groups, length // 2
    tokens = random.integers(3, VOCAB, (rows, length)).astype(np.int32)
    predictors = np.broadcast_to(np.arange(length - scored - 1, length - 1), (rows, scored)).astype(np.int32)
    found = types.Batch(
        tokens_NT=tokens,
        valid_NT=np.ones((rows, length), bool),
        predictors_NR=predictors,
        targets_NR=tokens[:, -scored:],
        loss_mask_NR=np.ones((rows, scored), bool),
        rewards_BK=np.tile(np.eye(1, 2, dtype=np.float32), (groups, 1)),
        reference_logps_BK=np.full((groups, 2), -7.6 * scored, np.float32),
        weight_B=np.ones(groups, np.float32),
        row_ids_B=np.arange(groups, dtype=np.int32),
    )
    return train_step.stack_micro_batches(found, accumulation=1)


def made(config: models.ModelConfig, example: types.Batch, *, skip_rule: skip_step.SkipRule | None):
    """Return (compiled update, its first state)."""
    rate = adamw.schedule(kind="constant", peak=1e-6, warmup=0, total_steps=9)
    optimizer = adamw.optimizer(
        rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=1.0, decay_mask=params.decay_mask(config)
    )
    optimizer = optimizer if skip_rule is None else skip_rule.watching(optimizer)
    forward_fn = forward.PolicyForward(
        config=config,
        compute_dtype="float32",
        remat="none",
        attention=attention.Selection("xla", "for the benchmark"),
        implementation="chunked",
        workspace_bytes=2**26,
        temperature=1.0,
    )
    loss = losses.resolve("alphapo-pref")
    update = functools.partial(
        train_step.train_step, forward_fn=forward_fn, loss=loss, optimizer=optimizer, rate=rate, skip_rule=skip_rule
    )
    weights = params.init(config, jax.random.key(0), "float32")
    state = types.TrainState(
        weights, jax.jit(optimizer.init)(weights), jnp.int32(0), None, None if skip_rule is None else jnp.int32(0)
    )
    return jax.jit(update, donate_argnums=0).lower(state, example).compile(), state


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"width": 256, "layers": 4, "length": 128, "groups": 4, "rounds": 30}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    config = models.ModelConfig(
        family="llama", vocab_size=VOCAB, width=options.width, layers=options.layers, heads=4, kv_heads=4,
        head_dim=options.width // 4, ffn=4 * options.width, max_positions=options.length,
    )  # fmt: skip
    example = batch(groups=options.groups, length=options.length)
    with mock.patch.object(jnp, "isfinite", lambda x: jnp.ones(jnp.shape(x), bool)):
        sides = {"without": made(config, example, skip_rule=None)}
    sides["skip_rule"] = made(config, example, skip_rule=skip_step.SkipRule(most=10))
    sides["skip_rule and spikes"] = made(config, example, skip_rule=skip_step.SkipRule(most=10, sigmas=6.0, window=128))
    host_calls = len(re.findall(r"callback|infeed|outfeed|host_transfer", sides["skip_rule and spikes"][0].as_text()))
    seconds, cpu_seconds = ({name: [] for name in sides} for _ in range(2))
    states = {name: state for name, (_, state) in sides.items()}
    for turn in range(options.rounds + 2):
        names = list(sides) if turn % 2 else list(sides)[::-1]
        for name in names:
            started, used = time.perf_counter(), time.process_time()
            states[name], pairs = jax.block_until_ready(sides[name][0](states[name], example))
            assert float(pairs["nonfinite"][0]) == 0.0
            if turn > 1:  # the first ones warm up
                seconds[name].append(time.perf_counter() - started)
                cpu_seconds[name].append(time.process_time() - used)

    def shares(values: dict[str, list[float]]) -> dict[str, float]:
        return {
            name: statistics.median((b - a) / a for a, b in zip(values["without"], values[name], strict=True))
            for name in ("skip_rule", "skip_rule and spikes")
        }

    counted = {name: compiled.cost_analysis() for name, (compiled, _) in sides.items()}
    print(
        json.dumps(
            {
                "device": jax.devices()[0].device_kind,
                "parameters": params.count(config),
                "rounds": options.rounds,
                "median_s": {name: statistics.median(values) for name, values in seconds.items()},
                "share": shares(seconds),
                "share_of_cpu_seconds": shares(cpu_seconds),
                "share_of_operations": shares({name: [cost["flops"]] for name, cost in counted.items()}),
                "share_of_bytes": shares({name: [cost["bytes accessed"]] for name, cost in counted.items()}),
                "host_calls": host_calls,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
