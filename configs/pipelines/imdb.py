"""IMDB with an oracle, from the base model to the reward-KL report: the cheapest check of a whole alignment.

Command   fpo pipeline --config configs/pipelines/imdb.py --workdir runs/imdb
Stages    SFT on reviews; a sentiment classifier on their labels, the oracle; K = 2 samples of every prompt at
          temperature 0.8 with their log-odds; alignment to them; 4 answers to 512 test prompts;
          reward against KL(policy || SFT)
Original  EXO's code, GPT-2 large; it has this track with rewards, with pairs of the oracle's (here
          --config.pairing=best_worst --config.losses="('exo-pref',)") and with a reward model trained on the pairs;
          GPT-2's dropout of 0.1 is on there and is not applied here
Sources   one set for all; `judgements` may name another for the oracle, so that the original's files serve too:
          imdb_class/{train,test}.json in format imdb beside imdb_prefix10/{train,test}.json in format demonstrations
Expect    nothing published for this recipe
"""

from fpo_jax.configs import imdb_reward, imdb_rw, imdb_sft
from fpo_jax.configs.pipelines import common


def get_config(loss: str = "alphapo-rw"):
    """Return the locked pipeline."""
    sft = imdb_sft.get_config()
    c = common.pipeline(base=sft.model.path, sft=sft, reward=imdb_reward.get_config(), align=imdb_rw.get_config(loss))
    c.measure_kl = True
    c.data.update({key: sft.data[key] for key in common.SOURCE})
    common.add(c, "sample", common.sampling(num_return=2, max_new_tokens=500))
    common.add(
        c, "generate", common.sampling(num_prompts=512, num_return=4, seeds=(42,), dedup="none", max_new_tokens=500)
    )
    return c
