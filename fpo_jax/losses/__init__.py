"""Losses: the divergence table of f-PO, its targets and scores, and other objectives on the same inputs.

    Completions [B, K] -> scores -> p = softmax ┐
                      -> rewards -> target q   ┴-> D_f(p‖q) [B]

f_divergences      the paper's table: read it first
preference_losses  the other objectives, on pairs of a group
scores, targets    the policy's s and the target's q, over the completions of a group
registry, options  every name a loss goes by, and what it can be told -> a `loss.Loss`, all of it settled
numerics           log-sum-exp and its like, accurate and finite
described          a loss in words

`fpo losses` prints every entry, name and option; `fpo losses NAME key=value ...` what one name stands for. Nothing here
touches tokens, models or batches; the step averages over groups and adds the SFT term.
"""

from fpo_jax.losses.described import IN_TRL, described, in_words
from fpo_jax.losses.f_divergences import DIVERGENCES, Divergence, f_divergence
from fpo_jax.losses.loss import Loss
from fpo_jax.losses.numerics import log_softmax
from fpo_jax.losses.options import OPTIONS, Option, options_of
from fpo_jax.losses.preference_losses import OBJECTIVES, Objective
from fpo_jax.losses.registry import PRESETS, Preset, carried_over, names_of, resolve
from fpo_jax.losses.scores import SCORES, Completions, Score, log_ratio_scores, mean_logp_scores, mean_logps
from fpo_jax.losses.targets import TARGETS, TIE_POLICIES, Target, chosen_shares, preference_target, reward_target

__all__ = [
    "DIVERGENCES",
    "IN_TRL",
    "OBJECTIVES",
    "OPTIONS",
    "PRESETS",
    "SCORES",
    "TARGETS",
    "TIE_POLICIES",
    "Completions",
    "Divergence",
    "Loss",
    "Objective",
    "Option",
    "Preset",
    "Score",
    "Target",
    "carried_over",
    "chosen_shares",
    "described",
    "f_divergence",
    "in_words",
    "log_ratio_scores",
    "log_softmax",
    "mean_logp_scores",
    "mean_logps",
    "names_of",
    "options_of",
    "preference_target",
    "resolve",
    "reward_target",
]
