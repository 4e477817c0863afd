"""Own demonstrations: supervised fine-tuning, the start of every alignment.

Command   fpo train --config own_sft --workdir runs/own --config.model.path=MODEL --config.data.train=chats.jsonl
          `fpo init --data FILE --model DIR` writes such a file
Data      messages, ShareGPT conversations, prompt and completion, Alpaca's columns, or pairs, of which the chosen is
          taken; docs/datasets.md has an example of each
Expect    a loss and an eval_perplexity that fall for an epoch or two; stop where eval_perplexity rises
"""

from fpo_jax import config as configuration


def get_config():
    """Return the locked configuration."""
    c = configuration.default()
    c.stage = "sft"  # loss and format follow
    c.model.path = "my_model"  # a Hugging Face directory or hub name
    c.data.train = "chats.jsonl"
    # c.data.eval = "held_out.jsonl"
    c.data.max_length = 2048  # tokens of an example
    c.data.max_prompt_length = 1536  # tokens kept of what comes before the answer when both are longer
    c.optim.learning_rate = 2e-5  # 2e-4 with adapters: c.lora.rank = 16
    c.optim.warmup_fraction = 0.1
    c.train.batch_size = 64  # examples of a step, over all devices
    return c
