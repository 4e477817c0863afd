"""What a program was told about the prompt format, and what a model's directory records of it -> one encoder."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fpo_jax.config import choices
from fpo_jax.tokenization import completion_texts, encode, template_sandbox
from fpo_jax.tokenization import prompt_format as records
from fpo_jax.tokenization import tokenizer as tokenizers
from fpo_jax.tokenization.prompt_format import PromptFormat
from fpo_jax.tokenization.tokenizer import Encoder

# marks that a template writes and a tokenizer has to know, or they are spelt out: <|im_end|>, <start_of_turn>, </s>
_MARKS = re.compile(r"<\|[\w/ -]+\|>|<｜[^｜<>]+｜>|<(?:start|end|begin)_of_\w+>|</?s>|<[be]os>")
_ANSWER = "fpo-answer"


@dataclasses.dataclass(frozen=True)
class Given:
    """What a user says of the prompt format; "" and False leave it to the model."""

    rule: str = ""
    tokenizer: str = ""
    chat_template: str = ""
    chat_template_kwargs: str = ""  # JSON
    eos_token: str = ""
    auto_insert_empty_system: bool = False
    prepend_bos: bool = False
    thoughts: str = ""


def resolve(directory: Path, given: Given | None = None, *, end_ids: Sequence[int] = ()) -> Encoder:
    """Return the encoder of a model's directory: as its record says, else as told, else as transformers does it.

    Args:
        directory: of a model, or the files that a run keeps of its own.
        given: by the user.
        end_ids: tokens that end a completion besides EOS (generation_config.json, config.json).

    Raises:
        ValueError: told something else than what the model was trained with, options that contradict each other, no
            tokenizer.
    """
    given = given or Given()
    choices.check("--rule", given.rule, ("", *records.RULES))
    found = records.read(directory)
    if found is not None:
        return _recorded(directory, found[0], given, end_ids)
    tokenizer = tokenizers.load_tokenizer(
        given.tokenizer or directory, chat_template=given.chat_template or None, eos_token=given.eos_token or None
    )
    rule = given.rule or ("chat" if tokenizer.chat_template else "raw")
    chat_only = ("chat_template", "chat_template_kwargs", "auto_insert_empty_system", "prepend_bos", "thoughts")
    if rule == "raw" and (idle := [name for name in chat_only if getattr(given, name)]):
        raise ValueError(
            f"{', '.join(map(_option, idle))} would change nothing under rule raw; leave out what does not apply."
        )
    settled = PromptFormat(
        rule=rule,
        chat_template_kwargs=records.parse_kwargs(given.chat_template_kwargs),
        auto_insert_empty_system=given.auto_insert_empty_system,
        prepend_bos=given.prepend_bos,
        thoughts=given.thoughts or PromptFormat.thoughts,
    )
    encoder = tokenizers.encoder(tokenizer, settled, end_ids=end_ids)
    if rule == "chat":
        completion_texts.require_template(encoder)
    return encoder


def _recorded(directory: Path, settled: PromptFormat, given: Given, end_ids: Sequence[int]) -> Encoder:
    """Return the encoder that a record describes, if nobody was told anything else."""
    tokenizer = tokenizers.load_tokenizer(
        directory, chat_template=settled.chat_template or None, eos_token=settled.eos_token
    )
    if tokenizers.fingerprint(tokenizer) != settled.tokenizer:
        raise ValueError(
            f"the tokenizer in {directory} is not the one that {records.FILE} there was written with; put it back."
        )
    problems = []
    if given.tokenizer:
        other = tokenizers.load_tokenizer(given.tokenizer, eos_token=given.eos_token or settled.eos_token)
        if tokenizers.fingerprint(other) != settled.tokenizer:
            problems.append(f"--tokenizer={given.tokenizer} makes other ids of the same text")
    if given.chat_template and tokenizers.template_text(given.chat_template) != settled.chat_template:
        problems.append("--chat-template is another template")
    for name in ("rule", "eos_token", "thoughts", "auto_insert_empty_system", "prepend_bos"):
        said, is_so = getattr(given, name), getattr(settled, name)
        if said and said != is_so:
            problems.append(f"{_option(name)}={said} where it was {is_so}")
    if given.chat_template_kwargs and records.parse_kwargs(given.chat_template_kwargs) != settled.chat_template_kwargs:
        problems.append(
            f"--chat-template-kwargs={given.chat_template_kwargs} where it was {dict(settled.chat_template_kwargs)}"
        )
    if problems:
        raise ValueError(
            f"{directory} was trained with another prompt format ({records.FILE} there): {'; '.join(problems)}; leave"
            " out what the model already says."
        )
    return tokenizers.encoder(tokenizer, settled, end_ids=end_ids)


def judge_thoughts(directory: Path, policy: str) -> str:
    """Return what a reward model is told of thoughts by who writes the answers: "" where that is its own business.

    Args:
        directory: of the reward model.
        policy: `data.thoughts` of the model whose answers it scores.
    """
    return policy if records.read(directory) is None and resolve(directory).format.rule == "chat" else ""


def warnings(encoder: Encoder) -> list[str]:
    """Say what of a chat template will not do what it looks like, one sentence each."""
    if encoder.format.rule != "chat":
        return []
    template, found = encoder.format.chat_template, []
    written = _sentence(encoder)
    shown = template if written is None else tokenizers.spelt(encoder, "".join(written.wholes) + written.prompt)
    known = encoder.tokenizer.get_vocab().keys()
    if unknown := sorted({mark for mark in _MARKS.findall(shown) if mark not in known}):
        found.append(
            f"the chat template writes {', '.join(unknown)}, which this tokenizer does not know as tokens: they are"
            " spelt out as text. Unless the model was made so (Zephyr), give its own template or its own tokenizer."
        )
    if "strftime_now" in template and "date_string" not in encoder.format.chat_template_kwargs:
        found.append(
            "the chat template writes a date, which is 26 Jul 2024 here, on any day, and today's in transformers and"
            ' vLLM; where the template knows it, tokenizer.chat_template_kwargs={"date_string": "26 Jul 2024"} is both.'
        )
    if written is None:
        return found
    lead, _, tail = written.wholes[0][len(written.prompt) :].partition(_ANSWER)
    if encoder.format.assistant_header == "prompt" and (header := tokenizers.spelt(encoder, lead).strip()):
        found.append(
            f"the chat template has no generation prompt: it writes {header!r} before an answer only when there is one,"
            " so the model is trained on it and has to write it itself."
        )
    closing = next((token for token in tokenizers.encode(encoder, [tail])[0] if token in encoder.control_ids), None)
    if closing is not None and closing not in encoder.end_ids:
        found.append(
            f"the chat template closes an answer with {encoder.tokenizer.convert_ids_to_tokens(closing)!r}, which is no"
            f" end token of this model (EOS is {encoder.format.eos_token!r}): answers go on behind it; to end them"
            " there, set tokenizer.eos_token (--eos-token) to it."
        )
    return found


def _sentence(encoder: Encoder) -> completion_texts.Texts | None:
    """Render a short conversation; None where the template refuses so short a one."""
    try:
        return completion_texts.chat_texts(encoder, "fpo-question", [_ANSWER])
    except ValueError:
        return None


def render_alike(one: Encoder, other: Encoder) -> bool:
    """Whether two encoders make the same ids of a short conversation, or both refuse it."""

    def ids(encoder: Encoder) -> object:
        prompts, completions = ["fpo-question"], [["fpo-answer"]]
        try:
            if encoder.format.rule == "raw":
                return encode.raw_rows(encoder, prompts, completions, max_length=2**20, max_completion_length=2**10)
            return encode.chat_rows(encoder, prompts, completions, max_length=2**20, max_prompt_length=2**10)
        except completion_texts.Refused as error:
            return error.reason

    return ids(one) == ids(other)


def transformers_ids(
    encoder: Encoder,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    template: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Return what `transformers` makes of a conversation with this tokenizer and its own template, told nothing else.

    The template, of which another may be given, runs in the process that bounds it; encoding is the plain tokenizer's,
    without the renamed controls.
    """
    tokenizer = encoder.tokenizer
    [text] = template_sandbox.render(
        template or str(tokenizer.get_chat_template()),
        [template_sandbox.Conversation(messages, add_generation_prompt, tools)],
        variables=tokenizer.special_tokens_map,
    )
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def example_faults(encoder: Encoder, example: Mapping[str, Any]) -> list[str]:
    """Compare what `transformers` makes of a conversation of the training with what was trained on.

    Args:
        encoder: of the directory that is checked, read anew.
        example: `messages` (and `tools`) or `prompt` and `completion`, with `prompt_ids` and `ids` of the training.

    Returns:
        One sentence for each difference; none where all is well.
    """
    if "messages" in example:
        conversation, tools = list(example["messages"]), example.get("tools")
        opened = transformers_ids(encoder, conversation[:-1], add_generation_prompt=True, tools=tools)
        whole = transformers_ids(encoder, conversation, add_generation_prompt=False, tools=tools)
    else:
        opened, whole = (
            encoder.tokenizer(text, verbose=False)["input_ids"]
            for text in (example["prompt"], example["prompt"] + example["completion"])
        )
        opened, whole = ([*ids[:-1]] if ids[-1:] == [encoder.eos_id] else ids for ids in (opened, whole))
    trained = list(example["ids"])
    found = []
    both = min(len(trained), len(whole))
    if trained[:both] != whole[:both] or not _only_an_end(encoder, trained[both:]) or not _blank(encoder, whole[both:]):
        found.append(
            f"the conversation: trained on {_shown(encoder, trained)}, transformers has {_shown(encoder, whole)}"
        )
    head = list(example["prompt_ids"])
    both = min(len(head), len(opened))
    if head[:both] != opened[:both] or (encoder.format.assistant_header == "prompt" and len(head) != len(opened)):
        found.append(f"the prompt: trained on {_shown(encoder, head)}, transformers has {_shown(encoder, opened)}")
    return found


def _only_an_end(encoder: Encoder, ids: list[int]) -> bool:
    return all(token == encoder.eos_id for token in ids)


def _blank(encoder: Encoder, ids: list[int]) -> bool:
    return not str(encoder.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _shown(encoder: Encoder, ids: list[int]) -> str:
    return repr(encoder.tokenizer.decode(ids, skip_special_tokens=False)[-160:])


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
