"""Random models too large for `tests/tiny.py`: bfloat16 weights, drawn by a thread for each CPU.

python -m benchmarks.random_model --layers 12 --folder runs/mistral_12      3 billion parameters, 6 GB
"""

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy

from fpo_jax import hf, models
from fpo_jax.models import params
from tests import tiny


def mistral(layers: int, *, vocab: int = 32_000, width: int = 4096) -> models.ModelConfig:
    """Return the shape of Mistral-7B with so many layers; a `width` below 4,096 shrinks everything else with it."""
    return models.ModelConfig(
        family="mistral", vocab_size=vocab, width=width, layers=layers, heads=width // 128 or 4,
        kv_heads=width // 512 or 1, head_dim=min(128, width // 4), ffn=width * 7 // 2, max_positions=4096,
        rope=models.Rope(theta=1e4), bos_id=1, eos_ids=(2,), pad_id=0, initializer_range=0.02,
    )  # fmt: skip


def write(folder: Path, config: models.ModelConfig, *, seed: int = 0) -> None:
    """Write a Hugging Face directory: matrices of normal numbers, norms of ones, the byte tokenizer of the tests.

    Other numbers than `params.init` draws, since every tensor has a generator of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tiny.write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(models.to_hf_config(config)))
    entries = [(name, entry) for entry in params.entries(config) for name in entry.hf_names()]

    def draw(number: int) -> np.ndarray:
        _, entry = entries[number]
        if entry.init != "normal":
            return np.ones(entry.hf_shape, ml_dtypes.bfloat16)
        values = np.random.default_rng([seed, number]).standard_normal(entry.hf_shape, np.float32)
        values *= np.float32(config.initializer_range)
        return values.astype(ml_dtypes.bfloat16)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        drawn = pool.map(draw, range(len(entries)))
    names = (name for name, _ in entries)
    safetensors.numpy.save_file(dict(zip(names, drawn, strict=True)), folder / hf.SINGLE, metadata={"format": "pt"})


def main() -> None:
    """Write what the command line says and tell how long it takes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    config, started = mistral(options.layers), time.perf_counter()
    write(options.folder, config)
    print(f"{params.count(config):,} parameters in {time.perf_counter() - started:.1f} s: {options.folder}")


if __name__ == "__main__":
    main()
