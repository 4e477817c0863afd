"""Llama-3-8B-Instruct on its own UltraFeedback samples: SimPO's own recipe.

Command   python train.py --config configs/simpo_llama3_instruct.py --workdir runs/simpo_llama3_instruct
Data      princeton-nlp/llama3-ultrafeedback (labelled by PairRM): 59,876 pairs -> 467 updates of 128
Original  4 GPUs x 2 pairs x 16 accumulated; gamma = 1.375 (1.4 in the paper); tie_policy=second as in mistral_base
Expect    the SimPO paper reports AlpacaEval 2 LC 44.7, WR 40.5, Arena-Hard 33.8
"""

from fpo_jax import recipes
from fpo_jax.configs import llama3_instruct


def get_config(loss: str = "sigmoid"):
    """Return the locked configuration; another loss may take SimPO's place."""
    c = llama3_instruct.get_config()
    c.loss.beta = 2.5
    recipes.use_loss(c, loss)
    return c
