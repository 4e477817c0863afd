"""Conversation or plain text -> token ids and the length of the prompt. No JAX, no torch.

prompt_format     how a prompt and its completions become ids: the record that runs and exports carry
resolve           what a user says and what a directory records -> one encoder; what of a template will surprise
chat_templates    chat templates by name
template_sandbox  a template and conversations -> texts, in a process of its own with bounded time and memory
tokenizer_limits  what a tokenizer's files may ask of this machine
tokenizer         load a tokenizer; encode so that text in the data can never become a control token
thinking          the marks of thoughts, and texts without them
completion_texts  the texts of a prompt and of its completions; what a template may not lose
encode            the two ways of building token ids (`raw`, `chat`)
truncation        token ids cut to a window
"""

from fpo_jax.tokenization import prompt_format
from fpo_jax.tokenization.chat_templates import CHAT_TEMPLATES
from fpo_jax.tokenization.completion_texts import Refused, chat_texts, knows_system
from fpo_jax.tokenization.encode import chat_rows, continuation, generation_prompts, keep_end, raw_rows
from fpo_jax.tokenization.prompt_format import PromptFormat, parse_kwargs
from fpo_jax.tokenization.resolve import (
    Given,
    example_faults,
    judge_thoughts,
    render_alike,
    resolve,
    transformers_ids,
    warnings,
)
from fpo_jax.tokenization.tokenizer import Encoder, encode, encoder, fingerprint, load_tokenizer
from fpo_jax.tokenization.truncation import Row, fit_chat, fit_raw

__all__ = [
    "CHAT_TEMPLATES",
    "Encoder",
    "Given",
    "PromptFormat",
    "Refused",
    "Row",
    "chat_rows",
    "chat_texts",
    "continuation",
    "encode",
    "encoder",
    "example_faults",
    "fingerprint",
    "fit_chat",
    "fit_raw",
    "generation_prompts",
    "judge_thoughts",
    "keep_end",
    "knows_system",
    "load_tokenizer",
    "parse_kwargs",
    "prompt_format",
    "raw_rows",
    "render_alike",
    "resolve",
    "transformers_ids",
    "warnings",
]
