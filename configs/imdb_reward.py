"""The oracle of the IMDB track: a sentiment classifier from GPT-2 large, whose score is the log-odds of "positive".

Command   python train.py --config configs/imdb_reward.py --workdir runs/imdb_reward
          fpo export --workdir runs/imdb_reward --out imdb_reward --step best
Data      stanfordnlp/imdb: 25,000 labelled reviews, 5 epochs of 97 updates of 256 and one of the 168 that remain
Original  2 GPUs x 32 x 4 accumulated; binary cross-entropy on a bias-free head; whole reviews of 512 tokens (here the
          ten tokens of the prompt and 500 more, as much as the oracle sees of a sample). GPT-2's
          dropout of 0.1 is on there and is not applied here; here the best of the evaluations of every 98 updates, an
          epoch, is kept; last_batch=pad and float32 master weights as in imdb_sft
Expect    nothing published for this recipe
"""

from fpo_jax.configs import imdb_sft


def get_config():
    """Return the locked configuration."""
    c = imdb_sft.get_config()
    c.stage = "reward"
    c.loss.name = "binary_cross_entropy"
    c.train.batch_size = 256
    c.train.eval_every = 98  # once an epoch
    c.train.keep_best = "eval_rewards/accuracies"
    return c
