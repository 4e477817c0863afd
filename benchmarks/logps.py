"""Time and compiled memory of the head: blocks of the vocabulary against dense logits, both in one run.

    python benchmarks/logps.py [--tokens 2048 --width 512 --vocab 32000] [--dtype float32] [--repeats 5] [--json OUT]

Prints one table (forward; forward and backward with respect to hidden states and head) and, with --json, writes the
same numbers. Times are medians over repeats in which the candidates take turns, so that a slow spell of the machine
hits all of them; memory is what XLA reserves for temporaries, without inputs and outputs.
"""

import argparse
import json
import os
import platform
import statistics
import time

import jax
import jax.numpy as jnp

from fpo_jax.kernels import chunked, reference, spec

CANDIDATES = {"reference": reference.token_stats, "chunked": chunked.token_stats}


def main() -> None:
    """Parse the arguments, measure, print the table, write the file."""
    arguments = parse()
    rows = measure(arguments)
    report = {"machine": machine(), "shapes": vars(arguments), "rows": rows}
    print("  ".join(f"{key} {value}" for key, value in report["machine"].items()))
    print(f"N={arguments.tokens} D={arguments.width} V={arguments.vocab} {arguments.dtype}")
    print(f"{'path':<24}{'pass':<20}{'median s':>10}{'min s':>9}{'temporaries MiB':>17}{'mean -logp':>12}")
    for row in rows:
        print(
            f"{row['path']:<24}{row['pass']:<20}{row['median_s']:>10.3f}{row['min_s']:>9.3f}"
            f"{row['temporaries_mib']:>17.1f}{row['mean_nll']:>12.6f}"
        )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=2)


def parse() -> argparse.Namespace:
    """Command line: sizes, dtype, blocks to try, repeats, output."""
    parser = argparse.ArgumentParser(description="Time and compiled memory of the head.")
    parser.add_argument("--tokens", type=int, default=2048, help="N, scored positions")
    parser.add_argument("--width", type=int, default=512, help="D")
    parser.add_argument("--vocab", type=int, default=32000, help="V")
    parser.add_argument("--dtype", choices=spec.DTYPES[:2], default="float32", help="of hidden states and head")
    parser.add_argument("--workspace-mib", type=int, nargs="+", default=[256, 32], help="budgets of the chunked path")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="file to write")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> list[dict]:
    """Compile every candidate, then time them in turns."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden_ND = jax.random.normal(keys[0], (arguments.tokens, arguments.width), arguments.dtype)
    head_VD = jax.random.normal(keys[1], (arguments.vocab, arguments.width), arguments.dtype) * arguments.width**-0.5
    targets_N = jax.random.randint(keys[2], (arguments.tokens,), 0, arguments.vocab)

    def mean_nll(token_stats, head_spec):
        def loss(hidden_ND, head_VD):
            stats = token_stats(hidden_ND, head_VD, targets_N, spec=head_spec)
            return jnp.mean(stats.lse_N - stats.target_logit_N)

        return loss

    losses = {"reference": mean_nll(CANDIDATES["reference"], spec.HeadSpec())}
    for mib in arguments.workspace_mib:
        head_spec = spec.HeadSpec(workspace_bytes=mib * 2**20)
        losses[f"chunked, {mib} MiB budget"] = mean_nll(CANDIDATES["chunked"], head_spec)
    programs = {}
    for path, loss in losses.items():
        for name, function in (("forward", loss), ("forward+backward", jax.value_and_grad(loss, (0, 1)))):
            programs[path, name] = jax.jit(function).lower(hidden_ND, head_VD).compile()

    times = {key: [] for key in programs}
    values = {}
    for repeat in range(arguments.repeats + 1):  # the first turn warms up
        for key, program in programs.items():
            start = time.perf_counter()
            values[key] = jax.block_until_ready(program(hidden_ND, head_VD))
            if repeat:
                times[key].append(time.perf_counter() - start)
    return [
        {
            "path": path,
            "pass": name,
            "median_s": statistics.median(times[path, name]),
            "min_s": min(times[path, name]),
            "temporaries_mib": program.memory_analysis().temp_size_in_bytes / 2**20,
            "mean_nll": float(jax.tree.leaves(values[path, name])[0]),
        }
        for (path, name), program in programs.items()
    ]


def machine() -> dict:
    """What the numbers depend on besides the code."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
