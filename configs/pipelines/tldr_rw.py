"""TL;DR with rewarded samples, from the base model to the reward report: f-PO's `tldr_rw` script and the stages before.

Command   fpo pipeline --config configs/pipelines/tldr_rw.py --workdir runs/tldr_rw
Stages    SFT on the filtered TL;DR summaries; reward model; K = 4 samples of every prompt at temperature 0.8, labelled;
          alignment to the rewards; 4 summaries of 512 test posts, scored
Original  three repositories; its sampling script draws K = 2 of 512 prompts where the alignment needs 4 of all
Expect    nothing published for this recipe
"""

from fpo_jax.configs import pythia_tldr_rw
from fpo_jax.configs.pipelines import common, tldr_pref


def get_config(loss: str = "alphapo-rw"):
    """Return the locked pipeline."""
    c = tldr_pref.get_config()
    common.replace_align(c, pythia_tldr_rw.get_config(loss))
    common.add(c, "sample", common.sampling(num_return=4, dedup="all", max_new_tokens=75))
    return c
