"""The cases of `benchmarks/train_step.py` for one GPU of 80 GB, and the utilisation that its times stand for.

Weights, gradients and both moments of AdamW take 16 bytes a parameter in float32, with accumulation 20 in ours: 2.9
billion parameters (12 layers) 43 or 54 GiB, 3.3 (14) 50 or 62. TRL's autocast keeps a bfloat16 copy for 2 bytes more;
with bfloat16 weights it takes 8 in all.
"""

import dataclasses

from benchmarks.train_step_turns import Case
from fpo_jax import models
from fpo_jax.perf import flops, hardware

LOSS_ATOL = 2e-2  # of a first loss near log 2: log-probs are sums over hundreds of tokens in bfloat16; measured 6e-3
_SHAPE = {
    "vocab": 32_000, "layers": 12, "width": 4096, "ffn": 14_336, "heads": 32, "device": "gpu", "dtype": "bfloat16",
    "rate": 1e-6, "rounds": 3, "remat": "full", "trl_remat": "full", "trl_micro": 4,
}  # fmt: skip
CASES = (
    Case("mistral short", groups=8, candidates=2, prompt=512, completion=512, **_SHAPE),
    Case("mistral long", groups=8, candidates=2, prompt=1536, completion=512, **_SHAPE),
    Case("mistral K=4", groups=4, candidates=4, prompt=1536, completion=512, **_SHAPE),
)


def tiny(case: Case) -> Case:
    """Return a case with everything that a GPU has but its size, to run on a CPU."""
    small = {"vocab": 1000, "width": 64, "ffn": 224, "heads": 4, "layers": 2, "device": "tiny"}
    return dataclasses.replace(case, prompt=case.prompt // 16, completion=case.completion // 16, **small)


def environment(side: str, device: str) -> dict[str, str]:
    """Return the variables that a side's process needs."""
    if device != "gpu":
        return {"JAX_PLATFORMS": "cpu"}
    if side.startswith("trl"):
        return {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93"}
    return {"JAX_PLATFORMS": "cuda"} | memory


def work(case: Case, *, shared: bool) -> flops.Work:
    """Return what the mathematics of an update takes: candidates with their prompts, or a prompt once a group."""
    count = case.groups * case.candidates
    lengths, contexts = [case.prompt + case.completion] * count, [0] * count
    if shared:
        lengths = [case.prompt] * case.groups + [case.completion] * count
        contexts = [0] * case.groups + [case.prompt] * count
    return flops.work(lengths, count * case.completion, contexts=contexts, sliding_window=None)


def utilisation(case: Case, config: models.ModelConfig, row: dict) -> dict:
    """Return the model FLOP/s utilisations of a row of the table, or nothing where the peak of its device is unknown.

    `mfu` counts what the side's layout has to compute (ours-shared: a prompt once), `mfu_with_reference` the same with
    the reference pass and its seconds, `mfu_candidates` every candidate with its prompt, whoever computes it: 6
    operations per parameter of a matrix and token, attention below the diagonal, scored positions in the head alone; no
    padding, no recomputation.
    """
    capacity = hardware.CAPACITIES.get(row["device"])
    if capacity is None:
        return {}
    own, whole = (work(case, shared=shared) for shared in (row["side"] == "ours-shared", False))
    update, reference = flops.train_step(config, own), flops.forward(config, own)
    return {
        "mfu": update / (row["seconds"] * capacity.flops),
        "mfu_with_reference": (update + reference) / (row["with_reference"] * capacity.flops),
        "mfu_candidates": flops.train_step(config, whole) / (row["seconds"] * capacity.flops),
    }


def table(rows: list[dict]) -> str:
    """Rows as Markdown."""
    columns = (
        "case, side, s / update (least and most), with reference, tokens/s, MFU, MFU with reference,"
        " MFU as if every candidate had its own prompt, peak GiB, compile s, times ours"
    )
    lines = [f"| {columns.replace(', ', ' | ')} |", "|---" * 11 + "|"]
    for row in rows:
        best = next((one for one in rows if one["case"] == row["case"] and one["side"] == "ours-shared"), row)
        shares = [f"{row[key]:.1%}" if key in row else "-" for key in ("mfu", "mfu_with_reference", "mfu_candidates")]
        lines.append(
            f"| {row['case']} | {row['side']} | {row['seconds']:.3f} ({row['fastest']:.3f}, {row['slowest']:.3f})"
            f" | {row['with_reference']:.3f} | {row['tokens_per_s']:,.0f} | {' | '.join(shares)}"
            f" | {row['peak_mib'] / 1024:.1f} | {row['first_round_s']:.1f}"
            f" | {row['with_reference'] / best['with_reference']:.2f} |"
        )
    return "\n".join(lines)


def check_losses(rows: list[dict]) -> list[str]:
    """Print how far the losses of a case are from its first side's, and return what is too far in the first update.

    Later ones are of weights that AdamW moved by the signs of gradients, those near 0 included, whose rounding differs.
    """
    problems, first = [], rows[0]
    for row in rows[1:]:
        apart = [abs(a - b) for a, b in zip(first["losses"], row["losses"], strict=True)]
        text = f"{row['case']}: losses of {row['side']} and {first['side']}: {apart[0]:.1e} apart in the first update"
        print(f"{text}, at most {max(apart):.1e} in {len(apart)}", flush=True)
        if not apart[0] <= LOSS_ATOL:
            problems.append(text)
    return problems
