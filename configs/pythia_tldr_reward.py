"""Reward model on TL;DR comparisons, from the base Pythia-2.8B: Bradley-Terry on a bias-free scalar head.

Command   python train.py --config configs/pythia_tldr_reward.py --workdir runs/tldr_reward
          fpo export --workdir runs/tldr_reward --out tldr_reward --step best
Data      summarize_from_feedback comparisons: 92,858 pairs -> 726 steps of 128 pairs
Original  as pythia_hh_reward with rows of 650 and summaries of 75 tokens; here too it is evaluated every 100
          steps, the best of which is kept, with last_batch=pad and float32 master weights
Expect    nothing published for this recipe
"""

from fpo_jax import recipes


def get_config():
    """Return the locked configuration."""
    c = recipes.exo()
    c.stage = "reward"
    c.data.format = "json"
    c.data.train = "data/tldr/train.json"
    c.data.eval = "data/tldr/test.json"
    c.data.max_length = 650
    c.data.max_completion_length = 75
    c.loss.name = "bradley_terry"
    c.optim.learning_rate = 1e-5
    c.train.eval_every = 100
    c.train.eval_groups = 3_200  # 100 batches of 4 GPUs x 8
    c.train.save_every = 100
    c.train.keep_checkpoints = 1
    c.train.keep_best = "eval_rewards/accuracies"
    c.plan.groups = 92_858
    return c
