"""Gemma-2-9B-it on its own UltraFeedback samples, labelled by ArmoRM: SimPO's own recipe.

Command   python train.py --config configs/simpo_gemma2_it.py --workdir runs/simpo_gemma2_it
Data      princeton-nlp/gemma2-ultrafeedback-armorm (`train`, `test`)
Original  4 GPUs x 2 pairs x 16 accumulated; gamma = 5; eager attention because of the
          soft-cap, which here every implementation of attention either has or is not chosen;
          tie_policy=second as in mistral_base
Expect    the SimPO paper reports AlpacaEval 2 LC 72.4, WR 65.9, Arena-Hard 59.1, GSM8K 88.0
"""

from fpo_jax import recipes


def get_config(loss: str = "sigmoid"):
    """Return the locked configuration; another loss may take SimPO's place."""
    c = recipes.simpo()
    c.model.path = "google/gemma-2-9b-it"
    c.tokenizer.chat_template = "gemma2"
    c.data.train = c.data.eval = "princeton-nlp/gemma2-ultrafeedback-armorm"
    c.data.train_split, c.data.eval_split = "train", "test"
    c.data.max_length = 2048
    c.data.max_prompt_length = 1800
    c.data.append_eos = "unless_last"  # <eos> behind <end_of_turn> and a newline, all of them scored
    c.loss.name = "sigmoid"
    c.loss.tie_policy = "second"  # of equal rewards the second is trained on as the chosen
    c.loss.beta = 10.0
    c.loss.gamma_beta_ratio = 0.5
    c.optim.learning_rate = 8e-7
    recipes.use_loss(c, loss)
    return c
