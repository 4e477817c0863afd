"""Align the quickstart's tiny Llama with an f-divergence on its own rewarded samples (f-PO's `rw` setting, K = 4).

Command   python train.py --config configs/quickstart.py --workdir runs/quickstart/align-mine
          after `make quickstart`, which writes model and data; `configs/quickstart.py:jeffreys` takes another row of
          `fpo losses`
Data      4 samples of the pretrained model on each of 2,000 prompts, reward 1 where the checker says right, else 0
Time      about 20 CPU-seconds, half of them compilation
Expect    held-out reward accuracy from 0.50 to 0.99; success at temperature 1 from 53-56 % to 89-91 % (seeds 0, 1, 2);
          every divergence of the table gains at least 30 points

`pretraining()` is the configuration of the model this one starts from and is measured against.
"""

from typing import Any

from fpo_jax import config as configuration

MAX_LENGTH, MAX_COMPLETION_LENGTH = 24, 12  # tokens; BOS + 8 digits + ">" and an answer of 8 digits + EOS need 19


def get_config(divergence: str = "alpha") -> Any:
    """Return the configuration of the alignment; `divergence` is a loss that can match rewards."""
    c = _tiny()
    c.model.path = "runs/quickstart/sft_model"
    c.data.train = "runs/quickstart/data/groups.jsonl"
    c.data.eval = "runs/quickstart/data/held_out_groups.jsonl"
    c.data.group_size = 4
    c.loss.name = divergence
    c.loss.target = "rewards"
    c.loss.score = "log_ratio"
    c.loss.beta_pi = 0.5
    c.loss.beta_r = 0.5  # at 0.1 the target is all but one-hot, and the log-probs of correct answers fall too
    if divergence == "alpha":
        c.loss.alpha = 0.1
    c.optim.learning_rate = 5e-4
    c.optim.schedule = "cosine"
    c.optim.b2 = 0.99
    c.train.batch_size = 32
    c.train.max_steps = 120
    c.train.epochs = 4.0
    c.train.micro_batch_per_device = 8  # 32 rows: a larger pass spends its time on fresh memory pages
    c.train.eval_every = 20
    c.train.eval_batch_per_device = 10
    c.train.save_every = 120
    c.reference.batch_per_device = 10
    return c


def pretraining() -> Any:
    """Return the configuration of the maximum-likelihood training on the imperfect demonstrations."""
    c = _tiny()
    c.model.path = "runs/quickstart/start"
    c.data.train = "runs/quickstart/data/demonstrations.jsonl"
    c.data.group_size = 2  # two demonstrations of each prompt
    c.loss.name = "sft"
    c.loss.tie_policy = "uniform"  # nobody judged them: both count
    c.optim.learning_rate = 3e-3
    c.optim.schedule = "cosine"
    c.optim.warmup_fraction = 0.05
    c.optim.b2 = 0.99
    c.optim.weight_decay = 0.01
    c.train.batch_size = 16
    c.train.micro_batch_per_device = 16
    c.train.max_steps = 1000
    c.train.epochs = 2.0
    c.train.eval_every = 0
    c.train.save_every = 500
    return c


def _tiny() -> Any:
    """Return what both share: plain text, short rows, float32."""
    c: Any = configuration.default()
    c.seed = 0
    c.model.compute_dtype = "float32"  # bfloat16 is slower on a CPU
    c.model.remat = "none"
    c.data.format = "json"
    c.data.rule = "raw"
    c.data.layout = "padded"  # rows of one length in every pass: a compilation less, which takes longer than all steps
    c.data.max_length = MAX_LENGTH
    c.data.max_completion_length = MAX_COMPLETION_LENGTH
    c.train.log_every = 20
    c.train.keep_checkpoints = 1
    c.logging.tensorboard = False
    return c
