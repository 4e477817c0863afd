"""Log-probs of completions: hidden states, LM head and loss tokens in, one number per sequence out.

sequence_logprobs  `completion_logps`, and `completion_losses` one step further
dispatch           which kernel runs, and why
coverage           what runs where: the table of docs/performance.md, `python -m fpo_jax.logprobs.coverage`
"""

from fpo_jax.kernels.lm_head.head_loss import sum_slots
from fpo_jax.logprobs.dispatch import (
    ENGINES,
    IMPLEMENTATIONS,
    PLATFORMS,
    HeadShapes,
    Selection,
    Target,
    explain,
    kept_if_unlimited,
    select,
)
from fpo_jax.logprobs.sequence_logprobs import CompletionLogps, completion_logps, completion_losses

__all__ = [
    "ENGINES",
    "IMPLEMENTATIONS",
    "PLATFORMS",
    "CompletionLogps",
    "HeadShapes",
    "Selection",
    "Target",
    "completion_logps",
    "completion_losses",
    "explain",
    "kept_if_unlimited",
    "select",
    "sum_slots",
]
