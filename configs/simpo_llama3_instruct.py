"""Llama-3-8B-Instruct on its own UltraFeedback samples: SimPO's own recipe.

Command   python train.py --config configs/simpo_llama3_instruct.py --workdir runs/simpo_llama3_instruct
Data      princeton-nlp/llama3-ultrafeedback (labelled by PairRM): 59,876 pairs -> 467 steps of 128
Original  4 GPUs x 2 pairs x 16 accumulated; gamma = 1.375 (1.4 in the paper); tie_policy=second as in mistral_base
Expect    the SimPO paper reports AlpacaEval 2 LC 44.7, WR 40.5, Arena-Hard 33.8
"""

from fpo_jax import recipes


def get_config(loss: str = "sigmoid"):
    """Return the locked configuration; another loss may take SimPO's place."""
    c = recipes.simpo()
    c.model.path = "meta-llama/Meta-Llama-3-8B-Instruct"
    c.tokenizer.chat_template = "llama3"
    c.data.train = c.data.eval = "princeton-nlp/llama3-ultrafeedback"
    c.data.train_split, c.data.eval_split = "train", "test"
    c.data.max_length = 2048
    c.data.max_prompt_length = 1800
    c.data.append_eos = "where_missing"  # EOS is <|eot_id|>, which the template writes: the original appends none
    c.loss.name = "sigmoid"
    c.loss.tie_policy = "second"  # of equal rewards the second is trained on as the chosen
    c.loss.beta = 2.5
    c.loss.gamma_beta_ratio = 0.55
    c.optim.learning_rate = 1e-6
    c.plan.groups = 59_876
    recipes.use_loss(c, loss)
    return c
