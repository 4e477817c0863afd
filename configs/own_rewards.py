"""Own rewards: an f-divergence to the softmax of the rewards, over K completions of each prompt.

Command   fpo train --config own_rewards --workdir runs/own --config.model.path=MODEL --config.data.train=rated.jsonl
          `own_rewards:jeffreys` takes another divergence; `fpo init --data FILE --model DIR` writes such a file
Data      columns prompt, completions (K texts or more) and rewards (as many numbers); docs/datasets.md has every other
          kind
Expect    a loss that falls and rewards/accuracies that rise from 0.5
"""

from fpo_jax import config as configuration
from fpo_jax import recipes


def get_config(loss: str = "alpha"):
    """Return the locked configuration."""
    c = configuration.default()
    c.model.path = "my_model"  # a Hugging Face directory or hub name
    c.data.train = "rated.jsonl"
    # c.data.eval = "held_out.jsonl"
    c.data.group_size = 4  # K, which divides the completions of every prompt
    c.data.max_length = 1024
    c.data.max_prompt_length = 512
    c.loss.name = "alpha"
    c.loss.target = "rewards"
    c.loss.beta_r = 0.5  # unit of a reward: the target is softmax(rewards / beta_r)
    c.loss.beta = 0.1  # distance to the start model: less goes further
    c.optim.learning_rate = 1e-6  # 1e-5 with adapters: c.lora.rank = 16
    c.optim.warmup_fraction = 0.1
    c.train.batch_size = 32  # prompts of a step, over all devices
    recipes.use_loss(c, loss)
    return c
