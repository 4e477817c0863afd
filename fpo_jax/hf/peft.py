"""An adapter beside its base -> one model, or a directory that PEFT reads; layer by layer, never whole on the host.

merged      W + scale B A as array-likes that `save.export` fetches block by block
write_peft  adapter_config.json and adapter_model.safetensors
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from fpo_jax import models, types
from fpo_jax.hf import companions, digests, load
from fpo_jax.hf import hub as directories
from fpo_jax.io import atomic_io
from fpo_jax.models import params


class _Stored:
    """One parameter of a directory, read where it is asked for, with what an adapter adds."""

    def __init__(
        self,
        entry: params.Entry,
        tensors: dict[tuple[int, ...], load.Place],
        pair: tuple[Any, Any] | None,
        scale: float,
    ):
        self.shape = entry.shape
        self._entry, self._tensors, self._pair, self._scale = entry, tensors, pair, scale

    def __getitem__(self, index: tuple[int, ...] | slice) -> np.ndarray:
        place = index if isinstance(index, tuple) else ()
        base = params.from_hf(self._entry, self._tensors[place].mapped(self._entry.disk_shape))
        if isinstance(index, slice):
            return np.array(base[index])
        if self._pair is None:
            return np.array(base)
        a, b = (np.asarray(part[place], np.float32) for part in self._pair)
        added = a.reshape(-1, a.shape[-1]) @ b.reshape(b.shape[0], -1)
        return np.asarray(base, np.float32) + self._scale * added.reshape(base.shape)  # our matrices' inputs come first


def merged(
    adapter_params: types.PyTree, base: Path, config: models.ModelConfig, adapter: models.Adapter
) -> dict[str, Any]:
    """Return all parameters of the model that base and adapter are together, float32 where there is an adapter.

    Args:
        adapter_params: A and B of every target, and a reward model's head; array-likes.
        base: directory that the training started from.
        config: its architecture.
        adapter: of the training.
    """
    own = params.flatten(adapter_params)
    tensors = load.located(base, load.stored(base, config))
    found: dict[str, Any] = {}
    for entry in params.entries(config):
        if entry.path in own:
            found[entry.path] = own[entry.path]
            continue
        a, b = own.get(f"{entry.path}_lora_a"), own.get(f"{entry.path}_lora_b")
        located = {place: tensors[name] for name, place in entry.tensors()}
        found[entry.path] = _Stored(entry, located, None if a is None else (a, b), adapter.scale)
    return params.nest(found)


def write_peft(
    adapter_params: types.PyTree,
    config: models.ModelConfig,
    adapter: models.Adapter,
    *,
    out_dir: Path,
    base_name: str,
    revision: str | None,
    source_dir: Path,
) -> None:
    """Write an adapter as PEFT does, with its tokenizer; the directory appears whole or not at all.

    Args:
        adapter_params: as for merged.
        config: the architecture of the base.
        adapter: of the training.
        out_dir: absent or empty.
        base_name: directory or hub name of the base, for adapter_config.json.
        revision: of the base on the hub, for the same.
        source_dir: tokenizer, chat template and prompt format of the training are copied from here.

    Raises:
        ValueError: out_dir is in use, a value is not finite, the base is multimodal, or transformers would not render a
            conversation as source_dir records it.
    """
    out_dir = atomic_io.vacant(out_dir)
    if (source_dir / "config.json").exists() and (others := directories.left_out(source_dir)):
        raise ValueError(
            f"{source_dir} also holds {others}, beside which PEFT names the matrices differently; export the merged"
            " model."
        )
    own, tensors = params.flatten(adapter_params), {}
    for entry in params.adapter_entries(config, adapter):
        for name, place in entry.tensors():
            tensors[name] = np.ascontiguousarray(params.to_hf(entry, np.asarray(own[entry.path][place])))
    if config.reward_head:
        tensors["base_model.model.score.weight"] = np.asarray(own["score"])
    if bad := [name for name, array in tensors.items() if not np.isfinite(array).all()]:
        raise ValueError(f"{bad[0]} has values that are not finite; the adapter is broken.")
    modules = sorted({entry.hf_name.split(".lora_")[0] for entry in params.adapter_entries(config, adapter)})
    content = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if config.reward_head else "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": revision,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": sorted({re.sub(r".*\{layer\}\.", "", module) for module in modules}),
        "modules_to_save": ["score"] if config.reward_head else None,
        "fan_in_fan_out": config.of_family.transposed,
        "use_rslora": adapter.rslora,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }
    with atomic_io.writing_folder(out_dir) as partial:
        directories.copy_companions(source_dir, partial, leave_out=("config.json", "generation_config.json"))
        companions.check(partial)
        (partial / "adapter_config.json").write_text(directories.dumps(content))
        safetensors.numpy.save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        digests.write(partial)
