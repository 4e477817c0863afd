"""Conversation or plain text -> token ids and the length of the prompt. No JAX, no torch.

templates   chat templates by name
rendering   a template and conversations -> texts, in a process of its own with bounded time and memory
tokenizer   load a tokenizer; encode so that text in the data can never become a control token
rules       the two ways of building rows (`raw`, `chat`) and their truncation
"""

from fpo_jax.chat.rules import (
    Row,
    chat_rows,
    chat_texts,
    continuation,
    fit_chat,
    fit_raw,
    generation_prompts,
    keep_end,
    raw_rows,
)
from fpo_jax.chat.templates import CHAT_TEMPLATES
from fpo_jax.chat.tokenizer import Encoder, encode, encoder, identity, load_tokenizer

__all__ = [
    "CHAT_TEMPLATES",
    "Encoder",
    "Row",
    "chat_rows",
    "chat_texts",
    "continuation",
    "encode",
    "encoder",
    "fit_chat",
    "fit_raw",
    "generation_prompts",
    "identity",
    "keep_end",
    "load_tokenizer",
    "raw_rows",
]
