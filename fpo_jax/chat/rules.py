r"""Build rows of token ids: the `raw` rule for plain text, the `chat` rule for conversations.

    raw   prompt + response + EOS, as f-PO's Pythia recipes build them
    chat  the chat template's text of the prompt, and what it adds when a response is appended; BOS, EOS

In both the prompt and the whole text are encoded and the response is the part of the whole that the prompt's own ids do
not cover. Where a token straddles the boundary (a prompt that ends in a space, say) it belongs to the response, is
scored, and the row is reported as `merged`. The mask follows from lengths alone: no token id is ever compared with pad.

Where this differs from the originals:
  raw   The response is cut as token ids; the original decodes the cut ids, appends the text to the prompt and encodes
        again, which can move the boundary. BOS opens the row if the tokenizer itself opens texts with BOS, and survives
        the cutting of the prompt.
  chat  The original renders the response as a conversation of its own and strips a leading BOS. That equals the
        difference taken here for templates that write turn by turn (Llama-3, Zephyr, Mistral's override, ChatML,
        Gemma-2), and is wrong or an error for the others: Llama-3.1 repeats its date header, Qwen its default system
        turn, Phi-3 closes the prompt with EOS, Mistral's own refuses a conversation that starts with the assistant.
        BOS is prepended if the tokenizer itself opens texts with BOS, not whenever it merely knows a BOS token (Phi-3).
        On a merge the original moves the boundary back by one token; here it moves to where the ids start to differ.
        The date that a template may write is pinned, so the same data give the same ids tomorrow.
"""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from fpo_jax.chat import rendering
from fpo_jax.chat import tokenizer as tokens
from fpo_jax.chat.tokenizer import Encoder

Message = dict[str, str]

TRUNCATION_MODES = ("keep_end", "keep_start")
_ANSWER = "fpo-answer"  # stands for an answer while its beginning is looked for


class Row(NamedTuple):
    """One candidate as token ids, not yet padded; `ids[prompt_length:]` are the scored ones."""

    ids: list[int]
    prompt_length: int
    prompt_cut: int = 0  # prompt tokens removed to fit the window
    response_cut: int = 0  # response tokens removed, EOS among them
    merged: bool = False  # a token straddles the boundary; it is scored


def raw_rows(
    encoder: Encoder,
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],
    *,
    max_length: int,
    max_response_length: int,
    max_prompt_length: int | None = None,
    truncation_mode: str = "keep_end",
) -> list[list[Row]]:
    """Build the rows of plain-text groups (f-PO's Pythia recipes): prompt + response + EOS.

    Args:
        encoder: of the tokenizer.
        prompts: one text per group.
        responses: the candidates of each group, as texts that follow the prompt directly (mostly a space first).
        max_length: tokens of a row, BOS and EOS included.
        max_response_length: tokens of a response, EOS included; longer ones lose their end.
        max_prompt_length: tokens of a prompt without BOS; None = only `max_length` limits it.
        truncation_mode: which end of a prompt is kept, `keep_end` or `keep_start`.

    Returns:
        For each group the rows of its candidates.

    Raises:
        ValueError: limits that leave no room, or reserved characters in a text.
    """
    check_lengths(max_length=max_length, max_prompt_length=max_prompt_length, max_response_length=max_response_length)
    check_choice("truncation_mode", truncation_mode, TRUNCATION_MODES)
    prompt_texts = [tokens.refuse_reserved(prompt) for prompt in prompts]
    full_texts = [
        [prompt + tokens.refuse_reserved(response) for response in group]
        for prompt, group in zip(prompts, responses, strict=True)
    ]
    return [
        [
            fit_raw(
                prompt,
                [*response, encoder.eos_id],
                max_length=max_length,
                max_prompt_length=max_prompt_length,
                max_response_length=max_response_length,
                truncation_mode=truncation_mode,
                bos_id=encoder.bos_id,
                adds_bos=encoder.adds_bos,
            )._replace(merged=merged)
            for prompt, response, merged in group
        ]
        for group in _encode_groups(encoder, prompt_texts, full_texts)
    ]


def chat_rows(
    encoder: Encoder,
    prompts: Sequence[str | list[Message]],
    responses: Sequence[Sequence[str | Message]],
    *,
    max_length: int,
    max_prompt_length: int,
    max_response_length: int | None = None,
    truncation_mode: str = "keep_end",
    truncate_together: bool = True,
    auto_insert_empty_system: bool = True,
) -> list[list[Row]]:
    """Build the rows of conversation groups with the tokenizer's chat template (f-PO's Llama and Mistral recipes).

    The assistant header belongs to the response: it is scored and counts in its length.

    Args:
        encoder: of a tokenizer with a chat template.
        prompts: one conversation per group; a plain text is one user turn.
        responses: the candidates of each group; a plain text is one assistant turn.
        max_length: tokens of a row. A group whose prompt and longest response exceed it has its prompt cut first.
        max_prompt_length: tokens that a cut prompt keeps.
        max_response_length: tokens of a response, EOS included; None = only the two other limits apply.
        truncation_mode: which end of a cut prompt is kept; `keep_end` (the original's) loses BOS.
        truncate_together: True (the original): if the group still is too long, *all* its responses are cut to
            `max_length - max_prompt_length` tokens. False: only those that are too long, to the room that is left.
        auto_insert_empty_system: put an empty system turn first if the template knows such a turn and there is none.

    Returns:
        For each group the rows of its candidates.

    Raises:
        ValueError: limits that leave no room, no chat template, a template that refuses the conversation.
    """
    check_lengths(max_length=max_length, max_prompt_length=max_prompt_length, max_response_length=max_response_length)
    check_choice("truncation_mode", truncation_mode, TRUNCATION_MODES)
    texts = [
        chat_texts(encoder, prompt, group, auto_insert_empty_system=auto_insert_empty_system)
        for prompt, group in zip(prompts, responses, strict=True)
    ]
    groups = []
    for group in _encode_groups(encoder, [prompt for prompt, _ in texts], [fulls for _, fulls in texts]):
        rows = fit_chat(
            [_begin(prompt, encoder) for prompt, _, _ in group],
            [
                response if response[-1:] == [encoder.eos_id] else [*response, encoder.eos_id]
                for _, response, _ in group
            ],
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            max_response_length=max_response_length,
            truncation_mode=truncation_mode,
            truncate_together=truncate_together,
        )
        groups.append([row._replace(merged=merged) for row, (_, _, merged) in zip(rows, group, strict=True)])
    return groups


def chat_texts(
    encoder: Encoder,
    prompt: str | list[Message],
    responses: Sequence[str | Message],
    *,
    auto_insert_empty_system: bool = True,
) -> tuple[str, list[str]]:
    """Render the prompt and each whole conversation; every conversation's text begins with the prompt's.

    Returns:
        (text of the prompt, texts of prompt + response). Control tokens that the template wrote are aliases
        (see `tokenizer.alias`); control tokens spelt in the data are plain text.

    Raises:
        ValueError: no chat template, a conversation that it refuses, a template whose later turns change earlier text.
    """
    tokenizer = encoder.tokenizer
    require_template(encoder)
    template = str(tokenizer.get_chat_template())
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    knows_system = "system" in template or "<|im_start|>" in template
    if auto_insert_empty_system and knows_system and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": ""})
    turns = [{"role": "assistant", "content": turn} if isinstance(turn, str) else turn for turn in responses]
    prompt_text, *full_texts = _render(encoder, template, [messages, *([*messages, turn] for turn in turns)])
    if not all(full.startswith(prompt_text) for full in full_texts):  # Phi-3 ends any text with EOS
        prompt_text = prompt_text.removesuffix(encoder.aliases[str(tokenizer.eos_token)])
    for full in full_texts:
        if not full.startswith(prompt_text):
            raise ValueError(
                "the chat template changes the text of the prompt when a response follows, so the response has no "
                f"beginning; pass another chat_template.\nprompt alone: ...{prompt_text[-80:]!r}\n"
                f"with response: ...{full[max(len(prompt_text) - 80, 0) : len(prompt_text) + 20]!r}"
            )
    return prompt_text, full_texts


def generation_prompts(
    encoder: Encoder, prompts: Sequence[str | list[Message]], *, rule: str, auto_insert_empty_system: bool = True
) -> list[list[int]]:
    """Return the token ids to continue, so that these and the response's are what training would make of both.

    Under rule `chat` they go on to the assistant's header, which training counts to the response: what the template
    writes before an answer, without a space that belongs to the answer's first token. Nothing is cut.

    Args:
        encoder: of the tokenizer; of one with a chat template for rule `chat`.
        prompts: plain texts, or conversations for rule `chat`.
        rule: `raw` or `chat`.
        auto_insert_empty_system: as for chat_rows; for rule `chat` only.

    Raises:
        ValueError: reserved characters in a text, no chat template, a template that refuses the conversation.
    """
    if rule == "raw":
        texts = [tokens.refuse_reserved(prompt) if isinstance(prompt, str) else _no_messages() for prompt in prompts]
    else:
        texts = []
        for prompt in prompts:
            whole = chat_texts(encoder, prompt, [_ANSWER], auto_insert_empty_system=auto_insert_empty_system)[1][0]
            before, found, _ = whole.rpartition(_ANSWER)
            if not found:
                raise ValueError(
                    "the chat template does not write what the assistant says; pass another chat_template."
                )
            texts.append(before.rstrip(" "))
    return [_begin(ids, encoder) for ids in tokens.encode(encoder, texts)]


def keep_end(encoder: Encoder, prompt: list[int], *, room: int) -> list[int]:
    """Return the last `room` tokens of a prompt to continue; a BOS that the tokenizer itself adds stays in front.

    Args:
        encoder: of the tokenizer.
        prompt: from `generation_prompts`.
        room: tokens that the prompt may have, at least 1.
    """
    opening = prompt[:1] if encoder.adds_bos and prompt[:1] == [encoder.bos_id] else []
    body = prompt[len(opening) :]
    return opening + body[max(0, len(body) - (room - len(opening))) :]


def continuation(tokenizer: PreTrainedTokenizerFast, prompt: list[int], response: list[int]) -> str:
    """Decode a response in its place: a SentencePiece tokenizer drops a leading space from a text of its own."""

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    tail = prompt[-8:]  # enough for the context of a first character
    before, whole = decode(tail), decode([*tail, *response])
    return whole[len(before) :] if whole.startswith(before) else decode(response)


def _no_messages():
    raise ValueError("rule='raw' takes plain text, and a prompt holds messages; use rule='chat'")


def fit_raw(
    prompt: list[int],
    response: list[int],
    *,
    max_length: int,
    max_response_length: int,
    max_prompt_length: int | None = None,
    truncation_mode: str = "keep_end",
    bos_id: int | None = None,
    adds_bos: bool = False,
) -> Row:
    """Cut one plain-text row to the window: first the response's end, then the prompt.

    A response that begins with BOS loses that token (the original's rule: it matters where BOS = EOS and the response
    is empty, which leaves nothing to score).

    >>> fit_raw([1, 2, 3, 4], [5, 6, 0], max_length=5, max_response_length=2)
    Row(ids=[2, 3, 4, 5, 6], prompt_length=3, prompt_cut=1, response_cut=1, merged=False)
    """
    response = response[1:] if bos_id is not None and response[:1] == [bos_id] else response
    kept = response[:max_response_length]
    opening = [bos_id] if adds_bos and bos_id is not None else []
    room = min(max_length - len(opening) - len(kept), max_prompt_length or max_length)
    head = opening + _keep(prompt, room, truncation_mode)
    return Row(
        ids=head + kept,
        prompt_length=len(head),
        prompt_cut=max(len(prompt) - room, 0),
        response_cut=len(response) - len(kept),
    )


def fit_chat(
    prompts: list[list[int]],
    responses: list[list[int]],
    *,
    max_length: int,
    max_prompt_length: int,
    max_response_length: int | None = None,
    truncation_mode: str = "keep_end",
    truncate_together: bool = True,
) -> list[Row]:
    """Cut the K rows of one group to the window: first the prompt, then the responses.

    With longest = max over the K responses: a prompt with |prompt| + longest > max_length is cut to max_prompt_length;
    if that is not enough, the responses are cut too (see `chat_rows` for `truncate_together`).

    >>> rows = fit_chat([[1, 2, 3]] * 2, [[4], [5, 6, 7]], max_length=4, max_prompt_length=2)
    >>> [(row.ids, row.response_cut) for row in rows]
    [([2, 3, 4], 0), ([2, 3, 5, 6], 1)]
    """
    limit = max_response_length or max_length
    longest = max(len(response[:limit]) for response in responses)
    rows = []
    for prompt, response in zip(prompts, responses, strict=True):
        head, kept = prompt, response[:limit]
        if len(head) + longest > max_length:
            head = _keep(head, max_prompt_length, truncation_mode)
        if truncate_together and len(head) + longest > max_length:
            kept = kept[: max_length - max_prompt_length]
        if not truncate_together:
            kept = kept[: max_length - len(head)]
        rows.append(Row(head + kept, len(head), len(prompt) - len(head), len(response) - len(kept)))
    return rows


def require_template(encoder: Encoder) -> None:
    """Refuse a tokenizer without a chat template: conversations are never just concatenated.

    Raises:
        ValueError: it has none.
    """
    if not encoder.tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer {encoder.tokenizer.name_or_path!r} has no chat template, so conversations have no text; "
            "pass chat_template= (a name, a file or Jinja text), or use rule='raw' with plain-text records"
        )


def check_lengths(*, max_length: int, max_prompt_length: int | None, max_response_length: int | None) -> None:
    """Refuse limits that leave a prompt or a response without a token.

    Raises:
        ValueError: a limit below 1, or one that fills `max_length` alone.
    """
    for name, value in (("max_prompt_length", max_prompt_length), ("max_response_length", max_response_length)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1, or None for no limit of its own")
        if value is not None and value >= max_length:
            raise ValueError(
                f"{name}={value} with max_length={max_length} leaves no room for the other part of a row; "
                f"use at most {max_length - 1}"
            )


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a name outside `choices`, listing them.

    Raises:
        ValueError: `value` is none of `choices`.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")


def _encode_groups(
    encoder: Encoder, prompt_texts: list[str], full_texts: list[list[str]]
) -> list[list[tuple[list[int], list[int], bool]]]:
    """Encode groups in one batch; per candidate (prompt ids, response ids, merged)."""
    encoded = iter(tokens.encode(encoder, [*prompt_texts, *(full for group in full_texts for full in group)]))
    prompts = [next(encoded) for _ in prompt_texts]
    return [[_split(prompt, next(encoded)) for _ in group] for prompt, group in zip(prompts, full_texts, strict=True)]


def _split(prompt: list[int], full: list[int]) -> tuple[list[int], list[int], bool]:
    """Split the whole text's ids where they stop being the prompt's own ids."""
    start = len(prompt)
    if merged := full[:start] != prompt:
        start = next(i for i, (a, b) in enumerate(zip([*prompt, None], [*full, None], strict=False)) if a != b)
    return full[:start], full[start:], merged


def _begin(prompt: list[int], encoder: Encoder) -> list[int]:
    """Prepend BOS where the tokenizer does so and the template has not."""
    if encoder.bos_id != encoder.eos_id and prompt[:2] == [encoder.bos_id] * 2:
        raise ValueError("the chat template opens the conversation with two BOS tokens; take one out of the template")
    if not encoder.adds_bos or encoder.bos_id is None or prompt[:1] == [encoder.bos_id]:
        return prompt
    return [encoder.bos_id, *prompt]


def _keep(ids: list[int], count: int, mode: str) -> list[int]:
    """Keep at most `count` ids, from the end or the start."""
    return ids[max(len(ids) - count, 0) :] if mode == "keep_end" else ids[:count]


def _render(encoder: Encoder, template: str, conversations: list[list[Message]]) -> list[str]:
    shielded = [
        [{key: tokens.protect(encoder, message[key]) for key in ("role", "content")} for message in messages]
        for messages in conversations
    ]
    try:
        texts = rendering.render(template, shielded, variables=encoder.tokenizer.special_tokens_map)
    except rendering.Refused as error:
        roles = ", ".join(message["role"] for message in conversations[error.index])
        raise ValueError(f"the chat template refuses a conversation of the turns {roles}: {error}") from error
    return [tokens.alias(encoder, text) for text in texts]
