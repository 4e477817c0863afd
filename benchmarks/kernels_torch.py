"""The PyTorch side of `benchmarks/kernels.py`: run by it, in a process of its own; prints one line of JSON.

Every candidate is a function (hidden, head, targets) -> negative log-probs [N] that autograd can go through.
"""

import functools
import importlib.util
import json
import sys
import time

import torch

from kernels import BETA, MIB, RESPONSE, arrays


def main() -> None:
    """Measure every candidate at the size given on the command line."""
    size = json.loads(sys.argv[1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, head, targets = (torch.from_numpy(x).to(device) for x in arrays(size["tokens"], size["D"], size["V"]))
    dtype = getattr(torch, size["dtype"])
    hidden, head = (x.to(dtype).requires_grad_() for x in (hidden, head))
    targets, rows, live = targets.long(), [], []
    for name, function in candidates(device).items():
        for step in ("forward", "forward and backward"):
            row = {"candidate": name, "pass": step, **{key: size[key] for key in ("tokens", "D", "V", "dtype")}}
            rows.append(row)
            if isinstance(function, str):
                row["note"] = function
                continue
            try:
                row |= measured_once(function, step, hidden, head, targets, device)
                row["times"] = []
                live.append((row, function))
            except Exception as error:
                row["note"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:90]}"
    for _ in range(size["repeats"]):
        for row, function in live:
            synchronize(device)
            start = time.perf_counter()
            once(function, row["pass"], hidden, head, targets)
            synchronize(device)
            row["times"].append(time.perf_counter() - start)
    print(json.dumps(rows))


def candidates(device: str) -> dict:
    """Names and functions; a text says why one cannot run."""
    found: dict = {"torch naive": naive}
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()  # without options it is the naive path
        found["torch linear_cross_entropy"] = lambda hidden, head, targets: torch.nn.functional.linear_cross_entropy(
            hidden, head, targets, reduction="none", options=options
        )
    else:
        found["torch linear_cross_entropy"] = f"not in torch {torch.__version__}"
    for name, module in (("Liger", "liger_kernel"), ("cut-cross-entropy", "cut_cross_entropy")):
        if importlib.util.find_spec(module) is None:
            found[name] = "not installed"
        elif device == "cpu":
            found[name] = "runs on a GPU"
    if "Liger" not in found:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        found["Liger"] = lambda hidden, head, targets: LigerFusedLinearCrossEntropyFunction.apply(
            hidden, head, targets, None, None, -100, 0.0, 0.0, "none"
        )[0]
    if "cut-cross-entropy" not in found:
        from cut_cross_entropy import linear_cross_entropy

        # PyPI's release has no implementation "cce_exact"; without the filter it computes every gradient tile
        for name, options in (("cce", {}), ("cce, unfiltered", {"filter_eps": None})):
            found[f"cut-cross-entropy {name}"] = functools.partial(linear_cross_entropy, reduction="none", **options)
    return found


def naive(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """All logits, as Hugging Face models make them, then a float32 cross-entropy."""
    return torch.nn.functional.cross_entropy((hidden @ head.T).float(), targets, reduction="none")


def once(function, step: str, hidden, head, targets) -> torch.Tensor:
    """One pass of the pair loss; returns the summed log-probs."""
    hidden.grad = head.grad = None
    if step == "forward":
        hidden, head = hidden.detach(), head.detach()  # some prepare gradients for whatever requires them
    with torch.set_grad_enabled(step != "forward"):
        sums = -function(hidden, head, targets).float().reshape(-1, RESPONSE).sum(1)
        loss = torch.nn.functional.softplus(-BETA * (sums[::2] - sums[1::2])).mean()
        if step != "forward":
            loss.backward()
    return sums.detach()


def measured_once(function, step: str, hidden, head, targets, device: str) -> dict:
    """Warm up, and read the memory and the value of one pass."""
    once(function, step, hidden, head, targets)
    hidden.grad = head.grad = None
    if device == "cpu":
        return {"logp": float(once(function, step, hidden, head, targets)[0])}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sums = once(function, step, hidden, head, targets)
    torch.cuda.synchronize()
    kept = sum(x.grad.nbytes for x in (hidden, head) if x.grad is not None)  # outputs are not temporaries
    return {"logp": float(sums[0]), "temporaries_mib": (torch.cuda.max_memory_allocated() - before - kept) / MIB}


def synchronize(device: str) -> None:
    """Wait for the GPU, where there is one."""
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
