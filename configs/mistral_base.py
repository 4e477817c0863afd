"""Mistral-7B-Base (zephyr-7b-sft-full) on UltraFeedback, alpha = 0.99, reference-free.

Command   python train.py --config configs/mistral_base.py --workdir runs/mistral_base
Data      HuggingFaceH4/ultrafeedback_binarized: 61,135 pairs -> 477 updates of 128, 48 of them warm-up
Original  4 GPUs x 2 pairs x 16 accumulated; gamma = beta * gamma_beta_ratio = 1.6; of equal rewards the
          second is trained on as the chosen (tie_policy=second). Weights are loaded in float32 and cast by
          DeepSpeed; here the master weights stay float32 and every product is of bfloat16
Expect    the loss differs from SimPO's by less than 0.7 % for margins in [-3, 3]: compare with a SimPO run
          (`configs/mistral_base.py:sigmoid`) at the same beta, gamma and rate, and with three seeds
"""

from fpo_jax import config, recipes


def get_config(loss: str = "alphapo"):
    """Return the locked configuration; `configs/mistral_base.py:sigmoid` is the same recipe with SimPO's loss."""
    c = config.default()
    c.seed = 42
    c.model.path = "alignment-handbook/zephyr-7b-sft-full"
    c.tokenizer.chat_template = "zephyr"
    c.data.format = "chat_pairs"
    c.data.train = "HuggingFaceH4/ultrafeedback_binarized"
    c.data.train_split = "train_prefs"
    c.data.eval = "HuggingFaceH4/ultrafeedback_binarized"
    c.data.eval_split = "test_prefs"
    c.data.rule = "chat"
    c.data.max_length = 1024
    c.data.max_prompt_length = 512
    # How SimPO's trainer of 2024 renders a conversation (spec 3.2, 3.3), which is not how transformers does.
    c.data.auto_insert_empty_system = True  # an empty system turn first, where the template has such turns
    c.data.prepend_bos = True  # BOS where the tokenizer opens texts with it, though the template does not write it
    c.data.assistant_header = "completion"  # the assistant's header is trained and counts in a response's length
    c.data.append_eos = "unless_last"  # behind </s> and a newline, a second </s>, all of them scored
    c.data.truncate_together = True  # all responses of a pair are cut when the longer one overflows
    c.data.last_batch = "drop"
    c.loss.name = "alphapo"
    c.loss.alpha = 0.99
    c.loss.tie_policy = "second"
    c.loss.beta = 2.0
    c.loss.gamma_beta_ratio = 0.8
    c.optim.learning_rate = 3e-7
    c.optim.schedule = "cosine"
    c.optim.warmup_fraction = 0.1
    c.train.batch_size = 128
    c.train.micro_batch_per_device = 2
    c.train.eval_batch_per_device = 4
    c.train.eval_every = 400
    c.plan.groups = 61_135
    recipes.use_loss(c, loss)
    return c
