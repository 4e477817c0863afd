"""Pythia-2.8B fine-tuned on the chosen completions of Anthropic HH helpful-base: the start of every HH alignment.

Command   python train.py --config configs/pythia_hh_sft.py --workdir runs/hh_sft
Data      Anthropic/hh-rlhf, helpful-base, chosen side: 43,835 dialogues -> 343 steps of 128
Original  4 GPUs x 8 x 4 accumulated, ZeRO-2, fp16 (here bfloat16); a row without padding was masked whole (a bug);
          342 steps, here 343 (last_batch=pad) and float32 master weights, as pythia_hh_pref says
Expect    nothing published but the models that follow
"""

from fpo_jax import recipes


def get_config():
    """Return the locked configuration."""
    c = recipes.exo()
    c.stage = "sft"
    c.data.format = "hh"
    c.data.train = c.data.eval = "Anthropic/hh-rlhf"
    c.data.subfolder = "helpful-base"
    c.data.train_split, c.data.eval_split = "train", "test"
    c.data.hh_split = "first_difference"  # how the original builds prompt and completions
    c.data.group_size = 1
    c.loss.name = "sft"
    c.optim.learning_rate = 1e-5
    c.train.eval_every = 0  # perplexity at the start and at the end
    c.train.eval_groups = 3_200  # 100 batches of 4 GPUs x 8
    c.train.save_every = 100
    c.train.keep_checkpoints = 1
    c.plan.groups = 43_835
    return c
