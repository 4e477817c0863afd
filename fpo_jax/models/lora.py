"""Rows of an adapter: which matrices it is beside, its A and B, and what is trained and what is only read.

LoRA, arXiv 2106.09685: W x + (alpha / r) B A x, with A [inputs, r] and B [r, outputs] of each matrix.
"""

import re

from fpo_jax.models.config import Adapter, ModelConfig
from fpo_jax.models.param_table import Row, groups, rows


def adapter(config: ModelConfig, *, rank: int, alpha: float, dropout: float, modules: str) -> Adapter:
    """Describe an adapter of the layers' matrices.

    Args:
        config: the architecture.
        rank: r >= 1.
        alpha: the additions are scaled by alpha / r.
        dropout: share of the inputs of A that is dropped in training, in [0, 1).
        modules: regular expression over the names that Hugging Face gives the matrices ("q_proj|v_proj", found anywhere
            in "model.layers.0.self_attn.q_proj"); "all-linear" = all of them.

    Raises:
        ValueError: no matrix of that name; lists those there are.
    """
    matrices = [row for row in rows(config) if row.stacked and row.decay]
    chosen = [row for row in matrices if modules == "all-linear" or re.search(modules, row.hf_name)]
    if not chosen:
        names = sorted({row.hf_name.removesuffix(".weight").rpartition(".")[2] for row in matrices})
        raise ValueError(f"lora.modules={modules!r} is in no name of this model's matrices: {', '.join(names)}.")
    targets = []
    for row in chosen:
        sizes = dict(zip(row.letters, row.shape, strict=True))
        inside, outside = _inputs_and_outputs(row, config)
        a, b = (tuple(sizes[letter] for letter in letters) for letters in (inside, outside))
        targets.append((row.path.removeprefix("layers/"), (*a, rank), (rank, *b)))
    return Adapter(rank, alpha, dropout, tuple(targets))


def adapter_rows(config: ModelConfig, of: Adapter) -> tuple[Row, ...]:
    """Return the rows of an adapter: A [L, inputs, r] and B [L, r, outputs] of each matrix, under PEFT's names."""
    by_path, found = {row.path: row for row in rows(config)}, []
    for path, a_shape, b_shape in of.targets:
        row = by_path[f"layers/{path}"]
        inside, outside = _inputs_and_outputs(row, config)
        name = f"base_model.model.{row.hf_name.removesuffix('.weight')}"
        axes = dict(zip(row.letters, row.axes, strict=True)) | {"r": None}
        for part, letters, shape, disk, init in (
            ("a", f"L{inside}r", a_shape, f"r({inside})", "uniform"),
            ("b", f"Lr{outside}", b_shape, f"({outside})r", "zeros"),
        ):
            found.append(
                Row(
                    f"{row.path}_lora_{part}",
                    letters,
                    f"{name}.lora_{part.upper()}.weight",
                    disk,
                    init,
                    decay=True,
                    shape=(config.layers, *shape),
                    axes=tuple(axes[letter] for letter in letters),
                )
            )
    return tuple(found)


def trained_rows(config: ModelConfig, of: Adapter | None) -> tuple[Row, ...]:
    """Return the rows that training changes: all of them, or the adapter's and a reward model's head."""
    if of is None:
        return rows(config)
    return (*adapter_rows(config, of), *(row for row in rows(config) if row.path == "score"))


def frozen_rows(config: ModelConfig, of: Adapter | None) -> tuple[Row, ...]:
    """Return the rows that training only reads: none, or those below an adapter."""
    return () if of is None else tuple(row for row in rows(config) if row.path != "score")


def _inputs_and_outputs(row: Row, config: ModelConfig) -> tuple[str, str]:
    """Return the letters of a matrix's input and output axes; GPT-2's lie on disk the other way round."""
    outside, inside = groups(row.hf_letters)
    return (outside, inside) if config.family == "gpt2" else (inside, outside)
