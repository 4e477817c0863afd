"""f-PO: preference alignment by f-divergence minimisation, in JAX/Flax for TPUs and GPUs (arXiv 2410.21662).

config = fpo_jax.load_config("mistral_base", ["loss.beta=2.0"])
trainer = fpo_jax.Trainer(config, "runs/mistral")
trainer.train()
trainer.save_pretrained("exported")
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["CausalLM", "Trainer", "__version__", "load_config"]

_PLACES = {
    "CausalLM": "fpo_jax.inference.causal_lm",
    "Trainer": "fpo_jax.trainer.trainer",
    "load_config": "fpo_jax.config.overrides",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: JAX takes a second, which `fpo --help` does not need."""
    if name not in _PLACES:
        raise AttributeError(f"module 'fpo_jax' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PLACES[name]), name)
