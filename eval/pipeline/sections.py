"""From a section of a pipeline's settings to the training configuration of a stage."""

from pathlib import Path
from typing import Any

from fpo_jax import config as configuration
from fpo_jax.trainer import run_inputs


def whole(section: Any, *, model: str, data: dict[str, Any], tokenizer: Any) -> Any:
    """Return a training configuration from a pipeline's section and what the pipeline fills in."""
    c: Any = configuration.default()
    with c.unlocked():
        c.update(section.copy_and_resolve_references())
    c.data.update(data)
    c.tokenizer.update(tokenizer.copy_and_resolve_references())
    c.model.path = model
    return c


def problems_of(config: Any) -> list[str]:
    """List what is wrong with a training configuration."""
    try:
        run_inputs.check(config)
    except ValueError as error:
        return [line.strip() for line in str(error).splitlines()[1:]]
    return []


def place(name: str | Path) -> Path | str:
    """Return a Path for what lies here, whose content then counts, and the name itself for what lies on the hub."""
    path = Path(name).expanduser()
    return path if str(name) and path.exists() else str(name)
