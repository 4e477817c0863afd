"""Records -> prepared token rows -> batches. NumPy on the host; no JAX arrays, no torch.

sources      files, saved data sets and hub names -> rows
records      rows of a named format -> `Records`
transcripts  HH-RLHF transcripts -> prompt and two responses
reviews      movie reviews -> prompt, response and label
prepared     records -> `Prepared` (flat token storage) with an `Audit` of everything cut, dropped or odd
packing      short texts of `Prepared` packed into rows
audit        what the audit counts, as text and as JSON
mixing       several sources as one
decontamination  records that repeat a benchmark are dropped
layouts      whole groups packed into rows, their prompts standing once
batches      order of the groups, resumable cursor, static shapes -> `shapes.Batch`
"""

from fpo_jax.data.audit import Audit
from fpo_jax.data.formats import Record, Records, read
from fpo_jax.data.group_packing import scored_positions
from fpo_jax.data.mixture import Part, mixture, parse
from fpo_jax.data.sampler import (
    RowSizes,
    Schedule,
    batch_at,
    batch_shapes,
    group_ids,
    order,
    packed,
    row_sizes,
    schedule,
    sequence,
    steps_per_epoch,
    tokens_once,
)
from fpo_jax.data.sequence_packing import pack
from fpo_jax.data.tokenize import Prepared, best_only, masked_sample, prepare, reward_row

__all__ = [
    "Audit",
    "Part",
    "Prepared",
    "Record",
    "Records",
    "RowSizes",
    "Schedule",
    "batch_at",
    "batch_shapes",
    "best_only",
    "group_ids",
    "masked_sample",
    "mixture",
    "order",
    "pack",
    "packed",
    "parse",
    "prepare",
    "read",
    "reward_row",
    "row_sizes",
    "schedule",
    "scored_positions",
    "sequence",
    "steps_per_epoch",
    "tokens_once",
]
