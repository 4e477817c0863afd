"""What a run is before it touches a device: checked configuration, model description, tokenised data, sizes.

config -> Inputs (loss, model config, data with audits) -> Plan (batches, steps, passes) -> a workdir that is its own
                 Inputs, Plan -> Blueprint: what the programs are compiled for, which needs neither data nor weights

inputs      what is read
labels      rewards that no reward model can be trained on
best        which metric may tell the best checkpoint
planning    order, sizes, passes
workdir     what makes it the same run
"""

from fpo_jax.job.best import DIRECTIONS
from fpo_jax.job.inputs import (
    Dataset,
    Inputs,
    Reference,
    adapter,
    buckets,
    check,
    check_reference_ids,
    prepare,
    read_data,
    read_encoder,
    read_model,
    read_reference,
    reward_pad_id,
)
from fpo_jax.job.planning import Blueprint, Plan, accumulation, blueprint, durations, plan, sequential_schedule
from fpo_jax.job.workdir import RESOLVED_LOSS, claim_workdir, fingerprints, identity, keep_source

__all__ = [
    "DIRECTIONS",
    "RESOLVED_LOSS",
    "Blueprint",
    "Dataset",
    "Inputs",
    "Plan",
    "Reference",
    "accumulation",
    "adapter",
    "blueprint",
    "buckets",
    "check",
    "check_reference_ids",
    "claim_workdir",
    "durations",
    "fingerprints",
    "identity",
    "keep_source",
    "plan",
    "prepare",
    "read_data",
    "read_encoder",
    "read_model",
    "read_reference",
    "reward_pad_id",
    "sequential_schedule",
]
