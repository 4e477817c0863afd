"""HH with rewarded samples, from the base model to the reward report: f-PO's `hh_rw` script and the stages before it.

Command   fpo pipeline --config configs/pipelines/hh_rw.py --workdir runs/hh_rw
Stages    SFT on the chosen completions; reward model; K = 4 samples of every prompt at temperature 0.8, labelled;
          alignment to the rewards; 4 answers to 512 test prompts, scored
Original  three repositories; it samples K = 2 and needs 4, a change that it records nowhere
Expect    nothing published for this recipe; docs/lab-notes/ has our runs on a small model
"""

from fpo_jax.configs import pythia_hh_rw
from fpo_jax.configs.pipelines import common, hh_pref


def get_config(loss: str = "alphapo-rw"):
    """Return the locked pipeline."""
    c = hh_pref.get_config()
    common.replace_align(c, pythia_hh_rw.get_config(loss))
    common.add(c, "sample", common.sampling(num_return=4))
    return c
