"""Reward model on Anthropic HH helpful-base pairs, from the base Pythia-2.8B: Bradley-Terry on a bias-free scalar head.

Command   python train.py --config configs/pythia_hh_reward.py --workdir runs/hh_reward
          fpo export --workdir runs/hh_reward --out hh_reward --step best
Data      Anthropic/hh-rlhf, helpful-base: 43,835 pairs -> 343 steps of 128 pairs
Original  4 GPUs x 8 x 4 accumulated, ZeRO-2, fp16 (here bfloat16); starts from the base model, not from SFT; the score
          stands at the last content token; evaluated before and after the epoch (100 batches) and saved only when the
          accuracy improves. Here it is evaluated every 100 steps, the best of which is kept (train.keep_best);
          343 steps instead of 342 (last_batch=pad) and float32 master weights, as pythia_hh_pref says
Expect    nothing published for this recipe
"""

from fpo_jax import recipes


def get_config():
    """Return the locked configuration."""
    c = recipes.exo()
    c.stage = "reward"
    c.data.format = "hh"
    c.data.train = c.data.eval = "Anthropic/hh-rlhf"
    c.data.subfolder = "helpful-base"
    c.data.train_split, c.data.eval_split = "train", "test"
    c.data.hh_split = "first_difference"  # how the original builds prompt and completions
    c.loss.name = "bradley_terry"
    c.optim.learning_rate = 1e-5
    c.train.eval_every = 100
    c.train.eval_groups = 3_200  # 100 batches of 4 GPUs x 8
    c.train.save_every = 100
    c.train.keep_checkpoints = 1
    c.train.keep_best = "eval_rewards/accuracies"
    c.plan.groups = 43_835
    return c
