"""Mistral-7B-Instruct-v0.2 on its own UltraFeedback samples: SimPO's own recipe.

Command   python train.py --config configs/simpo_mistral_instruct.py --workdir runs/simpo_mistral_instruct
Data      princeton-nlp/mistral-instruct-ultrafeedback (labelled by PairRM): about 59,700 pairs -> about 466 steps
Original  4 GPUs x 2 pairs x 16 accumulated; gamma = 0.25 (0.3 in the paper); tie_policy=second as in mistral_base
Expect    the SimPO paper reports AlpacaEval 2 LC 32.1, WR 34.8, Arena-Hard 21.0
"""

from fpo_jax import recipes


def get_config(loss: str = "sigmoid"):
    """Return the locked configuration; another loss may take SimPO's place."""
    c = recipes.simpo()
    c.model.path = "mistralai/Mistral-7B-Instruct-v0.2"
    c.tokenizer.chat_template = "mistral"
    c.data.train = c.data.eval = "princeton-nlp/mistral-instruct-ultrafeedback"
    c.data.train_split, c.data.eval_split = "train", "test"
    c.data.max_length = 2048
    c.data.max_prompt_length = 1800
    c.loss.name = "sigmoid"
    c.loss.tie_policy = "second"  # of equal rewards the second is trained on as the chosen
    c.loss.beta = 2.5
    c.loss.gamma_beta_ratio = 0.1
    c.optim.learning_rate = 5e-7
    c.plan.groups = 59_700  # about
    recipes.use_loss(c, loss)
    return c
