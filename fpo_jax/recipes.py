"""What the recipes of configs/ share, and how one of them gets another loss: `configs/X.py:LOSS`.

A recipe is `simpo()` or `exo()` with what is its own: model, data, loss, learning rate. None inherits from another.
"""

from fpo_jax import config as configuration


def simpo() -> configuration.Config:
    """Return what the chat recipes share: batches, schedule, and how SimPO's trainer of 2024 renders a conversation."""
    c = configuration.default()
    c.seed = 42
    c.data.format = "chat_pairs"
    c.data.rule = "chat"
    # Spec 3.2 and 3.3; not how transformers does it.
    c.data.auto_insert_empty_system = True  # an empty system turn first, where the template has such turns
    c.data.prepend_bos = True  # BOS where the tokenizer opens texts with it, though the template does not write it
    c.data.assistant_header = "completion"  # the assistant's header is trained and counts in a completion's length
    c.data.append_eos = "unless_last"  # behind </s> and a newline, a second </s>, all of them scored
    c.data.truncate_together = True  # all completions of a pair are cut when the longer one overflows
    c.data.last_batch = "drop"
    c.optim.schedule = "cosine"
    c.optim.warmup_fraction = 0.1
    c.train.batch_size = 128
    c.train.eval_batch_per_device = 4
    c.train.eval_every = 400
    return c


def exo() -> configuration.Config:
    """Return what the recipes of HH, TL;DR and IMDB share: those of EXO's code, from which the original's come."""
    c = configuration.default()
    c.seed = 1234
    c.model.path = "EleutherAI/pythia-2.8b"  # alignments start from its SFT checkpoint: override
    c.data.rule = "raw"
    c.data.max_length = 512
    c.data.max_completion_length = 200
    c.data.cut_prompts_together = False  # each completion's row cuts the prompt for itself (spec 2.4)
    c.data.on_identical = "drop"
    c.data.last_batch = "pad"
    c.optim.schedule = "cosine"
    c.optim.decay_over = "epochs"  # the original's cosine spans the epoch even when the run stops earlier
    c.optim.b2 = 0.95
    c.train.batch_size = 128
    c.train.eval_batch_per_device = 8
    c.train.eval_every = 34  # ten evaluations and ten checkpoints a run
    c.train.save_every = 34
    c.train.keep_checkpoints = 10
    return c


def use_loss(config: configuration.Config, name: str) -> None:
    """Give a configuration another loss, which takes those of the options that mean the same for it.

    The rest become unset, so that the loss has its own defaults; see `losses.carried_over`.

    Raises:
        ValueError: an unknown name, or options in `config.loss` that its own loss does not take.
    """
    if name == config.loss.name:
        return
    from fpo_jax import losses  # and with them jax, which a misspelt option need not wait for

    options = configuration.loss_options(config)
    kept = losses.carried_over(options, of=config.loss.name, to=name)
    for key, value in options.items():
        config.loss[key] = "" if isinstance(value, str) else None
    config.loss.update(kept)
    config.loss.name = name
