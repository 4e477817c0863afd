"""Several processes, one run: they start together, agree on what they run, and end together.

initialize     flags, environment or launcher -> `jax.distributed`
balance        files dealt out, so that each process reads about as much
consensus      what the processes tell each other over its key-value store: inputs, errors, stop requests
failure        how a process leaves, and what the others do when one is gone
exit_reporter  a tiny process that outlives this one and says what can be resumed
preemption     SIGTERM and SIGINT stop a run once its state is saved
progress       progress bars on the main process's terminal
watchdog       a run in which nothing moves ends
workdir_lock   what is written has one writer at a time, and a dead one gives way

In one process every function here does nothing, at no cost.
"""

from fpo_jax.distributed.balance import balanced
from fpo_jax.distributed.consensus import Vote, agree, check_shared, from_first, share, together
from fpo_jax.distributed.failure import LOST, finish, guard
from fpo_jax.distributed.initialize import Settings, StartError, start
from fpo_jax.distributed.process import CollectiveError, is_main_process, process_count, process_index

__all__ = [
    "LOST",
    "CollectiveError",
    "Settings",
    "StartError",
    "Vote",
    "agree",
    "balanced",
    "check_shared",
    "finish",
    "from_first",
    "guard",
    "is_main_process",
    "process_count",
    "process_index",
    "share",
    "start",
    "together",
]
