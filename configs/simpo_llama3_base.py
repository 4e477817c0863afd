"""Llama-3-8B-Base (SFT on UltraChat) on UltraFeedback: SimPO's own recipe.

Command   python train.py --config configs/simpo_llama3_base.py --workdir runs/simpo_llama3_base
Data      HuggingFaceH4/ultrafeedback_binarized: 61,135 pairs -> 477 steps of 128
Original  4 GPUs x 2 pairs x 16 accumulated; gamma = 1.0; tie_policy=second as in mistral_base
Expect    the SimPO paper reports AlpacaEval 2 LC 22.0, WR 20.3, Arena-Hard 23.4
"""

from fpo_jax import recipes


def get_config(loss: str = "sigmoid"):
    """Return the locked configuration; another loss may take SimPO's place."""
    c = recipes.simpo()
    c.model.path = "princeton-nlp/Llama-3-Base-8B-SFT"
    c.tokenizer.chat_template = "llama3"
    c.data.train = c.data.eval = "HuggingFaceH4/ultrafeedback_binarized"
    c.data.train_split, c.data.eval_split = "train_prefs", "test_prefs"
    c.data.max_length = 2048
    c.data.max_prompt_length = 1800
    c.loss.name = "sigmoid"
    c.loss.tie_policy = "second"  # of equal rewards the second is trained on as the chosen
    c.loss.beta = 2.0
    c.loss.gamma_beta_ratio = 0.5
    c.optim.learning_rate = 6e-7
    c.plan.groups = 61_135
    recipes.use_loss(c, loss)
    return c
