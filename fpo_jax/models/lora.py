"""Rows of an adapter: which matrices it is beside, its A and B, and what is trained and what is only read.

LoRA, arXiv 2106.09685: W x + (alpha / r) B A x, with A [inputs, r] and B [r, outputs] of each matrix. rsLoRA, arXiv
2312.03732, divides alpha by sqrt(r).
"""

import re

from fpo_jax.models.config import Adapter, ModelConfig
from fpo_jax.models.param_table import Entry, entries, groups


def adapter(
    config: ModelConfig, *, rank: int, alpha: float, dropout: float, modules: str, use_rslora: bool = False
) -> Adapter:
    """Describe an adapter of the layers' matrices.

    Args:
        config: the architecture.
        rank: r >= 1.
        alpha: the additions are scaled by alpha / r, or by alpha / sqrt(r).
        dropout: share of the inputs of A that is dropped in training, in [0, 1).
        modules: regular expression over the names that Hugging Face gives the matrices ("q_proj|v_proj", found anywhere
            in "model.layers.0.self_attn.q_proj"); "all-linear" = all of them.
        use_rslora: divide alpha by sqrt(r) and not by r (rsLoRA).

    Raises:
        ValueError: no matrix of that name; lists those there are. A router, or matrices of experts, by name.
    """
    every = [entry for entry in entries(config) if entry.stacked and entry.decay]
    matrices = [entry for entry in every if not _is_routed(entry)]  # transformers has no linear layers of the others
    refused = [entry for entry in every if _is_routed(entry) and modules != "all-linear"]
    if wrong := [entry.hf_name for entry in refused if re.search(modules, entry.hf_name)]:
        raise ValueError(
            f"lora.modules={modules!r} is in the name {wrong[0]}, and the router and the experts have no adapter; name"
            " others, self_attn for all matrices of attention."
        )
    chosen = [entry for entry in matrices if modules == "all-linear" or re.search(modules, entry.hf_name)]
    if not chosen:
        names = sorted({entry.hf_name.removesuffix(".weight").rpartition(".")[2] for entry in matrices})
        raise ValueError(f"lora.modules={modules!r} is in no name of this model's matrices: {', '.join(names)}.")
    return Adapter(rank, alpha, dropout, tuple(entry.path for entry in chosen), use_rslora)


def _is_routed(entry: Entry) -> bool:
    return entry.routed or entry.path.endswith("/router")


def adapter_entries(config: ModelConfig, of: Adapter | None) -> tuple[Entry, ...]:
    """Return the entries of an adapter: A [L, inputs, r] and B [L, r, outputs] of each matrix, under PEFT's names."""
    if of is None:
        return ()
    found = []
    for entry in (entry for entry in entries(config) if entry.path in of.targets):
        inside, outside = _inputs_and_outputs(entry, config)
        name = f"base_model.model.{entry.hf_name.removesuffix('.weight')}"
        sizes = dict(zip(entry.letters, entry.shape, strict=True)) | {"r": of.rank}
        axes = dict(zip(entry.letters, entry.axes, strict=True)) | {"r": None}
        for part, letters, disk, init in (
            ("a", f"L{inside}r", f"r({inside})", "uniform"),
            ("b", f"Lr{outside}", f"({outside})r", "zeros"),
        ):
            found.append(
                Entry(
                    f"{entry.path}_lora_{part}",
                    letters,
                    f"{name}.lora_{part.upper()}.weight",
                    disk,
                    init,
                    decay=True,
                    shape=tuple(sizes[letter] for letter in letters),
                    axes=tuple(axes[letter] for letter in letters),
                )
            )
    return tuple(found)


def trained_entries(config: ModelConfig, of: Adapter | None) -> tuple[Entry, ...]:
    """Return the entries that training changes: all of them, or the adapter's and a reward model's head."""
    if of is None:
        return entries(config)
    return (*adapter_entries(config, of), *(entry for entry in entries(config) if entry.path == "score"))


def frozen_entries(config: ModelConfig, of: Adapter | None) -> tuple[Entry, ...]:
    """Return the entries that training only reads: none, or those below an adapter."""
    return () if of is None else tuple(entry for entry in entries(config) if entry.path != "score")


def is_b(path: str) -> bool:
    """Whether a path is that of an adapter's B, which LoRA+ trains at a rate of its own."""
    return path.endswith("_lora_b")


def _inputs_and_outputs(entry: Entry, config: ModelConfig) -> tuple[str, str]:
    """Return the letters of a matrix's input and output axes; GPT-2's lie on disk the other way round."""
    outside, inside = groups(entry.hf_letters)
    return (outside, inside) if config.of_family.transposed else (inside, outside)
