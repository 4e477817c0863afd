"""Members of a run of several processes killed, stopped and hung at random moments: the others end, the run goes on."""

import signal
import socket
import time

import pytest

from fpo_jax import checkpoint
from fpo_jax.trainer import metric_logger
from tests import crash_site, faults, tiny
from tests.crash_site import weights

STEPS, SAVE_EVERY, PAIRS = 6, 2, 12
BOUND_S = 60.0  # of a machine that others use, too: heartbeat, watchdog and grace come to a fifth of it
HEARTBEAT_S, HANG_S = 5, 8
GO_ON = (0, 70, 75, 134, -signal.SIGABRT)  # after which the same command is started again; 0 where it came too late
MOMENTS = {point: count for point, count in crash_site.LAST.items() if point not in ("data", "load")}


class Hosts:
    """A tiny run of two to four processes, and what it is when nothing strikes it."""

    def __init__(self, root, zygote):
        self.root, self.zygote = root, zygote
        tiny.write_model(root / "model", layers=1)
        tiny.write_pairs(root / "pairs.jsonl", count=PAIRS)
        self.whole = {}

    def train(self, workdir, struck=None, *, processes):
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        options = {
            "model.path": self.root / "model", "data.train": self.root / "pairs.jsonl",
            "data.eval": self.root / "pairs.jsonl", "data.format": "json", "data.hh_split": "last_turn",
            "data.subfolder": "", "data.train_split": "", "data.eval_split": "", "data.max_length": 40,
            "data.max_completion_length": 16, "model.compute_dtype": "float32", "optim.learning_rate": 3e-3,
            "train.batch_size": PAIRS, "train.micro_batch_per_device": 1, "train.epochs": float(STEPS),
            "train.save_every": SAVE_EVERY, "train.eval_every": 3, "train.eval_batch_per_device": 3,
            "logging.tensorboard": False, "train.hang_timeout": HANG_S if struck else 600,
            "mesh.preset": "multi_gpu" if processes == 3 else "fsdp",
        }  # fmt: skip
        flags = [f"--config.{key}={value}" for key, value in options.items()]
        commands = [
            [
                *("--config", "configs/pythia_hh_pref.py", "--workdir", workdir, f"--coordinator=127.0.0.1:{port}"),
                *(f"--num_processes={processes}", f"--process_id={index}", "--start_timeout=60"),
                *(f"--heartbeat_timeout={HEARTBEAT_S}", *flags),
            ]
            for index in range(processes)
        ]
        logs = [self.root / f"log{index}" for index in range(processes)]
        ends = self.zygote.run_together("fpo_jax.cli.train", commands, logs, struck or {}, bound_s=BOUND_S)
        return [code for code, _ in ends], "\n".join(f"--- process {i}\n{said}" for i, (_, said) in enumerate(ends))

    def uninterrupted(self, processes):
        """Metrics and weights of the run that nothing strikes."""
        if processes not in self.whole:
            workdir = self.root / f"whole{processes}"
            codes, said = self.train(workdir, processes=processes)
            assert codes == [0] * processes, said
            self.whole[processes] = (workdir / metric_logger.METRICS_FILE).read_bytes(), weights(workdir, STEPS)
        return self.whole[processes]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    root = tmp_path_factory.mktemp("hosts")
    with faults.Zygote(root / "compiled") as zygote:
        yield Hosts(root, zygote)


def blow(random):
    """What happens to a member, and when."""
    how = random.choice(["kill", "kill", "stop", "hang"])
    point = random.choice(list(MOMENTS))
    fault = {"point": point, "count": random.randint(1, MOMENTS[point])}
    if how == "hang":
        return fault | {"hang": True}
    number = signal.SIGKILL if how == "kill" else signal.SIGSTOP
    return fault | {"signal": number, "delay": random.choice([0, random.uniform(0, 0.1)])}


@pytest.mark.faults  # two minutes; FPO_FAULT_TRIALS=1400 makes forty trials of it
def test_members_killed_stopped_or_hung_anywhere_end_all_and_the_run_goes_on(hosts, tmp_path):
    for number in range(faults.trials(6)):
        random, workdir = faults.draws("hosts", number), tmp_path / str(number)
        processes = random.choice([2, 2, 2, 3, 4])
        metrics, weighed = hosts.uninterrupted(processes)
        started = time.monotonic()
        member, fault = random.randrange(processes), blow(random)
        codes, said = hosts.train(workdir, {member: fault}, processes=processes)
        context = (
            f"trial {number}: {processes} processes, {member} struck by {fault}: {codes}; {faults.replay('members')}"
        )
        print(f"{time.monotonic() - started:.0f} s", context)
        survivors = [
            code for index, code in enumerate(codes) if index != member or fault.get("signal") != signal.SIGKILL
        ]
        assert all(code in GO_ON for code in survivors), f"{context}\n{said}"
        codes, said = hosts.train(workdir, processes=processes)
        assert codes == [0] * processes, f"{context}\n{said}"
        assert (workdir / metric_logger.METRICS_FILE).read_bytes() == metrics, context
        assert weights(workdir, STEPS) == weighed, context
        left = [path for name in ("*.tmp", "*tmp-*", ".removed/*", "lock.json") for path in workdir.rglob(name)]
        assert not left and not list((workdir / checkpoint.FOLDER).glob("*.damaged")), f"{context}: {left}"
