"""Llama-3-8B-Instruct on its own UltraFeedback samples, alpha = 0.99, reference-free.

Command   python train.py --config configs/llama3_instruct.py --workdir runs/llama3_instruct
Data      princeton-nlp/llama3-ultrafeedback (labelled by PairRM): 59,876 pairs -> 467 steps of 128, 47 warm-up
Original  4 GPUs x 2 pairs x 16 accumulated; gamma = 1.43; tie_policy=second as in mistral_base
Expect    SimPO with beta 2.6 instead of 2.5, to within 0.7 % of the loss for margins in [-3, 3]
"""

from fpo_jax import recipes


def get_config(loss: str = "alphapo"):
    """Return the locked configuration; `configs/llama3_instruct.py:sigmoid` is the same recipe with SimPO's loss."""
    c = recipes.simpo()
    c.model.path = "meta-llama/Meta-Llama-3-8B-Instruct"
    c.tokenizer.chat_template = "llama3"
    c.data.train = c.data.eval = "princeton-nlp/llama3-ultrafeedback"
    c.data.train_split, c.data.eval_split = "train", "test"
    c.data.max_length = 2048
    c.data.max_prompt_length = 1800
    c.data.append_eos = "where_missing"  # EOS is <|eot_id|>, which the template writes: the original appends none
    c.loss.name = "alphapo"
    c.loss.tie_policy = "second"  # of equal rewards the second is trained on as the chosen
    c.loss.alpha = 0.99
    c.loss.beta = 2.6
    c.loss.gamma_beta_ratio = 0.55
    c.optim.learning_rate = 1e-6
    c.plan.groups = 59_876
    recipes.use_loss(c, loss)
    return c
