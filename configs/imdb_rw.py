"""GPT-2 large on K = 2 sampled reviews scored by the sentiment classifier, beta_r = beta_pi = 0.1, with a reference.

Command   python train.py --config configs/imdb_rw.py --workdir runs/imdb_rw --config.model.path=<SFT directory>
          --config.data.train=<imdb_rw/train.json> --config.data.eval=<imdb_rw/test.json>
Data      prompt / completions / rewards: the SFT model's samples at temperature 0.8 with their log-odds of "positive";
          25,000 prompts -> 391 steps of 64
Original  EXO's code: 2 GPUs x 8 x 4 accumulated; a cap of 800 micro-steps, 200 steps; the alpha is ours. GPT-2's
          dropout of 0.1 is on there and is not applied here; float32 master weights
Expect    nothing published for this recipe
"""

from fpo_jax import recipes


def get_config(loss: str = "alphapo-rw"):
    """Return the locked configuration; `configs/imdb_rw.py:exo-rw` is the same recipe with another loss."""
    c = recipes.exo()
    c.model.path = "openai-community/gpt2-large"
    c.model.dropout = "off"  # its config names 0.1, which the original's runs have
    c.data.format = "json"
    c.data.train = "data/imdb_rw/train.json"
    c.data.eval = "data/imdb_rw/test.json"
    c.data.max_completion_length = 500
    c.data.group_size = 2
    c.loss.name = "alphapo-rw"
    c.loss.alpha = 0.1
    c.loss.beta_pi = 0.1
    c.loss.beta_r = 0.1
    c.loss.temperature = 0.8  # logits of policy and reference are divided by it, as in the original
    c.optim.learning_rate = 1e-6
    c.train.batch_size = 64
    c.train.max_steps = 200
    c.train.eval_every = c.train.save_every = 20
    c.plan.groups = 25_000
    recipes.use_loss(c, loss)
    return c
