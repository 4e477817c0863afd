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
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from fpo_jax.config import choices
from fpo_jax.tokenization import completion_texts, thinking, truncation
from fpo_jax.tokenization import messages as spoken
from fpo_jax.tokenization import tokenizer as tokens
from fpo_jax.tokenization.completion_texts import Turn
from fpo_jax.tokenization.messages import Completion, Message, Tool
from fpo_jax.tokenization.tokenizer import Encoder
from fpo_jax.tokenization.truncation import Row

ASSISTANT_TURNS = ("all", "last")


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
    completions: Sequence[Sequence[Completion]],
    *,
    tools: Sequence[Sequence[Tool] | None] | None = None,
    max_length: int,
    max_prompt_length: int,
    max_completion_length: int | None = None,
    truncation_mode: str = "keep_end",
    truncate_together: bool = False,
    ends: bool = True,
    assistant_turns: str = "all",
) -> list[list[Row]]:
    """Build the rows of conversation groups with the tokenizer's chat template.

    Args:
        encoder: of a tokenizer with a chat template; its prompt format decides what belongs to the prompt.
        prompts: one conversation per group; a plain text is one user turn.
        completions: those of each group; a plain text is one assistant turn. One of several messages is scored in its
            assistant turns alone: what users and tools say between them is context.
        tools: JSON schemas that each prompt offers; None = none does.
        max_length: tokens of a row. A group whose prompt and longest completion exceed it has its prompt cut first.
        max_prompt_length: tokens that a cut prompt keeps.
        max_completion_length: tokens of a completion, its end token included; None = only the two other limits apply.
        truncation_mode: which end of a cut prompt is kept; `keep_end` (the original's) loses BOS.
        truncate_together: True (the original): if the group still is too long, *all* its completions are cut to
            `max_length - max_prompt_length` tokens. False: only those that are too long, to the room that is left.
        ends: close each completion with one end token, as a model is taught to. False: leave the template's whole text
            as it is, as a reward model reads it.
        assistant_turns: which of a completion of several messages are scored, `all` or the `last`.

    Returns:
        For each group the rows of its completions.

    Raises:
        completion_texts.Refused: a conversation that cannot be rendered, or whose turns have other tokens when more
            follow.
        ValueError: limits that leave no room, no chat template.
    """
    truncation.check_lengths(
        max_length=max_length, max_prompt_length=max_prompt_length, max_completion_length=max_completion_length
    )
    choices.check("truncation_mode", truncation_mode, truncation.TRUNCATION_MODES)
    choices.check("assistant_turns", assistant_turns, ASSISTANT_TURNS)
    offered = [None] * len(prompts) if tools is None else tools
    rendered = [
        completion_texts.chat_texts(encoder, prompt, group, tools=own)
        for prompt, group, own in zip(prompts, completions, offered, strict=True)
    ]
    headers = _headers(encoder, rendered)
    encoded = _encode_groups(encoder, [one.prompt for one in rendered], [one.wholes for one in rendered])
    groups = []
    for header, one, group in zip(headers, rendered, encoded, strict=True):
        closed = [_Closed(completion) for _, completion, _ in group]
        if ends:
            turns = one.turns or [()] * len(group)
            closed = [
                _closed(encoder, prompt, completion, header, own, assistant_turns)
                for (prompt, completion, _), own in zip(group, turns, strict=True)
            ]
        rows = truncation.fit_chat(
            [_begin(prompt, encoder) for prompt, _, _ in group],
            [completion.ids for completion in closed],
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            max_completion_length=max_completion_length,
            truncation_mode=truncation_mode,
            truncate_together=truncate_together,
        )
        groups.append(
            [
                row._replace(merged=merged, header=header, context=completion.context)
                for row, (_, _, merged), completion in zip(rows, group, closed, strict=True)
            ]
        )
    return groups


def generation_prompts(
    encoder: Encoder,
    prompts: Sequence[str | list[Message]],
    *,
    tools: Sequence[Sequence[Tool] | None] | None = None,
) -> list[list[int]]:
    """Return the token ids to continue, as the encoder's prompt format says; nothing is cut.

    Under rule `chat` they are those of `transformers.apply_chat_template(..., add_generation_prompt=True)`, with the
    empty system turn and the BOS that the prompt format may ask for.

    Args:
        encoder: of the tokenizer; of one with a chat template for rule `chat`.
        prompts: plain texts, or conversations for rule `chat`.
        tools: JSON schemas that each prompt offers, for rule `chat`; None = none does.

    Raises:
        completion_texts.Refused: a conversation that cannot be rendered.
        ValueError: reserved characters in a text, no chat template, messages or tools under rule `raw`.
    """
    if encoder.format.rule == "raw":
        if tools is not None and any(tools):
            raise ValueError(spoken.NO_TOOLS)
        plain = [tokens.refuse_reserved(prompt) if isinstance(prompt, str) else _no_messages() for prompt in prompts]
        return [_opening(encoder, ids) for ids in tokens.encode(encoder, plain)]
    texts = completion_texts.generation_texts(encoder, prompts, tools=tools)
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


class _Closed(NamedTuple):
    """The ids of a completion up to its end, and which of them are not scored (`Row.context`)."""

    ids: list[int]
    context: tuple[tuple[int, int], ...] = ()


def _closed(
    encoder: Encoder, prompt: list[int], completion: list[int], header: int, turns: Sequence[Turn], assistant_turns: str
) -> _Closed:
    """Close a completion behind its last assistant turn, and tell what of it is context."""
    if not turns:
        return _Closed(_ended(completion, encoder, header))
    scored = turns[-1:] if assistant_turns == "last" else turns
    begins, ends, header = _spans(encoder, [*prompt, *completion], scored)
    begins, ends = ([place - len(prompt) for place in places] for places in (begins, ends))
    ids = _ended(completion, encoder, begins[-1] + header)
    return _Closed(ids, tuple(zip([0, *ends[:-1]], begins, strict=True)))


def _spans(encoder: Encoder, whole: list[int], turns: Sequence[Turn]) -> tuple[list[int], list[int], int]:
    """Return where assistant turns begin and end in the ids of the whole text, and the tokens of the last's header.

    Raises:
        completion_texts.Refused: a turn has other tokens where the conversation goes on.
    """
    texts = [text for turn in turns for text in (turn.before, turn.before + turn.header, turn.through)]
    encoded, begins, ends, header = iter(tokens.encode(encoder, texts)), [], [], 0
    for before, opened, through in zip(encoded, encoded, encoded, strict=True):
        head, said, _ = _split(before, through)
        header = len(_split(before, opened)[1])
        end = len(head) + _end(said, encoder, header)
        if whole[:end] != through[:end]:
            was, now = (str(encoder.tokenizer.decode(ids[len(head) : end])) for ids in (through, whole))
            raise completion_texts.Refused(
                f"the chat template writes an assistant turn otherwise once more turns follow ({was[:60]!r}, then"
                f" {now[:60]!r}), so it cannot be scored as it was written; set"
                " data.assistant_turns=last, or take another chat_template",
                "turn_changes",
            )
        begins.append(len(head))
        ends.append(end)
    return begins, ends, header


def _end(said: list[int], encoder: Encoder, header: int) -> int:
    """Return how many tokens of a turn it takes to its end token; all, where the template writes none."""
    closing = encoder.end_ids
    return next((place + 1 for place in range(header, len(said)) if said[place] in closing), len(said))


def _ended(completion: list[int], encoder: Encoder, header: int) -> list[int]:
    """Close a completion with its one end token, or as the original does it."""
    if encoder.format.append_eos == "unless_last":
        return completion if completion[-1:] == [encoder.eos_id] else [*completion, encoder.eos_id]
    kept = completion[: _end(completion, encoder, header)]
    return kept if kept[-1:] and kept[-1] in encoder.end_ids and len(kept) > header else [*completion, encoder.eos_id]


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
