"""Pythia-2.8B on Anthropic HH helpful-base preference pairs, alpha = 0.1, with a reference.

Command   python train.py --config configs/pythia_hh_pref.py --workdir runs/hh_pref --config.model.path=<SFT directory>
Data      Anthropic/hh-rlhf, helpful-base: 43,835 pairs -> 342 steps of 128 and one of the 59 that remain
Original  4 GPUs x 8 prompts x 4 accumulated; fp16, here bfloat16; the authors run the whole epoch (their cap of 1,400
          micro-steps is never reached); of equal rewards the second is trained on as the chosen (tie_policy=second).
          Here float32 master weights, and 343 steps, the last of the 59 pairs that remain (last_batch=pad); the
          original's last two micro-steps complete none: 342. `first_difference` splits 26 of 2,312 HH pairs elsewhere
          than the original's code
Expect    nothing published for this recipe; docs/lab-notes/ has our runs on small models
"""

from fpo_jax import recipes


def get_config(loss: str = "alphapo-pref"):
    """Return the locked configuration; `configs/pythia_hh_pref.py:exo-pref` is the same recipe with another loss."""
    c = recipes.exo()
    c.data.format = "hh"
    c.data.train = c.data.eval = "Anthropic/hh-rlhf"
    c.data.subfolder = "helpful-base"
    c.data.train_split, c.data.eval_split = "train", "test"
    c.data.hh_split = "first_difference"  # how the original builds prompt and completions
    c.loss.name = "alphapo-pref"
    c.loss.tie_policy = "second"  # of equal rewards the second is trained on as the chosen
    c.loss.alpha = 0.1
    c.loss.beta_pi = 0.5
    c.loss.temperature = 0.8  # logits of policy and reference are divided by it, as in the original
    c.optim.learning_rate = 1e-6
    c.plan.groups = 43_835
    recipes.use_loss(c, loss)
    return c
