"""The quickstart's sizes, and its two trainer configurations fitted to a workdir, a seed and the devices present."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from fpo_jax import config as configuration
from fpo_jax.configs import quickstart as recipe

PATHS = ("model.path", "data.train", "data.eval")


@dataclasses.dataclass(frozen=True)
class Scale:
    """The sizes that make the quickstart what it is; tests use smaller ones."""

    demonstrated_prompts: int = 10_000  # each demonstrated twice
    aligned_prompts: int = 2_000  # the first of them, answered K times by the pretrained model
    held_out_prompts: int = 1_000  # success is counted on these
    held_out_groups: int = 250  # the first of them, answered K times for the held-out loss and accuracy
    pretraining_steps: int | None = None  # None = what configs/quickstart.py says
    alignment_steps: int | None = None
    sampling_rows: int = 128  # completions drawn at once


def pretraining(workdir: Path, *, seed: int, scale: Scale) -> Any:
    """Return the ConfigDict of the pretraining."""
    c = recipe.pretraining()
    c.model.path = str(workdir / "start")
    c.data.train = str(workdir / "data" / "demonstrations.jsonl")
    return _fit(c, seed=seed, steps=scale.pretraining_steps)


def alignment(workdir: Path, *, seed: int, divergence: str, scale: Scale) -> Any:
    """Return the ConfigDict of the alignment."""
    c = recipe.get_config(divergence)
    c.model.path = str(workdir / "sft_model")
    c.data.train = str(workdir / "data" / "groups.jsonl")
    c.data.eval = str(workdir / "data" / "held_out_groups.jsonl")
    return _fit(c, seed=seed, steps=scale.alignment_steps)


def settings(config: Any) -> dict[str, Any]:
    """Return a configuration as {dotted key: value} without its paths: what they hold is compared by content."""
    return {
        key: value for key, value in configuration.flatten(json.loads(config.to_json())).items() if key not in PATHS
    }


def overrides(file: Any, used: Any) -> dict[str, Any]:
    """Return what train.py must be given on top of the config file to get the configuration that was used."""
    in_file, in_use = (configuration.flatten(json.loads(config.to_json())) for config in (file, used))
    return {key: value for key, value in in_use.items() if value != in_file[key]}


def _fit(c: Any, *, seed: int, steps: int | None) -> Any:
    """Spread each batch over all devices; where they do not divide it, the trainer says which size would do."""
    c.seed = seed
    c.train.max_steps = c.train.max_steps if steps is None else steps
    share = max(1, c.train.batch_size // jax.device_count())
    c.train.micro_batch_per_device = min(c.train.micro_batch_per_device, share)
    return c
