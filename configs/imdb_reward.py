"""The oracle of the IMDB track: a sentiment classifier from GPT-2 large, whose score is the log-odds of "positive".

Command   python train.py --config configs/imdb_reward.py --workdir runs/imdb_reward
          fpo export --workdir runs/imdb_reward --out imdb_reward --step best
Data      stanfordnlp/imdb: 25,000 labelled reviews, 5 epochs of 97 steps of 256 and one of the 168 that remain
Original  2 GPUs x 32 x 4 accumulated; binary cross-entropy on a bias-free head; whole reviews of 512 tokens (here the
          ten tokens of the prompt and 500 more, as much as the oracle sees of a sample). GPT-2's
          dropout of 0.1 is on there and is not applied here; here the best of the evaluations of every 98 steps, an
          epoch, is kept; last_batch=pad and float32 master weights as in imdb_sft
Expect    nothing published for this recipe
"""

from fpo_jax import recipes


def get_config():
    """Return the locked configuration."""
    c = recipes.exo()
    c.stage = "reward"
    c.model.path = "openai-community/gpt2-large"
    c.model.dropout = "off"  # its config names 0.1, which the original's runs have
    c.data.format = "imdb"
    c.data.train = c.data.eval = "stanfordnlp/imdb"
    c.data.train_split, c.data.eval_split = "train", "test"
    c.data.max_completion_length = 500
    c.data.group_size = 1
    c.loss.name = "binary_cross_entropy"
    c.optim.learning_rate = 1e-5
    c.train.eval_every = 98  # once an epoch
    c.train.eval_groups = 3_200  # 100 batches of 4 GPUs x 8
    c.train.save_every = 100
    c.train.keep_checkpoints = 1
    c.train.keep_best = "eval_rewards/accuracies"
    c.train.batch_size = 256
    c.train.epochs = 5.0
    c.plan.groups = 25_000
    return c
