"""Train a model: `python train.py --config configs/mistral_base.py --workdir runs/mistral [--config.key=value ...]`.

On several hosts run the same command on each: see docs/hosts.md. `--plan TARGET` in place of `--workdir` trains
nothing: it compiles the run for devices that need not be here (h100:4, h100:2x8, v5e-16) and says what it needs there.

Exit codes: 0 finished; 1 loss or gradient not finite, a checkpoint could not be written, or a fault of the program; 2
the input cannot be used or does not fit, or another run is in the workdir (the message says what to change); 70 another
process of the run failed, died or never came (134, which is SIGABRT, where jax noticed first): the same command on
every host goes on from the newest complete checkpoint; 75 stopped by a signal with everything saved: the same command
goes on; 143 or 130: ended at once by a second signal.
"""

import logging
import signal
import sys
from pathlib import Path
from typing import NoReturn

from absl import app, flags

from fpo_jax.config import overrides

_CONFIG = overrides.define("A file of configs/; override with --config.key=value, or =None where a field is unset.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Folder for checkpoints, metrics and logs; resumes what it holds.")
_PLAN = flags.DEFINE_string("plan", "", "Compile for h100:4, h100:2x8, v5e-16, v5p-2x8, ..., here; train nothing.")
_MODE = flags.DEFINE_string(
    "distributed", "auto", "auto: as the launcher or the flags below say; on; off: one process."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0; or JAX_COORDINATOR_ADDRESS.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run; or JAX_NUM_PROCESSES.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0; or JAX_PROCESS_ID.")
_START = flags.DEFINE_integer("start_timeout", 300, "Seconds that the processes wait for each other at the start.", 1)
_HEARTBEAT = flags.DEFINE_integer("heartbeat_timeout", 100, "Seconds of silence after which a process is dead.", 1)
_PROFILE = flags.DEFINE_string("profile", "", "first:last, e.g. 10:13 traces updates 10 to 12 into WORKDIR/profile.")
flags.mark_flags_as_required(["config"])


def parse(argv: list[str]) -> list[str]:
    """Parse the flags; a key that does not exist or a value of another type ends the program with one sentence."""
    try:
        rest = overrides.parse(argv, keys="`fpo_jax/config/knobs.py`")
    except ValueError as error:
        _fail(2, error)
    if _PLAN.value and (_WORKDIR.value or _PROFILE.value):
        _fail(2, "--plan trains nothing and takes neither --workdir nor --profile; leave them out.")
    if not _WORKDIR.value and not _PLAN.value:
        _fail(2, "--workdir is missing; give the folder of the run, new or to be resumed.")
    if rest[1:]:
        _fail(2, f"unexpected arguments {rest[1:]}; settings are given as --config.key=value.")
    return rest


def main(_argv: list[str]) -> None:
    """Run, and turn each outcome into an exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("fpo_jax").setLevel(logging.INFO)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _idle)  # while the imports below run; a run has handlers of its own
    if _PLAN.value:
        sys.exit(_plan())
    from fpo_jax import checkpoint, execution, hosts, loop  # after the flags: a misspelt option answers at once

    workdir = Path(_WORKDIR.value)
    try:
        hosts.start(
            hosts.Settings(
                mode=_MODE.value,
                coordinator=_COORDINATOR.value,
                num_processes=_PROCESSES.value,
                process_id=_PROCESS.value,
                start_timeout_s=_START.value,
                heartbeat_timeout_s=_HEARTBEAT.value,
            ),
            workdir,
        )
        if not hosts.first():  # process 0 speaks for all; warnings say whose they are
            logging.basicConfig(format=f"process {hosts.index()}: %(message)s", stream=sys.stderr, force=True)
            logging.getLogger("fpo_jax").setLevel(logging.WARNING)
        with hosts.guard():
            loop.run(_CONFIG.value, workdir, profile=_profiled())
        code = 0
    except (ValueError, hosts.StartError, loop.NonFinite, checkpoint.SaveFailed, execution.Stopped) as error:
        print(f"train.py: {error}", file=sys.stderr)
        codes = {hosts.StartError: hosts.LOST, loop.NonFinite: 1, checkpoint.SaveFailed: 1, execution.Stopped: 75}
        code = codes.get(type(error), 2)
    hosts.finish()
    sys.exit(code)


def _idle(number: int, _frame: object) -> NoReturn:
    _fail(75, f"{signal.Signals(number).name}: nothing was under way that could be lost; the same command goes on.")


def _profiled() -> range:
    from fpo_jax import config

    try:
        updates = config.row_slice(_PROFILE.value) if _PROFILE.value else slice(0, 0)
        return range(updates.start, updates.stop)
    except (TypeError, ValueError):
        raise ValueError(f"--profile={_PROFILE.value} is not first:last; write e.g. 10:13.") from None


def _plan() -> int:
    from fpo_jax import plan

    try:
        return plan.main(_CONFIG.value, _PLAN.value)
    except ValueError as error:
        _fail(2, error)


def _fail(code: int, error: object) -> NoReturn:
    print(f"train.py: {error}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
