"""Mistral-7B-Base (zephyr-7b-sft-full) on UltraFeedback: SimPO's own recipe.

Command   python train.py --config configs/simpo_mistral_base.py --workdir runs/simpo_mistral_base
Data      HuggingFaceH4/ultrafeedback_binarized: 61,135 pairs -> 477 steps of 128
Original  4 GPUs x 2 pairs x 16 accumulated; gamma = 1.6; as configs/mistral_base.py but for the loss;
          tie_policy=second as in mistral_base
Expect    the SimPO paper reports AlpacaEval 2 LC 21.5 (its README 21.4), WR 20.8, Arena-Hard 16.6
"""

from fpo_jax import recipes


def get_config(loss: str = "sigmoid"):
    """Return the locked configuration; another loss may take SimPO's place."""
    c = recipes.simpo()
    c.model.path = "alignment-handbook/zephyr-7b-sft-full"
    c.tokenizer.chat_template = "zephyr"
    c.data.train = c.data.eval = "HuggingFaceH4/ultrafeedback_binarized"
    c.data.train_split, c.data.eval_split = "train_prefs", "test_prefs"
    c.data.max_length = 1024
    c.data.max_prompt_length = 512
    c.loss.name = "sigmoid"
    c.loss.tie_policy = "second"  # of equal rewards the second is trained on as the chosen
    c.loss.beta = 2.0
    c.loss.gamma_beta_ratio = 0.8
    c.optim.learning_rate = 3e-7
    c.plan.groups = 61_135
    recipes.use_loss(c, loss)
    return c
