"""Own conversations in pairs: a preference loss on two conversations that part in their last turn.

Command   fpo train --config own_chat --workdir runs/own --config.model.path=MODEL --config.data.train=chats.jsonl
          `own_chat:dpo` takes another loss of `fpo losses`; `fpo init --data FILE --model DIR` writes such a file
Data      columns chosen and rejected, each a list of messages with role and content; docs/datasets.md has every other
          kind. They are rendered with the model's own chat template, and its own system prompt stays
Expect    rewards/accuracies from 0.5 towards 0.7 and more
"""

from fpo_jax import config as configuration
from fpo_jax import recipes


def get_config(loss: str = "alpha"):
    """Return the locked configuration."""
    c = configuration.default()
    c.model.path = "my_model"  # a Hugging Face directory or hub name, with a chat template
    c.data.train = "chats.jsonl"
    # c.data.eval = "held_out.jsonl"
    c.data.max_length = 2048  # tokens of a conversation
    c.data.max_prompt_length = 1536  # tokens kept of what comes before the answer when both are longer
    c.loss.name = "alpha"  # f-PO's α-divergence; 0 is EXO, 1 is DPO
    c.loss.alpha = 0.1
    c.loss.beta = 0.1  # distance to the start model: less goes further
    c.optim.learning_rate = 1e-6  # 1e-5 with adapters: c.lora.rank = 16
    c.optim.warmup_fraction = 0.1
    c.train.batch_size = 64  # pairs of a step, over all devices
    recipes.use_loss(c, loss)
    return c
