"""Attention of rows of several texts: every implementation of this device on the same arrays, in one run.

    python -m benchmarks.attention --rows 2 --length 4096 --head-dim 128 --json runs/attention.json

Rows of pairs with a shared prompt, and rows of one text; bfloat16 (float32 on a CPU), forward alone and with all
gradients. The implementations take turns; a time is the median over rounds. FLOP/s count the visible pairs of queries
and keys alone: 4 C a pair and head forward, 10 C backward. The error is that of the output against blocks of XLA in
float32, relative to the largest entry. What does not run here is a row that says so.
"""

import argparse
import functools
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fpo_jax import attention, sharding, types
from fpo_jax.attention import segment_mask as segments_
from fpo_jax.io import atomic_io
from fpo_jax.logprobs import Target

IMPLEMENTATIONS = ("chunked", "cudnn", "mosaic", "splash")
PROMPTS, COMPLETIONS = (100, 800), (50, 400)  # least and most tokens


def pairs(rows: int, length: int) -> types.Segments:
    """Draw rows of prompts that two completions follow; what is left over at the end is padding."""
    random = np.random.default_rng(0)
    ids_NT, places_NT, parents_NT = (np.full((rows, length), -1, np.int32) for _ in range(3))
    for row in range(rows):
        place, text = 0, 0
        while True:
            sizes = [int(random.integers(*PROMPTS)), *map(int, random.integers(*COMPLETIONS, 2))]
            if place + sum(sizes) > length:
                break
            for number, size in enumerate(sizes):
                span = slice(place, place + size)
                ids_NT[row, span], parents_NT[row, span] = text + number, text
                places_NT[row, span] = np.arange(size) + (sizes[0] if number else 0)
                place += size
            text += len(sizes)
    return types.Segments(*map(jnp.asarray, (ids_NT, places_NT, parents_NT)))


def attend(implementation: str, q_NTHC, k_NTGC, v_NTGC, valid_NT, segments) -> jax.Array:
    """Call one implementation."""
    return attention.attend(
        q_NTHC,
        k_NTGC,
        v_NTGC,
        valid_NT=valid_NT,
        scale=q_NTHC.shape[-1] ** -0.5,
        sliding_window=None,
        segments=segments,
        choice=attention.Selection(implementation, "the benchmark"),
        layout=sharding.Layout(),
    )


def compare(options: argparse.Namespace, *, shared: bool) -> list[dict]:
    """Return a row for each implementation."""
    N, T, H, G, C = options.rows, options.length, options.heads, options.kv_heads, options.head_dim
    target, dtype = Target.of(jax.devices()[0]), "float32" if jax.default_backend() == "cpu" else "bfloat16"
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, (N, T, heads, C), dtype) for key, heads in zip(keys, (H, G, G, H), strict=True)]
    segments = pairs(N, T) if shared else None
    valid_NT = jnp.ones((N, T), bool) if segments is None else segments.ids_NT >= 0
    seen_NTT = jnp.broadcast_to(jnp.tri(T, dtype=bool), (N, T, T))
    if segments is not None:
        seen_NTT &= segments_.seen(segments, segments, window=None)
    visible = int(jnp.sum(seen_NTT & valid_NT[:, :, None]))
    exact = jax.jit(functools.partial(attend, "chunked"))(
        *(x.astype("float32") for x in arrays[:3]), valid_NT, segments
    )
    rows, programs = [], {}
    for name in options.implementations:
        row = {"rows": "pairs, prompts once" if shared else "one text", "implementation": name, "note": ""}
        rows.append(row)
        try:
            choice = attention.select(
                name, platform=target.platform, dtype=dtype, head_dim=C, heads=H, kv_heads=G, positions=[T],
                sliding_window=None, soft_cap=None, segments=shared, shared=shared,
                compute_capability=target.compute_capability, layout=sharding.Layout(),
            )  # fmt: skip
        except ValueError as error:
            row["note"] = str(error)
            continue
        if choice.interpret:
            row["note"] = "emulated here, left out"
            continue
        forward = functools.partial(attend, name)

        def both(q_NTHC, k_NTGC, v_NTGC, dout_NTHC, *rest, forward=forward):
            out_NTHC, pull_back = jax.vjp(lambda *qkv: forward(*qkv, *rest), q_NTHC, k_NTGC, v_NTGC)
            return out_NTHC, *pull_back(dout_NTHC)

        for step, function, inputs in (("forward", forward, arrays[:3]), ("both", both, arrays)):
            inputs = (*inputs, valid_NT, segments)
            program = jax.jit(function).lower(*inputs).compile()
            out_NTHC = jax.tree.leaves(jax.block_until_ready(program(*inputs)))[0]
            row["error"] = float(jnp.max(jnp.abs(out_NTHC - exact)) / jnp.max(jnp.abs(exact)))
            row[f"{step}_mib"] = program.memory_analysis().temp_size_in_bytes / 2**20
            programs[name, step] = (row, program, inputs, [])
    for _ in range(options.repeats):
        for _, program, inputs, times in programs.values():
            started = time.perf_counter()
            jax.block_until_ready(program(*inputs))
            times.append(time.perf_counter() - started)
    for (_, step), (row, _, _, times) in programs.items():
        row[f"{step}_ms"] = 1e3 * statistics.median(times)
        row[f"{step}_tflops"] = (4 if step == "forward" else 14) * C * H * visible / statistics.median(times) / 1e12
    return rows


def table(rows: list[dict]) -> str:
    """Rows as Markdown."""
    names = "rows, implementation, forward ms, TFLOP/s, with gradients ms, TFLOP/s, temporaries MiB, error"
    lines = [f"| {names.replace(', ', ' | ')} |", "|---" * 8 + "|"]
    for row in rows:
        cells = [row["note"]]
        if not row["note"]:
            cells = [f"{row[f'{step}_{what}']:.3g}" for step in ("forward", "both") for what in ("ms", "tflops")]
            cells += [f"{row['both_mib']:.0f}", f"{row['error']:.1e}"]
        lines.append(f"| {' | '.join([row['rows'], row['implementation'], *cells])} |")
    return "\n".join(lines)


def main() -> None:
    """Compare at the size that the command line says, print one table, write the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("rows", 2), ("length", 4096), ("heads", 32), ("kv-heads", 8), ("head-dim", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--implementations", nargs="+", default=list(IMPLEMENTATIONS), choices=IMPLEMENTATIONS)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [row for shared in (True, False) for row in compare(options, shared=shared)]
    print(jax.devices()[0].device_kind, f"jax {jax.__version__}")
    print(table(rows))
    if options.json:
        atomic_io.write_json(options.json, {"device": jax.devices()[0].device_kind, "rows": rows})


if __name__ == "__main__":
    main()
