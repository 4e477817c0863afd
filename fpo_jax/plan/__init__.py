"""Whether a run fits on a target, and what it would cost there: compiled for real, on any machine.

planner      `run(config, "h100:4")` -> `Report`
compilation  every program of the run, compiled for absent devices
hlo, execution, trip_counts  what the compiled programs run, and how often
collectives, links, traffic  what they communicate, how fast, and what their kernels move
roofline     how long a step takes: at best, predicted, without overlap
suggestions  what to change where a run does not fit
report       the text
"""

from fpo_jax.plan.planner import Report, main, run

__all__ = ["Report", "main", "run"]
