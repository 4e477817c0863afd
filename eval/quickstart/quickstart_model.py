"""The quickstart's starting model: a tokenizer of 15 characters and a random Llama, as a Hugging Face directory.

The tokenizer opens every text with BOS, as Llama's does, so that `tokenizer(prompt)` gives the row the model was
trained on in transformers and vLLM too.
"""

import dataclasses
import json
import tempfile
from pathlib import Path

import jax
import tokenizers
import transformers

from fpo_jax import hf, models
from fpo_jax.eval.quickstart import quickstart_task as task
from fpo_jax.models import params

PAD, BOS, EOS, UNKNOWN = SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
VOCABULARY = {token: index for index, token in enumerate((*SPECIAL, *task.DIGITS, task.END_OF_PROMPT))}

ARCHITECTURE = models.ModelConfig(
    family="llama",
    vocab_size=len(VOCABULARY),
    width=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn=160,
    max_positions=64,
    initializer_range=0.05,
    bos_id=VOCABULARY[BOS],
    eos_ids=(VOCABULARY[EOS],),
    pad_id=VOCABULARY[PAD],
)


def write_start(out_dir: Path, *, seed: int, architecture: models.ModelConfig = ARCHITECTURE) -> None:
    """Write a random model with tokenizer, config and generation config; the directory appears whole or not at all.

    Args:
        out_dir: absent or empty.
        seed: of the weights.
        architecture: a vocabulary of len(VOCABULARY) tokens.
    """
    weights = jax.jit(params.init, static_argnums=(0, 2))(architecture, jax.random.key(seed), "float32")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        make_tokenizer(max_length=architecture.max_positions).save_pretrained(source)
        (source / "config.json").write_text(json.dumps(models.to_hf_config(architecture)))
        generation = {"bos_token_id": VOCABULARY[BOS], "eos_token_id": VOCABULARY[EOS], "pad_token_id": VOCABULARY[PAD]}
        generation |= {"do_sample": True, "temperature": 1.0, "max_new_tokens": task.LONGEST + 4}
        (source / "generation_config.json").write_text(json.dumps(generation))
        hf.export(weights, architecture, out_dir=out_dir, source_dir=source, dtype="float32")


def make_tokenizer(*, max_length: int) -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer with one token per digit; encode opens with BOS, decode(encode(text)) is the text.

    >>> tokenizer = make_tokenizer(max_length=64)
    >>> tokenizer("73>")["input_ids"], tokenizer.decode([11, 7, 14])
    ([1, 11, 7, 14], '73>')
    """
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCABULARY, unk_token=UNKNOWN))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, VOCABULARY[BOS])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model directory ready to sample from."""

    config: models.ModelConfig
    weights: dict
    tokenizer: transformers.PreTrainedTokenizerFast


def load(directory: Path) -> Loaded:
    """Read a directory with this project's own loader, as any user's model would be read."""
    config = hf.read_config(directory)
    weights = hf.load_params(directory, config, dtype="float32")
    return Loaded(config, weights, transformers.PreTrainedTokenizerFast.from_pretrained(directory))
