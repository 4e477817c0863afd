"""The PyTorch side of `benchmarks/kernels.py`: run by it, in a process of its own; prints one line of JSON.

Every candidate is a function (hidden, head, targets) that autograd can go through -> negative log-probs of the tokens
[N], or their sums over each completion.
"""

import functools
import json
import sys
import time

import torch

from kernels import BETA, COMPLETION, MIB, arrays, missing, reason


def main() -> None:
    """Measure every candidate at the size given on the command line."""
    size = json.loads(sys.argv[1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, head, targets = (torch.from_numpy(x).to(device) for x in arrays(size["tokens"], size["D"], size["V"]))
    dtype = getattr(torch, size["dtype"])
    hidden, head = (x.to(dtype).requires_grad_() for x in (hidden, head))
    targets, rows, live = targets.long(), [], []
    for name in size["candidates"]:
        function = candidate(name, device)
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
                row["note"] = reason(error)
    for _ in range(size["repeats"]):
        for row, function in live:
            synchronize(device)
            start = time.perf_counter()
            once(function, row["pass"], hidden, head, targets)
            synchronize(device)
            row["times"].append(time.perf_counter() - start)
    print(json.dumps(rows))


def candidate(name: str, device: str):
    """Return a candidate, or why it cannot run."""
    if not name.startswith("torch"):
        if note := missing(name) or ("runs on a GPU" if device == "cpu" else ""):
            return note
    try:
        return CANDIDATES[name]()
    except Exception as error:
        return reason(error)


def linear_cross_entropy():
    """PyTorch's own, by blocks."""
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        return f"not in torch {torch.__version__}"
    options = torch.nn.LinearCrossEntropyOptions()  # without options it is the naive path
    return functools.partial(torch.nn.functional.linear_cross_entropy, reduction="none", options=options)


def liger_triton():
    """Liger's operator of the losses, by blocks of tokens; per token, its backward pass makes the logits again."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return lambda hidden, head, targets: LigerFusedLinearCrossEntropyFunction.apply(
        hidden, head, targets, None, None, -100, 0.0, 0.0, "none"
    )[0]


def liger_cute():
    """Liger's operator of log-probs: on Hopper a CuTe DSL kernel that writes no logits, elsewhere blocks in PyTorch."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    if torch.cuda.get_device_capability() != (9, 0):
        return "runs on a Hopper GPU"
    return lambda hidden, head, targets: LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, head, targets)


def cut_cross_entropy(**options):
    """Apple's; by default it leaves out tiles of gradients that are small."""
    from cut_cross_entropy import linear_cross_entropy

    return functools.partial(linear_cross_entropy, reduction="none", **options)


def quack():
    """Quack's cross-entropy on all logits."""
    from quack.linear_cross_entropy import linear_cross_entropy_func

    return lambda hidden, head, targets: linear_cross_entropy_func(hidden, head, None, targets, reduction="none")


def quack_chunked():
    """Quack's blocks of tokens, which return sums alone: one call a completion."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def sums(hidden, head, targets):
        completions = zip(hidden.split(COMPLETION), targets.split(COMPLETION), strict=True)
        return torch.stack([chunked_linear_cross_entropy(x, head, y, reduction="sum") for x, y in completions])

    return sums


def naive(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """All logits, as Hugging Face models make them, then a float32 cross-entropy."""
    return torch.nn.functional.cross_entropy((hidden @ head.T).float(), targets, reduction="none")


CANDIDATES = {  # name -> what imports it and returns it, or why it cannot run
    "torch naive": lambda: naive,
    "torch linear_cross_entropy": linear_cross_entropy,
    "Liger Triton": liger_triton,
    "Liger CuTe DSL": liger_cute,
    "cut-cross-entropy cce": cut_cross_entropy,
    "cut-cross-entropy cce, unfiltered": functools.partial(cut_cross_entropy, filter_eps=None),
    "cut-cross-entropy cce_exact": functools.partial(cut_cross_entropy, impl="cce_exact"),
    "cut-cross-entropy cce_kahan_full_c": functools.partial(cut_cross_entropy, impl="cce_kahan_full_c"),
    "quack": quack,
    "quack chunked": quack_chunked,
}


def once(function, step: str, hidden, head, targets) -> torch.Tensor:
    """One pass of the pair loss; returns the summed log-probs."""
    hidden.grad = head.grad = None
    if step == "forward":
        hidden, head = hidden.detach(), head.detach()  # some prepare gradients for whatever requires them
    with torch.set_grad_enabled(step != "forward"):
        sums = -function(hidden, head, targets).float().reshape(len(targets) // COMPLETION, -1).sum(1)
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
