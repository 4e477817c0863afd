"""What an update of DPO on rows of several groups gets out of a device: MFU on valid tokens, memory, kernels' time.

    python -m benchmarks.utilisation --layers 16 --micro 4 --remat dots --fields mesh.preset=zero2 --kernels
    python -m benchmarks.utilisation --layers 32 --micro 2 --remat dots --fields optim.state_dtype=bfloat16

A Mistral shape with weights drawn on the device, so that nothing is written or read, and pairs whose lengths are those
of chats: log-normal, some 420 tokens of prompt and 320 of a completion. The model FLOP/s utilisation counts what the
mathematics needs (`flops`), a shared prompt once; no padding, no recomputation, no reference pass. The first update
compiles and is left out.
"""

import argparse
import collections
import functools
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks import random_model
from benchmarks.train_step_sides import set_fields
from benchmarks.updates import Updates
from fpo_jax import config as configuration
from fpo_jax import data, models
from fpo_jax.io import atomic_io
from fpo_jax.models import params
from fpo_jax.perf import flops, hardware
from fpo_jax.trainer import run_inputs

MAX_PROMPT, MAX_COMPLETION, MAX_LENGTH = 1500, 540, 2048


def pairs(groups: int, vocab: int) -> data.Prepared:
    """Draw pairs of random tokens, the first one preferred."""
    random = np.random.default_rng(0)
    prompts_B = np.clip(random.lognormal(5.6, 0.9, groups), 20, MAX_PROMPT).astype(np.int32)
    completions_BK = np.clip(random.lognormal(5.6, 0.6, (groups, 2)), 20, MAX_COMPLETION).astype(np.int32)
    lengths_N = (prompts_B[:, None] + completions_BK).reshape(-1)
    starts_N = np.cumsum(lengths_N, dtype=np.int64) - lengths_N
    tokens_S = random.integers(3, vocab, lengths_N.sum(), dtype=np.int32)
    for first, second, prompt in zip(starts_N[::2], starts_N[1::2], prompts_B, strict=True):
        tokens_S[second : second + prompt] = tokens_S[first : first + prompt]
    return data.Prepared(
        tokens_S=tokens_S,
        starts_N=starts_N,
        lengths_N=lengths_N,
        prompt_lengths_N=np.repeat(prompts_B, 2),
        rewards_BK=np.tile(np.array([2.0, 1.0], np.float32), (groups, 1)),
        sources=tuple(map(str, range(groups))),
        pad_id=0,
    )


class Drawn(Updates):
    """Updates of a model whose weights are drawn where they live."""

    def _load(self, source: Path):
        del source
        draw = functools.partial(params.init, self._inputs.model_config, dtype=self._config.model.param_dtype)
        return jax.jit(draw, out_shardings=self.programs.state.params)(jax.random.key(0))


def configured(options: argparse.Namespace) -> configuration.Config:
    """Return the configuration of a run on `pairs`."""
    config = configuration.default()
    config.update(
        {
            "model": {"path": "drawn", "remat": options.remat, "attention": options.attention},
            "data": {"train": "in memory", "layout": options.layout, "shuffle": False},
            "loss": {"name": "dpo"},
            "optim": {"learning_rate": 1e-6, "schedule": "constant"},
            "train": {"batch_size": options.groups, "micro_batch_per_device": options.micro},
        }
    )
    config.data.max_length, config.data.max_prompt_length = MAX_LENGTH, MAX_PROMPT
    set_fields(config, options.fields)
    return config


def needed(prepared: data.Prepared, config: models.ModelConfig, number: int, *, groups: int, shared: bool) -> int:
    """Return the operations that the mathematics of an update needs."""
    rows = slice(2 * groups * number, 2 * groups * (number + 1))
    lengths_N, prompts_N = prepared.lengths_N[rows], prepared.prompt_lengths_N[rows]
    completions_N = lengths_N - prompts_N
    if not shared:
        return flops.train_step(config, flops.work(lengths_N, completions_N, sliding_window=None))
    texts = np.concatenate([prompts_N[::2], completions_N])
    contexts = np.concatenate([np.zeros_like(prompts_N[::2]), prompts_N])
    return flops.train_step(config, flops.work(texts, completions_N.sum(), contexts=contexts, sliding_window=None))


def measure(options: argparse.Namespace) -> dict:
    """Run the updates and return what they took."""
    shape = random_model.mistral(options.layers, vocab=options.vocab, width=options.width)
    prepared = pairs(options.groups * options.updates, options.vocab)
    config = configured(options)
    inputs = run_inputs.Inputs(
        run_inputs.check(config), Path("drawn"), shape, run_inputs.Dataset(prepared, None, ""), None
    )
    run = Drawn(config, inputs, Path("drawn"))
    print(*run.programs.choices, sep="\n", flush=True)
    seconds, kernels = [], {}
    for number in range(options.updates):
        started = time.perf_counter()
        run.update(number)
        run.wait()
        seconds.append(time.perf_counter() - started)
    if options.kernels:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                run.update(options.updates - 1)
                run.wait()
            kernels = kernel_times(Path(folder))
    device, median = jax.devices()[0], statistics.median(seconds[1:])
    sizes = data.row_sizes(run.plan.schedule, 1)
    operations = statistics.mean(
        needed(prepared, shape, number, groups=options.groups, shared=options.layout == "shared")
        for number in range(1, options.updates)
    )
    capacity = hardware.CAPACITIES.get(device.device_kind)
    return {
        "device": device.device_kind, "parameters": params.count(shape), "options": vars(options) | {"json": None},
        "rows": f"T={sizes.length}, {run.plan.accumulation} micro-batches", "seconds": seconds, "median": median,
        "tokens_per_s": float(prepared.lengths_N.sum()) / options.updates / median,
        "padding": float(1 - sizes.texts.sum() / (sizes.rows * sizes.length)),
        "mfu": None if capacity is None else operations / median / capacity.flops,
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"), "kernels": kernels,
    }  # fmt: skip


def kernel_times(folder: Path) -> dict[str, float]:
    """Return the milliseconds of every kernel in a trace, the longest first."""
    (trace,) = folder.rglob("*.xplane.pb")
    total: dict[str, float] = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines if "GPU" in plane.name else ():
            for event in line.events if line.name.startswith("Stream") else ():
                total[event.name] += event.duration_ns / 1e6
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def main() -> None:
    """Measure what the command line says and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--groups", type=int, default=64, help="of an update")
    parser.add_argument("--micro", type=int, default=2, help="train.micro_batch_per_device: groups, or rows of groups")
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--layout", default="shared", choices=("padded", "packed", "shared"))
    parser.add_argument("--remat", default="full", choices=("none", "dots", "full", "offload"))
    parser.add_argument("--attention", default="auto", help="model.attention")
    parser.add_argument("--fields", nargs="+", default=[], metavar="KEY=VALUE", help="of the configuration")
    parser.add_argument("--kernels", action="store_true", help="tell the kernels of one more update")
    parser.add_argument("--json", type=Path)
    found = measure(options := parser.parse_args())
    print(
        f"{found['device']}: {found['parameters'] / 1e9:.2f} billion parameters, {options.layout}, {found['rows']}\n"
        f"{found['median']:.3f} s an update of {options.groups} pairs"
        f" ({', '.join(f'{value:.3f}' for value in found['seconds'][1:])}; the first {found['seconds'][0]:.1f}),"
        f" {found['tokens_per_s']:,.0f} tokens of sequences a second, padding {found['padding']:.1%}"
    )
    if found["mfu"] is not None:
        print(f"MFU on valid tokens {found['mfu']:.1%}, at most {found['peak_bytes'] / 2**30:.1f} GiB")
    for name, milliseconds in list(found["kernels"].items())[:30]:
        print(f"{milliseconds:9.2f} ms  {name[:100]}")
    if options.json:
        atomic_io.write_json(options.json, found)


if __name__ == "__main__":
    main()
