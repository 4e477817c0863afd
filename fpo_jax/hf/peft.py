"""An adapter beside its base -> one model, or from and to a directory of PEFT; layer by layer, never whole on the host.

merged      W + scale B A as array-likes that `save.export` fetches block by block
write_peft  adapter_config.json and adapter_model.safetensors
read_peft   what adapter_config.json says, in the words of our configuration
load_peft   the tensors, onto the mesh
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from fpo_jax import models, types
from fpo_jax.hf import companions, digests, load
from fpo_jax.hf import hub as directories
from fpo_jax.io import atomic_io
from fpo_jax.models import nf4, params


class _Stored:
    """One parameter of a directory, read where it is asked for, with what an adapter adds."""

    def __init__(
        self,
        entry: params.Entry,
        tensors: dict[tuple[int, ...], load.Place],
        parts: list[Any],
        scale: float,
        four_bit_axis: int | None,
    ):
        self.shape = entry.shape
        self._entry, self._tensors, self._parts, self._scale = entry, tensors, parts, scale
        self._four_bit_axis = four_bit_axis

    def __getitem__(self, index: tuple[int, ...] | slice) -> np.ndarray:
        place = index if isinstance(index, tuple) else ()
        base = params.from_hf(self._entry, self._tensors[place].mapped(self._entry.disk_shape))
        base = base[index] if isinstance(index, slice) else base
        if self._four_bit_axis is not None:
            base = np.asarray(nf4.quantise(jnp.asarray(base), self._four_bit_axis)[...])
        if not self._parts:
            return np.array(base)
        a, b, *magnitude = (np.asarray(part[place], np.float32) for part in self._parts)
        a = a[index] if isinstance(index, slice) else a  # of the embedding, whose first axis is A's
        experts = a.shape[:1] if self._entry.routed and not self._entry.of_experts else ()
        rank = a.shape[-1]
        added = a.reshape(*experts, -1, rank) @ b.reshape(*experts, rank, -1)  # our matrices' inputs come first
        whole = np.asarray(base, np.float32).reshape(added.shape) + self._scale * added
        for m in magnitude:
            norm = np.linalg.norm(whole, axis=0)
            whole *= m.reshape(-1) / np.where(norm > 0, norm, 1)
        return whole.reshape(base.shape)


def merged(
    adapter_params: types.PyTree, base: Path, config: models.ModelConfig, adapter: models.Adapter
) -> dict[str, Any]:
    """Return all parameters of the model that base and adapter are together, float32 where there is an adapter.

    What the training held in four bits is rounded to them here too, so that the model is the one that was trained.

    Args:
        adapter_params: array-likes of all that was trained: A, B and magnitudes, and what was trained whole.
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
        parts = [own[path] for part in "abm" if (path := f"{entry.path}_lora_{part}") in own]
        located = {place: tensors[name] for name, place in entry.tensors()}
        axis = params.four_bit_axis(entry, config) if entry.path in adapter.quantised else None
        found[entry.path] = _Stored(entry, located, parts, adapter.scale, axis)
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
        ValueError: out_dir is in use, a value is not finite, the base is multimodal, PEFT would read the adapter as
            another, or transformers would not render a conversation as source_dir records it.
    """
    out_dir = atomic_io.vacant(out_dir)
    if (source_dir / "config.json").exists() and (others := directories.left_out(source_dir)):
        raise ValueError(
            f"{source_dir} also holds {others}, beside which PEFT names the matrices differently; export the merged"
            " model."
        )
    if not config.of_family.peft_has_mlp and any("/mlp/" in path for path in adapter.targets):
        raise ValueError(
            f"PEFT would take the adapters of the MLPs and shared experts of {config.family} for those of its experts;"
            " export the merged model, or train with lora.modules=self_attn."
        )
    own, tensors = params.flatten(adapter_params), {}
    for entry, name, place in _tensors(config, adapter):
        tensors[name] = np.ascontiguousarray(params.to_hf(entry, np.asarray(own[entry.path][place])))
    tensors |= _tensors_of_experts(own, config, adapter)
    head = _tied_head(config, adapter)
    if head is not None:
        tensors[head] = tensors[_PREFIX + params.entries(config)[0].hf_name].copy()
    if bad := [name for name, array in tensors.items() if not np.isfinite(array).all()]:
        raise ValueError(f"{bad[0]} has values that are not finite; the adapter is broken.")
    plain = [entry for entry in params.adapter_entries(config, adapter) if not entry.routed]
    modules = {entry.hf_name.split(".lora_")[0].removeprefix(_PREFIX) for entry in plain}
    content = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if config.reward_head else "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": revision,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": sorted({re.sub(r".*\{layer\}\.", "", module) for module in modules}),
        **_target_parameters(config, adapter),
        "modules_to_save": _saved_modules(config, adapter) or None,
        "ensure_weight_tying": head is not None,
        "fan_in_fan_out": config.of_family.transposed,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }
    with atomic_io.writing_folder(out_dir) as partial:
        directories.copy_companions(source_dir, partial, leave_out=("config.json", "generation_config.json"))
        companions.check(partial)
        (partial / directories.ADAPTER_CONFIG).write_text(directories.dumps(content))
        safetensors.numpy.save_file(tensors, partial / directories.ADAPTER, metadata={"format": "pt"})
        digests.write(partial)


_PREFIX = "base_model.model."
# keys of adapter_config.json that change no number of an adapter that is there, or that another key switches on
_SILENT = frozenset(
    "peft_type task_type auto_mapping base_model_name_or_path revision inference_mode peft_version fan_in_fan_out"
    " megatron_core qalora_group_size runtime_config target_modules modules_to_save r lora_alpha lora_dropout"
    " use_rslora use_dora ensure_weight_tying".split()
)
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # init_lora_weights that leave the base as it is
_OF_REWARD = frozenset({"score", "classifier"})  # PEFT adds them to modules_to_save of a sequence classifier


def read_peft(directory: Path, config: models.ModelConfig) -> dict[str, Any]:
    """Read what an adapter is, as fields of the section `lora`: rank, alpha, dropout, modules and its kind.

    Args:
        directory: from hub.adapter_dir.
        config: the architecture of the base.

    Raises:
        ValueError: broken, no LoRA, or a key that changes numbers and is not built, by name; no matrix of this model.
    """
    path = directory / directories.ADAPTER_CONFIG
    content = directories.read_json(path)
    if content.get("peft_type") != "LORA":
        raise ValueError(f"{path} is of peft_type={content.get('peft_type')!r}; adapters are LORA here.")
    if (start := content.get("init_lora_weights")) not in _STARTS:
        raise ValueError(
            f"{path} has init_lora_weights={start!r}, which changes the weights below the adapter; convert it with"
            " PEFT's path_initial_model_for_weight_conversion."
        )
    others = content.keys() - _SILENT - {"init_lora_weights"}
    if unknown := sorted(key for key in others if content[key] not in (None, False, "none", [], {})):
        named = ", ".join(f"{key}={content[key]!r}" for key in unknown)
        raise ValueError(f"{path} has {named}, which changes numbers and is not built; train that adapter with PEFT.")
    saved = [name for name in content.get("modules_to_save") or () if name not in _OF_REWARD]
    if config.tied_head:  # whose copy in the file `load_peft` compares
        head = params.hf_head_name(config).removesuffix(".weight")
        saved = [name for name in saved if not head.endswith(name)]
    return {
        "rank": _number(content, "r", path, whole=True),
        "alpha": float(_number(content, "lora_alpha", path)),
        "dropout": float(_number(content, "lora_dropout", path)),
        "use_rslora": bool(content.get("use_rslora", False)),
        "use_dora": bool(content.get("use_dora", False)),
        "modules": _modules(directory, config),
        "modules_to_save": tuple(saved),
    }


def base_of(directory: Path) -> str:
    """Return the name of the base that adapter_config.json has; empty where it has none."""
    return str(directories.read_json(directory / directories.ADAPTER_CONFIG).get("base_model_name_or_path") or "")


def check_peft(directory: Path, config: models.ModelConfig, adapter: models.Adapter) -> None:
    """Check names, shapes and dtypes of the tensors; reads their header alone.

    Raises:
        ValueError: missing, unexpected, misshapen or non-float tensors; the first of each.
    """
    _located(directory, config, adapter)


def load_peft(
    directory: Path,
    config: models.ModelConfig,
    adapter: models.Adapter,
    *,
    shardings: types.PyTree | None = None,
) -> dict[str, Any]:
    """Read the tensors of an adapter as a tree of what is trained, float32, on its devices.

    Args:
        directory: from hub.adapter_dir.
        config: the architecture of the base.
        adapter: what `read_peft` says.
        shardings: tree of where each parameter lives; None = the default device.

    Returns:
        Nested dict of jax.Array; a reward model's new head is not in it, unless the directory has one.

    Raises:
        ValueError: as check_peft.
    """
    tensors = _located(directory, config, adapter)
    places = {} if shardings is None else params.flatten(shardings)
    found: dict[str, list[tuple[load.Tensor, tuple[int, ...]]]] = {}
    entries = {entry.path: entry for entry in params.trained_entries(config, adapter)}
    for entry, name, place in _tensors(config, adapter):
        if name in tensors:
            found.setdefault(entry.path, []).append((tensors[name], place))
    if (head := _tied_head(config, adapter)) is not None:
        copy, embedding = tensors[head], tensors[_PREFIX + params.entries(config)[0].hf_name]
        if not np.array_equal(copy.mapped(copy.shape), embedding.mapped(embedding.shape)):
            raise ValueError(
                f"the adapter in {directory} has an LM head that is not its embedding, and the model ties the two;"
                " train it with PEFT's ensure_weight_tying."
            )
    return params.nest(
        {
            path: load.at_once(entries[path], placed, np.dtype(np.float32), places.get(path))
            for path, placed in found.items()
        }
    )


def _saved_modules(config: models.ModelConfig, adapter: models.Adapter) -> list[str]:
    """Return what is trained whole, as ends of module names that are the ends of no others.

    PEFT's ensure_weight_tying knows embeddings by the name embed_tokens alone; where a tied one has another, its copy
    as the LM head is named too.
    """
    own = [entry for entry in params.trained_entries(config, adapter) if entry.path in (*adapter.saved, "score")]
    names = {params.module_of(entry).rpartition("{layer}.")[2] for entry in own}
    return sorted(
        names if _tied_head(config, adapter) is None else names | {params.hf_head_name(config)[: -len(".weight")]}
    )


def _tied_head(config: models.ModelConfig, adapter: models.Adapter) -> str | None:
    """Return PEFT's name of the LM head, of which a copy lies beside a trained embedding that it is tied to."""
    return _PREFIX + params.hf_head_name(config) if config.tied_head and "embed" in adapter.saved else None


def _tensors(
    config: models.ModelConfig, adapter: models.Adapter
) -> Iterator[tuple[params.Entry, str, tuple[int, ...]]]:
    """Yield what is trained, with PEFT's name of each tensor and its place in ours; without the experts' A and B."""
    for entry in params.trained_entries(config, adapter):
        for name, place in () if entry.routed else entry.tensors():
            yield entry, name if name.startswith(_PREFIX) else _PREFIX + name, place


# parameter of transformers' experts -> our matrices that may be in it; PEFT's wrapper of the last is the innermost
_OF_EXPERTS = {"down_proj": ("down",), "gate_up_proj": ("gate_up", "gate", "up")}
_EXPERTS = "mlp.experts"  # in every mixture of transformers 5


def _expert_parameters(config: models.ModelConfig, adapter: models.Adapter) -> dict[str, list[params.Entry]]:
    """Return the parameters of transformers' experts that have an adapter, and our matrices of them that have one."""
    chosen = {entry.path.rpartition("/")[2]: entry for entry in params.entries(config)}
    chosen = {name: entry for name, entry in chosen.items() if entry.routed and entry.path in adapter.targets}
    found = {key: [chosen[name] for name in names if name in chosen] for key, names in _OF_EXPERTS.items()}
    return {key: matrices for key, matrices in found.items() if matrices}


def _target_parameters(config: models.ModelConfig, adapter: models.Adapter) -> dict[str, Any]:
    """Return what adapter_config.json says of experts: two matrices in one parameter have twice the rank and alpha."""
    found = _expert_parameters(config, adapter)
    twice = [f"{_EXPERTS}.{key}" for key, matrices in found.items() if len(matrices) == 2]
    if not found:
        return {}
    return {
        "target_parameters": [f"{_EXPERTS}.{key}" for key in found],
        "rank_pattern": {key: 2 * adapter.rank for key in twice},
        "alpha_pattern": {key: adapter.alpha * (2**0.5 if adapter.rslora else 2) for key in twice},
    }


def _tensors_of_experts(
    own: Mapping[str, Any], config: models.ModelConfig, adapter: models.Adapter
) -> dict[str, np.ndarray]:
    """Return the experts' adapters as PEFT has them: A [E R, inputs] and B [outputs, R E] of all experts of a layer.

    transformers holds gate and up in one parameter, beside which PEFT has one A and one B. Ours of the two become one
    of twice the rank: one A below the other, and B in two blocks.
    """
    tensors, found = {}, _expert_parameters(config, adapter)
    for depth, matrices in enumerate(found.values()):
        name = _PREFIX + "model.layers.{layer}." + _EXPERTS + ".base_layer" * depth
        for layer in range(config.layers):
            parts = []
            for entry in matrices:
                a_EKr, b = (np.asarray(own[f"{entry.path}_lora_{part}"][layer], np.float32) for part in "ab")
                if b.ndim == 4:  # gate and up lie next to each other there
                    b = b.swapaxes(2, 3).reshape(*b.shape[:2], -1)
                parts.append((entry.path.rpartition("/")[2], a_EKr, b))
            a_ERK = np.concatenate([a.swapaxes(1, 2) for _, a, _ in parts], axis=1)
            halves = 2 if parts[0][0] in ("gate", "up") else 1
            experts, rank, outputs = parts[0][2].shape
            b_ERO = np.zeros((experts, len(parts) * rank, halves * outputs), np.float32)
            for number, (part, _, b) in enumerate(parts):
                start = outputs * (part == "up")
                b_ERO[:, number * rank : (number + 1) * rank, start : start + outputs] = b
            where = name.format(layer=layer)
            tensors[f"{where}.lora_A.weight"] = np.ascontiguousarray(a_ERK.reshape(-1, a_ERK.shape[-1]))
            tensors[f"{where}.lora_B.weight"] = np.ascontiguousarray(
                b_ERO.transpose(2, 1, 0).reshape(b_ERO.shape[2], -1)
            )
    return tensors


def _located(directory: Path, config: models.ModelConfig, adapter: models.Adapter) -> dict[str, load.Tensor]:
    tensors = _header(directory)
    if copies := [name for name in tensors if name.endswith(".base_layer.weight")]:
        raise ValueError(
            f"the adapter in {directory} holds a copy of an embedding, {copies[0]}, which need not be the base's; save"
            " it by PEFT with save_embedding_layers=False."
        )
    expected = {name: entry.hf_shape for entry, name, _ in _tensors(config, adapter)}
    if (head := _tied_head(config, adapter)) is not None:
        expected[head] = params.entries(config)[0].hf_shape
    optional = {name for entry, name, _ in _tensors(config, adapter) if entry.path == "score"}  # else it is drawn
    missing = sorted(expected.keys() - tensors.keys() - optional)
    unexpected = sorted(tensors.keys() - expected.keys())
    problems = [f"{name} is missing" for name in missing[:1]] + [f"{name} is unexpected" for name in unexpected[:1]]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ][:1]
    problems += [
        f"{name} is stored as {tensor.dtype}, supported are {', '.join(sorted(load.DTYPES))}"
        for name, tensor in tensors.items()
        if tensor.dtype not in load.DTYPES
    ][:1]
    if problems:
        base = base_of(directory) or "its adapter_config.json names none"
        raise ValueError(
            f"the adapter in {directory} does not fit this {config.family} model: {'; '.join(problems)}; give the model"
            f" that it was trained on ({base})."
        )
    return tensors


def _header(directory: Path) -> dict[str, load.Tensor]:
    path = directory / directories.ADAPTER
    try:
        return load.header(path)
    except (safetensors.SafetensorError, load.HeaderError) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); fetch it again.") from None


def _number(content: Mapping[str, Any], key: str, path: Path, *, whole: bool = False) -> Any:
    value = content.get(key, 0 if key == "lora_dropout" else None)
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise ValueError(f"{path} has {key}={value!r}, which is no number; fetch it again.")
    return value


def _modules(directory: Path, config: models.ModelConfig) -> str:
    """Return the matrices that have an A on disk, as the regular expression that `lora.modules` is."""
    held = _header(directory)
    names = []
    for entry in params.entries(config):
        module = entry.hf_name.removesuffix(".weight")
        first = module.format(layer=entry.first_layer, expert=0)
        if entry.path == "embed" and f"{_PREFIX}{module}.lora_embedding_A" in held:
            names.append(re.escape(module.rpartition(".")[2]))
        if entry.stacked and entry.decay and f"{_PREFIX}{first}.lora_A.weight" in held:
            names.append(re.escape(module.partition("{layer}.")[2]))
    if not names:
        raise ValueError(f"the adapter in {directory} is beside no matrix of this {config.family} model; give its own.")
    return rf"\.({'|'.join(names)})\.weight$"
