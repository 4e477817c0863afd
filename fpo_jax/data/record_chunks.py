"""A chunk of records -> the token rows of its groups, with what was dropped or odd: one piece of work of `tokenize`.

What a chunk becomes depends on its records and the `Job` alone, so that any number of processes makes the same rows.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fpo_jax import tokenization
from fpo_jax.data.record_file import Record
from fpo_jax.tokenization import completion_texts, messages, thinking
from fpo_jax.tokenization.messages import Completion, Message, Tool

_FLOAT32_MAX = float(np.finfo(np.float32).max)

Places = dict[str, list[str]]  # reason -> sources


class Group(NamedTuple):
    """A prompt with K completions."""

    prompt: str | list[Message]
    completions: Sequence[Completion]
    rewards: Sequence[float]
    source: str
    tools: Sequence[Tool] | None = None


class Policies(NamedTuple):
    """What becomes of rows that are not sound; see `tokenize.prepare`."""

    on_bad_row: str
    on_empty_completion: str
    on_long_prompt: str
    on_identical: str


class Job(NamedTuple):
    """What is the same for all chunks; see `tokenize.prepare`."""

    records: Sequence[Record]
    encoder: tokenization.Encoder
    options: dict[str, Any]  # of `tokenization.raw_rows` or `chat_rows`
    policies: Policies
    group_size: int
    reward_pad_id: int | None


class Chunk(NamedTuple):
    """What some records became."""

    tokens_S: np.ndarray  # int32, of all rows that are kept
    lengths_N: np.ndarray  # int32
    facts_N4: np.ndarray  # int64: prompt length, prompt tokens cut, completion tokens cut, merged
    rewards_BK: np.ndarray  # float32
    sources: list[str]
    formed: int  # groups before any was dropped
    dropped: tuple[Places, Places]  # for their texts, and for their tokens
    noted: tuple[Places, Places]
    example: dict[str, Any] | None
    scored_S: np.ndarray | None = None  # bool; None = every token after a prompt is scored


def work(job: Job, task: tuple[str, range]) -> Chunk | None:
    """Check the texts of some records (task "check"), or tokenise them ("tokenise").

    Raises:
        ValueError: a record does not fit the rule, or a policy says `error`.
    """
    kind, numbers = task
    dropped, noted = ({}, {}), ({}, {})
    formed = [
        group for number in numbers for group in _groups(job.records[number], job.group_size, job.encoder.format.rule)
    ]
    sound = [
        group
        for group in formed
        if not _filed(_text_fault(group, job.policies), group, dropped[0], noted[0], job.policies)
    ]
    return None if kind == "check" else _tokenised(job, sound, len(formed), dropped, noted)


def _tokenised(
    job: Job, sound: list[Group], formed: int, dropped: tuple[Places, Places], noted: tuple[Places, Places]
) -> Chunk:
    kept: list[Group] = []
    found: list[tokenization.Row] = []
    example = None
    built = _build(job.encoder, sound, job.options, job.policies) if sound else []
    for group, rows in zip(sound, built, strict=True):
        if isinstance(rows, completion_texts.Refused):
            dropped[1].setdefault(rows.reason, []).append(group.source)
            continue
        if not group.prompt and len(rows) == 1 and rows[0].prompt_length == 0:
            # nothing predicts the first token of a plain text that no BOS opens
            rows = [rows[0]._replace(prompt_length=1)]
        if job.reward_pad_id is not None:
            rows = [reward_row(row, job.encoder, job.reward_pad_id) for row in rows]
        fault = _row_fault(group, rows, job.policies, job.options["max_length"])
        if _filed(fault, group, dropped[1], noted[1], job.policies):
            continue
        kept.append(group)
        found.extend(rows)
        example = example or _example(group, rows[0], job.encoder)
    facts = [(row.prompt_length, row.prompt_cut, row.completion_cut, row.merged) for row in found]
    return Chunk(
        tokens_S=np.concatenate([np.zeros(0, np.int32), *(np.asarray(row.ids, np.int32) for row in found)]),
        lengths_N=np.asarray([len(row.ids) for row in found], np.int32),
        facts_N4=np.asarray(facts, np.int64).reshape(-1, 4),
        rewards_BK=np.asarray([group.rewards for group in kept], np.float32).reshape(-1, job.group_size),
        sources=[group.source for group in kept],
        formed=formed,
        dropped=dropped,
        noted=noted,
        example=example,
        scored_S=np.concatenate([row.scored for row in found]) if any(row.context for row in found) else None,
    )


def reward_row(row: tokenization.Row, encoder: tokenization.Encoder, pad_id: int | None) -> tokenization.Row:
    """Return a row up to the token at which a reward model's score stands.

    Under rule `raw` that is the last token of the text, before the EOS that closes a completion in training. Under rule
    `chat` it is, as in `transformers`, the last token of the template's whole text that is not the pad token.

    Args:
        row: of `tokenization.raw_rows`, or of `tokenization.chat_rows` with `ends=False`.
        encoder: of the reward model.
        pad_id: `pad_token_id` of the reward model's config; None = it has none.
    """
    ids = row.ids
    if encoder.format.rule == "raw":
        closed = len(ids) > row.prompt_length and ids[-1] == encoder.eos_id
        return row._replace(ids=ids[:-1]) if closed else row
    last = next((place for place in range(len(ids), row.prompt_length, -1) if ids[place - 1] != pad_id), len(ids))
    return row._replace(ids=ids[:last])


def _groups(record: Record, group_size: int, rule: str) -> list[Group]:
    """Cut a record's completions into consecutive groups."""
    count = len(record.completions)
    if not all(abs(reward) <= _FLOAT32_MAX for reward in record.rewards):  # nor is NaN
        raise ValueError(f"{record.source}: rewards {list(record.rewards)} are not all finite float32 numbers")
    if count % group_size or len(record.rewards) != count or count == 0:
        raise ValueError(
            f"{record.source}: {count} completions with {len(record.rewards)} rewards do not make groups of "
            f"{group_size}; group_size must divide the number of completions"
        )
    if rule == "raw" and not all(isinstance(text, str) for text in (record.prompt, *record.completions)):
        raise ValueError(
            f"{record.source}: rule='raw' takes plain text, and this record holds messages; use rule='chat'"
        )
    if rule == "raw" and record.tools:
        raise ValueError(f"{record.source}: {messages.NO_TOOLS}")
    starts = range(0, count, group_size)
    return [
        Group(
            record.prompt,
            record.completions[start : start + group_size],
            record.rewards[start : start + group_size],
            record.source if len(starts) == 1 else f"{record.source}#{number}",
            record.tools,
        )
        for number, start in enumerate(starts)
    ]


def _text_fault(group: Group, policies: Policies) -> str:
    texts = _texts(group)
    empty = [index for index, completion in enumerate(group.completions) if _is_empty(completion)]
    if empty and policies.on_empty_completion == "error":
        raise ValueError(
            f"{group.source}: completion {empty[0]} is empty; remove the row, or on_empty_completion='drop'"
        )
    if empty:
        return "empty_completion"
    return "identical" if len(texts) > 1 and len(set(texts)) == 1 else ""


def _is_empty(completion: Completion) -> bool:
    """Whether an assistant turn of a completion says nothing and calls nothing."""
    spoken = (turn for turn in messages.turns(completion) if turn["role"] == "assistant")
    return any(not messages.said(turn).strip() for turn in spoken)


def _texts(group: Group) -> list[str]:
    return [messages.said(completion) for completion in group.completions]


def _row_fault(group: Group, rows: Sequence[tokenization.Row], policies: Policies, max_length: int) -> str:
    """Name why a tokenised group cannot be used as it is, or return an empty text."""
    if any(row.prompt_length == 0 for row in rows):
        return "empty_prompt"
    if not all(_has_loss_token(row) for row in rows):
        if policies.on_empty_completion == "error":
            raise ValueError(
                f"{group.source}: a completion has no token to score; remove the row, or on_empty_completion='drop'"
            )
        return "no_scored_token"
    cut = max(row.prompt_cut for row in rows)
    if cut and policies.on_long_prompt == "error":
        raise ValueError(
            f"{group.source}: the prompt does not fit into max_length={max_length} beside its completions, {cut} of "
            "its tokens would be cut; raise max_length, or on_long_prompt='truncate' or 'drop'"
        )
    if cut and policies.on_long_prompt == "drop":
        return "long_prompt"
    same = all(row.ids == rows[0].ids and row.prompt_length == rows[0].prompt_length for row in rows)
    return "identical_after_cut" if same and len(set(_texts(group))) > 1 else ""


def _has_loss_token(row: tokenization.Row) -> bool:
    begin = row.prompt_length + row.header
    return bool(row.scored[begin:].any()) if row.context else len(row.ids) > begin


def _filed(
    reason: str, group: Group, dropped: dict[str, list[str]], noted: dict[str, list[str]], policies: Policies
) -> bool:
    """File a group under the reason against it; tell whether it is dropped."""
    if not reason:
        return False
    keep = reason.startswith("identical") and policies.on_identical == "keep"
    (noted if keep else dropped).setdefault(reason, []).append(group.source)
    return not keep


def _build(
    encoder: tokenization.Encoder, groups: Sequence[Group], options: dict[str, Any], policies: Policies
) -> Sequence[list[tokenization.Row] | completion_texts.Refused]:
    """Tokenise groups; an error names the group it is about, and stands in its place where it shall be skipped."""
    make: Callable[..., list[list[tokenization.Row]]] = {"raw": tokenization.raw_rows, "chat": tokenization.chat_rows}[
        encoder.format.rule
    ]
    tools = {"tools": [group.tools for group in groups]} if any(group.tools for group in groups) else {}
    prompts, completions = [group.prompt for group in groups], [group.completions for group in groups]
    try:
        return make(encoder, prompts, completions, **tools, **options)
    except ValueError as error:
        if len(groups) > 1:
            return [rows for group in groups for rows in _build(encoder, [group], options, policies)]
        if isinstance(error, completion_texts.Refused) and policies.on_bad_row == "skip":
            return [error]
        raise ValueError(f"{groups[0].source}: {error}") from error


def _example(group: Group, row: tokenization.Row, encoder: tokenization.Encoder) -> dict[str, Any] | None:
    """Return a conversation of the training and its ids, by which an export is checked; None if this one is no measure.

    A row that was cut, in which a token straddles the boundary, or whose text spells a control token or a thought has
    other ids elsewhere for a reason.
    """
    prompt, completion = group.prompt, group.completions[0]
    if not prompt or isinstance(completion, list):  # a plain text, whose first token may stand for the prompt
        return None
    spelt = [messages.said(prompt), *_texts(group), *map(str, group.tools or ())]
    odd = any(map(encoder.pattern.search, spelt)) or any(map(thinking.held, spelt))
    if odd or row.prompt_cut or row.completion_cut or row.merged:
        return None
    ids = {"prompt_ids": row.ids[: row.prompt_length], "ids": list(row.ids)}
    if encoder.format.rule == "raw":
        return {"prompt": prompt, "completion": completion, **ids}
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    tools = {"tools": list(group.tools)} if group.tools else {}
    return {"messages": [*asked, *messages.turns(completion)], **tools, **ids}
