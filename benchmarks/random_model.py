"""Random models too large for `tests/tiny.py`: bfloat16 weights, drawn and written by a thread for each CPU.

python -m benchmarks.random_model --layers 12 --folder runs/mistral_12      3 billion parameters, 6 GB
"""

import argparse
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fpo_jax import hf, model, params
from tests import tiny

_BLOCK = 2**23  # values drawn and written at a time


def mistral(layers: int, *, vocab: int = 32_000, width: int = 4096) -> model.ModelConfig:
    """Return the shape of Mistral-7B with so many layers; a `width` below 4,096 shrinks everything else with it."""
    return model.ModelConfig(
        family="mistral", vocab_size=vocab, width=width, layers=layers, heads=width // 128 or 4,
        kv_heads=width // 512 or 1, head_dim=min(128, width // 4), ffn=width * 7 // 2, max_positions=4096,
        rope=model.Rope(theta=1e4), bos_id=1, eos_ids=(2,), pad_id=0, initializer_range=0.02,
    )  # fmt: skip


def write(folder: Path, config: model.ModelConfig, *, seed: int = 0) -> None:
    """Write a Hugging Face directory: matrices of normal numbers, norms of ones, the byte tokenizer of the tests.

    Other numbers than `params.init` draws, since every block of values has a generator of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tiny.write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(model.to_hf_config(config)))
    header: dict = {"__metadata__": {"format": "pt"}}
    blocks, end = [], 0  # (offset of the bytes, values, whether they are drawn)
    for row in params.rows(config):
        size = math.prod(row.hf_shape)
        for name in row.hf_names():
            header[name] = {"dtype": "BF16", "shape": row.hf_shape, "data_offsets": [end, end + 2 * size]}
            for start in range(0, size, _BLOCK):
                blocks.append((end + 2 * start, min(_BLOCK, size - start), row.init == "normal"))
            end += 2 * size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with (folder / hf.SINGLE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(start + end)
        file.flush()

        def fill(number: int) -> None:
            offset, count, drawn = blocks[number]
            values = np.ones(count, np.float32)
            if drawn:
                np.random.default_rng([seed, number]).standard_normal(out=values, dtype=np.float32)
                values *= np.float32(config.initializer_range)
            bits = values.view(np.uint32)
            bits += np.uint32(0x8000)  # to the nearest bfloat16, the upper half of a float32
            os.pwrite(file.fileno(), (bits >> np.uint32(16)).astype(np.uint16).data, start + offset)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(fill, range(len(blocks))))


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
