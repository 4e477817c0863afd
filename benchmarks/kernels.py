"""The head kernels against everybody else's on the same numbers in one run, and compiled for devices that are not here.

    python benchmarks/kernels.py                      on the device jax sees, then for all targets with a compiler
    python benchmarks/kernels.py --parts check run --tokens 8192 --heads 4096x128256 4096x32000 2560x50304 --json OUT
    python benchmarks/kernels.py --parts deviceless --targets v5e-4 h100:1

The rivals are what `pip install tokamax 'liger-kernel[cutedsl]' cut-cross-entropy quack-kernels` brings, and PyTorch.

Run: every candidate computes the DPO loss of pairs of 512-token completions from hidden states, and its gradients for
hidden states and head, on the same arrays; those in PyTorch in a process of their own. Times are medians over rounds in
which the candidates take turns; TFLOP/s counts 2NDV forward and 8NDV with gradients for everybody; memory is that of
temporaries; the error is that of a completion's summed log-prob against float64. A rival's row has its release; one
that is not installed, or that fails, is a row that says so. On a CPU the sizes are small, and only the CPU part is run.

Check: losses and gradients through the kernels of this device against float64, padded and with several groups a row.

Deviceless: temporaries, and for GPU kernels registers, spills and shared memory, from the compilers themselves.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fpo_jax import logprobs
from fpo_jax.kernels.lm_head import head_loss, spec
from fpo_jax.perf import hardware

COMPLETION = 512  # tokens of a completion
BETA = 0.1
TOKENS = (4096, 8192, 16384)
HEADS = ("4096x32000", "4096x128256", "2560x50304", "3584x256000")
CPU_TOKENS, CPU_HEADS = (2048,), ("512x32000",)
TARGETS = ("v5e-4", "v5p-8", "v6e-4", "v7x-4", "h100:1")
MIB = 2**20
KEEP = 2**40  # bytes of logits: all of them
RIVALS = {  # how a candidate's name begins -> what it imports, what pip calls it
    "tokamax": ("tokamax", "tokamax"),
    "torch": ("torch", "torch"),
    "Liger": ("liger_kernel", "liger-kernel"),
    "cut-cross-entropy": ("cut_cross_entropy", "cut-cross-entropy"),
    "quack": ("quack", "quack-kernels"),
}
TOKAMAX = {"xla": "", "chunked_xla": "", "mosaic_tpu": "tpu"}  # implementation -> the platform it needs
IN_TORCH = (
    "torch naive",
    "torch linear_cross_entropy",
    "Liger Triton",
    "Liger CuTe DSL",
    "cut-cross-entropy cce",
    "cut-cross-entropy cce, unfiltered",
    "cut-cross-entropy cce_exact",
    "cut-cross-entropy cce_kahan_full_c",
    "quack",
    "quack chunked",
)


def main() -> None:
    """Run the parts that are asked for, print their tables, write the numbers."""
    arguments = parse()
    if arguments.compile_for:
        print(json.dumps(compile_rows(arguments)))
        return
    report: dict = {"machine": machine()}
    print("  ".join(f"{key} {value}" for key, value in report["machine"].items()))
    if "check" in arguments.parts:
        import kernels_check  # beside this file, which tests import by its path

        report["check"] = kernels_check.check()
    if "run" in arguments.parts:
        report["run"] = [row for D, V, tokens in sizes(arguments) for row in run(tokens, D, V, arguments)]
    if "deviceless" in arguments.parts:
        report["deviceless"] = deviceless(arguments)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=2))


def parse() -> argparse.Namespace:
    """Command line."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch's process needs the GPU's memory too
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description="Head kernels: time, memory and error.")
    parser.add_argument("--parts", nargs="+", choices=("check", "run", "deviceless"), default=["run", "deviceless"])
    parser.add_argument("--tokens", type=int, nargs="+", help=f"default {TOKENS}, on a CPU {CPU_TOKENS}")
    parser.add_argument("--heads", nargs="+", help="DxV")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32" if on_cpu else "bfloat16")
    parser.add_argument("--candidates", nargs="+", help="names of those to run; default all")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--json", help="file to write")
    parser.add_argument("--compile-for", help=argparse.SUPPRESS)  # the process of one target
    arguments = parser.parse_args()
    small = on_cpu and not arguments.compile_for
    arguments.measured = (
        arguments.tokens or (CPU_TOKENS if small else TOKENS),
        arguments.heads or (CPU_HEADS if small else HEADS),
    )
    for tokens in arguments.measured[0]:
        if tokens % (2 * COMPLETION):
            parser.error(f"--tokens {tokens} is not a number of pairs; use a multiple of {2 * COMPLETION}")
    return arguments


def sizes(arguments: argparse.Namespace) -> list[tuple[int, int, int]]:
    """(D, V, N) of every combination."""
    token_counts, names = arguments.measured
    heads = [tuple(map(int, head.split("x"))) for head in names]
    return [(D, V, tokens) for D, V in heads for tokens in token_counts]


def arrays(tokens: int, D: int, V: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hidden states, head and targets, float32; logits of standard deviation 3."""
    rng = np.random.default_rng(0)
    hidden_ND = rng.standard_normal((tokens, D), np.float32)
    head_VD = rng.standard_normal((V, D), np.float32) * np.float32(3 / np.sqrt(D))
    return hidden_ND, head_VD, rng.integers(0, V, tokens).astype(np.int32)


def exact_logp(hidden_ND: np.ndarray, head_VD: np.ndarray, targets_N: np.ndarray) -> float:
    """Summed log-prob of the first completion in float64, by blocks of the head."""
    hidden = hidden_ND[:COMPLETION].astype(np.float64)
    logits = np.concatenate(
        [hidden @ head_VD[i : i + 8192].astype(np.float64).T for i in range(0, len(head_VD), 8192)], 1
    )
    top = logits.max(1)
    lse = top + np.log(np.exp(logits - top[:, None]).sum(1))
    return float((logits[np.arange(COMPLETION), targets_N[:COMPLETION]] - lse).sum())


def our_candidates() -> dict:
    """Names and functions (hidden, head, targets) -> (loss, log-probs [S]) of what runs here; a text says why not."""
    device = logprobs.Target.of(jax.devices()[0])

    def ours(name):
        def token_logps(hidden_ND, head_VD, targets_N):
            stats = logprobs.IMPLEMENTATIONS[name](hidden_ND, head_VD, targets_N, spec=spec.HeadSpec())
            return stats.target_logit_N - stats.lse_N

        return token_logps

    found: dict = {"naive, float32 logits": ours("reference"), "chunked": ours("chunked")}
    found["naive, logits as operands"] = usual_logps
    inside: dict = {}
    for name, needs in logprobs.PLATFORMS.items():
        here = device.platform == needs
        found[name] = ours(name) if here else f"runs on a {needs.upper()}"
        if here:
            inside[f"{name}, loss inside"] = functools.partial(fused_loss, name, None)
            inside[f"{name}, loss inside, logits kept"] = functools.partial(fused_loss, name, KEEP)

    def rival(implementation):
        def token_logps(hidden_ND, head_VD, targets_N):
            import tokamax

            return -tokamax.linear_softmax_cross_entropy_loss(
                hidden_ND, targets_N, head_VD.T, reduction="none", implementation=implementation
            )

        return token_logps

    for implementation, needs in TOKAMAX.items():
        name = f"tokamax {implementation}"
        elsewhere = "" if needs in ("", device.platform) else f"runs on a {needs.upper()}"
        found[name] = missing(name) or elsewhere or rival(implementation)
    return {name: f if isinstance(f, str) else functools.partial(pair_loss, f) for name, f in found.items()} | inside


def missing(candidate: str) -> str:
    """Say that a candidate is not installed; "" where it is."""
    module, _ = next(names for begin, names in RIVALS.items() if candidate.startswith(begin))
    return "" if importlib.util.find_spec(module) else "not installed"


def release(candidate: str) -> str:
    """Return what pip calls a rival, and its version; "" for what is ours, and what is not installed."""
    for begin, (_, distribution) in RIVALS.items():
        if candidate.startswith(begin) and not missing(candidate):
            return f"{distribution} {importlib.metadata.version(distribution)}"
    return ""


def reason(error: Exception) -> str:
    """Return the kind of an error and the beginning of what it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:90]}"


def usual_logps(hidden_ND, head_VD, targets_N):
    """Logits in the dtype of the operands, then a float32 log-softmax: the usual model head."""
    logits_NV = jnp.einsum("ND,VD->NV", hidden_ND, head_VD).astype(jnp.float32)
    return jnp.take_along_axis(jax.nn.log_softmax(logits_NV), targets_N[:, None], axis=1)[:, 0]


def pair_loss(token_logps, hidden_ND, head_VD, targets_N):
    """Mean of -log sigmoid(beta (logp of chosen - logp of rejected)), and the summed log-probs."""
    sums_S = token_logps(hidden_ND, head_VD, targets_N).reshape(-1, COMPLETION).sum(axis=1)
    return jnp.mean(jax.nn.softplus(-BETA * (sums_S[::2] - sums_S[1::2]))), sums_S


def run(tokens: int, D: int, V: int, arguments: argparse.Namespace) -> list[dict]:
    """Measure every candidate at one size."""
    on_host = arrays(tokens, D, V)
    hidden_ND, head_VD = (jnp.asarray(x, arguments.dtype) for x in on_host[:2])
    inputs = (hidden_ND, head_VD, jnp.asarray(on_host[2]))
    exact = exact_logp(np.asarray(hidden_ND, np.float32), np.asarray(head_VD, np.float32), on_host[2])
    wanted = our_candidates()
    if arguments.candidates:
        wanted = {name: function for name, function in wanted.items() if name in arguments.candidates}
    programs, rows = {}, []
    for name, function in wanted.items():
        for step in ("forward", "forward and backward"):
            row = {"candidate": name, "pass": step, "tokens": tokens, "D": D, "V": V, "dtype": arguments.dtype}
            rows.append(row)
            if isinstance(function, str):
                row["note"] = function
                continue
            timed = function if step == "forward" else jax.value_and_grad(function, (0, 1), has_aux=True)
            try:
                program = jax.jit(timed).lower(*inputs).compile()
                sums_S = jax.tree.leaves(jax.block_until_ready(program(*inputs)))[1]
                row["logp_error"] = abs(float(sums_S[0]) - exact)
                row["temporaries_mib"] = hardware.temporaries_of(program, jax.devices()[0]) / MIB
                programs[id(row)] = (row, program, [])
            except Exception as error:
                row["note"] = reason(error)
    for _ in range(arguments.repeats):
        for _, program, times in programs.values():
            start = time.perf_counter()
            jax.block_until_ready(program(*inputs))
            times.append(time.perf_counter() - start)
    for row, _, times in programs.values():
        timing(row, times)
    del programs, inputs, hidden_ND, head_VD
    rows += torch_rows(tokens, D, V, exact, arguments)
    for row in rows:
        row["release"] = release(row["candidate"])
    title = f"N={tokens} D={D} V={V} {arguments.dtype}; GEMM ceiling {gemm_ceiling(arguments.dtype):.2f} TFLOP/s"
    print_table(title, rows, ("median_ms", "min_ms", "tflops", "temporaries_mib", "logp_error"))
    return rows


def timing(row: dict, times: list[float]) -> None:
    """Fill in the figures that follow from the times."""
    products = 2 if row["pass"] == "forward" else 8
    median = statistics.median(times)
    row |= {"median_ms": 1e3 * median, "min_ms": 1e3 * min(times)}
    row["tflops"] = products * row["tokens"] * row["D"] * row["V"] / median / 1e12


def gemm_ceiling(dtype: str) -> float:
    """TFLOP/s of one large square product on this device, in this run."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)  # zeros or ones draw less power: clocks too high
    product = jax.jit(lambda x: x @ x)
    jax.block_until_ready(product(matrix))
    times = []
    for _ in range(9):
        start = time.perf_counter()
        jax.block_until_ready(product(matrix))
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times) / 1e12


def torch_rows(tokens: int, D: int, V: int, exact: float, arguments: argparse.Namespace) -> list[dict]:
    """Rows of the candidates in PyTorch, from a process of their own."""
    wanted = [name for name in IN_TORCH if not arguments.candidates or name in arguments.candidates]
    if not wanted or missing("torch"):
        return [{"candidate": name, "pass": "all", "note": "PyTorch is not installed"} for name in wanted]
    size = {"tokens": tokens, "D": D, "V": V, "dtype": arguments.dtype, "repeats": arguments.repeats}
    size["candidates"] = wanted
    command = [sys.executable, str(Path(__file__).with_name("kernels_torch.py")), json.dumps(size)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if done.returncode:
        return [{"candidate": "PyTorch", "pass": "all", "note": (done.stderr.strip().splitlines() or ["?"])[-1][:100]}]
    rows = json.loads(done.stdout.splitlines()[-1])
    for row in rows:
        if "times" in row:
            timing(row, row.pop("times"))
            row["logp_error"] = abs(row.pop("logp") - exact)
    return rows


def environment() -> dict[str, str]:
    """Environment of a child process: the repository on its path."""
    root = str(Path(__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}


def deviceless(arguments: argparse.Namespace) -> list[dict]:
    """Compile for every target in a process of its own: two compilers cannot share one."""
    rows = []
    for target in arguments.targets:
        sizes_wanted = ["--heads", *(arguments.heads or HEADS), "--tokens", *map(str, arguments.tokens or [8192])]
        command = [sys.executable, __file__, "--compile-for", target, *sizes_wanted]
        alone = {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # libtpu has a lock; nothing runs on it
        done = subprocess.run(command, capture_output=True, text=True, env={**environment(), **alone})
        if done.returncode:
            note = (done.stderr.strip().splitlines() or ["?"])[-1]
            found = [{"candidate": "all", "pass": "all", "note": note}]
        else:
            found = json.loads(done.stdout.splitlines()[-1])
        print_table(
            f"compiled for {target}", found, ("tokens", "D", "V", "temporaries_mib", "registers", "spills", "smem_kib")
        )
        rows += [{"target": target, **row} for row in found]
    return rows


def compile_rows(arguments: argparse.Namespace) -> list[dict]:
    """Compile every path for one target."""
    target = arguments.compile_for
    mesh = hardware.mesh(target, devices=1)
    here, device = NamedSharding(mesh, PartitionSpec()), mesh.devices.flat[0]
    names = (
        "reference",
        "chunked",
        *(name for name, p in logprobs.PLATFORMS.items() if (p == "tpu") == ("-" in target)),
    )
    rows = []
    for D, V, tokens in sizes(arguments):
        hidden = jax.ShapeDtypeStruct((tokens, D), jnp.bfloat16, sharding=here)
        head = jax.ShapeDtypeStruct((V, D), jnp.bfloat16, sharding=here)
        targets = jax.ShapeDtypeStruct((tokens,), jnp.int32, sharding=here)
        losses = {name: functools.partial(composed_loss, name) for name in names}
        losses |= {f"{name}, loss inside": functools.partial(fused_loss, name, None) for name in names[2:]}
        for name, of_arrays in losses.items():

            def loss(*args, of_arrays=of_arrays):
                return of_arrays(*args)[0]

            for step in ("forward", "forward and backward"):
                function = loss if step == "forward" else jax.value_and_grad(loss, (0, 1))
                row = {"candidate": name, "pass": step, "tokens": tokens, "D": D, "V": V}
                with tempfile.TemporaryDirectory() as dump:
                    os.environ |= {f"MOSAIC_GPU_DUMP_{x}": "1" for x in ("PTX", "PTXAS", "RESOURCES")}
                    os.environ["MOSAIC_GPU_DUMP_TO"] = dump
                    try:
                        program = hardware.compile_for(function, hidden, head, targets)
                        row["temporaries_mib"] = hardware.temporaries_of(program, device) / MIB
                        row["peak_mib"] = program.memory_analysis().peak_memory_in_bytes / MIB
                        row |= resources(Path(dump))
                    except Exception as error:
                        row["note"] = reason(error)
                rows.append(row)
    return rows


def composed_loss(name, hidden_ND, head_VD, targets_N):
    """Mean DPO loss through one implementation, and the log-probs [S] of the completions."""
    return mean_of(head_loss.fpo_head_loss, hidden_ND, head_VD, targets_N, token_stats=logprobs.IMPLEMENTATIONS[name])


def fused_loss(name, kept_bytes, hidden_ND, head_VD, targets_N):
    """The same with the loss in the kernels of an implementation, and the logits kept where they fit."""
    options = {"engine": logprobs.ENGINES[name], "kept_bytes": kept_bytes}
    return mean_of(head_loss.fused_head_loss, hidden_ND, head_VD, targets_N, **options)


def mean_of(head_loss_of, hidden_ND, head_VD, targets_N, *, kept_bytes=None, **how):
    """Mean loss of the groups, and the log-probs of their candidates."""
    loss_mask_N, operands, options = group_inputs(hidden_ND)
    options["spec"] = spec.HeadSpec(kept_bytes=kept_bytes)
    out = head_loss_of(hidden_ND, head_VD, targets_N, loss_mask_N, operands, **options, **how)
    return jnp.mean(out.losses_B), out.logps_BK.reshape(-1)


def group_inputs(hidden_ND):
    """Mask, operands and options of pairs of completions."""
    pairs = hidden_ND.shape[0] // (2 * COMPLETION)
    options = {"group_loss": dpo, "groups": (pairs, 2), "spec": spec.HeadSpec()}
    return jnp.ones(hidden_ND.shape[0], bool), jnp.zeros((pairs, 2), jnp.float32), options


def dpo(logps_BK, operands):
    """-log sigmoid of beta times the margin, with the reference's log-probs as operands."""
    margin_BK = logps_BK - operands
    is_first_BK = jax.lax.broadcasted_iota(jnp.int32, margin_BK.shape, 1) == 0
    return jax.nn.softplus(-BETA * jnp.sum(jnp.where(is_first_BK, margin_BK, -margin_BK), axis=1))


def resources(folder: Path) -> dict:
    """What ptxas says of the Pallas kernels among a program's: the worst of each."""
    ptxas = "".join(path.read_text() for path in folder.glob("*.ptxas"))
    smem = "".join(path.read_text() for path in folder.glob("*.resources.txt"))
    if not ptxas:
        return {}
    return {
        "registers": max(map(int, re.findall(r"Used (\d+) registers", ptxas))),
        "spills": max(map(int, re.findall(r"(\d+) bytes spill", ptxas))),
        "smem_kib": max(map(int, re.findall(r"smem_scratch_bytes=(\d+)", smem))) / 1024,
    }


def print_table(title: str, rows: list[dict], columns: tuple[str, ...]) -> None:
    """Print one table."""
    print(f"\n{title}\n{'candidate':<36}{'pass':<22}" + "".join(f"{column:>17}" for column in columns), flush=True)
    for row in rows:
        cells = (row.get(column) for column in columns)
        texts = ("" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x) for x in cells)
        figures = "".join(f"{text:>17}" for text in texts)
        described = "  ".join(filter(None, (row.get("release"), row.get("note"))))
        print(f"{row['candidate']:<36}{row['pass']:<22}{figures}  {described}".rstrip(), flush=True)


def machine() -> dict:
    """What the numbers depend on besides the code."""
    device = jax.devices()[0]
    return {"device": device.device_kind, "cores": os.cpu_count(), "jax": jax.__version__} | {
        "python": platform.python_version()
    }


if __name__ == "__main__":
    main()
