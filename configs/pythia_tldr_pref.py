"""Pythia-2.8B on TL;DR comparisons, alpha = 0.025, with a reference.

Command   python train.py --config configs/pythia_tldr_pref.py --workdir runs/tldr_pref
          --config.model.path=<SFT directory> --config.data.train=<tldr/train.json> --config.data.eval=<tldr/test.json>
Data      prompt / chosen / rejected: 92,858 comparisons -> 726 steps an epoch, of which 350 are run
Original  1,400 micro-steps = 350 steps, 48 % of the epoch, while the cosine spans all of it (rate still 0.53 of
          peak); tie_policy=second, last_batch=pad and float32 master weights as in pythia_hh_pref
Expect    nothing published for this recipe; docs/lab-notes/ has our runs on small models
"""

from fpo_jax import recipes


def get_config(loss: str = "alphapo-pref"):
    """Return the locked configuration; `configs/pythia_tldr_pref.py:exo-pref` is the same recipe with another loss."""
    c = recipes.exo()
    c.data.format = "json"
    c.data.train = "data/tldr/train.json"
    c.data.eval = "data/tldr/test.json"
    c.data.max_length = 650
    c.data.max_completion_length = 75
    c.loss.name = "alphapo-pref"
    c.loss.tie_policy = "second"  # of equal rewards the second is trained on as the chosen
    c.loss.alpha = 0.025
    c.loss.beta_pi = 0.3
    c.loss.temperature = 0.8  # logits of policy and reference are divided by it, as in the original
    c.optim.learning_rate = 1e-6
    c.train.max_steps = 350
    c.train.eval_every = 72  # the original's checkpoint interval: 290 micro-steps
    c.train.save_every = 72
    c.plan.groups = 92_858
    recipes.use_loss(c, loss)
    return c
