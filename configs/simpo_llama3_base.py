"""Llama-3-8B-Base (SFT on UltraChat) on UltraFeedback: SimPO's own recipe.

Command   python train.py --config configs/simpo_llama3_base.py --workdir runs/simpo_llama3_base
Data      HuggingFaceH4/ultrafeedback_binarized: 61,135 pairs -> 477 updates of 128
Original  4 GPUs x 2 pairs x 16 accumulated; gamma = 1.0; tie_policy=second as in mistral_base
Expect    the SimPO paper reports AlpacaEval 2 LC 22.0, WR 20.3, Arena-Hard 23.4
"""

from fpo_jax import recipes
from fpo_jax.configs import llama3_base


def get_config(loss: str = "sigmoid"):
    """Return the locked configuration; another loss may take SimPO's place."""
    c = llama3_base.get_config()
    c.optim.learning_rate = 6e-7
    recipes.use_loss(c, loss)
    return c
