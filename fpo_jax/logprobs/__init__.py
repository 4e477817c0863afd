"""Log-probs of completions: hidden states, LM head and loss tokens in, one number per sequence out.

sequence_logprobs  `response_logps`, and `response_losses` one step further
dispatch           which kernel runs, and why
coverage           the table of targets, meshes and layouts that the READMEs show: `python -m fpo_jax.logprobs.coverage`
"""

from fpo_jax.kernels.lm_head.head_loss import sum_slots
from fpo_jax.logprobs.dispatch import (
    ENGINES,
    IMPLEMENTATIONS,
    PLATFORMS,
    Choice,
    HeadShapes,
    Target,
    choose,
    explain,
    kept_if_unlimited,
)
from fpo_jax.logprobs.sequence_logprobs import ResponseLogps, response_logps, response_losses

__all__ = [
    "ENGINES",
    "IMPLEMENTATIONS",
    "PLATFORMS",
    "Choice",
    "HeadShapes",
    "ResponseLogps",
    "Target",
    "choose",
    "explain",
    "kept_if_unlimited",
    "response_logps",
    "response_losses",
    "sum_slots",
]
