"""Pythia-2.8B on Anthropic HH helpful-base preference pairs, alpha = 0.1, with a reference.

Command   python train.py --config configs/pythia_hh_pref.py --workdir runs/hh_pref --config.model.path=<SFT directory>
Data      Anthropic/hh-rlhf, helpful-base: 43,835 pairs -> 342 updates of 128 and one of the 59 that remain
Original  4 GPUs x 8 prompts x 4 accumulated; fp16, here bfloat16; the authors run the whole epoch (their cap of 1,400
          micro-steps is never reached); of equal rewards the second is trained on as the chosen (tie_policy=second).
          Here float32 master weights, and 343 updates, the last of the 59 pairs that remain (last_batch=pad); the
          original's last two micro-steps complete none: 342. `first_difference` splits 26 of 2,312 HH pairs elsewhere
          than the original's code
Expect    nothing published for this recipe; docs/lab-notes/ has our runs on small models
"""

from fpo_jax import config, recipes


def get_config(loss: str = "alphapo-pref"):
    """Return the locked configuration; `configs/pythia_hh_pref.py:exo-pref` is the same recipe with another loss."""
    c = config.default()
    c.seed = 1234
    c.model.path = "EleutherAI/pythia-2.8b"  # the recipe starts from its SFT checkpoint: override
    c.data.format = "hh"
    c.data.train = c.data.eval = "Anthropic/hh-rlhf"
    c.data.subfolder = "helpful-base"
    c.data.train_split, c.data.eval_split = "train", "test"
    c.data.hh_split = "first_difference"  # how the original builds prompt and responses
    c.data.rule = "raw"
    c.data.max_length = 512
    c.data.max_response_length = 200
    c.data.cut_prompts_together = False  # each response's row cuts the prompt for itself (spec 2.4)
    c.data.on_identical = "drop"
    c.data.last_batch = "pad"
    c.loss.name = "alphapo-pref"
    c.loss.alpha = 0.1
    c.loss.tie_policy = "second"
    c.loss.beta_pi = 0.5
    c.loss.temperature = 0.8  # logits of policy and reference are divided by it, as in the original
    c.optim.learning_rate = 1e-6
    c.optim.schedule = "cosine"
    c.optim.decay_over = "epochs"  # the original's cosine spans the epoch even when the run stops earlier
    c.optim.b2 = 0.95
    c.train.batch_size = 128
    c.train.micro_batch_per_device = 8
    c.train.eval_batch_per_device = 8
    c.train.eval_every = 34  # ten evaluations and ten checkpoints a run
    c.train.save_every = 34
    c.train.keep_checkpoints = 10
    c.plan.groups = 43_835
    recipes.use_loss(c, loss)
    return c
