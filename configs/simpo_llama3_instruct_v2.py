"""Llama-3-8B-Instruct on its own UltraFeedback samples, labelled by ArmoRM: SimPO's own recipe.

Command   python train.py --config configs/simpo_llama3_instruct_v2.py --workdir runs/simpo_llama3_instruct_v2
Data      princeton-nlp/llama3-ultrafeedback-armorm (`train`, `test`)
Original  4 GPUs x 2 pairs x 16 accumulated; gamma = 3.0; tie_policy=second as in mistral_base
Expect    the SimPO paper reports AlpacaEval 2 LC 53.7, WR 47.5, Arena-Hard 36.5; users measured 48 and 44
"""

from fpo_jax import recipes


def get_config(loss: str = "sigmoid"):
    """Return the locked configuration; another loss may take SimPO's place."""
    c = recipes.simpo()
    c.model.path = "meta-llama/Meta-Llama-3-8B-Instruct"
    c.tokenizer.chat_template = "llama3"
    c.data.train = c.data.eval = "princeton-nlp/llama3-ultrafeedback-armorm"
    c.data.train_split, c.data.eval_split = "train", "test"
    c.data.max_length = 2048
    c.data.max_prompt_length = 1800
    c.data.append_eos = "where_missing"  # EOS is <|eot_id|>, which the template writes: the original appends none
    c.loss.name = "sigmoid"
    c.loss.tie_policy = "second"  # of equal rewards the second is trained on as the chosen
    c.loss.beta = 10.0
    c.loss.gamma_beta_ratio = 0.3
    c.optim.learning_rate = 1e-6
    recipes.use_loss(c, loss)
    return c
