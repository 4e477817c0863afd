"""From flags, environment or launcher to `jax.distributed`, before any device is opened.

Three ways lead to several processes:
  flags, or their variables   every process names the coordinator, the number of processes and its own number
  a launcher                  SLURM, Open MPI, a TPU slice, an indexed Kubernetes job: jax reads what it needs
  neither                     this process is alone, and nothing is asked of the network
"""

import importlib.util
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from fpo_jax.distributed import failure, process
from fpo_jax.io import terminal

log = logging.getLogger("fpo_jax")

MODES = ("auto", "on", "off")
# flag -> variable that stands for it; the first has jax's own name
VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}


class Settings(NamedTuple):
    """What the flags say; None = not given."""

    mode: str = "auto"  # auto: as the environment says | on: jax must find a cluster | off: alone
    coordinator: str | None = None  # host:port of process 0, reachable from all
    num_processes: int | None = None
    process_id: int | None = None
    start_timeout_s: int = 300
    heartbeat_timeout_s: int = 100  # a process that is silent for so long is dead, and the others end


class StartError(Exception):
    """The processes did not find each other in time."""


def start(settings: Settings, workdir: Path) -> None:
    """Join the other processes of the run, if there are any.

    Args:
        settings: from the flags.
        workdir: named when this process has to end because another one did.

    Raises:
        ValueError: settings that contradict each other or the environment.
        StartError: not all processes arrived in time.
    """
    arguments = select(settings, os.environ)
    if arguments is None:
        return
    log.info(
        "several processes: waiting up to %d s for all of them at %s",
        settings.start_timeout_s,
        arguments.get("coordinator_address", "the address that the launcher gives"),
    )
    apart = (
        f"the processes did not come together within --start_timeout={settings.start_timeout_s} s: start the same"
        " command on every host, look for a process that ended early, and check that the coordinator's port is free"
        " there and open to the others; a process that is meant to be alone takes --distributed=off."
    )
    failure.set_exit_message(apart, workdir)  # when the time is over, jax ends the process from C++
    # jax's own preemption service would take SIGTERM from us.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=settings.start_timeout_s,
            heartbeat_timeout_seconds=settings.heartbeat_timeout_s,
        )
    except ValueError as error:
        raise ValueError(
            f"jax found no cluster to join ({error}); give --coordinator, --num_processes and --process_id, or"
            " --distributed=off to run in one process."
        ) from None
    except RuntimeError as error:  # JaxRuntimeError is one
        raise StartError(f"{apart} ({terminal.first_line(error)})") from None
    if process.process_count() > 1:
        failure.watch(workdir)
    else:
        failure.set_exit_message("", workdir)


def select(settings: Settings, environment: Mapping[str, str]) -> dict | None:
    """Return the arguments of jax.distributed.initialize, or None for a process that is alone.

    Raises:
        ValueError: settings that contradict each other or the environment.
    """
    if settings.mode not in MODES:
        raise ValueError(f"--distributed={settings.mode} is not one of {', '.join(MODES)}.")
    flags = {name: getattr(settings, name) for name in VARIABLES}
    if settings.mode == "off":
        if given := [f"--{name}" for name, value in flags.items() if value is not None]:
            raise ValueError(f"--distributed=off and {', '.join(given)} contradict each other; leave one out.")
        return None
    found = {name: _setting(name, value, environment) for name, value in flags.items()}
    missing = [f"--{name} (or {VARIABLES[name]})" for name, value in found.items() if value is None]
    launched = launcher(environment)
    if not missing:
        _check(found)
        method = {"cluster_detection_method": "deactivate"}
    elif len(missing) < len(found) and launched is None:
        raise ValueError(
            f"{' and '.join(missing)} missing: a process that is not started by SLURM, Open MPI or on a TPU slice needs"
            " all three of --coordinator, --num_processes and --process_id."
        )
    elif launched is None and settings.mode == "auto":
        return None
    else:
        method = _all_devices_of_the_node(environment)
    names = {"coordinator": "coordinator_address"}
    return method | {names.get(name, name): value for name, value in found.items() if value is not None}


def launcher(environment: Mapping[str, str]) -> str | None:
    """Name what started this process as one of several, by its variables; None where nothing did.

    SLURM_STEP_NUM_TASKS counts the tasks of this very step: a shell in an allocation of many has one.
    """
    platforms = environment.get("JAX_PLATFORMS", "")
    if _number(environment, "SLURM_STEP_NUM_TASKS") > 1 and "SLURM_PROCID" in environment:
        return "SLURM"
    if _number(environment, "OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    if (not platforms or "tpu" in platforms) and importlib.util.find_spec("libtpu") and _on_tpu_host():
        return "a TPU host"
    if "JOB_COMPLETION_INDEX" in environment and "KUBERNETES_SERVICE_HOST" in environment:
        if importlib.util.find_spec("kubernetes"):
            return "Kubernetes"
        log.warning(
            "JOB_COMPLETION_INDEX is set, but this process runs alone: for several, give --coordinator,"
            " --num_processes and --process_id, or install jax[k8s]."
        )
    return None


def _setting(name: str, flag: str | int | None, environment: Mapping[str, str]) -> str | int | None:
    text = environment.get(VARIABLES[name], "")
    if flag is not None or not text:
        return flag
    if name == "coordinator":
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{VARIABLES[name]}={text!r} is not a number.") from None


def _check(found: Mapping) -> None:
    host, _, port = found["coordinator"].rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--coordinator={found['coordinator']!r} is not host:port, e.g. 10.0.0.1:29500.")
    if not 0 <= found["process_id"] < found["num_processes"]:
        raise ValueError(
            f"--process_id={found['process_id']} is outside 0 ... {found['num_processes'] - 1}"
            f" (--num_processes={found['num_processes']})."
        )


def _all_devices_of_the_node(environment: Mapping[str, str]) -> dict:
    """With one process a node, give it every GPU there; jax would take one GPU a process under SLURM and Open MPI."""
    nodes = _number(environment, "SLURM_STEP_NUM_NODES")
    alone = _number(environment, "SLURM_STEP_NUM_TASKS") == nodes and nodes > 1
    alone |= "OMPI_COMM_WORLD_SIZE" in environment and _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE") == 1
    return {"local_device_ids": []} if alone and "JAX_LOCAL_DEVICE_IDS" not in environment else {}


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdigit() else 1


def _on_tpu_host() -> bool:
    """Whether a PCI device of Google's is here: what jax itself looks for."""
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(path.read_text().strip() == "0x1ae0" for path in vendors)
