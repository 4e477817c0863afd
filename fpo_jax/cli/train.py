"""Train a model: `fpo train --config mistral_base --workdir runs/mistral [--config.key=value ...]`.

A finished run goes on to more steps with a larger train.epochs or train.max_steps: as it is where its learning rate is
constant, else with --extend, under the learning rates of the longer run.

On several hosts run the same command on each: see docs/hosts.md. `fpo plan` says beforehand what a run needs.

Exit codes: 0 finished; 1 loss or gradient not finite, a checkpoint could not be written, or a fault of the program; 2
the input cannot be used or does not fit, or another run is in the workdir (the message says what to change); 70 another
process of the run failed, died or never came (134, which is SIGABRT, where jax noticed first), or nothing moved for
train.hang_timeout: the same command on every host goes on from the newest complete checkpoint; 75 stopped by a signal
with everything saved: the same command goes on; 143 or 130: ended at once by a second signal; 137, of the shell, killed
(mostly for memory). After 70, 75, 130, 134, 137 and 143 the same command goes on.
"""

import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags

from fpo_jax.config import overrides, row_slice
from fpo_jax.io import terminal

_KEYS = "`fpo config`"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; return the exit code.

    Args:
        arguments: of the command line; None = those of this process.
    """
    config, options, profiled = _parse(sys.argv[1:] if arguments is None else list(arguments))
    terminal.log_to_stderr()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _idle)  # while the imports below run; a run has handlers of its own
    from fpo_jax import checkpoint, distributed  # after the flags: a misspelt option answers at once
    from fpo_jax.distributed import preemption
    from fpo_jax.perf import hardware
    from fpo_jax.trainer import trainer

    hardware.lend_memory()
    workdir = Path(options.workdir)
    try:
        distributed.start(
            distributed.Settings(
                mode=options.distributed,
                coordinator=options.coordinator,
                num_processes=options.num_processes,
                process_id=options.process_id,
                start_timeout_s=options.start_timeout,
                heartbeat_timeout_s=options.heartbeat_timeout,
            ),
            workdir,
        )
        if not distributed.is_main_process():  # process 0 speaks for all; warnings say whose they are
            terminal.log_to_stderr(prefix=f"process {distributed.process_index()}: ")
            logging.getLogger("fpo_jax").setLevel(logging.WARNING)
        hardware.require_devices()
        with distributed.guard():
            trainer.run(config, workdir, profile=profiled, extend=options.extend)
        code = 0
    except (ValueError, OSError) as error:
        _say(error)
        code = 2
    except (distributed.StartError, trainer.NonFinite, checkpoint.SaveFailed, preemption.Stopped) as error:
        _say(error)
        codes = {distributed.StartError: distributed.LOST, preemption.Stopped: 75}
        code = codes.get(type(error), 1)
    distributed.finish()
    return code


def _parse(arguments: list[str]) -> tuple[object, flags.FlagValues, range]:
    """Parse the flags; a key that does not exist or a value of another type ends the program with one sentence."""
    values = overrides.flag_values(arguments)
    of: Any = {"flag_values": values}
    flags.DEFINE_string("workdir", "", "Folder for checkpoints, metrics and logs; resumes what it holds.", **of)
    flags.DEFINE_string("distributed", "auto", "auto: as the launcher or the flags below say; on; off: alone.", **of)
    flags.DEFINE_string("coordinator", None, "host:port of process 0; or JAX_COORDINATOR_ADDRESS.", **of)
    flags.DEFINE_integer("num_processes", None, "Processes of the run; or JAX_NUM_PROCESSES.", **of)
    flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0; or JAX_PROCESS_ID.", **of)
    flags.DEFINE_integer("start_timeout", 300, "Seconds that processes wait for each other at the start.", 1, **of)
    flags.DEFINE_integer("heartbeat_timeout", 100, "Seconds of silence after which a process is dead.", 1, **of)
    flags.DEFINE_bool("extend", False, "Go on to more steps than the workdir's run was to make.", **of)
    flags.DEFINE_string("profile", "", "first:last, e.g. 10:13 traces steps 10 to 12 into WORKDIR/profile.", **of)
    try:
        config = overrides.parse(values, arguments, keys=_KEYS, about=__doc__, pipeline=False)
        if not values.workdir:
            raise ValueError("--workdir is missing; give the folder of the run, new or to be resumed.")
        return config, values, _profiled(values.profile)
    except ValueError as error:
        _say(error)
        sys.exit(2)


def _profiled(text: str) -> range:
    try:
        steps = row_slice(text) if text else slice(0, 0)
        return range(steps.start, steps.stop)
    except (TypeError, ValueError):
        raise ValueError(f"--profile={text} is not first:last; write e.g. 10:13.") from None


def _idle(number: int, _frame: object) -> NoReturn:
    _say(f"{signal.Signals(number).name}: nothing was under way that could be lost; the same command goes on.")
    sys.exit(75)


def _say(error: object) -> None:
    terminal.refuse(Path(sys.argv[0]).name, error)


if __name__ == "__main__":
    sys.exit(main())
