"""HH with preference pairs, from the base model to the reward report: f-PO's `hh_pref` script and the stages before it.

Command   fpo pipeline --config configs/pipelines/hh_pref.py --workdir runs/hh_pref
Stages    SFT on the chosen completions; reward model, for the report; alignment to the pairs; 4 answers to 512 test
          prompts, scored
Original  three repositories
Expect    nothing published for this recipe
"""

from fpo_jax.configs import pythia_hh_pref, pythia_hh_reward, pythia_hh_sft
from fpo_jax.configs.pipelines import common


def get_config(loss: str = "alphapo-pref"):
    """Return the locked pipeline."""
    c = common.pipeline(
        base="EleutherAI/pythia-2.8b",
        sft=pythia_hh_sft.get_config(),
        reward=pythia_hh_reward.get_config(),
        align=pythia_hh_pref.get_config(loss),
    )
    common.add(c, "generate", common.sampling(num_prompts=512, num_return=4, seeds=(42,), dedup="consecutive"))
    return c
