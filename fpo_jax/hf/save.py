"""Parameters -> a model directory; the host holds one tensor of one layer at a time, of embeddings a block of rows.

Parameters are array-likes with `shape` and `parameter[index]`: jax.Array on any mesh, NumPy arrays, or the unread
tensors of a checkpoint. Each block is fetched, cast, checked, turned into the layout of the disk, digested and written.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from fpo_jax import models, types
from fpo_jax.distributed import progress
from fpo_jax.hf import companions, digests
from fpo_jax.hf import hub as directories
from fpo_jax.io import atomic_io
from fpo_jax.models import params

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_BLOCK_VALUES = 2**26  # of a parameter without layers


class _Piece(NamedTuple):
    """One tensor on disk."""

    name: str
    entry: params.Entry
    place: tuple[int, ...]  # layer, or layer and expert; () = the parameter has no layers

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.entry.hf_shape)


def export(
    parameters: types.PyTree,
    config: models.ModelConfig,
    *,
    out_dir: Path,
    source_dir: Path,
    dtype: jax.typing.DTypeLike,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a model directory that transformers and vLLM read; it appears whole or not at all.

    With several processes all of them call this: every one takes part in fetching what lies on the devices of all,
    process 0 alone writes, and the others return when it is done.

    Args:
        parameters: nested dict of array-likes, fetched a block at a time.
        config: the architecture.
        out_dir: absent or empty; parents are made.
        source_dir: config.json, tokenizer and template files are copied from here.
        dtype: of the weights on disk: float32, bfloat16 or float16.
        max_shard_bytes: a larger model is written in several files with an index.

    Raises:
        ValueError: out_dir is in use or its disk too small, the tree or source_dir is of another model, a weight is not
            finite in dtype, or transformers would not render a conversation as source_dir records it.
        OSError: the disk failed on the way; nothing is left behind.
    """
    dtype = np.dtype(dtype)
    out_dir = atomic_io.vacant(out_dir)
    params.check(parameters, config)
    found = directories.read_config(source_dir)
    if config.reward_head:  # what a new reward model does not have from the language model it started from
        found = dataclasses.replace(found, reward_head=True, pad_id=config.pad_id)
    if found != config:
        raise ValueError(f"{source_dir} describes another model: {_difference(found, config)}.")
    flat = params.flatten(parameters)
    if jax.process_index() == 0:
        _write(flat, config, out_dir, source_dir, dtype, max_shard_bytes)
    else:
        for piece in [piece for shard in _shards(config, dtype, max_shard_bytes) for piece in shard]:
            for _ in _blocks(flat[piece.entry.path], piece, dtype):
                pass
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"export to {out_dir}")


def _write(
    flat: Mapping[str, Any], config: models.ModelConfig, out_dir: Path, source_dir: Path, dtype: np.dtype, limit: int
) -> None:
    """Write everything beside out_dir, then rename."""
    atomic_io.make_folder(out_dir.parent)
    needed, free = params.count(config) * dtype.itemsize, shutil.disk_usage(out_dir.parent).free
    if needed > free:
        raise ValueError(
            f"{out_dir} needs {needed / 1e9:.1f} GB for the weights, its disk has {free / 1e9:.1f} GB free; make room,"
            " choose another disk or a smaller dtype."
        )
    with atomic_io.writing_folder(out_dir) as partial:
        directories.copy_companions(source_dir, partial)
        companions.check(partial)
        (partial / "config.json").write_text(directories.dumps(_exported_config(source_dir, config, dtype)))
        digests.write(partial, _write_weights(flat, config, partial, dtype, limit))


def _write_weights(
    flat: Mapping[str, Any], config: models.ModelConfig, directory: Path, dtype: np.dtype, limit: int
) -> dict[str, digests.Written]:
    """Write one file, or shards and their index; returns their digests."""
    shards = _shards(config, dtype, limit)
    single = len(shards) == 1
    weight_map, files = {}, {}
    bar = progress.bar(title="writing weights", total=sum(map(len, shards)), unit="tensor")
    for number, shard in enumerate(shards, start=1):
        name = directories.SINGLE if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {piece.name: name for piece in shard}
        with digests.Writer(directory / name) as file:
            file.header(_header(shard, dtype))
            for piece in shard:
                file.tensor(_blocks(flat[piece.entry.path], piece, dtype))
                bar.update()
        files[name] = file
    bar.close()
    if not single:
        count = params.count(config)
        metadata = {"total_parameters": count, "total_size": count * dtype.itemsize}
        (directory / directories.INDEX).write_text(directories.dumps({"metadata": metadata, "weight_map": weight_map}))
    return {
        name: file.written((piece.name, _DTYPES[dtype.name], piece.entry.hf_shape) for piece in shard)
        for (name, file), shard in zip(files.items(), shards, strict=True)
    }


def _shards(config: models.ModelConfig, dtype: np.dtype, limit: int) -> list[list[_Piece]]:
    """Deal the tensors out to files of at most `limit` bytes, each sorted by name as safetensors sorts them."""
    shards: list[list[_Piece]] = [[]]
    filled = 0
    for entry in params.entries(config):
        for name, place in entry.tensors():
            piece = _Piece(name, entry, place)
            size = piece.size * dtype.itemsize
            if shards[-1] and filled + size > limit:
                shards.append([])
                filled = 0
            shards[-1].append(piece)
            filled += size
    return [sorted(shard) for shard in shards]


def _header(shard: list[_Piece], dtype: np.dtype) -> bytes:
    """Return the start of a safetensors file: length, JSON of names, dtypes, shapes and offsets, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in shard:
        start, end = end, end + piece.size * dtype.itemsize
        header[piece.name] = {"dtype": _DTYPES[dtype.name], "shape": piece.entry.hf_shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _blocks(parameter: Any, piece: _Piece, dtype: np.dtype) -> Iterator[memoryview]:
    """Yield the bytes of a tensor, checked: one of a layer whole, a parameter without layers in blocks of rows.

    Rows come in the order of the disk, because layouts without layers start with the same axis on both sides.
    """
    entry = piece.entry
    if not piece.place:
        total, rows = entry.shape[0], max(1, _BLOCK_VALUES * entry.shape[0] // entry.size)
        indices = [slice(start, min(start + rows, total)) for start in range(0, total, rows)]
    else:
        indices = [piece.place]
    for index in indices:
        fetched = _fetch(parameter, index)
        with np.errstate(over="ignore"):
            block = fetched.astype(dtype, copy=False)
        if not np.isfinite(block).all():
            raise ValueError(
                f"{piece.name} has values that are not finite in {dtype.name}; the model is broken or needs bfloat16."
            )
        turned = params.to_hf(entry if entry.stacked else dataclasses.replace(entry, shape=block.shape), block)
        del block, fetched
        yield turned.reshape(-1).view(np.uint8).data


def _fetch(parameter: Any, index: tuple[int, ...] | slice) -> np.ndarray:
    """Bring one layer, or an expert of it, or some rows, to the host; what several processes have comes to each."""
    if not isinstance(parameter, jax.Array):
        return np.asarray(parameter[index])
    if not parameter.is_fully_addressable:
        return multihost_utils.process_allgather(parameter[index], tiled=True)
    wanted = [slice(at, at + 1) for at in index] if isinstance(index, tuple) else [index]
    rest = parameter.shape[len(wanted) :]
    block = np.empty((*(part.stop - part.start for part in wanted), *rest), parameter.dtype)
    for shard in parameter.addressable_shards:
        first = [part.indices(size)[0] for part, size in zip(shard.index, parameter.shape, strict=True)]
        found = [
            (max(low, part.start), min(low + size, part.stop))
            for low, size, part in zip(first, shard.data.shape, wanted, strict=False)
        ]
        if shard.replica_id == 0 and all(start < stop for start, stop in found):
            of_shard = tuple(slice(start - low, stop - low) for (start, stop), low in zip(found, first, strict=False))
            of_block = (slice(s - part.start, e - part.start) for (s, e), part in zip(found, wanted, strict=True))
            # cut on its device: all of it would be too much for the host
            block[*of_block, *shard.index[len(wanted) :]] = np.asarray(shard.data[of_shard])
    return block.reshape(rest) if isinstance(index, tuple) else block


def _exported_config(source_dir: Path, config: models.ModelConfig, dtype: np.dtype) -> dict[str, Any]:
    """Return the source's config with the dtype of the new weights, and without pointers to code that stays behind.

    A reward model says so, and names a pad token: transformers scores the last token that is none. Of a multimodal
    source it is that of the language model.
    """
    source = models.text_config(directories.read_json(source_dir / "config.json"))
    source.pop("auto_map", None)
    source.pop("quantization_config", None)  # of weights that were read into floats
    keys = [key for key in ("dtype", "torch_dtype") if key in source] or ["torch_dtype"]  # transformers 5, 4
    source |= dict.fromkeys(keys, dtype.name)
    if config.reward_head:
        source |= models.head_keys(config) | {"pad_token_id": models.pad_token_id(config)}
    return source


def _difference(found: models.ModelConfig, config: models.ModelConfig) -> str:
    fields = [field for field in vars(config) if getattr(found, field) != getattr(config, field)]
    return ", ".join(f"{field} is {getattr(found, field)} there and {getattr(config, field)} here" for field in fields)
