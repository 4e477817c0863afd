"""Safetensors -> parameter tree on its devices; the host holds one layer of one parameter at a time.

    headers ──check──► name -> place in a file ──read, cut, cast──► one layer's slices ──► device shards

Each process reads a tensor once, from its beginning to its end in large pieces, and cuts the slices of its own devices
out of them, each distinct slice once. Rows that none of its devices holds are left out; parts of rows are not: network
disks and disks that turn take longer to seek than to read on. Layers are turned into our layout and stacked on the
devices, in place.
"""

import collections
import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from fpo_jax import models, types
from fpo_jax.distributed import progress
from fpo_jax.hf import hub as directories
from fpo_jax.hf import mxfp4
from fpo_jax.models import params

log = logging.getLogger("fpo_jax")

Index = tuple[slice, ...]

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_ELEMENTS = DTYPES | {"U8": np.uint8}  # also of what is no weight by itself
# Stacked parameters up to this size are stacked on the host: one transfer and nothing to compile for norms and biases,
# and less memory than one layer of a model that is worth counting.
_STACKED_ON_HOST_BYTES = 2**26
_PIECE_BYTES = 2**24  # that are read at a time, or one entry of a tensor's first axis where that is more


class Tensor(NamedTuple):
    """Where a tensor lies on the disk."""

    path: Path
    offset: int
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]

    def mapped(self, shape: tuple[int, ...]) -> np.ndarray:
        """Map the tensor in the given shape; pages count as memory of the process until the last view is gone."""
        return np.memmap(self.path, np.dtype(_ELEMENTS[self.dtype]), "r", self.offset, shape)

    def row_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of one entry of the first axis, in the given shape."""
        return math.prod(shape[1:]) * np.dtype(_ELEMENTS[self.dtype]).itemsize

    def read(self, shape: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        """Read entries of the first axis, in the given shape.

        Raises:
            ValueError: the file ends before them.
        """
        row = self.row_bytes(shape)
        content = np.fromfile(self.path, np.uint8, (stop - start) * row, offset=self.offset + start * row)
        if content.size != (stop - start) * row:
            raise ValueError(f"{self.path} was cut short while it was read; fetch it again.")
        return content.view(_ELEMENTS[self.dtype]).reshape(stop - start, *shape[1:])


Place = Tensor | mxfp4.Tensor


def check_weights(directory: Path, config: models.ModelConfig) -> None:
    """Check names, shapes and dtypes of the safetensors against the config; reads their headers alone.

    Raises:
        ValueError: missing, unexpected, misshapen or non-float tensors, missing or damaged files; all of them at once.
    """
    located(directory, stored(directory, config))


def load_params(
    directory: Path,
    config: models.ModelConfig,
    *,
    dtype: jax.typing.DTypeLike,
    shardings: types.PyTree | None = None,
    key: jax.Array | None = None,
    held_as: Callable[[params.Entry, jax.Array], Any] = lambda _, whole: whole,
) -> types.PyTree:
    """Read safetensors into a parameter tree on its devices, layer by layer; several processes read their own parts.

    Args:
        directory: model directory with safetensors.
        config: its architecture, from read_config.
        dtype: of the result; cast once, from the dtype on disk.
        shardings: tree of NamedSharding or SingleDeviceSharding to place each parameter on, in any memory kind; None =
            the default device.
        key: draws the head of a new reward model, which the directory, a language model's, does not hold.
        held_as: makes of a parameter that was read what is kept of it, before the next one is read.

    Returns:
        Nested dict of jax.Array, or of what `held_as` makes.

    Raises:
        ValueError: what check_weights raises, or a head that differs from the embedding it is tied to.
    """
    on_disk = stored(directory, config)
    tensors = located(directory, on_disk)
    if others := directories.left_out(directory):
        log.warning("%s also holds %s, which are left out: its language model alone is read.", directory, others)
    if any(isinstance(tensor, mxfp4.Tensor) for tensor in tensors.values()):
        log.warning(
            "%s holds its experts in MXFP4: they are read as bfloat16, and exports hold them without quantisation.",
            directory,
        )
    _check_tied_head(directory, on_disk, tensors)
    places = {} if shardings is None else params.flatten(shardings)
    held = {entry.path for entry in params.entries(on_disk)}
    total = sum(len(entry.hf_names()) for entry in params.entries(config) if entry.path in held)
    with progress.bar(title="loading weights", total=total, unit="tensor") as bar:
        flat = _read(config, tensors, held, np.dtype(dtype), places, key, bar.update, held_as)
    return params.nest(flat)


def _read(
    config: models.ModelConfig,
    tensors: Mapping[str, Place],
    held: set[str],
    dtype: np.dtype,
    places: Mapping[str, Sharding],
    key: jax.Array | None,
    advance: Callable[[int], object],
    held_as: Callable[[params.Entry, jax.Array], Any],
) -> dict[str, Any]:
    """Read every parameter; `advance` is called with the number of tensors that were read."""
    flat = {}
    for entry in params.entries(config):
        place = places.get(entry.path)
        if entry.path not in held:
            assert key is not None
            flat[entry.path] = jax.device_put(params.initial(entry, config, key).astype(dtype), place)
            continue
        # Nothing here holds on to what was read, so that `held_as` may use its memory.
        layers = [(tensors[name], at) for name, at in entry.tensors()]
        if entry.stacked and entry.size * dtype.itemsize > _STACKED_ON_HOST_BYTES:
            flat[entry.path] = held_as(entry, _layer_by_layer(entry, layers, dtype, place, advance))
        else:
            flat[entry.path] = held_as(entry, at_once(entry, layers, dtype, place))
            advance(len(layers))
    return flat


def stored(directory: Path, config: models.ModelConfig) -> models.ModelConfig:
    """Describe what the directory holds: a new reward model starts from a language model."""
    if not config.reward_head:
        return config
    return dataclasses.replace(config, reward_head=directories.read_config(directory).reward_head)


_Placed = tuple[Place, tuple[int, ...]]  # a tensor, and where in the stacked axes of its parameter it stands


def at_once(entry: params.Entry, tensors: Sequence[_Placed], dtype: np.dtype, place: Sharding | None) -> jax.Array:
    """Read a small parameter, or one without layers, in our layout."""
    ours = entry.inner_letters
    turn = [entry.disk_letters.index(letter) for letter in ours]
    on_disk = [ours.index(letter) for letter in entry.disk_letters]

    def read(indices: list[Index]) -> list[np.ndarray]:
        if not entry.stacked:
            cut = [tuple(index[axis] for axis in on_disk) for index in indices]
            return [box.transpose(turn) for box in _cut(tensors[0][0], entry.disk_shape, cut, dtype)]
        stacked = len(tensors[0][1])
        cut = [(*index[:stacked], *(index[stacked + axis] for axis in on_disk)) for index in indices]
        boxes = _stacked(tensors, entry.disk_shape, cut, dtype)
        return [box.transpose([*range(stacked), *(stacked + axis for axis in turn)]) for box in boxes]

    return _place(read, entry.shape, place)


def _layer_by_layer(
    entry: params.Entry,
    tensors: Sequence[_Placed],
    dtype: np.dtype,
    place: Sharding | None,
    advance: Callable[[int], object],
) -> jax.Array:
    """Read a stacked parameter: each layer goes to the devices as it lies on disk and is turned and stacked there.

    A layer of experts is all of its experts.
    """
    stacks_on, layer_on = _device_places(entry, place)
    stacked = jnp.zeros(entry.shape, dtype, device=stacks_on)
    each = len(tensors) // entry.shape[0]
    for layer in range(entry.shape[0]):
        own = [(tensor, at[1:]) for tensor, at in tensors[layer * each : (layer + 1) * each]]
        read = functools.partial(_stacked, own, entry.disk_shape, dtype=dtype)
        placed = _place(read, (*entry.shape[1 : len(tensors[0][1])], *entry.disk_shape), layer_on)
        stacked = _set_layer(stacked, placed, np.int32(layer), entry=entry, place=stacks_on)
        del placed  # else it is held while the next layer is read
        stacked.block_until_ready()  # else the host runs ahead and holds the layers that wait
        advance(each)
    return stacked if place == stacks_on else jax.device_put(stacked, place)


def _device_places(entry: params.Entry, place: Sharding | None) -> tuple[Sharding | None, Sharding | None]:
    """Return where a stacked parameter is put together, in device memory, and where a layer of it as on disk lands."""
    if place is None:
        return None, None
    if place.memory_kind not in (None, "device"):
        place = place.with_memory_kind("device")
    if not isinstance(place, NamedSharding):
        return place, place
    axes = dict(zip(entry.letters, (*place.spec, *[None] * len(entry.letters)), strict=False))
    letters = "E" * entry.of_experts + entry.disk_letters
    return place, NamedSharding(place.mesh, PartitionSpec(*(axes[letter] for letter in letters)))


@functools.partial(jax.jit, static_argnames=("entry", "place"), donate_argnums=0)
def _set_layer(
    stacked: jax.Array, tensor: jax.Array, layer: jax.Array, *, entry: params.Entry, place: Sharding | None
) -> jax.Array:
    turn = functools.partial(params.from_hf, entry)
    turned = jax.vmap(turn)(tensor) if entry.of_experts else turn(tensor)
    updated = jax.lax.dynamic_update_index_in_dim(stacked, turned, layer, 0)
    return updated if place is None else jax.lax.with_sharding_constraint(updated, place)


def _place(
    read: Callable[[list[Index]], list[np.ndarray]], shape: tuple[int, ...], place: Sharding | None
) -> jax.Array:
    """Make an array from `read(indices)`, of each distinct slice that this process's devices hold."""
    if place is None:
        return jax.device_put(read([tuple(slice(0, size) for size in shape)])[0])
    owners: dict[tuple, list] = {}  # bounds of a slice -> its devices
    indices = place.addressable_devices_indices_map(shape)
    for device, index in indices.items():
        assert index is not None  # it is for devices of other processes
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        owners.setdefault(bounds, []).append(device)
    boxes = read([tuple(slice(*bound) for bound in bounds) for bounds in owners])
    shards = {}
    for devices in reversed(owners.values()):
        box = boxes.pop()  # so that none is held once it is on its devices
        for device in devices:
            shards[device] = jax.device_put(box, SingleDeviceSharding(device, memory_kind=place.memory_kind))
    return jax.make_array_from_single_device_arrays(shape, place, [shards[device] for device in indices])


def _stacked(
    tensors: Sequence[_Placed], shape: tuple[int, ...], indices: Sequence[Index], dtype: np.dtype
) -> list[np.ndarray]:
    """Read tensors of one shape, each once, and copy slices out of the array in which they stand; see `_cut`."""
    if not tensors[0][1]:
        return _cut(tensors[0][0], shape, indices, dtype)
    boxes = [np.empty([part.stop - part.start for part in index], dtype) for index in indices]
    for tensor, at in tensors:
        held = []
        for box, index in zip(boxes, indices, strict=True):
            stacked = list(zip(at, index, strict=False))
            if all(part.start <= number < part.stop for number, part in stacked):
                held.append((box[tuple(number - part.start for number, part in stacked)], index[len(at) :]))
        for (target, _), part in zip(held, _cut(tensor, shape, [index for _, index in held], dtype), strict=True):
            target[...] = part
    return boxes


def _cut(tensor: Place, shape: tuple[int, ...], indices: Sequence[Index], dtype: np.dtype) -> list[np.ndarray]:
    """Read a tensor in the given shape once, and copy slices out of it; the only place that reads weights for devices.

    Args:
        tensor: where it lies.
        shape: of it.
        indices: slices with start and stop, one of each axis.
        dtype: of the result.
    """
    boxes = [np.empty([part.stop - part.start for part in index], dtype) for index in indices]
    rows = max(1, _PIECE_BYTES // max(1, tensor.row_bytes(shape)))
    for start in range(0, shape[0], rows):
        held = [
            (box, index, max(start, index[0].start), min(start + rows, index[0].stop))
            for box, index in zip(boxes, indices, strict=True)
            if index[0].start < start + rows and start < index[0].stop
        ]
        if not held:
            continue
        begin = min(low for *_, low, _ in held)
        piece = tensor.read(shape, begin, max(high for *_, high in held))
        for box, (first, *rest), low, high in held:
            box[low - first.start : high - first.start] = piece[(slice(low - begin, high - begin), *rest)]
    return boxes


def located(directory: Path, config: models.ModelConfig) -> dict[str, Place]:
    """Map every tensor name to its place, after checking names, shapes, dtypes and files.

    Raises:
        ValueError: as check_weights.
    """
    paths, headers, problems = directories.weight_files(directory), {}, []
    for path in paths:
        try:
            headers[path] = header(path)
        except FileNotFoundError:
            problems.append(f"{path.name}, named by the index, is missing")
        except (safetensors.SafetensorError, HeaderError) as error:
            problems.append(f"{path.name} is damaged or cut short ({error}); fetch it again")
    tensors: dict[str, Place] = {}
    towers = bool(directories.left_out(directory))
    for path, found in headers.items():
        named = ((models.text_tensor(name) if towers else name, tensor) for name, tensor in found.items())
        found = {params.full_hf_name(name, config): tensor for name, tensor in named if name is not None}
        problems += [
            f"{name} stands in several files, one of them {path.name}" for name in sorted(found.keys() & tensors.keys())
        ]
        tensors |= found
    if config.of_family.quantised:
        tensors, wrong = mxfp4.joined(tensors)
        problems += wrong
    if len(headers) == len(paths):
        problems += _mismatches(tensors, config)
    if problems:
        shown = problems[:20] + [f"and {len(problems) - 20} more"] * (len(problems) > 20)
        raise ValueError(f"the weights in {directory} do not fit its config: {'; '.join(shown)}.")
    return tensors


class HeaderError(ValueError):
    """A header that the library would accept and that cannot be right."""


def header(path: Path) -> dict[str, Tensor]:
    """Read where the tensors of a file lie.

    The library checks the header against the file: UTF-8, JSON, dtypes, sizes, offsets without a gap or an overlap. It
    allows 100 MB, of which Python makes a gigabyte, and takes the last of two tensors with one name.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > directories.LARGEST_JSON:
            raise HeaderError(f"its header claims {length:,} bytes, and at most {directories.LARGEST_JSON:,} are read")
        with safetensors.safe_open(path, framework="np"):
            content = json.loads(file.read(length), object_pairs_hook=_unique)
    content.pop("__metadata__", None)
    return {
        name: Tensor(path, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in content.items()
    }


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = [name for name, count in collections.Counter(name for name, _ in pairs).items() if count > 1]
        raise HeaderError(f"its header names {twice[0]} twice")
    return found


def _mismatches(tensors: Mapping[str, Place], config: models.ModelConfig) -> list[str]:
    expected = {name: entry.hf_shape for entry in params.entries(config) for name in entry.hf_names()}
    head_name = params.hf_head_name(config)
    ignored = params.ignored_hf_names(config) | ({head_name} if config.tied_head else set())
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is unexpected" for name in sorted(tensors) if name not in expected and name not in ignored]
    if config.tied_head and head_name in tensors:
        expected[head_name] = expected[_embed_name(config)]
    for name in expected:
        if name not in tensors:
            continue
        found = tensors[name]
        if found.shape != expected[name]:
            problems.append(f"{name} has shape {found.shape}, the config asks for {expected[name]}")
        if found.dtype not in DTYPES:
            problems.append(f"{name} is stored as {found.dtype}, supported are {', '.join(sorted(DTYPES))}")
    return problems


def _check_tied_head(directory: Path, config: models.ModelConfig, tensors: Mapping[str, Place]) -> None:
    head_name, embed_name = params.hf_head_name(config), _embed_name(config)
    if not config.tied_head or head_name not in tensors:
        return
    shape = tensors[embed_name].shape
    rows = max(1, _PIECE_BYTES // tensors[embed_name].row_bytes(shape))
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        head, embed = (tensors[name].read(shape, start, stop) for name in (head_name, embed_name))
        if not np.array_equal(head, embed):
            raise ValueError(
                f"the weights in {directory} do not fit its config: the config ties {head_name} to {embed_name}, but"
                " the two differ."
            )


def _embed_name(config: models.ModelConfig) -> str:
    return next(entry.hf_name for entry in params.entries(config) if entry.path == "embed")
