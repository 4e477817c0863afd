r"""Build rows of token ids as the prompt format says: `raw` for plain text, `chat` for conversations.

    raw   prompt + completion + EOS, as f-PO's Pythia recipes build them
    chat  the chat template's text of the prompt, and what it adds when a completion is appended; one end token

In both the prompt and the whole text are encoded and the completion is the part of the whole that the prompt's own ids
do not cover. Where a token straddles the boundary (a prompt that ends in a space, say) it belongs to the completion, is
scored, and the row is reported as `merged`. The mask follows from lengths alone: no token id is ever compared with pad.

Ids are those of `transformers.apply_chat_template`, up to the token that ends the answer: what a template writes behind
it (ChatML a newline, Phi-3 a second end) no sampled answer holds, and it is neither trained nor scored. Only where a
template writes no end token at all is EOS appended. The date that a template may write is pinned, so the same data give
the same ids tomorrow.

The recipes of the original differ (spec 3.3), each time by a field of `prompt_format.PromptFormat`: an empty system
turn, BOS where the tokenizer opens texts with it, the assistant's header in the completion, EOS unless it is last.
Where even they differ from the originals:
  raw   The completion is cut as token ids; the original decodes the cut ids, appends the text to the prompt and encodes
        again, which can move the boundary. BOS opens the row if the tokenizer itself opens texts with BOS, and survives
        the cutting of the prompt.
  chat  The original renders the completion as a conversation of its own and strips a leading BOS. That equals the
        difference taken here for templates that write turn by turn (Llama-3, Zephyr, Mistral's override, ChatML,
        Gemma-2), and is wrong or an error for the others: Llama-3.1 repeats its date header, Qwen its default system
        turn, Phi-3 closes the prompt with EOS, Mistral's own refuses a conversation that starts with the assistant.
        BOS is prepended if the tokenizer itself opens texts with BOS, not whenever it merely knows a BOS token (Phi-3).
        On a merge the original moves the boundary back by one token; here it moves to where the ids start to differ.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from fpo_jax.config import choices
from fpo_jax.tokenization import completion_texts, thinking, truncation
from fpo_jax.tokenization import tokenizer as tokens
from fpo_jax.tokenization.completion_texts import Message
from fpo_jax.tokenization.tokenizer import Encoder
from fpo_jax.tokenization.truncation import Row


def raw_rows(
    encoder: Encoder,
    prompts: Sequence[str],
    completions: Sequence[Sequence[str]],
    *,
    max_length: int,
    max_completion_length: int,
    max_prompt_length: int | None = None,
    truncation_mode: str = "keep_end",
    cut_prompts_together: bool = True,
) -> list[list[Row]]:
    """Build the rows of plain-text groups (f-PO's Pythia recipes): prompt + completion + EOS.

    Args:
        encoder: of the tokenizer.
        prompts: one text per group.
        completions: those of each group, as texts that follow the prompt directly (mostly a space first).
        max_length: tokens of a row, BOS and EOS included.
        max_completion_length: tokens of a completion, EOS included; longer ones lose their end.
        max_prompt_length: tokens of a prompt without BOS; None = only `max_length` limits it.
        truncation_mode: which end of a prompt is kept, `keep_end` or `keep_start`.
        cut_prompts_together: True: a prompt leaves room for the longest completion of its group, so that all
            completions follow the same prompt. False (the original): each row cuts the prompt for its own completion.

    Returns:
        For each group the rows of its completions.

    Raises:
        ValueError: limits that leave no room, or reserved characters in a text.
    """
    truncation.check_lengths(
        max_length=max_length, max_prompt_length=max_prompt_length, max_completion_length=max_completion_length
    )
    choices.check("truncation_mode", truncation_mode, truncation.TRUNCATION_MODES)
    prompt_texts = [tokens.refuse_reserved(prompt) if isinstance(prompt, str) else _no_messages() for prompt in prompts]
    whole_texts = [
        [prompt + tokens.refuse_reserved(completion) for completion in group]
        for prompt, group in zip(prompts, completions, strict=True)
    ]
    groups = []
    for group in _encode_groups(encoder, prompt_texts, whole_texts):
        longest = max(len(completion) + 1 for _, completion, _ in group) if cut_prompts_together else 0
        groups.append(
            [
                truncation.fit_raw(
                    prompt,
                    [*completion, encoder.eos_id],
                    max_length=max_length,
                    max_prompt_length=max_prompt_length,
                    max_completion_length=max_completion_length,
                    truncation_mode=truncation_mode,
                    bos_id=encoder.bos_id,
                    adds_bos=encoder.adds_bos,
                    longest=min(longest, max_completion_length),
                )._replace(merged=merged)
                for prompt, completion, merged in group
            ]
        )
    return groups


def chat_rows(
    encoder: Encoder,
    prompts: Sequence[str | list[Message]],
    completions: Sequence[Sequence[str | Message]],
    *,
    max_length: int,
    max_prompt_length: int,
    max_completion_length: int | None = None,
    truncation_mode: str = "keep_end",
    truncate_together: bool = False,
    ends: bool = True,
) -> list[list[Row]]:
    """Build the rows of conversation groups with the tokenizer's chat template.

    Args:
        encoder: of a tokenizer with a chat template; its prompt format decides what belongs to the prompt.
        prompts: one conversation per group; a plain text is one user turn.
        completions: those of each group; a plain text is one assistant turn.
        max_length: tokens of a row. A group whose prompt and longest completion exceed it has its prompt cut first.
        max_prompt_length: tokens that a cut prompt keeps.
        max_completion_length: tokens of a completion, its end token included; None = only the two other limits apply.
        truncation_mode: which end of a cut prompt is kept; `keep_end` (the original's) loses BOS.
        truncate_together: True (the original): if the group still is too long, *all* its completions are cut to
            `max_length - max_prompt_length` tokens. False: only those that are too long, to the room that is left.
        ends: close each completion with one end token, as a model is taught to. False: leave the template's whole text
            as it is, as a reward model reads it.

    Returns:
        For each group the rows of its completions.

    Raises:
        completion_texts.Refused: a conversation that cannot be rendered.
        ValueError: limits that leave no room, no chat template.
    """
    truncation.check_lengths(
        max_length=max_length, max_prompt_length=max_prompt_length, max_completion_length=max_completion_length
    )
    choices.check("truncation_mode", truncation_mode, truncation.TRUNCATION_MODES)
    rendered = [
        completion_texts.chat_texts(encoder, prompt, group) for prompt, group in zip(prompts, completions, strict=True)
    ]
    headers = _headers(encoder, rendered)
    encoded = _encode_groups(encoder, [one.prompt for one in rendered], [one.wholes for one in rendered])
    groups, closing = [], encoder.end_ids
    for header, group in zip(headers, encoded, strict=True):
        rows = truncation.fit_chat(
            [_begin(prompt, encoder) for prompt, _, _ in group],
            [_ended(completion, encoder, header, closing) if ends else completion for _, completion, _ in group],
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            max_completion_length=max_completion_length,
            truncation_mode=truncation_mode,
            truncate_together=truncate_together,
        )
        groups.append(
            [row._replace(merged=merged, header=header) for row, (_, _, merged) in zip(rows, group, strict=True)]
        )
    return groups


def generation_prompts(encoder: Encoder, prompts: Sequence[str | list[Message]]) -> list[list[int]]:
    """Return the token ids to continue, as the encoder's prompt format says; nothing is cut.

    Under rule `chat` they are those of `transformers.apply_chat_template(..., add_generation_prompt=True)`, with the
    empty system turn and the BOS that the prompt format may ask for.

    Args:
        encoder: of the tokenizer; of one with a chat template for rule `chat`.
        prompts: plain texts, or conversations for rule `chat`.

    Raises:
        completion_texts.Refused: a conversation that cannot be rendered.
        ValueError: reserved characters in a text, no chat template, messages under rule `raw`.
    """
    if encoder.format.rule == "raw":
        plain = [tokens.refuse_reserved(prompt) if isinstance(prompt, str) else _no_messages() for prompt in prompts]
        return [_opening(encoder, ids) for ids in tokens.encode(encoder, plain)]
    return [_begin(ids, encoder) for ids in tokens.encode(encoder, completion_texts.generation_texts(encoder, prompts))]


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


def continuation(tokenizer: PreTrainedTokenizerFast, prompt: list[int], completion: list[int]) -> str:
    """Decode a completion in its place: a SentencePiece tokenizer drops a leading space from a text of its own.

    Special tokens are left out, but for those that mark a thought, which would be an answer without them.
    """
    added = tokenizer.added_tokens_decoder
    marks = {index for index, token in added.items() if token.special and token.content in thinking.MARKS}
    skipped = {index for index, token in added.items() if token.special} - marks

    def decode(ids: list[int]) -> str:
        if marks:
            ids = [index for index in ids if index not in skipped]
        return str(tokenizer.decode(ids, skip_special_tokens=not marks, clean_up_tokenization_spaces=False))

    tail = prompt[-8:]  # enough for the context of a first character
    before, whole = decode(tail), decode([*tail, *completion])
    return whole[len(before) :] if whole.startswith(before) else decode(completion)


def _no_messages():
    raise ValueError("rule='raw' takes plain text, and a prompt holds messages; use rule='chat'")


def _encode_groups(
    encoder: Encoder, prompt_texts: list[str], whole_texts: list[list[str]]
) -> list[list[tuple[list[int], list[int], bool]]]:
    """Encode groups in one batch; per completion (prompt ids, completion ids, merged)."""
    encoded = iter(tokens.encode(encoder, [*prompt_texts, *(whole for group in whole_texts for whole in group)]))
    prompts = [next(encoded) for _ in prompt_texts]
    return [[_split(prompt, next(encoded)) for _ in group] for prompt, group in zip(prompts, whole_texts, strict=True)]


def _split(prompt: list[int], whole: list[int]) -> tuple[list[int], list[int], bool]:
    """Split the whole text's ids where they stop being the prompt's own ids."""
    start = len(prompt)
    if merged := whole[:start] != prompt:
        start = next(i for i, (a, b) in enumerate(zip([*prompt, None], [*whole, None], strict=False)) if a != b)
    return whole[:start], whole[start:], merged


def _headers(encoder: Encoder, rendered: list[completion_texts.Texts]) -> list[int]:
    """Return how many tokens of each group's completions are the assistant's header."""
    if not any(one.header for one in rendered):
        return [0] * len(rendered)
    plain = tokens.encode(encoder, [one.prompt for one in rendered])
    opened = tokens.encode(encoder, [one.prompt + one.header for one in rendered])
    return [len(_split(prompt, whole)[1]) for prompt, whole in zip(plain, opened, strict=True)]


def _ended(completion: list[int], encoder: Encoder, header: int, ends: frozenset[int]) -> list[int]:
    """Close a completion with its one end token, or as the original does it."""
    if encoder.format.append_eos == "unless_last":
        return completion if completion[-1:] == [encoder.eos_id] else [*completion, encoder.eos_id]
    place = next((place for place in range(header, len(completion)) if completion[place] in ends), None)
    return [*completion, encoder.eos_id] if place is None else completion[: place + 1]


def _begin(prompt: list[int], encoder: Encoder) -> list[int]:
    """Prepend BOS where the prompt format says so, the tokenizer does and the template has not."""
    if encoder.bos_id != encoder.eos_id and prompt[:2] == [encoder.bos_id] * 2:
        raise ValueError("the chat template opens the conversation with two BOS tokens; take one out of the template")
    return _opening(encoder, prompt) if encoder.format.prepend_bos else prompt


def _opening(encoder: Encoder, ids: list[int]) -> list[int]:
    """Prepend BOS where the tokenizer itself opens texts with it."""
    if not encoder.adds_bos or encoder.bos_id is None or ids[:1] == [encoder.bos_id]:
        return ids
    return [encoder.bos_id, *ids]
