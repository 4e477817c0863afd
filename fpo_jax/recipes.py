"""A recipe with another loss than its own: `configs/X.py:LOSS`, and the alignments of a pipeline."""

from fpo_jax import config as configuration


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
