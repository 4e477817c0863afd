"""GPT-2 large fine-tuned on whole IMDB reviews, their first ten tokens being the prompt: the start of the IMDB track.

Command   python train.py --config configs/imdb_sft.py --workdir runs/imdb_sft
Data      stanfordnlp/imdb: 25,000 reviews, 5 epochs of 195 steps of 128 and one of the 40 that remain
Original  2 GPUs x 16 x 4 accumulated, fp16 (here bfloat16); rows of 512 and completions of 500 tokens; EXO's code, of
          which f-PO keeps the readers. GPT-2's dropout of 0.1 is on there and is not applied here; float32 master
          weights and a last step that is filled up (last_batch=pad) as in pythia_hh_sft
Expect    nothing published but the models that follow
"""

from fpo_jax import recipes


def get_config():
    """Return the locked configuration."""
    c = recipes.exo()
    c.stage = "sft"
    c.model.path = "openai-community/gpt2-large"
    c.model.dropout = "off"  # its config names 0.1, which the original's runs have
    c.data.format = "imdb"
    c.data.train = c.data.eval = "stanfordnlp/imdb"
    c.data.train_split, c.data.eval_split = "train", "test"
    c.data.max_completion_length = 500
    c.data.group_size = 1
    c.loss.name = "sft"
    c.optim.learning_rate = 1e-5
    c.train.eval_every = 0  # perplexity at the start and at the end
    c.train.eval_groups = 3_200  # 100 batches of 4 GPUs x 8
    c.train.save_every = 100
    c.train.keep_checkpoints = 1
    c.train.epochs = 5.0
    c.plan.groups = 25_000
    return c
