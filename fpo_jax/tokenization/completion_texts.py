"""Conversations -> the texts of prompt, assistant header and whole, by the chat template; and what must not get lost.

A prompt is what the template writes with `add_generation_prompt=True`, so that what follows is what a model is sampled
from; the recipes of the original leave the assistant's header to the completion instead. A conversation whose text is
not in what comes out, and one whose answer does not begin where the model is asked to begin, is refused and never
trained on in silence.
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fpo_jax.tokenization import messages as spoken
from fpo_jax.tokenization import template_sandbox, thinking
from fpo_jax.tokenization import tokenizer as tokens
from fpo_jax.tokenization.messages import Completion, Message, Tool
from fpo_jax.tokenization.template_sandbox import Conversation
from fpo_jax.tokenization.tokenizer import Encoder


class Refused(ValueError):
    """A conversation that cannot be rendered as it is; `reason` is what the audit files it under."""

    def __init__(self, fact: str, reason: str):
        super().__init__(fact)
        self.reason = reason


class Turn(NamedTuple):
    """An assistant turn of a completion of several."""

    before: str  # all that stands before it
    header: str  # of the assistant, where it belongs to the completion; else ""
    through: str  # all up to its end, as the template writes it where the conversation ends there


class Texts(NamedTuple):
    """The texts of one group. Control tokens that the template wrote are aliases (see `tokenizer.alias`)."""

    prompt: str
    header: str  # of the assistant, where it belongs to the completion; else ""
    wholes: list[str]  # prompt and completion of each completion; every one begins with the prompt
    turns: Sequence[Sequence[Turn]] = ()  # of each completion, where one has several messages; else empty


def chat_texts(
    encoder: Encoder,
    prompt: str | list[Message],
    completions: Sequence[Completion],
    *,
    tools: Sequence[Tool] | None = None,
) -> Texts:
    """Render the prompt and each whole conversation as the encoder's prompt format says.

    Args:
        encoder: of a tokenizer with a chat template.
        prompt: a conversation; a plain text is one user turn.
        completions: the assistant turns that may follow; a plain text is the content of one, and one of several
            messages begins and ends with an assistant's.
        tools: JSON schemas that the prompt offers.

    Raises:
        Refused: the template refuses the conversation, leaves out a message's text, a call or the tools, changes the
            prompt when a completion follows, or a completion holds a thought that nobody said what to do with.
        ValueError: no chat template.
    """
    settled = encoder.format
    require_template(encoder)
    messages = _opened(encoder, prompt)
    answers = [
        [_settled_thought(turn, settled.thoughts) for turn in spoken.turns(completion)] for completion in completions
    ]
    asked: list[Conversation] = []

    def ask(before: list[Message], after: list[list[Message]]) -> slice:
        """Have a beginning rendered, and what follows it; return where the texts will be."""
        start = len(asked)
        asked.append(Conversation(before, True, tools))
        if settled.assistant_header == "completion":
            asked.append(Conversation(before, False, tools))
        asked.extend(Conversation([*before, *turns], False, tools) for turns in after)
        return slice(start, len(asked))

    group = ask(messages, answers)
    parts = [
        [ask([*messages, *turns[:at]], [[turns[at]]]) for at in _spoken_at(turns)] if len(turns) > 1 else []
        for turns in answers
    ]
    texts = _render(encoder, asked)
    found, opened = _begun(encoder, texts[group])
    turned = []
    for whole, turns, own in zip(found.wholes, answers, parts, strict=True):
        if not whole.startswith(found.prompt):
            raise Refused(_no_beginning(found.prompt, whole), "no_beginning")
        begun = [_begun(encoder, texts[part]) for part in own] or [(found._replace(wholes=[whole]), opened)]
        for at, (one, its_opened) in zip(_spoken_at(turns), begun, strict=True):
            before = [*messages, *turns[:at]]
            _check_answer(one, its_opened, [*before, turns[at]])
            if settled.thoughts != "keep":
                _refuse_written_thought(encoder, [*before, {"role": "assistant", "content": ""}])
        turned.append([Turn(one.prompt, one.header, one.wholes[0]) for one, _ in begun] if own else [])
    return found._replace(turns=turned) if any(turned) else found


def _spoken_at(turns: Sequence[Message]) -> list[int]:
    """Return which turns of a completion are the assistant's; the first and the last must be."""
    found = [at for at, turn in enumerate(turns) if turn["role"] == "assistant"]
    if found[:1] != [0] or found[-1] != len(turns) - 1:
        roles = ", ".join(turn["role"] for turn in turns)
        raise ValueError(f"a completion begins and ends with an assistant turn, and the turns of one are {roles}")
    return found


def _begun(encoder: Encoder, texts: Sequence[str]) -> tuple[Texts, str]:
    """Return a beginning with what follows it, from texts in the order of `ask`, and what a model is asked with."""
    opened, rest = texts[0], list(texts[1:])
    if encoder.format.assistant_header == "prompt":
        return Texts(opened, "", rest), opened
    plain, *wholes = rest
    if not all(whole.startswith(plain) for whole in wholes):  # Phi-3 ends any text with EOS
        plain = plain.removesuffix(encoder.aliases[str(encoder.tokenizer.eos_token)])
    return Texts(plain, opened[len(plain) :] if opened.startswith(plain) else "", wholes), opened


def _check_answer(begun: Texts, opened: str, messages: list[Message]) -> None:
    """Refuse an answer, the last of the messages, that does not follow its beginning, or is not all there."""
    [whole], turn = begun.wholes, messages[-1]
    if not whole.startswith(begun.prompt):
        raise Refused(_no_beginning(begun.prompt, whole), "no_beginning")
    completion, said = whole[len(begun.prompt) :], spoken.content(turn).strip()
    if said not in completion and thinking.plain(said) not in thinking.plain(completion):
        raise Refused(_left_out(turn, messages), "text_lost")
    if thinking.opened(opened) and not thinking.closed(said):
        raise Refused(
            f"the generation prompt opens a thought that this completion does not close"
            f" ({said[:40]!r}): cut within it, or of a model that does not think",
            "thought",
        )


def generation_texts(
    encoder: Encoder,
    prompts: Sequence[str | list[Message]],
    *,
    tools: Sequence[Sequence[Tool] | None] | None = None,
) -> list[str]:
    """Render what a model is sampled from: each prompt with what the template writes for an answer to follow.

    Args:
        encoder: of a tokenizer with a chat template.
        prompts: conversations or texts.
        tools: JSON schemas that each prompt offers; None = none does.

    Raises:
        Refused: as for chat_texts.
        ValueError: no chat template.
    """
    require_template(encoder)
    offered = [None] * len(prompts) if tools is None else tools
    return _render(
        encoder,
        [Conversation(_opened(encoder, prompt), True, own) for prompt, own in zip(prompts, offered, strict=True)],
    )


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
    content = spoken.content(turn)
    if policy == "keep" or turn["role"] != "assistant" or not thinking.held(content):
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
    if not left.strip() and not spoken.calls(turn):
        raise Refused("a completion is nothing but a thought", "thought")
    return {**turn, "content": left}


def _refuse_written_thought(encoder: Encoder, messages: list[Message]) -> None:
    """Refuse a template that writes a thought, mostly an empty one, between its generation prompt and an answer.

    Raises:
        Refused: it does.
    """
    lead = _written_before_an_answer(encoder.format.chat_template, _settings(encoder), _worded(messages))
    if thinking.held(lead):
        raise Refused(
            f"the chat template writes a thought of its own between its generation prompt and an answer"
            f" ({lead.strip()!r}), which no sampling would put there; set tokenizer.chat_template_kwargs"
            ' (--chat-template-kwargs) to {"enable_thinking": false} where the template knows that, or data.thoughts'
            " (--thoughts) to keep, which trains it",
            "thought",
        )


@functools.lru_cache(maxsize=4096)
def _written_before_an_answer(template: str, variables: str, worded: str) -> str:
    """Return what a template writes between its generation prompt and an answer, whatever the turns say."""
    messages = json.loads(worded)
    asked = [Conversation(messages[:-1], add_generation_prompt=True), Conversation(messages)]
    try:
        opened, whole = template_sandbox.render(template, asked, variables=json.loads(variables))
    except template_sandbox.Refused:
        return ""
    return whole[len(opened) :].partition(messages[-1]["content"])[0] if whole.startswith(opened) else ""


def _worded(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return, as JSON, messages of the same roles, with as many calls, that speak in words of ours.

    A short text may stand in what a template itself writes; these words stand there only if it shows what is said.
    """
    return json.dumps(
        [
            {
                **message,
                "content": f"fpoturn{number}fpo" if message["content"] or not calls else message["content"],
                **{key: "fpotool00" for key in ("name", "tool_call_id") if key in message},
                **({"tool_calls": _worded_calls(calls, number)} if calls else {}),
            }
            for number, message in enumerate(messages)
            for calls in [message.get("tool_calls")]
        ]
    )


def _worded_calls(calls: Sequence[Mapping[str, Any]], number: int) -> list[dict[str, Any]]:
    found = []
    for place, call in enumerate(calls):
        function = {"name": f"fpocall{number}x{place}fpo", "arguments": {f"fpokey{number}x{place}fpo": "fpovalue"}}
        beside = {key: "fpotool00" if key == "id" else value for key, value in call.items() if key in ("id", "type")}
        found.append({**beside, "function": function} if "function" in call else {**beside, **function})
    return found


def _words(message: Mapping[str, Any]) -> Iterator[str]:
    """Yield what of a message of `_worded` a template has to show."""
    if message["content"]:
        yield message["content"]
    for call in spoken.calls(message):
        yield from (call["name"], *call["arguments"])


def _settings(encoder: Encoder) -> str:
    """Return the variables of the template as JSON."""
    return json.dumps({**encoder.tokenizer.special_tokens_map, **encoder.format.chat_template_kwargs}, sort_keys=True)


def _render(encoder: Encoder, conversations: Sequence[Conversation]) -> list[str]:
    """Render conversations as aliases and text; refuse what the template refuses, or does not show all of."""

    def shielded(value: Any) -> Any:
        return spoken.mapped(value, lambda text: tokens.protect(encoder, text))

    asked = [
        Conversation(shielded(one.messages), one.add_generation_prompt, shielded(one.tools) if one.tools else None)
        for one in conversations
    ]
    settings = encoder.format.chat_template, _settings(encoder)
    try:
        texts = template_sandbox.render(settings[0], asked, variables=json.loads(settings[1]))
    except template_sandbox.Refused as error:
        refused = conversations[error.index]
        if "tool" not in settings[0] and _speaks_of_tools(refused):  # most fail at a call, which has no content
            names = [*map(spoken.tool_name, refused.tools or ())]
            raise Refused(_no_tools(names), "tools_lost") from error
        roles = ", ".join(message["role"] for message in refused.messages)
        given = f"the chat template refuses a conversation of the turns {roles}: {error}"
        if encoder.format.auto_insert_empty_system:
            given += " (an empty system turn is put first, as data.auto_insert_empty_system says)"
        raise Refused(given, "template_refuses") from error
    for conversation, original, text in zip(asked, conversations, texts, strict=True):
        passed_over = _passed_over(*settings, _worded(original.messages), original.add_generation_prompt)
        for number in [*_lost(conversation.messages, text), *passed_over]:
            message = original.messages[number]
            if spoken.said(message).strip():
                raise Refused(_left_out(message, original.messages), "text_lost")
        if conversation.tools and conversation.add_generation_prompt:
            _check_tools(*settings, conversation, text)
    return [tokens.alias(encoder, text) for text in texts]


def _check_tools(template: str, variables: str, conversation: Conversation, text: str) -> None:
    """Refuse a template that does not know tools: it writes the same without them, or not all of their names.

    Raises:
        Refused: it does.
    """
    assert conversation.tools
    try:
        asked = [conversation._replace(tools=None)]
        [without] = template_sandbox.render(template, asked, variables=json.loads(variables))
    except template_sandbox.Refused:
        without = ""
    missing = [name for tool in conversation.tools if (name := spoken.tool_name(tool)) not in text]
    if text == without or missing:
        named = ", ".join(missing or [spoken.tool_name(tool) for tool in conversation.tools])
        raise Refused(_no_tools([named]), "tools_lost")


def _speaks_of_tools(conversation: Conversation) -> bool:
    """Whether a conversation offers tools, calls one or holds what one returned."""
    said = any(message["role"] == "tool" or spoken.calls(message) for message in conversation.messages)
    return bool(conversation.tools) or said


def _no_tools(names: Sequence[str]) -> str:
    """Say that a template does not know tools, and what to do; `names` are the row's, none where it only calls."""
    if not names:
        return (
            "the chat template knows no tools, and this row has calls of tools or their results; give"
            " tokenizer.chat_template (--chat-template) one that knows tools, or leave the row out"
        )
    return (
        f"the chat template does not show the model the tools of this row ({', '.join(names)}); give"
        " tokenizer.chat_template (--chat-template) one that knows tools, or take the column tools away"
    )


def _lost(messages: Sequence[Mapping[str, Any]], text: str) -> Iterator[int]:
    """Yield the numbers of messages whose text, trimmed, or whose calls are not in a rendered one.

    Earlier thoughts may go.
    """
    for number, message in enumerate(messages):
        content = spoken.content(message).strip()
        called = all(call["name"] in text for call in spoken.calls(message))
        as_json = json.dumps(content, ensure_ascii=False)[1:-1]  # how some templates write what a tool returned
        if called and (content in text or as_json in text):
            continue
        if message["role"] == "assistant" and number + 1 < len(messages):
            content = thinking.dropped(content)
        if not called or thinking.plain(content) not in thinking.plain(text):
            yield number


@functools.lru_cache(maxsize=4096)
def _passed_over(template: str, variables: str, worded: str, add_generation_prompt: bool) -> tuple[int, ...]:
    """Return the numbers of the turns that a template does not show all of, whatever they say.

    A short text may stand in what the template itself writes, so turns of these roles are rendered with words of ours.
    """
    messages = json.loads(worded)
    try:
        asked = [Conversation(messages, add_generation_prompt)]
        [text] = template_sandbox.render(template, asked, variables=json.loads(variables))
    except template_sandbox.Refused:  # what it refuses of these words it may take of others
        return ()
    return tuple(number for number, one in enumerate(messages) if not all(word in text for word in _words(one)))


def _left_out(message: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> str:
    what = "text or a call of a tool" if spoken.calls(message) else "text"
    return (
        f"the chat template leaves out the {what} of a turn of role {message['role']!r}"
        f" ({spoken.said(message).strip()[:40]!r}) in a conversation of the turns"
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
