"""Conversations -> the texts of prompt, assistant header and whole, by the chat template; and what must not get lost.

A prompt is what the template writes with `add_generation_prompt=True`, so that what follows is what a model is sampled
from; the recipes of the original leave the assistant's header to the completion instead. A conversation whose text is
not in what comes out, and one whose answer does not begin where the model is asked to begin, is refused and never
trained on in silence.
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from fpo_jax.tokenization import template_sandbox, thinking
from fpo_jax.tokenization import tokenizer as tokens
from fpo_jax.tokenization.tokenizer import Encoder

Message = dict[str, str]


class Refused(ValueError):
    """A conversation that cannot be rendered as it is; `reason` is what the audit files it under."""

    def __init__(self, fact: str, reason: str):
        super().__init__(fact)
        self.reason = reason


class Texts(NamedTuple):
    """The texts of one group. Control tokens that the template wrote are aliases (see `tokenizer.alias`)."""

    prompt: str
    header: str  # of the assistant, where it belongs to the completion; else ""
    wholes: list[str]  # prompt and completion of each completion; every one begins with the prompt


def chat_texts(encoder: Encoder, prompt: str | list[Message], completions: Sequence[str | Message]) -> Texts:
    """Render the prompt and each whole conversation as the encoder's prompt format says.

    Args:
        encoder: of a tokenizer with a chat template.
        prompt: a conversation; a plain text is one user turn.
        completions: the assistant turns that may follow; a plain text is the content of one.

    Raises:
        Refused: the template refuses the conversation, leaves out a message's text, changes the prompt when a
            completion follows, or a completion holds a thought that nobody said what to do with.
        ValueError: no chat template.
    """
    settled = encoder.format
    require_template(encoder)
    messages = _opened(encoder, prompt)
    turns = [{"role": "assistant", "content": turn} if isinstance(turn, str) else dict(turn) for turn in completions]
    turns = [_settled_thought(turn, settled.thoughts) for turn in turns]
    asked = [
        template_sandbox.Conversation(messages, add_generation_prompt=True),
        *([template_sandbox.Conversation(messages)] if settled.assistant_header == "completion" else []),
        *(template_sandbox.Conversation([*messages, turn]) for turn in turns),
    ]
    texts = _render(encoder, asked)
    opened, wholes = texts[0], texts[-len(turns) :] if turns else []
    if settled.assistant_header == "completion":
        plain = texts[1]
        if not all(whole.startswith(plain) for whole in wholes):  # Phi-3 ends any text with EOS
            plain = plain.removesuffix(encoder.aliases[str(encoder.tokenizer.eos_token)])
        header = opened[len(plain) :] if opened.startswith(plain) else ""
        found = Texts(plain, header, wholes)
    else:
        found = Texts(opened, "", wholes)
    for whole, turn in zip(wholes, turns, strict=True):
        if not whole.startswith(found.prompt):
            raise Refused(_no_beginning(found.prompt, whole), "no_beginning")
        completion = whole[len(found.prompt) :]
        said = turn["content"].strip()
        if said not in completion and thinking.plain(said) not in thinking.plain(completion):
            raise Refused(_left_out(turn, [*messages, turn]), "text_lost")
        if thinking.opened(opened) and not thinking.closed(turn["content"]):
            raise Refused(
                f"the generation prompt opens a thought that this completion does not close"
                f" ({turn['content'].strip()[:40]!r}): cut within it, or of a model that does not think",
                "thought",
            )
    if settled.thoughts != "keep":
        _refuse_written_thought(encoder, [*messages, {"role": "assistant", "content": ""}])
    return found


def generation_texts(encoder: Encoder, prompts: Sequence[str | list[Message]]) -> list[str]:
    """Render what a model is sampled from: each prompt with what the template writes for an answer to follow.

    Raises:
        Refused: as for chat_texts.
        ValueError: no chat template.
    """
    require_template(encoder)
    asked = [template_sandbox.Conversation(_opened(encoder, prompt), add_generation_prompt=True) for prompt in prompts]
    return _render(encoder, asked)


def require_template(encoder: Encoder) -> None:
    """Refuse a tokenizer without a chat template: conversations are never just concatenated.

    Raises:
        ValueError: it has none.
    """
    if not encoder.format.chat_template:
        raise ValueError(
            f"the tokenizer {encoder.tokenizer.name_or_path!r} has no chat template, so conversations have no text; "
            "pass chat_template= (a name, a file or Jinja text), or use rule='raw' with plain-text records"
        )


def knows_system(template: str) -> bool:
    """Whether a template has system turns, as the original's code decides it."""
    return "system" in template or "<|im_start|>" in template


def _opened(encoder: Encoder, prompt: str | list[Message]) -> list[Message]:
    """Return the messages of a prompt, after the empty system turn that the prompt format may ask for."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    inserts = encoder.format.auto_insert_empty_system and knows_system(encoder.format.chat_template)
    if inserts and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": ""})
    return messages


def _settled_thought(turn: Message, policy: str) -> Message:
    """Return an assistant turn with its thought kept or taken out."""
    content = turn["content"]
    if policy == "keep" or not thinking.held(content):
        return turn
    if policy == "refuse":
        raise Refused(
            f"a completion holds a thought ({content.strip()[:40]!r}); set data.thoughts (--thoughts) to keep (it is"
            " trained and scored as the rest) or drop (it is taken out)",
            "thought",
        )
    left = thinking.dropped(content)
    if thinking.held(left):
        raise Refused(f"a completion holds a thought that is not closed ({left.strip()[:40]!r})", "thought")
    if not left.strip():
        raise Refused("a completion is nothing but a thought", "thought")
    return {**turn, "content": left}


def _refuse_written_thought(encoder: Encoder, messages: list[Message]) -> None:
    """Refuse a template that writes a thought, mostly an empty one, between its generation prompt and an answer.

    Raises:
        Refused: it does.
    """
    roles = tuple(message["role"] for message in messages)
    lead = _written_before_an_answer(encoder.format.chat_template, _settings(encoder), roles)
    if thinking.held(lead):
        raise Refused(
            f"the chat template writes a thought of its own between its generation prompt and an answer"
            f" ({lead.strip()!r}), which no sampling would put there; set tokenizer.chat_template_kwargs"
            ' (--chat-template-kwargs) to {"enable_thinking": false} where the template knows that, or data.thoughts'
            " (--thoughts) to keep, which trains it",
            "thought",
        )


@functools.lru_cache(maxsize=4096)
def _written_before_an_answer(template: str, variables: str, roles: tuple[str, ...]) -> str:
    """Return what a template writes between its generation prompt and an answer, whatever the turns say."""
    words = [f"fpoturn{number}fpo" for number in range(len(roles))]
    messages = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
    asked = [
        template_sandbox.Conversation(messages[:-1], add_generation_prompt=True),
        template_sandbox.Conversation(messages),
    ]
    try:
        opened, whole = template_sandbox.render(template, asked, variables=json.loads(variables))
    except template_sandbox.Refused:
        return ""
    return whole[len(opened) :].partition(words[-1])[0] if whole.startswith(opened) else ""


def _settings(encoder: Encoder) -> str:
    """Return the variables of the template as JSON."""
    return json.dumps({**encoder.tokenizer.special_tokens_map, **encoder.format.chat_template_kwargs}, sort_keys=True)


def _render(encoder: Encoder, conversations: Sequence[template_sandbox.Conversation]) -> list[str]:
    shielded = [
        conversation._replace(
            messages=[
                {key: tokens.protect(encoder, text) for key, text in message.items()}
                for message in conversation.messages
            ]
        )
        for conversation in conversations
    ]
    settings = encoder.format.chat_template, _settings(encoder)
    try:
        texts = template_sandbox.render(settings[0], shielded, variables=json.loads(settings[1]))
    except template_sandbox.Refused as error:
        roles = ", ".join(message["role"] for message in conversations[error.index].messages)
        given = f"the chat template refuses a conversation of the turns {roles}: {error}"
        if encoder.format.auto_insert_empty_system:
            given += " (an empty system turn is put first, as data.auto_insert_empty_system says)"
        raise Refused(given, "template_refuses") from error
    for conversation, original, text in zip(shielded, conversations, texts, strict=True):
        roles = tuple(message["role"] for message in original.messages)
        passed_over = _passed_over(*settings, roles, original.add_generation_prompt)
        for number in [*_lost(conversation.messages, text), *passed_over]:
            if original.messages[number]["content"].strip():
                raise Refused(_left_out(original.messages[number], original.messages), "text_lost")
    return [tokens.alias(encoder, text) for text in texts]


def _lost(messages: Sequence[Mapping[str, str]], text: str) -> Iterator[int]:
    """Yield the numbers of the messages whose text, trimmed, is not in a rendered one; earlier thoughts may go."""
    for number, message in enumerate(messages):
        content = message["content"].strip()
        if content in text:
            continue
        if message["role"] == "assistant" and number + 1 < len(messages):
            content = thinking.dropped(content)
        if thinking.plain(content) not in thinking.plain(text):
            yield number


@functools.lru_cache(maxsize=4096)
def _passed_over(template: str, variables: str, roles: tuple[str, ...], add_generation_prompt: bool) -> tuple[int, ...]:
    """Return the numbers of the turns that a template shows nothing of, whatever they say.

    A short text may stand in what the template itself writes, so turns of these roles are rendered with words of ours.
    """
    words = [f"fpoturn{number}fpo" for number in range(len(roles))]
    messages = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
    try:
        asked = [template_sandbox.Conversation(messages, add_generation_prompt)]
        [text] = template_sandbox.render(template, asked, variables=json.loads(variables))
    except template_sandbox.Refused:  # what it refuses of these words it may take of others
        return ()
    return tuple(number for number, word in enumerate(words) if word not in text)


def _left_out(message: Mapping[str, str], messages: Sequence[Mapping[str, str]]) -> str:
    return (
        f"the chat template leaves out the text of a turn of role {message['role']!r}"
        f" ({message['content'].strip()[:40]!r}) in a conversation of the turns"
        f" {', '.join(turn['role'] for turn in messages)}; pass another chat_template, or take the turn out"
    )


def _no_beginning(prompt: str, whole: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole)))
    return (
        "the chat template changes the text of the prompt when a completion follows, so the completion has no"
        " beginning; pass another chat_template, or chat_template_kwargs that it knows.\n"
        f"asked for an answer: ...{prompt[max(at - 60, 0) : at + 40]!r}\n"
        f"with the completion:   ...{whole[max(at - 60, 0) : at + 40]!r}"
    )
