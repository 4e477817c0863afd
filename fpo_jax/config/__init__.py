"""The configuration of a run.

fields     every config field with its default and meaning; which of them may change when a run resumes
overrides  a recipe by name or path, and what the command line changes
checks     what is wrong with their values, one sentence each
effects    which of them change nothing beside the others
choices    the one sentence about a value that is none of its choices
"""

from fpo_jax.config.checks import problems, raise_problems, row_slice, validate
from fpo_jax.config.fields import (
    FITTING,
    RESUMABLE,
    Config,
    about,
    default,
    difference,
    flatten,
    loss_options,
    value_at,
)

__all__ = [
    "FITTING",
    "RESUMABLE",
    "Config",
    "about",
    "default",
    "difference",
    "flatten",
    "loss_options",
    "problems",
    "raise_problems",
    "row_slice",
    "validate",
    "value_at",
]
