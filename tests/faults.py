"""Real processes that are struck: programs run in forks of one that has imported everything, and each may have a fault.

A fork is the program itself, with its own devices, signals and exit code; only the seconds of imports are spared, and
those of tracing where a start before it with the same arguments left its executables (not at the point `compile`).
Several processes of one run are forked together; the one that is struck may hang in place of a signal.
What strikes it is told as JSON: a signal at the `count`-th call of a POINT or at the `count`-th operation on a file
below `folder`, or without either, `delay` seconds after that (or after the start). `FPO_FAULT_SEED` replays the
draws of a failed test, `FPO_FAULT_TRIALS` scales their number.
"""

import functools
import gc
import hashlib
import importlib
import json
import math
import os
import pickle
import pkgutil
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests import compiling
from tests.paths import REPO

SEED = int(os.environ.get("FPO_FAULT_SEED", "20260923"))
# where a run can be struck: its phases, by the function that each of them begins with
POINTS = {
    "data": "fpo_jax.data.prepare",
    "load": "fpo_jax.hf.load_params",
    "compile": "fpo_jax.trainer.compiled_step.CompiledStep._compile",
    "reference": "fpo_jax.trainer.reference_logprobs.compute",
    "reference written": "fpo_jax.trainer.reference_logprobs.save",
    "step": "fpo_jax.trainer.train_step.stack_micro_batches",
    "evaluation": "fpo_jax.trainer.evaluator.Evaluation.__call__",
    "answers": "fpo_jax.inference.sampler.sample",
    "save": "fpo_jax.checkpoint.Checkpointer.save",
    "generate": "fpo_jax.cli.jsonl_job.JobFile.append",
    "judge": "fpo_jax.eval.judge.pairwise_judge.Store.add",
}
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree")
FREE = ("keep_checkpoints", "async_save")  # fields that no program is compiled for
TRAINED = "trained.jsonl"  # in the workdir: number and group ids of every step that was begun, in any start


def trials(usual: int) -> int:
    """How many trials a test runs: its usual number, scaled by FPO_FAULT_TRIALS (whose usual value is 200)."""
    return max(1, usual * int(os.environ.get("FPO_FAULT_TRIALS", "200")) // 200)


def draws(name: str, number: int = 0) -> random.Random:
    """The random numbers of one trial."""
    return random.Random(f"{SEED}/{name}/{number}")


def replay(test: str) -> str:
    """The command that repeats a failed test."""
    return f"replay with FPO_FAULT_SEED={SEED} python -m pytest -m '' -k {test}"


class Zygote:
    """The process that has imported everything. It runs one program at a time."""

    def __init__(self, cache: Path, *, devices: int = 1):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": compiling.flags(devices=devices),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(REPO),
        }
        command = [sys.executable, "-m", "tests.faults"]
        self._process = subprocess.Popen(
            command, cwd=REPO, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Zygote":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(self, program: str, arguments: list, log: Path, fault: dict | None = None) -> tuple[int, str]:
        """Run a program to its end; return the exit code (negative: the signal that ended it) and what it said."""
        assert self._process.stdin is not None and self._process.stdout is not None
        job = {"program": program, "arguments": list(map(str, arguments)), "log": str(log), "fault": fault or {}}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline()), log.read_text(errors="replace")

    def run_together(
        self, program: str, commands: list[list], logs: list[Path], faults: dict[int, dict], *, bound_s: float
    ) -> list[tuple[int, str]]:
        """Run processes of one run to their ends; as `run` for each of them.

        One that still lives `bound_s` after the first of them has ended is killed, and its code is None. Where none is
        left but stopped ones, they go on.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        jobs = [
            {"program": program, "arguments": list(map(str, command)), "log": str(log), "fault": faults.get(number, {})}
            for number, (command, log) in enumerate(zip(commands, logs, strict=True))
        ]
        self._process.stdin.write(json.dumps({"together": jobs, "bound_s": bound_s}) + "\n")
        self._process.stdin.flush()
        codes = json.loads(self._process.stdout.readline())
        return [(code, log.read_text(errors="replace")) for code, log in zip(codes, logs, strict=True)]


def digest(tree) -> str:
    """sha256 over the bytes of a tree's arrays, with their dtypes and shapes."""
    import jax
    import numpy as np

    found = hashlib.sha256()
    for leaf in map(np.asarray, jax.tree.leaves(tree)):
        found.update(f"{leaf.dtype} {leaf.shape}".encode() + leaf.tobytes())
    return found.hexdigest()


def trained(workdir: Path) -> list[tuple[int, list[int]]]:
    """Number and group ids of the steps that were begun, in the order of time; a line cut by a kill is left out."""
    path = workdir / TRAINED
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [tuple(json.loads(line)) for line in lines]


def _serve() -> None:
    """Run what is asked for on the standard input, each in a fork."""
    import tempfile

    from fpo_jax import tokenization
    from tests import tiny

    modules = {
        name: importlib.import_module(name)
        for name in (
            *("fpo_jax.cli.train", "fpo_jax.cli.generate", "fpo_jax.cli.label", "fpo_jax.cli.export"),
            *("fpo_jax.eval.judge.winrate", "fpo_jax.eval.benchmarks.answer", "fpo_jax.eval.pipeline.pipeline"),
        )
    }
    for late in ("fpo_jax.trainer.trainer", "jaxlib.mlir.dialects.mhlo"):  # imported by a run, by the first program
        importlib.import_module(late)
    with tempfile.TemporaryDirectory() as folder:  # transformers imports most of itself with the first tokenizer,
        tiny.write_tokenizer(Path(folder))
        (Path(folder) / "config.json").write_text('{"model_type": "llama"}')  # and torch with the first configuration
        tokenization.load_tokenizer(folder)
    compiling.collect_seldom()
    gc.collect()
    gc.freeze()  # or every fork walks, and by that copies, all that is imported
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        asked = json.loads(line)
        children = []
        for job in asked.get("together", [asked]):
            children.append(os.fork())
            if children[-1] == 0:
                _become(modules[job["program"]], job)
        codes = _ends(children, asked.get("bound_s", math.inf))
        replies.write(json.dumps(codes if "together" in asked else codes[0]) + "\n")
        replies.flush()


def _ends(children: list[int], bound_s: float) -> list[int | None]:
    """Return the exit codes of all children, of which none outlives the first by more than the bound."""
    codes: dict[int, int | None] = {}
    stopped, end = set(), math.inf
    while len(codes) < len(children):
        child, status = os.waitpid(-1, os.WUNTRACED | (os.WNOHANG if end < math.inf else 0))
        if child and os.WIFSTOPPED(status):
            stopped.add(child)
        elif child:
            codes[child] = os.waitstatus_to_exitcode(status) if time.monotonic() < end else None
            end = min(end, time.monotonic() + bound_s)
        left = [one for one in children if one not in codes]
        if stopped and set(left) <= stopped:
            end, stopped = time.monotonic() + bound_s, set()
            for one in left:
                os.kill(one, signal.SIGCONT)
        if time.monotonic() > end:
            for one in left:
                os.kill(one, signal.SIGKILL)
        if not child:
            time.sleep(0.01)
    return [codes[child] for child in children]


def _become(program, job: dict) -> None:
    """Be the program from here to its end."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 0
    try:
        if program.__name__ == "fpo_jax.cli.train":
            import jax

            together = any(argument.startswith("--process_id") for argument in job["arguments"])
            if job["fault"].get("point") != "compile" and not together:
                _keep_executables(job["arguments"])
            if not together:
                _log_groups(Path(job["arguments"][job["arguments"].index("--workdir") + 1]))
            _arm(job["fault"])
            sys.argv = ["train.py"]
            code = program.main(job["arguments"])
            if together:
                jax.distributed.shutdown()  # as the usual way out does, which `os._exit` below is not
        else:
            _arm(job["fault"])
            code = program.main(job["arguments"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    print(f"came by {_calls[0]} times", flush=True)
    sys.stderr.flush()
    os._exit(code or 0)


def _keep_executables(arguments: list[str]) -> None:
    import jax
    from jax.experimental import serialize_executable

    from fpo_jax.trainer import compiled_step

    inner, place = compiled_step.CompiledStep._compile, arguments.index("--workdir")
    same = arguments[:place] + arguments[place + 2 :]
    key = json.dumps([argument for argument in same if not any(name in argument for name in FREE)])

    def compiled(self, first, batch):
        parts = f"{key} {self.name} {batch.tokens_NT.shape} {batch.targets_NR.shape}".encode()
        path = Path(os.environ["JAX_COMPILATION_CACHE_DIR"]) / f"{hashlib.sha256(parts).hexdigest()}.executable"
        if path.exists():
            return serialize_executable.deserialize_and_load(*pickle.loads(path.read_bytes()))
        jax.config.update("jax_enable_compilation_cache", False)  # what came from that cache cannot be kept again
        made = inner(self, first, batch)
        jax.config.update("jax_enable_compilation_cache", True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(pickle.dumps(serialize_executable.serialize(made)))
        temporary.replace(path)
        return made

    compiled_step.CompiledStep._compile = compiled


def _log_groups(workdir: Path) -> None:
    from fpo_jax import data

    inner = data.batch_at

    @functools.wraps(inner)
    def logged(schedule, number, positions):
        batch = inner(schedule, number, positions)
        if schedule.batch_size == 4:  # a step's; evaluations and the reference pass have other sizes here
            with (workdir / TRAINED).open("a") as file:
                file.write(json.dumps([number + 1, sorted(batch.row_ids_B[batch.row_ids_B >= 0].tolist())]) + "\n")
        return batch

    data.batch_at = logged


_calls = [0]  # of the point, or operations on files


def _arm(fault: dict) -> None:
    """Let the fault strike when its time has come."""
    if not fault:
        return

    def strike() -> None:
        _calls[0] += 1
        if _calls[0] == fault.get("count", 1):
            if "hang" in fault:
                time.sleep(10**6)
            elif fault.get("delay"):
                threading.Thread(target=_send, args=[fault], daemon=True).start()
            else:
                _send(fault)

    if "point" in fault:
        _before(POINTS[fault["point"]], strike)
    elif "folder" in fault:
        below = os.fspath(fault["folder"])

        def hook(event: str, arguments: tuple) -> None:
            if event in FILE_EVENTS and any(str(a).startswith(below) for a in arguments if isinstance(a, (str, Path))):
                strike()

        sys.addaudithook(hook)
    else:
        strike()


def _send(fault: dict) -> None:
    time.sleep(fault.get("delay", 0.0))
    for _ in range(fault.get("times", 1)):
        os.kill(os.getpid(), fault["signal"])
        time.sleep(0.02)


def _before(name: str, act) -> None:
    """Call `act` at the beginning of every call of a function, or of a method, of that name."""
    place, _, last = name.rpartition(".")
    owner = pkgutil.resolve_name(place)
    inner = getattr(owner, last)

    @functools.wraps(inner)
    def struck(*arguments, **options):
        act()
        return inner(*arguments, **options)

    setattr(owner, last, struck)


if __name__ == "__main__":
    _serve()
