"""GPT-2 large fine-tuned on whole IMDB reviews, their first ten tokens being the prompt: the start of the IMDB track.

Command   python train.py --config configs/imdb_sft.py --workdir runs/imdb_sft
Data      stanfordnlp/imdb: 25,000 reviews, 5 epochs of 195 updates of 128 and one of the 40 that remain
Original  2 GPUs x 16 x 4 accumulated, fp16 (here bfloat16); rows of 512 and responses of 500 tokens; EXO's code, of
          which f-PO keeps the readers. GPT-2's dropout of 0.1 is on there and is not applied here; float32 master
          weights and a last update that is filled up (last_batch=pad) as in pythia_hh_sft
Expect    nothing published but the models that follow
"""

from fpo_jax.configs import pythia_hh_sft


def get_config():
    """Return the locked configuration."""
    c = pythia_hh_sft.get_config()
    c.model.path = "openai-community/gpt2-large"
    c.model.dropout = "off"  # its config names 0.1, which the original's runs have
    c.data.format = "imdb"
    c.data.hh_split, c.data.subfolder = "last_turn", ""
    c.data.train = c.data.eval = "stanfordnlp/imdb"
    c.data.max_response_length = 500
    c.train.epochs = 5.0
    c.plan.groups = 25_000
    return c
