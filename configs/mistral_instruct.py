"""Mistral-7B-Instruct-v0.2 on its own UltraFeedback samples, alpha = 0.925, reference-free.

Command   python train.py --config configs/mistral_instruct.py --workdir runs/mistral_instruct
Data      princeton-nlp/mistral-instruct-ultrafeedback (labelled by PairRM): about 59,700 pairs -> about 466 steps
Original  4 GPUs x 2 pairs x 16 accumulated; gamma = 0.30; tie_policy=second as in mistral_base
Expect    alpha = 0.925 down-weights badly mis-ranked pairs against SimPO (gradient -14 % at margin -3, +7.5 % at 3)
"""

from fpo_jax import recipes


def get_config(loss: str = "alphapo"):
    """Return the locked configuration; `configs/mistral_instruct.py:sigmoid` is the same recipe with SimPO's loss."""
    c = recipes.simpo()
    c.model.path = "mistralai/Mistral-7B-Instruct-v0.2"
    c.tokenizer.chat_template = "mistral"
    c.data.train = c.data.eval = "princeton-nlp/mistral-instruct-ultrafeedback"
    c.data.train_split, c.data.eval_split = "train", "test"
    c.data.max_length = 2048
    c.data.max_prompt_length = 1800
    c.loss.name = "alphapo"
    c.loss.tie_policy = "second"  # of equal rewards the second is trained on as the chosen
    c.loss.alpha = 0.925
    c.loss.beta = 2.5
    c.loss.gamma_beta_ratio = 0.12
    c.optim.learning_rate = 6e-7
    c.plan.groups = 59_700  # about
    recipes.use_loss(c, loss)
    return c
