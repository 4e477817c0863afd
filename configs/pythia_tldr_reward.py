"""Reward model on TL;DR comparisons, from the base Pythia-2.8B: Bradley-Terry on a bias-free scalar head.

Command   python train.py --config configs/pythia_tldr_reward.py --workdir runs/tldr_reward
          fpo export --workdir runs/tldr_reward --out tldr_reward --step best
Data      summarize_from_feedback comparisons: 92,858 pairs -> 726 updates of 128 pairs
Original  as pythia_hh_reward with rows of 650 and summaries of 75 tokens; here too it is evaluated every 100
          updates, the best of which is kept, with last_batch=pad and float32 master weights
Expect    nothing published for this recipe
"""

import copy

from fpo_jax.configs import pythia_hh_reward, pythia_tldr_pref


def get_config():
    """Return the locked configuration."""
    c = pythia_hh_reward.get_config()
    source, group_size = pythia_tldr_pref.get_config().data, c.data.group_size
    c.data = copy.deepcopy(source)
    c.data.group_size = group_size
    c.plan.groups = 92_858
    return c
