"""Own pairs: a preference loss on a prompt with a chosen and a rejected completion each.

Command   fpo train --config own_pairs --workdir runs/own --config.model.path=MODEL --config.data.train=pairs.csv
          `own_pairs:simpo` takes another loss of `fpo losses`; `fpo init --data FILE --model DIR` writes such a file
Data      CSV, JSON, JSON Lines, Parquet, Arrow, a folder or a hub name, with the columns prompt, chosen, rejected;
          docs/datasets.md has every other kind
Expect    rewards/accuracies from 0.5 towards 0.7 and more; a loss that starts at 0.69
"""

from fpo_jax import config as configuration
from fpo_jax import recipes


def get_config(loss: str = "dpo"):
    """Return the locked configuration."""
    c = configuration.default()
    c.model.path = "my_model"  # a Hugging Face directory or hub name
    c.data.train = "pairs.jsonl"
    # c.data.eval = "held_out.jsonl"
    c.data.max_length = 1024  # tokens of prompt and completion
    c.data.max_prompt_length = 512  # tokens kept of a prompt when both are longer
    c.loss.name = "dpo"
    c.loss.beta = 0.1  # distance to the start model: less goes further
    c.optim.learning_rate = 1e-6  # 1e-5 with adapters: c.lora.rank = 16
    c.optim.warmup_fraction = 0.1
    c.train.batch_size = 64  # pairs of a step, over all devices
    recipes.use_loss(c, loss)
    return c
