"""Rows of an adapter: which matrices it is beside, its A and B, and what is trained and what is only read.

LoRA, arXiv 2106.09685: W x + (alpha / r) B A x, with A [inputs, r] and B [r, outputs] of each matrix. rsLoRA, arXiv
2312.03732, divides alpha by sqrt(r). DoRA, arXiv 2402.09353, has a magnitude m [outputs] too, which takes the place of
the norms that W + (alpha / r) B A has over its inputs.
"""

import re
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from fpo_jax.models import nf4
from fpo_jax.models.config import Adapter, ModelConfig
from fpo_jax.models.param_table import Entry, entries, groups


def adapter(
    config: ModelConfig,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    modules: str,
    use_rslora: bool = False,
    use_dora: bool = False,
    modules_to_save: Sequence[str] = (),
    base_dtype: str = "",
) -> Adapter:
    """Describe an adapter of the layers' matrices, of experts or of the embedding.

    Args:
        config: the architecture.
        rank: r >= 1.
        alpha: the additions are scaled by alpha / r, or by alpha / sqrt(r).
        dropout: share of the inputs of A that is dropped in training, in [0, 1).
        modules: regular expression over the names that Hugging Face gives the matrices ("q_proj|v_proj", found anywhere
            in "model.layers.0.self_attn.q_proj"); "all-linear" = those that all tokens meet,
            without the embedding.
        use_rslora: divide alpha by sqrt(r) and not by r (rsLoRA).
        use_dora: train the magnitudes of the matrices' outputs too (DoRA).
        modules_to_save: ends of Hugging Face's names of modules that are trained whole, as PEFT matches them: "norm" is
            the end of every norm's name, "model.norm" of the last one's.
        base_dtype: "nf4" holds the frozen matrices of the layers in four bits (QLoRA); "" = as the other weights.

    Raises:
        ValueError: no matrix or module of that name; lists those there are. A router, or an embedding that is the LM
            head too. Drop-out beside experts, magnitudes of them or of the embedding. A module that is to have an
            adapter and to be trained whole. A model without a matrix that NF4 can hold.
    """
    matrices = [entry for entry in entries(config) if entry.decay and (entry.stacked or entry.path == "embed")]
    if modules == "all-linear":  # transformers has no linear layers of the others
        chosen = [entry for entry in matrices if entry.stacked and not _is_routed(entry)]
    else:
        chosen = [entry for entry in matrices if re.search(modules, entry.hf_name)]
        _check_named(chosen, config, modules=modules, dropout=dropout, use_dora=use_dora)
    if not chosen:
        named = [entry for entry in matrices if entry.stacked or not config.tied_head]
        names = sorted({entry.hf_name.removesuffix(".weight").rpartition(".")[2] for entry in named})
        raise ValueError(f"lora.modules={modules!r} is in no name of this model's matrices: {', '.join(names)}.")
    targets, saved = tuple(entry.path for entry in chosen), _saved(config, modules_to_save)
    if both := [entry.hf_name for entry in chosen if entry.path in saved]:
        raise ValueError(
            f"{both[0]} is named by lora.modules and by lora.modules_to_save, and is trained whole or by an adapter;"
            " name it in one of them."
        )
    quantised = tuple(
        entry.path
        for entry in entries(config)
        if base_dtype == "nf4" and entry.path not in saved and four_bit_axis(entry, config) is not None
    )
    if base_dtype == "nf4" and not quantised:
        raise ValueError(
            f"lora.base_dtype=nf4 holds matrices in blocks of {nf4.BLOCK} inputs, and no matrix of this model has a"
            " multiple of them; unset it."
        )
    return Adapter(rank, alpha, dropout, targets, use_rslora, use_dora, saved, quantised)


def _check_named(chosen: Sequence[Entry], config: ModelConfig, *, modules: str, dropout: float, use_dora: bool) -> None:
    """Refuse what no adapter is built for, and what PEFT has no counterpart of."""
    for entry in chosen:
        named = f"lora.modules={modules!r} is in the name {entry.hf_name}"
        if entry.path.endswith("/router"):
            raise ValueError(
                f"{named}, and the router has no adapter; name others, self_attn for all matrices of attention."
            )
        if entry.path == "embed" and config.tied_head and not config.reward_head:
            raise ValueError(
                f"{named}, and this embedding is the LM head too, which PEFT's adapter of it leaves as it was until it"
                " is merged; train it whole by lora.modules_to_save."
            )
        if use_dora and (entry.routed or entry.path == "embed"):
            raise ValueError(f"{named}, and lora.use_dora has no magnitudes of it; unset lora.use_dora or name others.")
        if dropout and entry.routed:
            raise ValueError(
                f"{named}, and lora.dropout={dropout:g} is not built beside experts, nor in PEFT; set it to 0."
            )


def four_bit_axis(entry: Entry, config: ModelConfig) -> int | None:
    """Return the axis of a parameter along which NF4 has its blocks; None = NF4 cannot hold it."""
    return nf4.input_axis(entry, transposed=config.of_family.transposed)


def _saved(config: ModelConfig, names: Sequence[str]) -> tuple[str, ...]:
    """Return the paths of all parameters of the modules whose names end so."""
    own = [(module_of(entry), entry) for entry in entries(config) if entry.path != "score"]
    for name in names:
        found = [entry for module, entry in own if module.endswith(name)]
        if routed := [entry for entry in found if _is_routed(entry)]:
            raise ValueError(
                f"lora.modules_to_save: {name!r} is the end of {module_of(routed[0])}, and the router and the experts"
                " are trained by lora.rank=0 alone; name others."
            )
        if not found:
            ends = sorted({module.rpartition(".")[2] for module, entry in own if not _is_routed(entry)})
            tied = f"; the LM head is {module_of(own[0][1])}" if config.tied_head else ""
            raise ValueError(
                f"lora.modules_to_save: {name!r} is the end of no module's name in this model: {', '.join(ends)}{tied}."
            )
    return tuple(entry.path for module, entry in own if any(module.endswith(name) for name in names))


def module_of(entry: Entry) -> str:
    """Return the name that Hugging Face gives the module of a parameter: "model.layers.{layer}.mlp.up_proj"."""
    return entry.hf_name.rpartition(".")[0]


def trains_head(config: ModelConfig, of: Adapter | None) -> bool:
    """Whether the LM head is trained, or the embedding that it is tied to."""
    return of is None or ("embed" if config.tied_head else "head") in of.saved


def _is_routed(entry: Entry) -> bool:
    return entry.routed or entry.path.endswith("/router")


def adapter_entries(config: ModelConfig, of: Adapter | None) -> tuple[Entry, ...]:
    """Return the entries of an adapter: A [L, inputs, r] and B [L, r, outputs] of each matrix, under PEFT's names.

    Each expert has its own, A [L, E, inputs, r] and B [L, E, r, outputs]. The embedding has A [V, r] and B [r, D], of
    which A starts at zero. With DoRA also the magnitudes m [L, outputs], which start at the norms of the matrices
    (`magnitude`).
    """
    if of is None:
        return ()
    found = []
    for entry in (entry for entry in entries(config) if entry.path in of.targets):
        inside, outside = _inputs_and_outputs(entry, config)
        name = f"base_model.model.{entry.hf_name.removesuffix('.weight')}"
        sizes = dict(zip(entry.letters, entry.shape, strict=True)) | {"r": of.rank}
        axes = dict(zip(entry.letters, entry.axes, strict=True)) | {"r": None}
        stack = "" if not entry.stacked else "LE" if entry.routed else "L"
        names, starts = (".weight", ("uniform", "zeros")) if entry.stacked else ("", ("zeros", "unit_normal"))
        middle = "lora" if entry.stacked else "lora_embedding"
        parts = [
            ("a", f"{stack}{inside}r", f"{middle}_A{names}", f"r({inside})", starts[0]),
            ("b", f"{stack}r{outside}", f"{middle}_B{names}", f"({outside})r", starts[1]),
        ]
        if of.dora:
            parts.append(("m", f"L{outside}", "lora_magnitude_vector", f"({outside})", "magnitude"))
        for part, letters, own, disk, init in parts:
            found.append(
                Entry(
                    f"{entry.path}_lora_{part}",
                    letters,
                    f"{name}.{own}",
                    disk,
                    init,
                    decay=part != "m",
                    shape=tuple(sizes[letter] for letter in letters),
                    first_layer=entry.first_layer,
                    axes=tuple(axes[letter] for letter in letters),
                )
            )
    return tuple(found)


def trained_entries(config: ModelConfig, of: Adapter | None) -> tuple[Entry, ...]:
    """Return the entries that training changes: all, or the adapter's, what is saved beside it and a reward's head."""
    if of is None:
        return entries(config)
    return (*adapter_entries(config, of), *(entry for entry in entries(config) if _is_whole(entry, of)))


def frozen_entries(config: ModelConfig, of: Adapter | None) -> tuple[Entry, ...]:
    """Return the entries that training only reads: none, or those below an adapter."""
    return () if of is None else tuple(entry for entry in entries(config) if not _is_whole(entry, of))


def _is_whole(entry: Entry, of: Adapter) -> bool:
    """Whether a parameter of the model is trained itself, beside an adapter."""
    return entry.path == "score" or entry.path in of.saved


def magnitude(weight: Float[Array, "L ..."], like: Entry) -> Float[Array, "L ..."]:
    """Return the norms [L, outputs] of matrices [L, inputs, outputs] over their inputs, float32.

    Args:
        weight: the matrices of all layers.
        like: the entry of the magnitudes.
    """
    inputs = tuple(range(1, weight.ndim - len(like.shape) + 1))
    return jnp.sqrt(jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=inputs))


def is_b(path: str) -> bool:
    """Whether a path is that of an adapter's B, which LoRA+ trains at a rate of its own."""
    return path.endswith("_lora_b")


def _inputs_and_outputs(entry: Entry, config: ModelConfig) -> tuple[str, str]:
    """Return the letters of a matrix's input and output axes; GPT-2's and stacked experts' inputs lie first on disk."""
    *experts, first, last = groups(entry.hf_letters)
    inputs_first = config.of_family.transposed or experts or not entry.stacked
    inside, outside = (first, last) if inputs_first else (last, first)
    return inside, "".join(letter for letter in entry.letters if letter in outside)
