"""TL;DR with comparisons, from the base model to the reward report: f-PO's `tldr_pref` script and the stages before it.

Command   fpo pipeline --config configs/pipelines/tldr_pref.py --workdir runs/tldr_pref
Stages    SFT on the filtered TL;DR summaries; reward model, for the report; alignment to the comparisons; 4 summaries
          of 512 test posts, scored
Original  three repositories; it stops at 350 steps and then asks for ten checkpoints, of which it has made four
Expect    nothing published for this recipe
"""

from fpo_jax.configs import pythia_tldr_pref, pythia_tldr_reward, pythia_tldr_sft
from fpo_jax.configs.pipelines import common


def get_config(loss: str = "alphapo-pref"):
    """Return the locked pipeline."""
    sft = pythia_tldr_sft.get_config()
    c = common.pipeline(
        base="EleutherAI/pythia-2.8b",
        sft=sft,
        reward=pythia_tldr_reward.get_config(),
        align=pythia_tldr_pref.get_config(loss),
    )
    c.demonstrations.update({key: sft.data[key] for key in common.SOURCE})
    common.add(
        c,
        "generate",
        common.sampling(num_prompts=512, num_return=4, seeds=(42,), dedup="consecutive", max_new_tokens=75),
    )
    return c
