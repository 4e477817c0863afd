"""Pythia-2.8B on HH with K = 4 sampled completions scored by a reward model, alpha = 0.1, with a reference.

Command   python train.py --config configs/pythia_hh_rw.py --workdir runs/hh_rw --config.model.path=<SFT directory>
          --config.data.train=<hh_rw/train.json> --config.data.eval=<hh_rw/test.json>
Data      prompt / completions / rewards: the SFT model's samples at temperature 0.8, labelled by the reward model
Original  as pythia_hh_pref, with beta_r * beta_pi = 0.035 and the target's log clamped at -10;
          the last step is filled up (last_batch=pad) and master weights are float32, as there
Expect    nothing published for this recipe; docs/lab-notes/ has our runs on small models
"""

from fpo_jax import recipes


def get_config(loss: str = "alphapo-rw"):
    """Return the locked configuration; `configs/pythia_hh_rw.py:exo-rw` is the same recipe with another loss."""
    c = recipes.exo()
    c.data.format = "json"
    c.data.train = "data/hh_rw/train.json"
    c.data.eval = "data/hh_rw/test.json"
    c.data.group_size = 4
    c.loss.name = "alphapo-rw"
    c.loss.alpha = 0.1
    c.loss.beta_pi = 0.35
    c.loss.beta_r = 0.1
    c.loss.temperature = 0.8  # logits of policy and reference are divided by it, as in the original
    c.optim.learning_rate = 1e-6
    c.plan.groups = 43_835
    recipes.use_loss(c, loss)
    return c
