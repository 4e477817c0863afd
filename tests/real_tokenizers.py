"""The real tokenizers of the shared data, each loaded once: reading a SentencePiece file takes seconds."""

import dataclasses
from functools import lru_cache

from fpo_jax import tokenization
from tests.paths import shared_data

NAMES = ("neox", "phi3", "mistral1", "mistral3", "stories")
_PATHS = {
    "neox": ("tokenizers", "gpt_neox_20B_tokenizer.json"),
    "phi3": ("tokenizers", "phi-3-mini"),
    "mistral1": ("tokenizers", "mistral-v1.model"),
    "mistral3": ("tokenizers", "mistral-v3.model"),
    "stories": ("stories260K",),
}


def path(name: str):
    """Return where the files of a tokenizer are; skips the test where they are absent."""
    return shared_data(*_PATHS[name])


# how the trainer of the original's chat recipes renders (spec 3.2, 3.3)
ORIGINAL = tokenization.PromptFormat(
    auto_insert_empty_system=True, prepend_bos=True, assistant_header="completion", append_eos="unless_last"
)


def encoder(
    name: str, template: str | None = None, prompt_format: tokenization.PromptFormat | None = None
) -> tokenization.Encoder:
    """Return the encoder with a named chat template, or with the tokenizer's own; good until the next call."""
    loaded, own = _load(name)
    text = loaded.tokenizer.chat_template = tokenization.CHAT_TEMPLATES[template] if template else own
    settled = prompt_format or tokenization.PromptFormat(rule="chat" if text else "raw")
    open_fields = {name: getattr(loaded.format, name) for name in ("eos_token", "end_ids", "tokenizer")}
    return loaded._replace(format=dataclasses.replace(settled, chat_template=text or "", **open_fields))


@lru_cache
def _load(name: str) -> tuple[tokenization.Encoder, str | None]:
    loaded = tokenization.encoder(
        tokenization.load_tokenizer(path(name), eos_token="<|endoftext|>" if name == "neox" else None)
    )
    return loaded, loaded.tokenizer.chat_template
