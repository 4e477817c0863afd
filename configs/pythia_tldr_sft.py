"""Pythia-2.8B fine-tuned on TL;DR summaries: the start of every TL;DR alignment.

Command   python train.py --config configs/pythia_tldr_sft.py --workdir runs/tldr_sft
Data      UCL-DARK/openai-tldr-filtered: 116,722 posts with a summary -> 912 steps of 128
Original  as pythia_hh_sft with rows of 650 and summaries of 75 tokens; the summary follows the prompt without a space,
          while the preference data have one: here both have it;
          last_batch=pad and float32 master weights as in pythia_hh_sft
Expect    nothing published but the models that follow
"""

from fpo_jax import recipes


def get_config():
    """Return the locked configuration."""
    c = recipes.exo()
    c.stage = "sft"
    c.data.format = "tldr_sft"
    c.data.train = c.data.eval = "UCL-DARK/openai-tldr-filtered"
    c.data.train_split, c.data.eval_split = "train", "test"
    c.data.max_length = 650
    c.data.max_completion_length = 75
    c.data.group_size = 1
    c.loss.name = "sft"
    c.optim.learning_rate = 1e-5
    c.train.eval_every = 0  # perplexity at the start and at the end
    c.train.eval_groups = 3_200  # 100 batches of 4 GPUs x 8
    c.train.save_every = 100
    c.train.keep_checkpoints = 1
    c.plan.groups = 116_722
    return c
