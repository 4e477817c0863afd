"""The shape legend and the two records that flow through every step. Read this file first.

Letters name logical sizes, never sharded ones; an array's suffix is its shape: `tokens_NT`, `logps_BK`.
`python -m fpo_jax.shapes` prints the legend.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

LEGEND = {
    "A": "micro-batches accumulated into one update",
    "B": "groups: one prompt with its K candidate responses",
    "K": "candidates per group (2 for a preference pair)",
    "N": "rows, N = B*K, group-major: row b*K + k is candidate k of group b",
    "T": "tokens of a row, prompt and response, right-padded",
    "R": "scored positions of a row (response tokens), right-padded",
    "D": "model width",
    "V": "vocabulary",
    "L": "layers",
    "H": "query heads",
    "G": "key/value heads",
    "C": "head dimension",
    "F": "feed-forward width",
}

Array = jax.Array | np.ndarray
PyTree = Any


class Batch(NamedTuple):
    """B whole groups with static shapes; NumPy on the host, jax.Array on devices.

    Row n predicts `targets_NR[n, r]` from the hidden state at `predictors_NR[n, r]`, which is the position
    before the target token. Only these R positions of T ever reach the LM head.
    """

    tokens_NT: Array  # int32, right-padded with the pad id
    valid_NT: Array  # bool, True = a real token (never derived from token ids)
    predictors_NR: Array  # int32 in [0, T), 0 where not scored
    targets_NR: Array  # int32 token ids, 0 where not scored
    scored_NR: Array  # bool, True = counts
    rewards_BK: Array  # float32; preference data carries 1 for chosen, 0 for rejected
    reference_logps_BK: Array  # float32 summed log-probs under the reference; zeros when the loss needs none
    weight_B: Array  # float32, 1 = a real group, 0 = padding of a ragged last batch
    row_ids_B: Array  # int32, the group's position in the prepared data set (-1 for padding)
    segments_NT: Array | None = None  # int32, of packed rows: number of the text in its row (-1 for padding)


class TrainState(NamedTuple):
    """What one update changes, and what a checkpoint holds besides the data cursor."""

    params: PyTree  # nested dict of arrays, layers stacked on a leading L axis
    opt_state: PyTree
    step: PyTree  # int32 scalar (or its shape, or its sharding): updates applied or skipped so far
    frozen: PyTree = None  # parameters that no update changes; no checkpoint holds them


if __name__ == "__main__":
    for letter, meaning in LEGEND.items():
        print(f"{letter}  {meaning}")
