"""Tiny models, tokenizers and data sets that tests make for themselves."""

import json
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
import tokenizers
import transformers

from fpo_jax import config as configuration
from fpo_jax import models, sharding
from fpo_jax.models import params
from fpo_jax.trainer import run_inputs, run_schedule, steps

SPECIAL = ("<pad>", "<s>", "</s>")
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}</s>\n{% endfor %}"


def write_tokenizer(folder: Path) -> int:
    """Write a byte-level tokenizer with a chat template; returns its size."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write_model(folder: Path, *, seed: int = 0, family: str = "llama", **changed) -> models.ModelConfig:
    """Write a random model with the byte tokenizer as a Hugging Face directory."""
    folder.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(folder)
    options = {"vocab_size": size, "width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 24}
    options |= {"max_positions": 64, "bos_id": 1, "eos_ids": (2,), "pad_id": 0, "initializer_range": 0.3}
    config = models.ModelConfig(family=family, **(options | changed))
    (folder / "config.json").write_text(json.dumps(models.to_hf_config(config)))
    weights = params.flatten(params.init(config, jax.random.key(seed), "float32"))
    tensors = {}
    for entry in params.entries(config):
        array = np.asarray(weights[entry.path])
        for name, place in entry.tensors():
            tensors[name] = np.ascontiguousarray(params.to_hf(entry, array[place]))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return config


def write_pairs(path: Path, *, count: int, seed: int = 0, completions: int | None = None) -> Path:
    """Write prompt/chosen/rejected rows, or prompt/completions/rewards with `completions` completions."""
    random = np.random.default_rng(seed)

    def words(low, high):
        return " ".join(random.choice(["ab", "cde", "f", "gh"], size=random.integers(low, high)))

    rows = []
    for index in range(count):
        prompt = f"{index}: {words(1, 5)}?"
        if completions is None:
            rows.append({"prompt": prompt, "chosen": f" {words(1, 4)}!", "rejected": f" {words(1, 6)}."})
        else:
            texts = [f" {words(1, 4)}{i}" for i in range(completions)]
            rows.append({"prompt": prompt, "completions": texts, "rewards": random.normal(size=completions).tolist()})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(model_dir: Path, data: Path, **changed):
    """Return a small raw-rule configuration in float32; `changed` sets dotted keys with dots written as __."""
    c = configuration.default()
    c.model.path, c.data.train, c.data.eval = str(model_dir), str(data), str(data)
    c.model.compute_dtype, c.model.remat = "float32", "none"
    c.data.format, c.data.rule = "json", "raw"
    c.data.layout, c.data.max_length, c.data.max_completion_length = "padded", 40, 16
    c.loss.name, c.loss.alpha, c.loss.beta_pi = "alpha", 0.1, 0.5
    c.optim.learning_rate, c.optim.warmup_fraction = 1e-3, 0.1
    c.train.batch_size, c.train.micro_batch_per_device = 8, 1
    c.train.eval_every, c.train.save_every, c.train.eval_batch_per_device = 4, 2, 1
    c.mesh.fsdp, c.mesh.data = 2, 4
    c.logging.tensorboard = False
    c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changed.items()})
    return c


def built(config, *, devices: int = 1) -> tuple[run_inputs.Inputs, run_schedule.RunSchedule, steps.Steps]:
    """Return what a run of the configuration reads, plans and compiles."""
    inputs, layout = run_inputs.prepare(config), sharding.make_layout(**config.mesh, devices=jax.devices()[:devices])
    plan = run_schedule.build(config, inputs, devices=layout.data_parallel_degree)
    return inputs, plan, steps.build(config, run_schedule.blueprint(config, inputs, plan), layout)
