"""The shape legend and the two records that flow through every step. Read this file first.

Letters name logical sizes, never sharded ones; an array's suffix is its shape: `tokens_NT`, `logps_BK`.
`python -m fpo_jax.types` prints the legend.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

LEGEND = {
    "A": "micro-batches accumulated into one step",
    "B": "groups: one prompt with its K completions",
    "K": "completions per group (2 for a preference pair)",
    "N": "rows; one completion each, N = B*K and row b*K + k is completion k of group b, or groups packed into them",
    "T": "tokens of a row, prompt and completion, right-padded",
    "R": "scored positions of a row (completion tokens), right-padded",
    "D": "model width",
    "V": "vocabulary",
    "L": "layers",
    "H": "query heads",
    "G": "key/value heads",
    "C": "head dimension",
    "F": "feed-forward width, of one expert where there are several",
    "E": "experts of a mixture",
    "S": "feed-forward width of the expert that sees every token",
}

Array = jax.Array | np.ndarray
PyTree = Any


class Segments(NamedTuple):
    """Who sees whom in rows that hold several texts. A segment's tokens are neighbours.

    A token sees, of its own segment and of the segment that it follows, what stands before it: completions that follow
    one prompt see that prompt and nothing of each other.
    """

    ids_NT: Array  # int32, the token's segment, counted from 0 in every row; -1 for padding
    positions_NT: Array  # int32, where the token stands in its own conversation, the prompt that it follows included
    parents_NT: Array | None = None  # int32, the segment that the token's segment follows, or its own; None = its own


class Batch(NamedTuple):
    """B whole groups with static shapes; NumPy on the host, jax.Array on devices.

    Row n predicts `targets_NR[n, r]` from the hidden state at `predictors_NR[n, r]`, which is the position
    of the token before the target. Only these R positions of T ever reach the LM head.

    Rows hold one completion each, or, with `slots_NR`, as many whole groups as find room: then B counts the N * S
    places for groups, S in each row, and what stands in no group's place has weight 0.
    """

    tokens_NT: Array  # int32, right-padded with the pad id
    valid_NT: Array  # bool, True = a real token (never derived from token ids)
    predictors_NR: Array  # int32 in [0, T), 0 where not scored
    targets_NR: Array  # int32 token ids, 0 where not scored
    loss_mask_NR: Array  # bool, True = counts
    rewards_BK: Array  # float32; preference data carries 1 for chosen, 0 for rejected
    reference_logps_BK: Array  # float32 summed log-probs under the reference; zeros when the loss needs none
    weight_B: Array  # float32, 1 = a real group, 0 = padding of a ragged last batch
    row_ids_B: Array  # int32, the group's position in the prepared data set (-1 for padding)
    segments: Segments | None = None  # of packed rows
    slots_NR: Array | None = None  # int32 in [0, S*K), of rows of groups: the row's completion that is scored here
    ends_NP: Array | None = None  # int32, of the same rows, P = S*K: where each completion's last token stands


class TrainState(NamedTuple):
    """What one step changes, and what a checkpoint holds besides the data cursor."""

    params: PyTree  # nested dict of arrays, layers stacked on a leading L axis
    opt_state: PyTree
    step: PyTree  # int32 scalar (or its shape, or its sharding): steps applied or skipped so far
    frozen: PyTree = None  # parameters that no step changes; no checkpoint holds them
    skipped: PyTree = None  # int32 scalar: steps not applied in a row (skip_step.SkipRule.in_a_row); None = not counted


if __name__ == "__main__":
    for letter, meaning in LEGEND.items():
        print(f"{letter}  {meaning}")
