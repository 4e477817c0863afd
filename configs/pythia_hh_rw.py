"""Pythia-2.8B on HH with K = 4 sampled responses scored by a reward model, alpha = 0.1, with a reference.

Command   python train.py --config configs/pythia_hh_rw.py --workdir runs/hh_rw --config.model.path=<SFT directory>
          --config.data.train=<hh_rw/train.json> --config.data.eval=<hh_rw/test.json>
Data      prompt / completions / rewards: the SFT model's samples at temperature 0.8, labelled by the reward model
Original  as pythia_hh_pref, with beta_r * beta_pi = 0.035 and the target's log clamped at -10;
          the last update is filled up (last_batch=pad) and master weights are float32, as there
Expect    nothing published for this recipe; docs/lab-notes/ has our runs on small models
"""

from fpo_jax import recipes
from fpo_jax.configs import pythia_hh_pref


def get_config(loss: str = "alphapo-rw"):
    """Return the locked configuration; `configs/pythia_hh_rw.py:exo-rw` is the same recipe with another loss."""
    c = pythia_hh_pref.get_config("alphapo-rw")
    c.data.format = "json"
    c.data.hh_split, c.data.subfolder = "last_turn", ""
    c.data.train_split = c.data.eval_split = ""
    c.data.train = "data/hh_rw/train.json"
    c.data.eval = "data/hh_rw/test.json"
    c.data.group_size = 4
    c.loss.beta_pi = 0.35
    c.loss.beta_r = 0.1
    recipes.use_loss(c, loss)
    return c
