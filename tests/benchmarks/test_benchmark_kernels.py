"""The benchmark of the head kernels, on sizes where it takes seconds: its rows are complete and everybody agrees."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tolerances
from tests.paths import REPO

TOKENS, D, V = 1024, 24, 136  # two completions of 512 tokens
FIGURES = {"median_ms", "min_ms", "tflops", "logp_error"}
RIVALS = ("tokamax", "Liger", "cut-cross-entropy", "quack")  # how exact they are is for the report to say
JAX_HERE = {"naive, float32 logits", "chunked"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What one run of the program writes, by candidate and pass."""
    report = tmp_path_factory.mktemp("benchmark") / "report.json"
    options = f"--parts run --tokens {TOKENS} --heads {D}x{V} --repeats 2 --json {report}"
    program = [sys.executable, "benchmarks/kernels.py", *options.split()]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(program, capture_output=True, text=True, cwd=REPO, env=environment)
    assert done.returncode == 0, done.stderr
    assert "GEMM ceiling" in done.stdout
    found = json.loads(report.read_text())["run"]
    assert len({(row["candidate"], row["pass"]) for row in found}) == len(found)
    return found


def test_every_row_is_measured_or_says_why_not(rows):
    for row in rows:
        assert "note" in row or FIGURES <= row.keys(), row
        assert row.get("tflops", 1) > 0, row
    assert {row["candidate"] for row in rows if "note" not in row} >= JAX_HERE


def test_every_rival_has_its_rows_and_its_release_or_the_reason_why_not(rows):
    benchmark = load()
    rivals = [*(f"tokamax {name}" for name in benchmark.TOKAMAX), *benchmark.IN_TORCH]
    found = {name: [row for row in rows if row["candidate"] == name] for name in rivals}
    for name, own in found.items():
        assert own, name
        module, distribution = next(names for begin, names in benchmark.RIVALS.items() if name.startswith(begin))
        for row in own:
            if importlib.util.find_spec(module) is None:
                assert row["note"].endswith("not installed") and not row["release"], row
            else:
                assert row["release"].startswith(f"{distribution} "), row
    assert {row["release"] for row in rows if row["candidate"] in JAX_HERE} == {""}


def test_a_rival_that_fails_is_a_reason():
    assert load().reason(ModuleNotFoundError("No module named 'cutlass'\nsecond line")) == (
        "ModuleNotFoundError: No module named 'cutlass'"
    )
    assert load().reason(AssertionError()) == "AssertionError: "


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_candidates_in_pytorch_return_tokens_or_sums_and_every_name_is_known():
    program = """
import torch, kernels, kernels_torch
assert tuple(kernels_torch.CANDIDATES) == kernels.IN_TORCH
assert kernels_torch.candidate("quack chunked", "cpu") in ("not installed", "runs on a GPU")
hidden, head, targets = (torch.from_numpy(x) for x in kernels.arrays(1024, 24, 136))
of_tokens = kernels_torch.naive
of_completions = lambda *args: of_tokens(*args).reshape(-1, kernels.COMPLETION).sum(1)
args = (hidden.requires_grad_(), head.requires_grad_(), targets.long())
for step in ("forward", "forward and backward"):
    first, second = (kernels_torch.once(function, step, *args) for function in (of_tokens, of_completions))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
"""
    environment = {**os.environ, "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO / "benchmarks", env=environment)
    assert done.returncode == 0, done.stderr


def test_log_probs_agree_with_float64(rows):
    errors = {(row["candidate"], row["pass"]): row["logp_error"] for row in rows if "note" not in row}
    for who, error in errors.items():
        if not who[0].startswith(RIVALS):
            assert error < tolerances.BENCHMARK_LOGP_NATS, (who, error)


def test_gradients_agree():
    benchmark = load()
    inputs = tuple(jnp.asarray(x) for x in benchmark.arrays(TOKENS, D, V))
    functions = {
        name: run
        for name, run in benchmark.our_candidates().items()
        if not (isinstance(run, str) or name.startswith(RIVALS))
    }

    def grads(name):
        loss = jax.value_and_grad(lambda *args: functions[name](*args)[0], (0, 1))
        return jax.jit(loss)(*inputs)[1]

    expected = grads("naive, float32 logits")
    for name in functions:
        for ours, theirs in zip(grads(name), expected, strict=True):
            largest = float(np.abs(theirs).max())
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerances.BENCHMARK_GRADIENT * largest, err_msg=name)


def test_tokens_that_are_no_pairs_are_refused():
    program = [sys.executable, "benchmarks/kernels.py", "--tokens", "1000"]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(program, capture_output=True, text=True, cwd=REPO, env=environment)
    assert done.returncode == 2
    assert "use a multiple of 1024" in done.stderr


def load():
    """Import the program; by its path, because `kernels` is a folder too."""
    spec = importlib.util.spec_from_file_location("benchmark_kernels", REPO / "benchmarks" / "kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
