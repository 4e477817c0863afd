"""Pythia-2.8B on TL;DR with K = 4 sampled summaries scored by a reward model, alpha = 0.025, with a reference.

Command   python train.py --config configs/pythia_tldr_rw.py --workdir runs/tldr_rw --config.model.path=<SFT directory>
          --config.data.train=<tldr_rw/train.json> --config.data.eval=<tldr_rw/test.json>
Data      prompt / completions / rewards: the SFT model's samples at temperature 0.8, labelled by the reward model
Original  as pythia_tldr_pref, with beta_r * beta_pi = 0.05 and the target's log clamped at -10;
          last_batch=pad and float32 master weights as in pythia_hh_pref
Expect    nothing published for this recipe; docs/lab-notes/ has our runs on small models
"""

from fpo_jax import recipes


def get_config(loss: str = "alphapo-rw"):
    """Return the locked configuration; `configs/pythia_tldr_rw.py:exo-rw` is the same recipe with another loss."""
    c = recipes.exo()
    c.data.format = "json"
    c.data.train = "data/tldr_rw/train.json"
    c.data.eval = "data/tldr_rw/test.json"
    c.data.max_length = 650
    c.data.max_completion_length = 75
    c.data.group_size = 4
    c.loss.name = "alphapo-rw"
    c.loss.alpha = 0.025
    c.loss.beta_pi = 0.5
    c.loss.beta_r = 0.1
    c.loss.temperature = 0.8  # logits of policy and reference are divided by it, as in the original
    c.optim.learning_rate = 1e-6
    c.train.max_steps = 350
    c.train.eval_every = 72  # the original's checkpoint interval: 290 micro-steps
    c.train.save_every = 72
    c.plan.groups = 92_858
    recipes.use_loss(c, loss)
    return c
