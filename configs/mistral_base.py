"""Mistral-7B-Base (zephyr-7b-sft-full) on UltraFeedback, alpha = 0.99, reference-free.

Command   python train.py --config configs/mistral_base.py --workdir runs/mistral_base
Data      HuggingFaceH4/ultrafeedback_binarized: 61,135 pairs -> 477 steps of 128, 48 of them warm-up
Original  4 GPUs x 2 pairs x 16 accumulated; gamma = beta * gamma_beta_ratio = 1.6; of equal rewards the
          second is trained on as the chosen (tie_policy=second). Weights are loaded in float32 and cast by
          DeepSpeed; here the master weights stay float32 and every product is of bfloat16
Expect    the loss differs from SimPO's by less than 0.7 % for margins in [-3, 3]: compare with a SimPO run
          (`configs/mistral_base.py:sigmoid`) at the same beta, gamma and rate, and with three seeds
"""

from fpo_jax import recipes


def get_config(loss: str = "alphapo"):
    """Return the locked configuration; `configs/mistral_base.py:sigmoid` is the same recipe with SimPO's loss."""
    c = recipes.simpo()
    c.model.path = "alignment-handbook/zephyr-7b-sft-full"
    c.tokenizer.chat_template = "zephyr"
    c.data.train = c.data.eval = "HuggingFaceH4/ultrafeedback_binarized"
    c.data.train_split, c.data.eval_split = "train_prefs", "test_prefs"
    c.data.max_length = 1024
    c.data.max_prompt_length = 512
    c.loss.name = "alphapo"
    c.loss.tie_policy = "second"  # of equal rewards the second is trained on as the chosen
    c.loss.alpha = 0.99
    c.loss.beta = 2.0
    c.loss.gamma_beta_ratio = 0.8
    c.optim.learning_rate = 3e-7
    c.plan.groups = 61_135
    recipes.use_loss(c, loss)
    return c
