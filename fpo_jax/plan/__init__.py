"""Whether a run fits on a target, and what it would cost there: compiled for real, on any machine.

planner      `run(config, "h100:4")` -> `Report`
compilation  every program of the run, compiled for absent devices
collectives, roofline  what the programs communicate; what bounds their time
suggestions  what to change where a run does not fit
report       the text
"""

from fpo_jax.plan.planner import Report, main, run

__all__ = ["Report", "main", "run"]
