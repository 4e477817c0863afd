"""Batches and forward functions that tests build by hand."""

import numpy as np

from fpo_jax import attention, types
from fpo_jax.trainer import forward


def random_batch(*, groups: int, completions: int, length: int, vocab: int, seed: int = 0, rewards=None) -> types.Batch:
    """Return rows of random tokens, prompts and lengths; the scored part follows each prompt."""
    random = np.random.default_rng(seed)
    rows, width = groups * completions, length - 3
    tokens = random.integers(3, vocab, (rows, length)).astype(np.int32)
    valid = np.zeros((rows, length), bool)
    predictors, targets = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int32)
    scored = np.zeros((rows, width), bool)
    for row in range(rows):
        prompt = int(random.integers(2, length - 4))
        total = int(random.integers(prompt + 1, length + 1))
        valid[row, :total] = True
        tokens[row, total:] = 0
        count = min(total - prompt, width)
        predictors[row, :count] = np.arange(prompt - 1, prompt - 1 + count)
        targets[row, :count] = tokens[row, prompt : prompt + count]
        scored[row, :count] = True
    if rewards is None:
        rewards = np.tile(np.eye(1, completions, dtype=np.float32), (groups, 1))
    return types.Batch(
        tokens, valid, predictors, targets, scored,
        np.asarray(rewards, np.float32),
        np.zeros((groups, completions), np.float32),
        np.ones(groups, np.float32),
        np.arange(groups, dtype=np.int32),
    )  # fmt: skip


def forward_fn(config, **changed) -> forward.PolicyForward:
    """Return a float32 forward function of a tiny model."""
    options = {
        "compute_dtype": "float32",
        "remat": "none",
        "attention": attention.Selection("chunked" if config.of_family.sinks else "xla", "for the test"),
        "implementation": "chunked",
    }
    options |= {"workspace_bytes": 2**20, "temperature": 1.0}
    return forward.PolicyForward(config=config, **(options | changed))
