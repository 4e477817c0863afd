"""Mistral-7B-Base (zephyr-7b-sft-full) on UltraFeedback: SimPO's own recipe.

Command   python train.py --config configs/simpo_mistral_base.py --workdir runs/simpo_mistral_base
Data      HuggingFaceH4/ultrafeedback_binarized: 61,135 pairs -> 477 updates of 128
Original  4 GPUs x 2 pairs x 16 accumulated; gamma = 1.6; as configs/mistral_base.py but for the loss;
          tie_policy=second as in mistral_base
Expect    the SimPO paper reports AlpacaEval 2 LC 21.5 (its README 21.4), WR 20.8, Arena-Hard 16.6
"""

from fpo_jax.configs import mistral_base


def get_config(loss: str = "sigmoid"):
    """Return the locked configuration; another loss may take SimPO's place."""
    c = mistral_base.get_config(loss)
    return c
