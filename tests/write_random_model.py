"""Write a random model directory of any shape, shard by shard, with a writer that shares nothing with the product's.

    python -m tests.write_random_model DIR [--family mistral --layers 32 --width 4096 ...] [--shard-bytes 5000000000]

The default is the shape of Mistral-7B in bfloat16. Tensors are cut from an endless repetition of PERIOD random numbers,
a prime, so that no two rows or tensors of a size that models have are alike; the process holds a few tens of megabytes.
"""

import argparse
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np

from fpo_jax import models
from fpo_jax.models import params

PERIOD = 8_388_593
WORDS = {"bfloat16": (np.uint16, ml_dtypes.bfloat16, "BF16"), "float32": (np.uint32, np.float32, "F32")}
MISTRAL_7B = models.ModelConfig(
    family="mistral",
    vocab_size=32_000,
    width=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    ffn=14_336,
    max_positions=32_768,
    eos_ids=(2,),
)


class Noise:
    """Random numbers below 2 in magnitude by position: `values(start, count)`."""

    def __init__(self, dtype: str, seed: int):
        """Draw one period; the highest bit of the exponent is cleared, so every value is finite."""
        word, self._dtype, _ = WORDS[dtype]
        bits = np.dtype(word).itemsize * 8
        drawn = np.random.default_rng(seed).integers(0, 2**bits, PERIOD, word)
        self._twice = np.tile(drawn & word(2**bits - 1 - 2 ** (bits - 2)), 2)

    def values(self, start: int, count: int) -> np.ndarray:
        """Return at most PERIOD numbers from position `start` of the endless sequence."""
        return self._twice[start % PERIOD :][:count].view(self._dtype)


def plan(config: models.ModelConfig, *, dtype: str, shard_bytes: int) -> list[dict[str, tuple[int, tuple[int, ...]]]]:
    """Deal tensors out to shards in the order of published models: name -> (position of its noise, shape)."""
    itemsize, shards, filled, position = np.dtype(WORDS[dtype][0]).itemsize, [{}], 0, 0
    entries = sorted(params.entries(config), key=lambda entry: entry.path == "head")
    of_layer = [[entry for entry in entries if entry.stacked]] * config.layers
    names = [(entry.hf_name, entry.hf_shape) for entry in entries if not entry.stacked and entry.path == "embed"]
    names += [
        (name, entry.hf_shape)
        for layer, stacked in enumerate(of_layer)
        for entry in stacked
        for name, place in entry.tensors()
        if place[0] == layer
    ]
    names += [(entry.hf_name, entry.hf_shape) for entry in entries if not entry.stacked and entry.path != "embed"]
    for name, shape in names:
        size = math.prod(shape) * itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = (position, shape)
        filled, position = filled + size, position + math.prod(shape)
    return shards


def write(directory: Path, config: models.ModelConfig, *, dtype: str, shard_bytes: int, seed: int = 0) -> None:
    """Write config.json, the shards and their index."""
    directory.mkdir(parents=True)
    noise, (word, _, code) = Noise(dtype, seed), WORDS[dtype]
    content = models.to_hf_config(config) | {"torch_dtype": dtype}
    (directory / "config.json").write_text(json.dumps(content))
    shards = plan(config, dtype=dtype, shard_bytes=shard_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, end = {}, 0
        for name, (_, shape) in shard.items():
            start, end = end, end + math.prod(shape) * np.dtype(word).itemsize
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header)
        with (directory / file_name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text.encode())
            for position, shape in shard.values():
                for start in range(0, math.prod(shape), PERIOD):
                    values = noise.values(position + start, min(PERIOD, math.prod(shape) - start))
                    file.write(values.view(np.uint8).data)
        weight_map |= dict.fromkeys(shard, file_name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def main() -> None:
    """Write as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.write_random_model")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", choices=WORDS, default="bfloat16")
    parser.add_argument("--shard-bytes", type=int, default=5_000_000_000)
    fields = ("family", "vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "ffn")
    for field in fields:
        default = getattr(MISTRAL_7B, field)
        parser.add_argument("--" + field.replace("_", "-"), type=type(default), default=default)
    options = vars(parser.parse_args())
    config = models.ModelConfig(
        max_positions=MISTRAL_7B.max_positions, eos_ids=(2,), **{field: options[field] for field in fields}
    )
    write(options["directory"], config, dtype=options["dtype"], shard_bytes=options["shard_bytes"])


if __name__ == "__main__":
    main()
