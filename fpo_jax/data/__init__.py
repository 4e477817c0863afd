"""Examples -> tokenised groups -> batches. NumPy on the host; no JAX arrays, no torch.

loading            files, saved data sets and hub names -> rows; tabular_files and columns read and name them
formats            rows of a named format -> `Records`; hh_rlhf and imdb are two of them, common_formats has what other
                   trainers read; values checks what a row holds
auto_format        which format a source has, by its columns
mixture            several sources as one
decontamination    records that repeat a benchmark are dropped
record_file        records on disk while a large set is tokenised
tokenize           records -> `Prepared` (tokenized), with an `Audit` (audit) of everything cut, dropped or odd; chunk
                   by chunk (record_chunks), in several processes (worker_pool)
dataset_folder     both on disk, verified and mapped; flat_texts and growing_array are its storage
sequence_packing   short texts packed into sequences
group_packing      whole groups packed into sequences, their prompts standing once
sampler            order of the groups, resumable cursor, static shapes -> `types.Batch`
"""

from fpo_jax.data.audit import Audit
from fpo_jax.data.dataset_folder import Dataset
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
    "Dataset",
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
