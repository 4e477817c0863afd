"""Hugging Face model directories: find or download one, read it into a parameter tree, write one.

    directory ──read_config──► ModelConfig      directory ──load_params──► params      params ──export──► directory

Weights are safetensors only, one file or shards with an index, and cross through the rows of params.py; torch and
pickle are never involved. Every problem of a directory is reported at once, before a single weight is placed.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors
import jax
import numpy as np
import safetensors
import safetensors.numpy

from fpo_jax import model, params, shapes

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# what besides the weights makes a model directory complete
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates",
)
_DOWNLOADS = [SINGLE, "model-*.safetensors", INDEX, *COMPANIONS, "additional_chat_templates/*"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_DISK_DTYPES = {"F64", "F32", "F16", "BF16"}


def local_dir(name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """Return a local model directory; a hub name is downloaded to the hub cache first (no pickles, no code).

    Args:
        name_or_path: an existing directory, or a hub name such as "EleutherAI/pythia-70m".
        revision: hub commit, tag or branch; None = main. Only a hub name has one.

    Raises:
        ValueError: neither a directory nor reachable, a revision for a directory, or no safetensors inside.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"{path} is a local directory, revision={revision!r} has no meaning; leave it out.")
    elif not _HUB_NAME.fullmatch(str(name_or_path)):
        raise ValueError(f"{name_or_path} is not a directory; give a model directory or a hub name such as org/name.")
    else:
        try:
            path = Path(
                huggingface_hub.snapshot_download(str(name_or_path), revision=revision, allow_patterns=_DOWNLOADS)
            )
        except (OSError, huggingface_hub.errors.HFValidationError) as error:
            at = "" if revision is None else f" at revision {revision}"
            raise ValueError(
                f"{name_or_path} is no directory here and could not be fetched from the hub{at}"
                f" ({type(error).__name__}: {str(error).splitlines()[0]}); check the spelling, the network, HF_TOKEN"
                " for gated models, or download it elsewhere and give its directory."
            ) from error
    _weight_files(path)
    return path


def read_config(directory: Path) -> model.ModelConfig:
    """Read config.json.

    Raises:
        ValueError: missing, broken or unsupported.
    """
    return model.from_hf_config(_read_json(directory / "config.json"))


def load_params(
    directory: Path,
    config: model.ModelConfig,
    *,
    dtype: jax.typing.DTypeLike,
    shardings: shapes.PyTree | None = None,
) -> shapes.PyTree:
    """Read safetensors into a parameter tree, one stacked parameter at a time on the host.

    Args:
        directory: model directory with safetensors.
        config: its architecture, from read_config.
        dtype: of the result; cast once, from the dtype on disk.
        shardings: tree of jax.sharding.Sharding to place each parameter on; None = the default device.

    Returns:
        Nested dict of jax.Array.

    Raises:
        ValueError: missing, unexpected, misshapen or non-float tensors, missing or damaged files, a head that
            differs from the embedding it is tied to; all of them at once.
    """
    dtype = np.dtype(dtype)
    places = {} if shardings is None else params.flatten(shardings)
    with contextlib.ExitStack() as stack:
        tensors = _open(directory, config, stack)
        flat = {}
        for row in params.rows(config):
            stacked = np.empty(row.shape, dtype)
            for layer, name in enumerate(row.hf_names()):
                tensor = params.from_hf(row, tensors[name].get_tensor(name))
                stacked[layer if row.stacked else ...] = tensor.astype(dtype)
            flat[row.path] = jax.device_put(stacked, places.get(row.path))
        return params.nest(flat)


def export(
    parameters: shapes.PyTree,
    config: model.ModelConfig,
    *,
    out_dir: Path,
    source_dir: Path,
    dtype: jax.typing.DTypeLike,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a model directory that transformers and vLLM read; it appears whole or not at all.

    Args:
        parameters: nested dict of arrays, on devices or on the host.
        config: the architecture.
        out_dir: absent or empty; parents are made.
        source_dir: config.json, tokenizer and template files are copied from here.
        dtype: of the weights on disk: float32, bfloat16 or float16.
        max_shard_bytes: a larger model is written in several files with an index; at most one file's tensors
            are on the host at a time.

    Raises:
        ValueError: out_dir is in use, the tree or source_dir is of another model, or a weight is not finite in dtype.
    """
    dtype = np.dtype(dtype)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"{out_dir} exists and is not an empty directory; choose another or remove it.")
    params.check(parameters, config)
    if (found := read_config(source_dir)) != config:
        raise ValueError(f"{source_dir} describes another model: {_difference(found, config)}.")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = out_dir.with_name(f".{out_dir.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        copy_companions(source_dir, partial)
        (partial / "config.json").write_text(_dumps(_exported_config(source_dir, dtype)))
        _write_weights(params.flatten(parameters), config, partial, dtype, max_shard_bytes)
        partial.rename(out_dir)
    except BaseException:
        shutil.rmtree(partial)
        raise


def copy_companions(source_dir: Path, target_dir: Path) -> None:
    """Copy config, generation config, tokenizer files and chat templates into an existing directory."""
    for path in sorted({path for pattern in COMPANIONS for path in source_dir.glob(pattern)}):
        if path.is_dir():
            shutil.copytree(path, target_dir / path.name)
        else:
            shutil.copyfile(path, target_dir / path.name)


def check_vocabulary(tokenizer_size: int, config: model.ModelConfig) -> None:
    """Check that every id of the tokenizer has an embedding; a larger embedding is normal (Pythia: 50,304 for 50,277).

    Args:
        tokenizer_size: len(tokenizer), added tokens included.
        config: the architecture.

    Raises:
        ValueError: the tokenizer is larger than the model.
    """
    if tokenizer_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer_size} tokens, the model {config.vocab_size} embeddings; use the tokenizer"
            " of this model, without added tokens."
        )


def weights_fingerprint(directory: Path) -> str:
    """Return the sha256 (hex) over config.json and the weight files, names and contents, in name order.

    Raises:
        ValueError: no safetensors, or a missing shard.
    """
    total = hashlib.sha256()
    for path in sorted([*_weight_files(directory), directory / "config.json"]):
        if not path.is_file():
            raise ValueError(f"{path} is missing.")
        with path.open("rb") as file:
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _weight_files(directory: Path) -> list[Path]:
    """List the safetensors files that make up the weights; shards named by the index may turn out to be missing."""
    single, index = directory / SINGLE, directory / INDEX
    if single.exists() and index.exists():
        raise ValueError(f"{directory} has both {SINGLE} and {INDEX}; remove the one that is not meant.")
    if single.exists():
        return [single]
    if index.exists():
        names = set(_weight_map(index).values())
        if outside := sorted(name for name in names if Path(name).name != name):
            raise ValueError(f"{index} names files outside its directory: {', '.join(outside)}.")
        return [directory / name for name in sorted(names)]
    if pickles := sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern)):
        raise ValueError(
            f"{directory} has weights only as pickles ({', '.join(pickles)}), which run code when read and are refused;"
            " convert them to safetensors first."
        )
    raise ValueError(f"{directory} has neither {SINGLE} nor {INDEX}; give a directory with safetensors weights.")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to file names; fetch it again.")
    return weight_map


def _open(directory: Path, config: model.ModelConfig, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Map every needed tensor name to its open file, after checking names, shapes, dtypes and files."""
    paths, files, problems = _weight_files(directory), {}, []
    for path in paths:
        try:
            files[path] = stack.enter_context(safetensors.safe_open(path, framework="np"))
        except FileNotFoundError:
            problems.append(f"{path.name}, named by the index, is missing")
        except safetensors.SafetensorError as error:
            problems.append(f"{path.name} is damaged or cut short ({error}); fetch it again")
    tensors: dict[str, Any] = {}
    for path, file in files.items():
        names = set(file.keys())
        problems += [
            f"{name} stands in several files, one of them {path.name}" for name in sorted(names & set(tensors))
        ]
        tensors |= dict.fromkeys(names, file)
    if len(files) == len(paths):
        problems += _mismatches(tensors, config)
    if problems:
        shown = problems[:20] + [f"and {len(problems) - 20} more"] * (len(problems) > 20)
        raise ValueError(f"the weights in {directory} do not fit its config: {'; '.join(shown)}.")
    return tensors


def _mismatches(tensors: Mapping[str, Any], config: model.ModelConfig) -> list[str]:
    expected = {name: row.hf_shape for row in params.rows(config) for name in row.hf_names()}
    ignored = set(params.ignored_hf_names(config))
    head_name = params.hf_head_name(config)
    if config.tied_head:
        ignored.add(head_name)
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is unexpected" for name in sorted(tensors) if name not in expected and name not in ignored]
    for name in expected:
        if name not in tensors:
            continue
        found = tensors[name].get_slice(name)
        if tuple(found.get_shape()) != expected[name]:
            problems.append(f"{name} has shape {tuple(found.get_shape())}, the config asks for {expected[name]}")
        if found.get_dtype() not in _DISK_DTYPES:
            problems.append(f"{name} is stored as {found.get_dtype()}, supported are {', '.join(sorted(_DISK_DTYPES))}")
    if not problems and config.tied_head and head_name in tensors:
        embed_name = next(row.hf_name for row in params.rows(config) if row.path == "embed")
        head, embed = (tensors[name].get_tensor(name) for name in (head_name, embed_name))
        if not np.array_equal(head, embed):
            problems.append(f"the config ties {head_name} to {embed_name}, but the two differ")
    return problems


def _write_weights(
    flat: Mapping[str, Any], config: model.ModelConfig, directory: Path, dtype: np.dtype, max_shard_bytes: int
) -> None:
    """Write one file, or shards and their index, gathering one shard at a time."""
    shards: list[list[tuple[int | None, params.Row, str]]] = [[]]
    filled = total = 0
    for row in params.rows(config):
        size = math.prod(row.hf_shape) * dtype.itemsize
        for layer, name in enumerate(row.hf_names()):
            if shards[-1] and filled + size > max_shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append((layer if row.stacked else None, row, name))
            filled, total = filled + size, total + size
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    )
    for name, shard in zip(names, shards, strict=True):
        tensors = {hf_name: _tensor(flat[row.path], row, layer, dtype, hf_name) for layer, row, hf_name in shard}
        safetensors.numpy.save_file(tensors, directory / name, metadata={"format": "pt"})
        shutil.copymode(directory / "config.json", directory / name)  # safetensors makes files for their owner alone
    if len(shards) > 1:
        weight_map = {hf_name: name for name, shard in zip(names, shards, strict=True) for _, _, hf_name in shard}
        metadata = {"total_parameters": params.count(config), "total_size": total}
        (directory / INDEX).write_text(_dumps({"metadata": metadata, "weight_map": weight_map}))


def _tensor(parameter: Any, row: params.Row, layer: int | None, dtype: np.dtype, name: str) -> np.ndarray:
    array = np.asarray(parameter if layer is None else parameter[layer])
    with np.errstate(over="ignore"):
        tensor = params.to_hf(row, array).astype(dtype)
    if not np.isfinite(tensor).all():
        raise ValueError(
            f"{name} has values that are not finite in {dtype.name}; the model is broken or needs bfloat16."
        )
    return tensor


def _exported_config(source_dir: Path, dtype: np.dtype) -> dict[str, Any]:
    """Return the source's config with the dtype of the new weights, and without pointers to code that stays behind."""
    config = _read_json(source_dir / "config.json")
    config.pop("auto_map", None)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]  # transformers 5, 4
    return config | dict.fromkeys(keys, dtype.name)


def _difference(found: model.ModelConfig, config: model.ModelConfig) -> str:
    fields = [field for field in vars(config) if getattr(found, field) != getattr(config, field)]
    return ", ".join(f"{field} is {getattr(found, field)} there and {getattr(config, field)} here" for field in fields)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object.")
    return content


def _dumps(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
