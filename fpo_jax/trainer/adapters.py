"""The adapter of a run: its description from the configuration, and what the run says of it."""

from collections.abc import Mapping
from typing import Any

from fpo_jax import config as configuration
from fpo_jax import models
from fpo_jax.models import params

DEFAULTS = {"alpha": 16.0, "dropout": 0.0, "modules": "all-linear", "use_rslora": False}


def of_run(config: configuration.Config, model_config: models.ModelConfig) -> models.Adapter | None:
    """Return the description of the adapter that is trained, or None.

    Raises:
        ValueError: the model has no matrix of the names asked for.
    """
    return of_settings(config.lora, model_config)


def of_settings(settings: Mapping[str, Any], model_config: models.ModelConfig) -> models.Adapter | None:
    """Return the adapter of a `lora` section, of a checkpoint of before too: what is not there has its default."""
    if not settings.get("rank"):
        return None
    given = {name: value for name in DEFAULTS if (value := settings.get(name)) not in (None, "")}
    return params.adapter(model_config, rank=settings["rank"], **(DEFAULTS | given))


def in_words(config: configuration.Config, adapter: models.Adapter) -> str:
    """Say which adapter is trained, in a line."""
    scale = "alpha/sqrt(rank)" if adapter.rslora else "alpha/rank"
    parts = [
        f"adapter: LoRA of rank {adapter.rank} over {len(adapter.targets)} matrices, scale {adapter.scale:g}"
        f" ({scale}{', rsLoRA' if adapter.rslora else ''})"
    ]
    if (ratio := config.lora.loraplus_lr_ratio) != 1:
        parts.append(f"B learns at {ratio:g} times the rate of A (LoRA+)")
    return "; ".join(parts)
