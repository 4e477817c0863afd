"""Llama-3-8B fine-tuned on UltraChat: the start of the Llama-3-Base recipes, SimPO's own.

Command   python train.py --config configs/llama3_base_sft.py --workdir runs/llama3_base_sft
Data      HuggingFaceH4/ultrachat_200k (`train_sft`, `test_sft`); every assistant turn is a row of its own with all that
          came before it, so that each is trained on once, with more rows than the original has conversations
Original  4 GPUs x 8 x 4 accumulated; the whole conversation as one row, user turns trained on too (alignment-handbook)
Expect    the SimPO paper reports AlpacaEval 2 LC 6.2, WR 4.6, Arena-Hard 3.3
"""

from fpo_jax import recipes


def get_config():
    """Return the locked configuration."""
    c = recipes.simpo()
    c.stage = "sft"
    c.model.path = "meta-llama/Meta-Llama-3-8B"
    c.tokenizer.chat_template = "llama3"
    c.data.format = "messages"
    c.data.train = c.data.eval = "HuggingFaceH4/ultrachat_200k"
    c.data.train_split, c.data.eval_split = "train_sft", "test_sft"
    c.data.max_length = 2048
    c.data.max_prompt_length = 1800
    c.data.group_size = 1
    c.loss.name = "sft"
    c.optim.learning_rate = 2e-5
    c.train.eval_batch_per_device = 8
    c.train.eval_every = 200
    return c
