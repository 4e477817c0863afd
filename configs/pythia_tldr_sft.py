"""Pythia-2.8B fine-tuned on TL;DR summaries: the start of every TL;DR alignment.

Command   python train.py --config configs/pythia_tldr_sft.py --workdir runs/tldr_sft
Data      UCL-DARK/openai-tldr-filtered: 116,722 posts with a summary -> 912 updates of 128
Original  as pythia_hh_sft with rows of 650 and summaries of 75 tokens; the summary follows the prompt without a space,
          while the preference data have one: here both have it;
          last_batch=pad and float32 master weights as in pythia_hh_sft
Expect    nothing published but the models that follow
"""

from fpo_jax.configs import pythia_hh_sft


def get_config():
    """Return the locked configuration."""
    c = pythia_hh_sft.get_config()
    c.data.format = "tldr_sft"
    c.data.hh_split, c.data.subfolder = "last_turn", ""
    c.data.train = c.data.eval = "UCL-DARK/openai-tldr-filtered"
    c.data.train_split, c.data.eval_split = "train", "test"
    c.data.max_length = 650
    c.data.max_response_length = 75
    c.plan.groups = 116_722
    return c
