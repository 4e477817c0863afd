"""Loading and exporting piece by piece: which bytes are read, what the host holds meanwhile, and several processes."""

import dataclasses
import gc
import itertools
import json
import math
import os
import resource
import shutil
import socket
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from numpy.testing import assert_array_equal

from fpo_jax import checkpoint, hf, models, sharding, types
from fpo_jax.hf import load as weight_loading
from fpo_jax.hf import save
from fpo_jax.models import params
from fpo_jax.trainer import export
from tests import write_random_model
from tests.paths import REPO

LLAMA = models.ModelConfig(
    family="llama",
    vocab_size=20,
    width=24,
    layers=3,
    heads=8,
    kv_heads=4,
    head_dim=6,
    ffn=40,
    max_positions=32,
    eos_ids=(2,),
)
CONFIGS = {
    "llama": LLAMA,
    "mistral": dataclasses.replace(LLAMA, family="mistral", sliding_window=3, tied_head=True),
    "gpt_neox": dataclasses.replace(LLAMA, family="gpt_neox", heads=4, parallel_residual=True),
}
MESHES = {"fsdp": (1, 8, 1), "tensor": (2, 1, 4), "mixed": (2, 2, 2)}
each_mesh = pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
# every layer by itself, or small parameters at once
each_way = pytest.mark.parametrize("at_once_bytes", [0, 2**26], ids=["layers", "whole"])


def source_of(folder, config, dtype="bfloat16", shard_bytes=10_000):
    write_random_model.write(folder, config, dtype=dtype, shard_bytes=shard_bytes)
    return folder


def places_of(config, mesh):
    devices = jax.devices()[: math.prod(mesh)]
    grid = sharding.make_mesh(**dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)), devices=devices)
    return params.shardings(config, mesh=grid)


def tensors_of(folder):
    """(name, tensor) one at a time."""
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(path, framework="np") as file:
            yield from ((name, file.get_tensor(name)) for name in file.keys())


def assert_same_model(source, out):
    """Every tensor bit by bit, one in memory at a time."""
    files = {}
    for path in out.glob("*.safetensors"):
        with safetensors.safe_open(path, framework="np") as file:
            files |= dict.fromkeys(file.keys(), path)
    for name, tensor in tensors_of(source):
        with safetensors.safe_open(files.pop(name), framework="np") as file:
            found = file.get_tensor(name)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape, name
        assert_array_equal(found.view(np.uint8), tensor.view(np.uint8), err_msg=name)
    assert not files


@pytest.mark.sampled(4)
@each_way
@each_mesh
@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("mistral", "bfloat16"), ("gpt_neox", "bfloat16")])
def test_every_shard_is_its_slice_and_comes_back_to_the_bit(tmp_path, monkeypatch, family, dtype, mesh, at_once_bytes):
    config = CONFIGS[family]
    source, places = source_of(tmp_path / "source", config, dtype), places_of(config, mesh)
    whole = params.flatten(hf.load_params(source, config, dtype=dtype))
    monkeypatch.setattr(weight_loading, "_STACKED_ON_HOST_BYTES", at_once_bytes)
    tree = hf.load_params(source, config, dtype=dtype, shardings=places)
    assert jax.tree.map(lambda x: x.sharding, tree) == places
    for path, array in params.flatten(tree).items():
        expected = np.asarray(whole[path])
        for shard in array.addressable_shards:
            assert_array_equal(np.asarray(shard.data), expected[shard.index], err_msg=path, strict=True)
    monkeypatch.setattr(save, "_BLOCK_VALUES", 100)  # embeddings in blocks of four rows
    hf.export(tree, config, out_dir=tmp_path / "out", source_dir=source, dtype=dtype, max_shard_bytes=9000)
    assert_same_model(source, tmp_path / "out")


def test_the_layers_hold_what_the_noise_put_there(tmp_path, monkeypatch):
    """The whole parameter by hand, since the test above compares two loads."""
    monkeypatch.setattr(weight_loading, "_STACKED_ON_HOST_BYTES", 0)
    tree = hf.load_params(source_of(tmp_path / "s", LLAMA), LLAMA, dtype="float32")
    tensors = dict(tensors_of(tmp_path / "s"))
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(3)]
    query = np.stack([tensors[name].reshape(8, 6, 24).transpose(2, 0, 1) for name in names])
    assert_array_equal(np.asarray(tree["layers"]["attention"]["query"]), query.astype(np.float32))


def recorded_reads(monkeypatch):
    """(tensor, first byte of it, bytes) of every read from now on."""
    found, read = [], weight_loading.Tensor.read

    def recorded(self, shape, start, stop):
        row = self.row_bytes(shape)
        found.append((self, start * row, (stop - start) * row))
        return read(self, shape, start, stop)

    monkeypatch.setattr(weight_loading.Tensor, "read", recorded)
    return found


@each_way
@each_mesh
def test_every_byte_is_read_once_however_many_devices_hold_it(tmp_path, monkeypatch, mesh, at_once_bytes):
    source, read = source_of(tmp_path / "source", LLAMA), recorded_reads(monkeypatch)
    monkeypatch.setattr(weight_loading, "_STACKED_ON_HOST_BYTES", at_once_bytes)
    hf.load_params(source, LLAMA, dtype="bfloat16", shardings=places_of(LLAMA, mesh))
    assert sum(count for _, _, count in read) == 2 * params.count(LLAMA)


@each_mesh
def test_a_tensor_is_read_from_its_beginning_to_its_end_in_pieces_of_whole_rows(tmp_path, monkeypatch, mesh):
    source, read = source_of(tmp_path / "source", LLAMA), recorded_reads(monkeypatch)
    whole = hf.load_params(source, LLAMA, dtype="float32")
    read.clear()
    for name, value in (("_STACKED_ON_HOST_BYTES", 0), ("_PIECE_BYTES", 600)):
        monkeypatch.setattr(weight_loading, name, value)
    tree = hf.load_params(source, LLAMA, dtype="float32", shardings=places_of(LLAMA, mesh))
    jax.tree.map(assert_array_equal, tree, whole)
    rows = {2 * math.prod(entry.disk_shape[1:]) for entry in params.entries(LLAMA)}
    assert len(read) > len({tensor for tensor, *_ in read}), "some tensors are more than one piece"
    assert all(count <= 600 or count in rows for *_, count in read)
    for tensor in {tensor for tensor, *_ in read}:
        parts = [(start, start + count) for other, start, count in read if other == tensor]
        assert all(end == start for (_, end), (start, _) in itertools.pairwise(parts)), tensor


def test_rows_that_no_device_of_the_process_holds_are_not_read(tmp_path, monkeypatch):
    source = source_of(tmp_path / "source", LLAMA)
    tensor = weight_loading.located(source, LLAMA)["model.embed_tokens.weight"]
    expected, read = dict(tensors_of(source))["model.embed_tokens.weight"], recorded_reads(monkeypatch)
    monkeypatch.setattr(weight_loading, "_PIECE_BYTES", 3 * 48)
    indices = [(slice(14, 16), slice(0, 12)), (slice(4, 6), slice(12, 24)), (slice(4, 5), slice(0, 24))]
    boxes = weight_loading._cut(tensor, (20, 24), indices, np.dtype("float32"))
    for box, index in zip(boxes, indices, strict=True):
        assert_array_equal(box, expected[index].astype(np.float32), strict=True)
    assert [(start // 48, count // 48) for _, start, count in read] == [(4, 2), (14, 1), (15, 1)]


def test_a_file_that_is_cut_while_it_is_read_is_told(tmp_path):
    source = source_of(tmp_path / "source", LLAMA)
    tensor = weight_loading.located(source, LLAMA)["model.embed_tokens.weight"]
    os.truncate(tensor.path, tensor.offset + 48 * 10)
    assert tensor.read((20, 24), 0, 10).shape == (10, 24)
    with pytest.raises(ValueError, match=r"model-.*\.safetensors was cut short while it was read; fetch it again"):
        tensor.read((20, 24), 5, 11)


@each_way
def test_other_shardings_and_memories(tmp_path, monkeypatch, at_once_bytes):
    source = source_of(tmp_path / "source", LLAMA)
    monkeypatch.setattr(weight_loading, "_STACKED_ON_HOST_BYTES", at_once_bytes)
    whole = hf.load_params(source, LLAMA, dtype="bfloat16")
    pinned = jax.tree.map(lambda place: place.with_memory_kind("pinned_host"), places_of(LLAMA, (1, 2, 4)))
    third = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[3]), whole)
    mesh = sharding.make_mesh(data=2, fsdp=3, tensor=1, devices=jax.devices()[:6])
    layers = jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec("fsdp" if x.shape[0] == 3 else None)), whole)
    for places in (pinned, third, layers):
        tree = hf.load_params(source, LLAMA, dtype="bfloat16", shardings=places)
        assert jax.tree.map(lambda x: x.sharding, tree) == places
        jax.tree.map(assert_array_equal, tree, whole)


def peak_bytes(function, calls=3):
    """Most bytes of NumPy arrays at one time; arrays on devices and mapped files are not among them.

    The least of some calls: tracing, and how late the runtime gives a layer back, differ from call to call.
    """
    peaks = []
    for _ in range(calls):
        gc.collect()
        tracemalloc.start()
        try:
            function()
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    return min(peaks)


WIDE = dataclasses.replace(LLAMA, family="mistral", width=256, ffn=1024, layers=24, vocab_size=2048, tied_head=True)
WIDEST_BYTES = 2 * 256 * 1024  # of one layer's widest tensor in bfloat16
EMBEDDING_BYTES = 2 * WIDEST_BYTES
SLACK_BYTES = 2**18  # of Python objects: rows, headers, traces; measured 0.13 MB


def test_the_host_holds_one_tensor_of_one_layer(tmp_path, monkeypatch):
    source, places = source_of(tmp_path / "source", WIDE, shard_bytes=10**7), places_of(WIDE, (1, 2, 1))
    monkeypatch.setattr(save, "_BLOCK_VALUES", 128 * 1024)
    result = {}

    def load():
        result["tree"] = hf.load_params(source, WIDE, dtype="bfloat16", shardings=places)

    def write():
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        hf.export(result["tree"], WIDE, out_dir=tmp_path / "out", source_dir=source, dtype="bfloat16")

    assert peak_bytes(load, calls=1) > 12 * WIDEST_BYTES, "24 layers of a half are stacked: the measure sees it"
    monkeypatch.setattr(weight_loading, "_STACKED_ON_HOST_BYTES", 2**18)
    monkeypatch.setattr(weight_loading, "_PIECE_BYTES", 2**16)  # beside the layer that is cut from it
    # a CPU device takes what was read at once, here the embedding, without a copy: NumPy memory that is a device's
    # the runtime gives a layer back a moment after it used it: measured -0.3 to +0.7 MB around one layer
    assert peak_bytes(load) < EMBEDDING_BYTES + 3 * WIDEST_BYTES
    # the fetched layer and its turned copy
    assert peak_bytes(write) < 2 * WIDEST_BYTES + SLACK_BYTES
    assert_same_model(source, tmp_path / "out")


def test_the_check_reads_headers_only_and_the_tied_head_is_compared_in_blocks(tmp_path, monkeypatch):
    config = CONFIGS["mistral"]
    source = source_of(tmp_path / "untied", dataclasses.replace(config, tied_head=False))
    calls = recorded_reads(monkeypatch)
    hf.check_weights(source, config)
    assert not calls
    monkeypatch.setattr(weight_loading, "_PIECE_BYTES", 7 * 48)
    with pytest.raises(ValueError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight, but the two differ"):
        hf.load_params(source, config, dtype="bfloat16")
    assert len(calls) == 2, "stops at the first block that differs"
    taller = dataclasses.replace(config, vocab_size=21)
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \(20, 24\), the config asks for \(21, 24\)"):
        hf.check_weights(source, taller)


def test_a_full_disk_is_seen_before_and_on_the_way(tmp_path, monkeypatch):
    source = source_of(tmp_path / "source", LLAMA)
    tree = hf.load_params(source, LLAMA, dtype="float32")
    options = {"out_dir": tmp_path / "out", "source_dir": source, "dtype": "float32"}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # a file of more bytes cannot be written
    try:
        with pytest.raises(OSError, match="File too large"):
            hf.export(tree, LLAMA, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 50_000, 50_000))
    with pytest.raises(ValueError, match=r"out needs 0\.0 GB for the weights, its disk has 0\.0 GB free; make room"):
        hf.export(tree, LLAMA, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def save_checkpoint(workdir, source, config, tree):
    (workdir / checkpoint.SOURCE_FOLDER).mkdir(parents=True)
    hf.copy_companions(source, workdir / checkpoint.SOURCE_FOLDER)
    saver = checkpoint.Checkpointer(workdir, keep=1)
    meta = {"config": {"stage": "align", "lora": {"rank": 0}}}
    saver.save(7, types.TrainState(tree, {"count": jnp.int32(0)}, jnp.int32(7)), meta)
    saver.close()


@each_mesh
def test_a_checkpoint_exports_layer_by_layer(tmp_path, mesh):
    source = source_of(tmp_path / "source", LLAMA, "float32")
    tree = hf.load_params(source, LLAMA, dtype="float32", shardings=places_of(LLAMA, mesh))
    save_checkpoint(tmp_path / "run", source, LLAMA, tree)
    stored, _ = checkpoint.restore_params(tmp_path / "run", None)
    for path, leaf in params.flatten(stored).items():
        expected = np.asarray(params.flatten(tree)[path])
        if path.startswith("layers/"):
            assert leaf.chunk_layout.read_chunk.shape[0] == 1, "a layer is read without its neighbours"
            assert_array_equal(np.asarray(leaf[2]), expected[2], strict=True)
        assert_array_equal(np.asarray(leaf), expected, strict=True)
    line = export.export(tmp_path / "run", tmp_path / "out", step=None, dtype=None)
    assert line.endswith(f"llama, step 7, {params.count(LLAMA):,} parameters in float32")
    assert_same_model(source, tmp_path / "out")


PROCESS = """
import json, sys, time
import jax
number, address, source, out = int(sys.argv[1]), *sys.argv[2:]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(address, num_processes=2, process_id=number)
from pathlib import Path
from fpo_jax import hf, sharding
from fpo_jax.hf import load
from fpo_jax.models import params
load._STACKED_ON_HOST_BYTES = 2000  # norms at once, matrices by layer
cut, held = load._cut, []
def recorded(*args, **kwargs):
    boxes = cut(*args, **kwargs)
    held.extend(box.nbytes for box in boxes)
    return boxes
load._cut = recorded
config = hf.read_config(Path(source))
mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices())
places = params.shardings(config, mesh=mesh)
tree = hf.load_params(Path(source), config, dtype="bfloat16", shardings=places)
rename = Path.rename
Path.rename = lambda *paths: (time.sleep(1), rename(*paths))  # the other process has to wait for the directory
hf.export(tree, config, out_dir=Path(out), source_dir=Path(source), dtype="bfloat16", max_shard_bytes=9000)
print(json.dumps({"held": sum(held), "there": Path(out).is_dir()}))
"""


@pytest.mark.slow  # two processes
def test_two_processes_hold_their_own_parts_and_one_writes(tmp_path):
    source = source_of(tmp_path / "source", LLAMA)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-c", PROCESS]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"PYTHONPATH": str(REPO)}
    processes = [
        subprocess.Popen(
            [*command, str(number), address, source, tmp_path / "out"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    # the mesh cuts D of every matrix between the two; norms are on both
    vectors = sum(entry.size for entry in params.entries(LLAMA) if entry.letters in ("D", "LD"))
    own = params.count(LLAMA) - (params.count(LLAMA) - vectors) // 2
    for stdout, _ in outputs:
        assert json.loads(stdout.splitlines()[-1]) == {"held": 2 * own, "there": True}
    assert_same_model(source, tmp_path / "out")


def measure(*options):
    """Run the benchmark in a process of its own; its report."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"PYTHONPATH": str(REPO)}
    command = [sys.executable, REPO / "benchmarks" / "loading.py", *map(str, options)]
    done = subprocess.run(command, env=environment, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads(done.stdout)


@pytest.mark.large
def test_seven_billion_parameters_pass_through_a_small_host(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    config = write_random_model.MISTRAL_7B
    write_random_model.write(source, config, dtype="bfloat16", shard_bytes=5_000_000_000)
    report = measure("--model", source, "--out", out, "--devices", 8, "--mesh", "1,4,2")
    # device_bytes, which host memory holds here besides, are subtracted: every device's copy of a norm counts
    assert report["load"]["device_bytes"] >= 2 * params.count(config)
    assert report["load"]["overhead_bytes"] < report["limit_bytes"]
    assert report["export"]["overhead_bytes"] < report["limit_bytes"]
    assert_same_model(source, out)


@pytest.mark.large
def test_a_checkpoint_passes_through_a_small_host(tmp_path):
    config = dataclasses.replace(write_random_model.MISTRAL_7B, layers=10)  # 4.9 GB
    source = source_of(tmp_path / "source", config, shard_bytes=2 * 10**9)
    tree = hf.load_params(source, config, dtype="bfloat16", shardings=places_of(config, (1, 4, 2)))
    save_checkpoint(tmp_path / "run", source, config, tree)
    del tree
    report = measure("--workdir", tmp_path / "run", "--out", tmp_path / "out")
    # no device arrays to subtract: interpreter, one fetched tensor, its copies, chunks on their way
    assert report["export"]["overhead_bytes"] < 2 * params.count(config) / 4
    assert_same_model(source, tmp_path / "out")
