"""Several processes: real ones over loopback, each with its CPU devices and gloo between them."""

import importlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import Mesh

from fpo_jax import checkpoint, distributed, hf, sharding
from fpo_jax import config as configuration
from fpo_jax.distributed import failure, initialize
from fpo_jax.trainer import device_batch, metric_logger, trainer
from tests import compiling, tiny, tolerances
from tests.paths import REPO

STEPS = 40
BOUND_S = 60  # a process ends so soon after another one; a busy machine needs more than the 10 s of the heartbeat
ANSWERS = {
    "completions.count": 2,
    "completions.max_new_tokens": 4,
    "completions.temperature": 0.0,
    "completions.batch_per_device": 1,
}
FSDP = {"mesh.fsdp": 4} | ANSWERS
TENSOR = {"mesh.fsdp": 2, "mesh.tensor": 2, "optim.offload": True} | ANSWERS


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    tiny.write_model(root / "model", layers=1, vocab_size=260)  # divisible by the tensor axis
    tiny.write_pairs(root / "pairs.jsonl", count=24)
    return root


def options(inputs, changed):
    """The HH recipe, made tiny."""
    return {
        "model.path": str(inputs / "model"), "data.format": "json", "data.train": str(inputs / "pairs.jsonl"),
        "data.eval": str(inputs / "pairs.jsonl"), "data.hh_split": "last_turn", "data.subfolder": "",
        "data.train_split": "", "data.eval_split": "", "data.max_length": 40, "data.max_completion_length": 16,
        "model.compute_dtype": "float32", "optim.learning_rate": 3e-3, "train.batch_size": 8,
        "train.micro_batch_per_device": 1, "train.epochs": STEPS * 8 / 24, "train.save_every": 3,
        "train.eval_every": 10, "train.eval_batch_per_device": 2, "train.keep_checkpoints": 2,
        "reference.batch_per_device": 2, "logging.tensorboard": False,
    } | changed  # fmt: skip


def run_here(inputs, workdir, changed):
    """The run in this process, on four of its devices."""
    c = importlib.import_module("fpo_jax.configs.pythia_hh_pref").get_config()
    c.update_from_flattened_dict(options(inputs, changed))
    trainer.run(c, workdir, devices=jax.devices()[:4])
    return outcome(workdir)


def outcome(workdir):
    weights, meta = checkpoint.restore_params(workdir, None)
    assert meta["step"] == STEPS
    return metric_logger.read(workdir / metric_logger.METRICS_FILE), [
        np.asarray(leaf) for leaf in jax.tree.leaves(weights)
    ]


def assert_same_run(found, expected):
    """Same numbers in every line, same weights, up to the order of float32 sums."""
    assert [line["step"] for line in found[0]] == [line["step"] for line in expected[0]]
    for line, other in zip(found[0], expected[0], strict=True):
        assert line.keys() == other.keys()
        assert abs(line.get("loss", 0.0) - other.get("loss", 0.0)) < tolerances.PROCESSES_LOSS
        for name, number in other.items():
            if name.endswith("rewards/accuracies") and line["step"] <= 1:
                continue  # the policy is the reference still: the sign of a margin is that of its rounding
            np.testing.assert_allclose(line[name], number, **tolerances.PROCESSES_METRICS, err_msg=f"{name} {line}")
    for leaf, other in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(leaf, other, atol=tolerances.PROCESSES_WEIGHTS, rtol=0)


class Job:
    """Processes of one run; what is left of them is killed at the end."""

    def __init__(self, commands, folder, *, devices):
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"log{index}" for index in range(len(commands))]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": compiling.flags(devices=devices),
            "PYTHONPATH": str(REPO),
        }
        self.processes = []
        for command, log in zip(commands, self.logs, strict=True):
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(command, cwd=REPO, env=environment, stdout=file, stderr=subprocess.STDOUT)
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def until(self, path, lines, *, timeout=240):
        """Wait until a file of the run has so many lines."""
        end = time.monotonic() + timeout
        while not path.exists() or path.read_bytes().count(b"\n") < lines:
            assert time.monotonic() < end and None in [process.poll() for process in self.processes], self.text()
            time.sleep(0.002)

    def ends(self, *, timeout=240):
        """Exit codes, as a shell shows them."""
        end = time.monotonic() + timeout
        try:
            codes = [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {timeout} s:\n{self.text()}")
        return [code if code >= 0 else 128 - code for code in codes]

    def last_line(self, index, words):
        """The last line of a process that its witness, which outlives it, ends with these words in it."""
        end = time.monotonic() + BOUND_S
        while words not in self.text(index) and time.monotonic() < end:
            time.sleep(0.02)
        assert words in self.text(index), self.text()
        return self.text(index).splitlines()[-1]

    def text(self, index=None):
        if index is None:
            return "\n".join(f"--- process {i}\n{self.text(i)}" for i in range(len(self.logs)))
        return self.logs[index].read_text()


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def train(inputs, workdir, changed, *, processes, logs, each=None):
    """`train.py` in several processes with four devices together; `each` adds options to one of them."""
    port, commands = free_port(), []
    for index in range(processes):
        mine = options(inputs, changed) | (each or {}).get(index, {})
        folder = mine.pop("workdir", workdir)
        commands.append(
            [
                *(sys.executable, "train.py", "--config", "configs/pythia_hh_pref.py", "--workdir", str(folder)),
                *(f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}", f"--process_id={index}"),
                *("--heartbeat_timeout=10", *(f"--config.{key}={value}" for key, value in mine.items())),
            ]
        )
    return Job(commands, logs, devices=4 // processes)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """The run that nothing interrupts, in one process."""
    workdir = tmp_path_factory.mktemp("whole") / "w"
    return run_here(inputs, workdir, FSDP), (workdir / "audit.json").read_bytes()


@pytest.mark.slow  # four processes, then two, and a run in this one
def test_four_processes_stop_together_and_two_or_one_go_on(inputs, whole, tmp_path):
    workdir = tmp_path / "four"
    with train(inputs, workdir, FSDP, processes=4, logs=tmp_path / "logs4") as job:
        job.until(workdir / metric_logger.METRICS_FILE, 6)
        job.processes[2].send_signal(signal.SIGTERM)
        assert job.ends() == [75] * 4, job.text()
    (step,) = {int(found) for found in re.findall(r"SIGTERM: saved step (\d+) of", job.text())}
    assert 4 <= step < STEPS and job.text().count("SIGTERM: saved step") == 4
    assert "Traceback" not in job.text() and "was ended from outside" not in job.text()
    assert "evaluation at step 0" in job.text(
        0
    ) and "mesh: data 1, fsdp 4, tensor 1 over 4 cpu devices of 4 processes" in job.text(0)
    for index in (1, 2, 3):  # process 0 alone reports
        assert "evaluation at step" not in job.text(index) and "mesh: data" not in job.text(index)
    shutil.copytree(workdir, tmp_path / "one")
    assert_same_run(run_here(inputs, tmp_path / "one", FSDP), whole[0])
    with train(inputs, workdir, FSDP, processes=2, logs=tmp_path / "logs2") as job:
        assert job.ends() == [0, 0], job.text()
    assert f"resumed from step {step} of {STEPS}" in job.text(0) and "was ended from outside" not in job.text()
    assert_same_run(outcome(workdir), whole[0])
    assert [path.name for path in workdir.iterdir() if path.name.startswith(".")] == []
    assert (workdir / "audit.json").read_bytes() == whole[1]


@pytest.mark.faults  # two processes, and a run in this one
def test_killed_process_ends_the_other_and_the_run_goes_on(inputs, whole, tmp_path):
    """With tensor parallelism across the processes and the moments in the hosts' memory."""
    workdir = tmp_path / "w"
    with train(inputs, workdir, TENSOR, processes=2, logs=tmp_path / "logs") as job:
        job.until(workdir / metric_logger.METRICS_FILE, 6)
        job.processes[1].kill()
        codes = job.ends(timeout=BOUND_S)
    assert codes[0] in (70, 134) and codes[1] == 137, job.text()
    said = job.last_line(0, "the same command on every host goes on")
    assert re.match("process 0 of 2.*another process died or cannot be reached", said), job.text(0)
    newest = re.search(r"newest complete checkpoint is step (\d+); the same command on every host goes on", said)
    assert newest and (workdir / checkpoint.FOLDER / newest[1] / "params").is_dir()
    assert_same_run(run_here(inputs, workdir, TENSOR), whole[0])


@pytest.mark.slow  # two processes
def test_processes_with_different_inputs_refuse_to_start(inputs, tmp_path):
    other = {"data.train": str(tiny.write_pairs(tmp_path / "other.jsonl", count=24, seed=1)), "optim.b1": 0.8}
    with train(inputs, tmp_path / "w", FSDP, processes=2, logs=tmp_path / "logs", each={1: other}) as job:
        assert job.ends(timeout=180) == [2, 2], job.text()
    for index in (0, 1):
        assert re.search(
            r"(?s)do not run the same job:.*optim.b1: 0.9 on process 0, 0.8 on process 1.*"
            r"train data: [0-9a-f]{64} on process 0, [0-9a-f]{64} on process 1.*same version, data and model",
            job.text(index),
        ), job.text()
    assert "Traceback" not in job.text() and not (tmp_path / "w").exists()


DRIVER = """
import sys
from pathlib import Path
import numpy as np
from fpo_jax import distributed
from fpo_jax.distributed import consensus
port, count, index, workdir = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
settings = distributed.Settings("auto", f"127.0.0.1:{port}", count, index, TIMEOUT, heartbeat_timeout_s=10)
distributed.start(settings, workdir)
with distributed.guard():
    BODY
distributed.finish()
"""


def drive(tmp_path, body, *, processes=2, timeout=120, absent=(), devices=1):
    """Run a few lines in several processes."""
    code = DRIVER.replace("TIMEOUT", str(timeout)).replace("BODY", body.replace("\n", "\n    "))
    port = free_port()
    commands = [
        [sys.executable, "-c", code, str(port), str(processes), str(i), str(tmp_path)] for i in range(processes)
    ]
    return Job([command for i, command in enumerate(commands) if i not in absent], tmp_path / "logs", devices=devices)


def test_texts_arrays_errors_and_signals_reach_everyone(tmp_path):
    body = """
import os, signal
import jax
from jax.sharding import Mesh
from fpo_jax import sharding
from fpo_jax.distributed import preemption

def refusal(check, *arguments):
    try:
        check(*arguments)
    except distributed.CollectiveError as error:
        assert isinstance(error, ValueError)
        return str(error).split("\\n")

def read():
    with distributed.together():
        if index:
            raise ValueError(f"row {index} is bad")

assert distributed.share(f"from {index}") == ["from 0", "from 1", "from 2"]
assert distributed.from_first(np.full(3, index + 7)).tolist() == [7, 7, 7]
assert refusal(distributed.agree, {"same": 1}) is None and refusal(distributed.check_shared, workdir) is None
assert refusal(read) == ["process 1: row 1 is bad", "process 2: row 2 is bad"]
found = refusal(distributed.agree, {"seed": index // 2, "same": 1})
assert found[1:-1] == ["  seed: 0 on processes 0, 1, 1 on process 2"], found
(workdir / str(index)).mkdir()
consensus.SHARED_FOLDER_TIMEOUT_S = 0.5
found = refusal(distributed.check_shared, workdir / str(index // 2))
assert found[0].startswith(f"process 2: {workdir / '1'} is not the folder that process 0 has"), found
heard = []
with preemption.StopRequest() as stop:
    stop.connect(Mesh(np.array(jax.devices()).reshape(3, 1, 1, 1), sharding.MESH_AXES))
    for call in range(4):
        if index == 1 and call == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        heard.append(stop.agreed())
assert heard == [None, None, "SIGTERM", "SIGTERM"], heard
print("done")
"""
    with drive(tmp_path, body, processes=3) as job:
        assert job.ends() == [0, 0, 0], job.text()
    assert job.text().count("done") == 3 and "ended from outside" not in job.text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "logs"]


def test_rows_reach_devices_that_are_no_neighbours(tmp_path):
    """Each process builds its part alone; together they are the batch, in order, stacked or not."""
    body = """
import jax
from jax.sharding import Mesh
from fpo_jax import config, sharding
from fpo_jax.trainer import device_batch, train_step
from tests.batches import random_batch
mesh = Mesh(np.array(jax.devices())[[0, 2, 3, 1]].reshape(2, 2, 1, 1), sharding.MESH_AXES)
one = device_batch.BatchSharding(config.default(), sharding.Layout(mesh))
assert one._blocks == device_batch.held_blocks(mesh, process=index) == [[0, 3], [1, 2]][index]
whole = random_batch(groups=24, completions=3, length=11, vocab=50)
gather = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))
for accumulation in (1, 2, 3):
    positions = one.positions(24, accumulation=accumulation)
    rows = (positions[:, None] * 3 + np.arange(3)).reshape(-1)
    part = jax.tree.map(lambda leaf: leaf[rows if len(leaf) == 72 else positions], whole)
    stacked = accumulation > 1
    if stacked:
        part = train_step.stack_micro_batches(part, accumulation=accumulation)
    placed = one.place(part, stacked=stacked)
    for leaf, expected in zip(jax.tree.leaves(placed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(np.asarray(gather(leaf)).reshape(expected.shape), expected)
print("done")
"""
    with drive(tmp_path, body, devices=2) as job:
        assert job.ends() == [0, 0], job.text()
    assert job.text().count("done") == 2


def test_failure_of_one_process_ends_one_that_waits_for_it(tmp_path):
    """The other one waits in a collective that never comes, where neither a signal nor an exception would reach it."""
    with drive(tmp_path, "if index: raise KeyError('fault')\ndistributed.from_first(np.zeros(1))") as job:
        codes = job.ends(timeout=BOUND_S)
    assert codes == [70, 1], job.text()
    assert "process 0 of 2: process 1 ended: KeyError: 'fault'" in job.text(0)
    assert "holds no complete checkpoint" in job.text(0) and "KeyError" in job.text(1)


HANG = """
from fpo_jax.distributed import watchdog
with watchdog.watching(2, workdir / 'checkpoints'):
    watchdog.moved()
    if index == HUNG:
        __import__('time').sleep(600)
    distributed.from_first(np.zeros(1))
"""


@pytest.mark.parametrize("hung", [0, 1])
def test_hang_of_a_process_that_lives_ends_all_and_shows_where_each_of_them_is(tmp_path, hung):
    """One sleeps, the other waits for it in a collective; which of them notices first is chance."""
    with drive(tmp_path, HANG.replace("HUNG", str(hung)).strip()) as job:
        assert job.ends(timeout=BOUND_S) == [70, 70], job.text()
    assert "nothing moved for" in job.text() and "so the run counts as hanging (train.hang_timeout)" in job.text()
    for index in (0, 1):
        assert "ts threads are at:" in job.text(index) and "Thread 0x" in job.text(index), job.text()
        assert ("from_first" in job.text(index)) == (index != hung), job.text()
        assert "the same command on every host" in job.text(index).splitlines()[-1]


def test_stacks_come_before_the_last_words_or_not_at_all(monkeypatch, capfd):
    """Two hosts notice a hang in one second; the word of the other one arrives while this one is leaving."""
    monkeypatch.setattr(failure, "_leaving", threading.Lock())
    failure.show_stacks("its threads are at:")
    assert "hread 0x" in capfd.readouterr().err
    with failure._leaving:
        failure.show_stacks("its threads are at:")
    assert capfd.readouterr().err == ""


def test_a_save_that_fails_by_the_death_of_another_process_is_no_fault_of_its_own(monkeypatch):
    """As gloo tells it, below what the checkpointer makes of it; a full disk is this process's own."""
    monkeypatch.setattr(failure.process, "get", lambda key, timeout_s: None)  # nobody left a word
    for reason, code in (
        (RuntimeError("Gloo AllGather failed: [gloo/transport/tcp/pair.cc:547] Connection closed by peer"), 70),
        (ValueError("UNAVAILABLE: recvmsg: Connection reset by peer"), 70),
        (jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out"), 70),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 1),
        (OSError(28, "No space left on device"), 1),
    ):
        try:
            raise checkpoint.SaveFailed("step 2 was not saved") from reason
        except checkpoint.SaveFailed as error:
            found, said = failure._judged(error)
        assert found == code and ("another process died" in said) == (code == 70), said


def test_killed_coordinator_ends_the_others_with_a_sentence(tmp_path):
    """jax ends them from C++ at once; the sentence comes from the witness."""
    (tmp_path / checkpoint.FOLDER / "12").mkdir(parents=True)
    (tmp_path / checkpoint.FOLDER / "15.orbax-checkpoint-tmp").mkdir()
    body = "(workdir / f'up{index}').touch()\ndistributed.share('') if index else __import__('time').sleep(600)"
    with drive(tmp_path, body) as job:
        for index in (0, 1):
            job.until(tmp_path / f"up{index}", 0, timeout=60)
        job.processes[0].kill()
        assert job.ends(timeout=BOUND_S) == [137, 134], job.text()
    said = job.last_line(1, "the same command on every host goes on from there.")
    assert said.startswith("process 1 of 2 was ended from outside: killed here, or by jax because another process died")
    assert said.endswith(
        "The newest complete checkpoint is step 12; the same command on every host goes on from there."
    )


def test_process_that_never_comes(tmp_path):
    with drive(tmp_path, "pass", timeout=2, absent={1}) as job:
        assert job.ends(timeout=BOUND_S) == [134], job.text()
    assert job.last_line(0, "did not come together within --start_timeout=2 s")


SHARES = """
import shutil
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from fpo_jax import checkpoint, hf, types
from fpo_jax.checkpoint import integrity
from tests import damage

read, digest = [], integrity.digest
integrity.digest = lambda path, algorithm: read.append(path) or digest(path, algorithm)

def since():
    found = [text.split() for text in distributed.share(" ".join(map(str, read)))]
    read.clear()
    return [[path.replace(".orbax-checkpoint-tmp", "") for path in paths] for paths in found]

def once(found, files):
    assert all(found) and sorted(sum(found, [])) == sorted(map(str, files)), found

def state(value):
    split = NamedSharding(Mesh(np.array(jax.devices()), "x"), PartitionSpec("x"))
    values = np.random.default_rng(value).normal(size=8000).astype(np.float32)
    make = lambda size: jax.make_array_from_callback((size,), split, lambda part: values[:size][part])
    return types.TrainState({"w": make(8000)}, {"m": make(4000)}, np.int32(0))

folder = workdir / checkpoint.FOLDER
one = checkpoint.Checkpointer(workdir, keep=3)
one.commit(1, state(1), {})
seals = since()
assert all(("ocdbt.process_1" in path) == (number == 1) for number in (0, 1) for path in seals[number]), seals
files = [path for path in damage.files(folder / "1") if path.name != integrity.MANIFEST]
once(seals, files)
one.commit(2, state(2), {})
one.close()

bad = max((folder / "2" / "params" / "ocdbt.process_1").rglob("d/*"), key=lambda path: path.stat().st_size)
both = files + [path for path in damage.files(folder / "2") if path.name != integrity.MANIFEST]
distributed.share("listed")
if index == 0:
    damage.flip(bad, 99)
since()
one = checkpoint.Checkpointer(workdir, keep=3)
once(since(), both)
assert one.latest_step() == 1 and (folder / "2.damaged").is_dir() and not (folder / "2").exists()
place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
abstract = types.TrainState(*jax.tree.map(place, state(1)[:2]), jax.ShapeDtypeStruct((), "int32", sharding=here))
found = one.restore(1, abstract).params["w"].addressable_shards[0]
np.testing.assert_array_equal(found.data, state(1).params["w"].addressable_shards[0].data)

if index == 0:
    for name in ("meta/metadata", "_CHECKPOINT_METADATA"):
        damage.flip(folder / "1" / name, 99)
distributed.share("flipped")
try:
    checkpoint.Checkpointer(workdir, keep=3)
except distributed.CollectiveError as error:
    assert "no checkpoint of" in str(error) and "_CHECKPOINT_METADATA is not what was written" in str(error), error
else:
    raise AssertionError("a damaged step was taken")
print("done")
"""


def test_processes_digest_what_they_wrote_and_verify_a_share_each(tmp_path):
    """A byte that process 1 wrote is flipped: both go on from the older step, and nobody reads a file twice."""
    with drive(tmp_path, SHARES.strip()) as job:
        assert job.ends() == [0, 0], job.text()
    assert job.text().count("done") == 2


FINGERPRINTS = """
import shutil
from fpo_jax import hf
from fpo_jax.checkpoint import integrity
read, digest = [], integrity.digest
integrity.digest = lambda path, algorithm: read.append(path.name) or digest(path, algorithm)
model, copy = workdir / "model", workdir / "copy"
alone = hf.weights_fingerprint(model)
names = sorted(read)

def found(**directories):
    read.clear()
    mine = hf.weights_fingerprints(directories)
    return mine, [text.split() for text in distributed.share(" ".join(read))]

mine, everyone = found(model=model)
assert mine == {"model": alone} and all(everyone) and sorted(sum(everyone, [])) == names, everyone
mine, everyone = found(model=copy if index else model)
assert mine == {"model": alone} and [sorted(one) for one in everyone] == [names, names], everyone
mine, everyone = found(model=model, reference=copy)
assert mine == {"model": alone, "reference": alone} and sorted(sum(everyone, [])) == sorted(2 * names), everyone
if index:
    content = bytearray((copy / names[-1]).read_bytes())
    content[-1] ^= 1
    (copy / names[-1]).write_bytes(content)
mine, _ = found(model=copy if index else model)
assert (mine["model"] == alone) == (index == 0), "a copy that differs has another fingerprint"
if index:
    (copy / names[-1]).unlink()
try:
    hf.weights_fingerprints({"model": copy if index else model})
except distributed.CollectiveError as error:
    assert str(error) == f"process 1: {copy / names[-1]} is missing.", error
else:
    raise AssertionError("a shard is missing")
print("done")
"""


def test_processes_fingerprint_a_share_of_one_model_and_all_of_a_copy(tmp_path):
    tiny.write_model(tmp_path / "model", layers=1)
    single = tmp_path / "model" / hf.SINGLE
    shard = tmp_path / "model" / "model-00001-of-00001.safetensors"
    names = list(safetensors.numpy.load_file(single))
    (tmp_path / "model" / hf.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, shard.name)}))
    single.rename(shard)
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    with drive(tmp_path, FINGERPRINTS.strip()) as job:
        assert job.ends() == [0, 0], job.text()
    assert job.text().count("done") == 2


PLAIN = {"coordinator": "10.0.0.1:29500", "num_processes": 2, "process_id": 1}
SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_STEP_NUM_NODES": "2", "JAX_PLATFORMS": "cuda"}


class TestChoose:
    def test_alone_where_nothing_says_otherwise(self):
        shell_in_allocation = {
            "SLURM_JOB_ID": "7",
            "SLURM_NTASKS": "4",
            "SLURM_STEP_NUM_TASKS": "1",
            "SLURM_PROCID": "0",
        }
        for environment in ({}, shell_in_allocation, {"OMPI_COMM_WORLD_SIZE": "1"}, {"JAX_PLATFORMS": "cpu"}):
            assert initialize.select(distributed.Settings(), environment) is None

    def test_flags_or_variables(self):
        expected = {
            "coordinator_address": "10.0.0.1:29500", "num_processes": 2, "process_id": 1,
            "cluster_detection_method": "deactivate",
        }  # fmt: skip
        variables = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:29500", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
        assert initialize.select(distributed.Settings(**PLAIN), {}) == expected
        assert initialize.select(distributed.Settings(process_id=1), variables) == expected, (
            "a flag is before its variable"
        )
        assert initialize.select(distributed.Settings("off"), variables | SLURM) is None

    def test_launchers(self):
        assert initialize.select(distributed.Settings(), SLURM) == {}, "several tasks a node: one GPU each, as jax does"
        one_per_node = SLURM | {"SLURM_STEP_NUM_NODES": "4"}
        assert initialize.select(distributed.Settings(), one_per_node) == {"local_device_ids": []}
        assert initialize.select(distributed.Settings(), one_per_node | {"JAX_LOCAL_DEVICE_IDS": "0,1"}) == {}
        mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
        assert initialize.select(distributed.Settings(), mpi) == {"local_device_ids": []}
        assert initialize.select(distributed.Settings(coordinator="a:1"), SLURM) == {"coordinator_address": "a:1"}
        assert initialize.select(distributed.Settings("on"), {}) == {}, "jax looks for itself"

    @pytest.mark.parametrize(
        ("changed", "environment", "message"),
        [
            ({"num_processes": None}, {}, r"--num_processes \(or JAX_NUM_PROCESSES\) missing: .* needs all three"),
            ({"coordinator": None}, {}, r"--coordinator \(or JAX_COORDINATOR_ADDRESS\) missing"),
            ({"process_id": 2}, {}, r"--process_id=2 is outside 0 ... 1"),
            ({"coordinator": "10.0.0.1"}, {}, "--coordinator='10.0.0.1' is not host:port"),
            ({"mode": "maybe"}, {}, "--distributed=maybe is not one of auto, on, off"),
            ({"mode": "off"}, {}, "--distributed=off and --coordinator, --num_processes, --process_id contradict"),
            ({"process_id": None}, {"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID='one' is not a number"),
        ],
    )
    def test_half_given_or_wrong(self, changed, environment, message):
        with pytest.raises(ValueError, match=message):
            initialize.select(distributed.Settings(**(PLAIN | changed)), environment)


class FakeDevice:
    """What a mesh needs of a device."""

    platform = device_kind = "cpu"

    def __init__(self, index, process):
        self.id, self.process_index = index, process


def fake_mesh(processes):
    """(data, fsdp, tensor) = the shape of the array of process numbers."""
    devices = [FakeDevice(index, process) for index, process in enumerate(np.ravel(processes))]
    data, fsdp, tensor = np.shape(processes)
    return Mesh(np.array(devices, object).reshape(data, fsdp, 1, tensor), sharding.MESH_AXES)


class TestBlocks:
    def test_contiguous(self):
        mesh = fake_mesh([[[0], [0], [1], [1]]])
        assert [device_batch.held_blocks(mesh, process=process) for process in (0, 1)] == [[0, 1], [2, 3]]

    def test_as_the_links_lie(self):
        mesh = fake_mesh([[[0], [1]], [[1], [0]]])
        assert [device_batch.held_blocks(mesh, process=process) for process in (0, 1)] == [[0, 3], [1, 2]]

    def test_processes_that_differ_along_tensor_build_the_same_rows(self):
        mesh = fake_mesh([[[0, 1], [0, 1]]])
        assert [device_batch.held_blocks(mesh, process=process) for process in (0, 1)] == [[0, 1], [0, 1]]
        assert device_batch.held_blocks(fake_mesh([[[0, 1, 2]]]), process=2) == [0]

    @pytest.mark.parametrize("accumulation", [1, 3])
    def test_positions_of_all_processes_are_every_group_once(self, accumulation, monkeypatch):
        mesh = fake_mesh([[[0], [2]], [[1], [0]]])
        seen = []
        for process in range(3):
            monkeypatch.setattr(jax, "process_index", lambda process=process: process)
            one = device_batch.BatchSharding(configuration.default(), sharding.Layout(mesh))
            seen.append(one.positions(24, accumulation=accumulation).tolist())
        assert sorted(itertools.chain(*seen)) == list(range(24))
        assert seen[0] == {1: [*range(6), *range(18, 24)], 3: [0, 1, 6, 7, 8, 9, 14, 15, 16, 17, 22, 23]}[accumulation]
