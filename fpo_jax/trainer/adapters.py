"""The adapter of a run: its description from the configuration and from `lora.path`, and what the run says of it."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fpo_jax import config as configuration
from fpo_jax import hf, models
from fpo_jax.models import params

log = logging.getLogger("fpo_jax")

DEFAULTS = {
    "alpha": 16.0,
    "dropout": 0.0,
    "modules": "all-linear",
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": (),
    "base_dtype": "",
}


def of_run(config: configuration.Config, model_config: models.ModelConfig) -> models.Adapter | None:
    """Return the description of the adapter that is trained, or None.

    Raises:
        ValueError: the model has no matrix of the names asked for, or `lora.path` is another adapter.
    """
    return of_settings(settled(config, model_config).lora, model_config)


def of_settings(settings: Mapping[str, Any], model_config: models.ModelConfig) -> models.Adapter | None:
    """Return the adapter of a `lora` section, of a checkpoint of before too: what is not there has its default."""
    if not settings.get("rank"):
        return None
    given = {name: value for name in DEFAULTS if (value := settings.get(name)) not in (None, "")}
    return params.adapter(model_config, rank=settings["rank"], **(DEFAULTS | given))


def settled(config: configuration.Config, model_config: models.ModelConfig) -> configuration.Config:
    """Return the configuration with what `lora.path` says in its place, so that it says all without that directory.

    Raises:
        ValueError: a field that is set to something else than the adapter in `lora.path` is; a broken one.
    """
    if not config.lora.path:
        return config
    with configuration.about("lora.path"):
        directory = hf.adapter_dir(config.lora.path)
        found = hf.read_peft(directory, model_config)
    config = config.copy_and_resolve_references()
    if config.lora.dropout is not None:  # is of the training, and may differ
        found["dropout"] = config.lora.dropout
    theirs = of_settings(found, model_config)
    assert theirs is not None
    for name, value in found.items():
        given = config.lora[name]
        if not _is_unset(given) and of_settings(found | {name: given}, model_config) != theirs:
            raise ValueError(
                f"lora.{name}={given!r}, and the adapter in lora.path={config.lora.path} has {value!r}; unset"
                f" lora.{name}, or leave lora.path out to begin a new adapter."
            )
        config.lora[name] = value
    hf.check_peft(directory, model_config, theirs)
    return config


def _is_unset(value: Any) -> bool:
    return value is None or (not isinstance(value, bool) and value in ("", 0, ()))


def directory_of(config: configuration.Config) -> Path | None:
    """Return the local directory of the adapter that a run starts from; None = a new one, or none."""
    if not config.lora.path:
        return None
    directory = hf.adapter_dir(config.lora.path)
    if (base := hf.base_of(directory)) and not _same_model(base, config.model.path):
        log.warning(
            "lora.path was trained on %s, by its adapter_config.json; model.path is %s", base, config.model.path
        )
    return directory


def _same_model(one: str, other: str) -> bool:
    """Whether two names are of one model: the same name, or two paths to one directory."""
    return one == other or (Path(one).is_dir() and Path(one).resolve() == Path(other).resolve())


def in_reference(config: configuration.Config) -> bool:
    """Whether the reference is the base with the adapter that the run starts from."""
    return bool(config.lora.path) and config.reference.adapter == "start" and not config.reference.path


def in_words(config: configuration.Config, adapter: models.Adapter, *, needs_reference: bool) -> str:
    """Say which adapter is trained, from what it starts and what the reference is, in a line."""
    scale = "alpha/sqrt(rank), rsLoRA" if adapter.rslora else "alpha/rank"
    parts = [
        f"adapter: {'DoRA' if adapter.dora else 'LoRA'} of rank {adapter.rank} over {len(adapter.targets)} matrices,"
        f" scale {adapter.scale:g} ({scale})"
    ]
    if adapter.saved:
        parts.append(f"trained whole beside it: {', '.join(adapter.saved)}")
    if adapter.quantised:
        parts.append(f"{len(adapter.quantised)} frozen matrices in four bits (NF4), the reference's too")
    if (ratio := config.lora.loraplus_lr_ratio) != 1:
        parts.append(f"B learns at {ratio:g} times the rate of A (LoRA+)")
    if config.lora.path:
        parts.append(f"starts from {config.lora.path}, whose alpha is {adapter.alpha:g}")
    if config.lora.path and needs_reference and not config.reference.path:
        beside = "with" if in_reference(config) else "without"
        parts.append(
            f"the reference is the base {beside} that adapter, by reference.adapter={config.reference.adapter}"
        )
    return "; ".join(parts)
