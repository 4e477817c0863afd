"""Mistral-7B-Instruct-v0.2 on its own UltraFeedback samples: SimPO's own recipe.

Command   python train.py --config configs/simpo_mistral_instruct.py --workdir runs/simpo_mistral_instruct
Data      princeton-nlp/mistral-instruct-ultrafeedback (labelled by PairRM): about 59,700 pairs -> about 466 updates
Original  4 GPUs x 2 pairs x 16 accumulated; gamma = 0.25 (0.3 in the paper); tie_policy=second as in mistral_base
Expect    the SimPO paper reports AlpacaEval 2 LC 32.1, WR 34.8, Arena-Hard 21.0
"""

from fpo_jax import recipes
from fpo_jax.configs import mistral_instruct


def get_config(loss: str = "sigmoid"):
    """Return the locked configuration; another loss may take SimPO's place."""
    c = mistral_instruct.get_config()
    c.loss.gamma_beta_ratio = 0.1
    c.optim.learning_rate = 5e-7
    recipes.use_loss(c, loss)
    return c
