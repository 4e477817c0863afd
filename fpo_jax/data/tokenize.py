"""Records -> token rows in flat NumPy storage, with an audit of everything cut, dropped or odd.

What flows in: `Records`, a tokenizer, the rule and its limits. What flows out: `Prepared`, from which batches are
sliced, and its `Audit`. Every group of `Prepared` has K rows, and every row at least one prompt token and one scored
token, so no loss ever divides by zero.

Letters used only here: S tokens of all rows together; B and N count the whole set, not a batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from fpo_jax import tokenization
from fpo_jax.config import choices
from fpo_jax.data import audit as audits
from fpo_jax.data.audit import Audit
from fpo_jax.data.formats import Message, Record, Records
from fpo_jax.data.tokenized import Prepared
from fpo_jax.tokenization import completion_texts, thinking, truncation

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_CHUNK = 256  # groups tokenised at once: enough to keep the Rust threads busy, little to hold in memory


class _Group(NamedTuple):
    prompt: str | list[Message]
    completions: Sequence[str | Message]
    rewards: Sequence[float]
    source: str


def prepare(
    records: Records | Sequence[Record],
    encoder: tokenization.Encoder,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    group_size: int = 2,
    truncation_mode: str = "keep_end",
    truncate_together: bool = False,
    cut_prompts_together: bool = True,
    on_bad_row: str = "error",
    on_empty_completion: str = "drop",
    on_long_prompt: str = "truncate",
    on_identical: str = "drop",
    buckets: Sequence[int] | None = None,
    vocab_size: int | None = None,
    reward_pad_id: int | None = None,
    most: int | None = None,
) -> tuple[Prepared, Audit]:
    """Tokenise records into groups of `group_size` rows, and audit them.

    Args:
        records: from `formats.read`, or any sequence of records.
        encoder: of the tokenizer, with the prompt format: rule `raw` (plain text, f-PO's Pythia recipes) or `chat`.
        max_length: tokens of a row.
        max_prompt_length: tokens that a cut prompt keeps; `chat` needs it.
        max_completion_length: tokens of a completion, EOS included; `raw` needs it.
        group_size: K; a record with c completions makes c/K groups of consecutive ones.
        truncation_mode: which end of a cut prompt is kept, `keep_end` or `keep_start`.
        truncate_together: see `tokenization.chat_rows`; for `chat` only.
        cut_prompts_together: see `tokenization.raw_rows`; for `raw` only.
        on_bad_row: `error` or `skip`, for a group that the chat template refuses or loses text of.
        on_empty_completion: `drop` or `error`, for a group with a completion of white space only or of no scored token.
        on_long_prompt: `truncate`, `drop` or `error`, for a group whose prompt does not fit.
        on_identical: `drop` or `keep`, for a group whose completions are all the same, before or after cutting.
        buckets: row lengths T that batches will be padded to, for the audit's padding share; None = `max_length`.
        vocab_size: rows of the model's embedding; a token id outside it is an error. None = not checked.
        reward_pad_id: of a reward model, whose score stands at the last token that is not this one; its rows are the
            whole text without an EOS of ours. None = a language model.
        most: groups to keep, at equal distances, so that they represent a sorted set too; None = all.

    Returns:
        (prepared, audit).

    Raises:
        ValueError: an illegal option, a record that does not fit the rule, a reward that is not finite, a policy of
            `error`, nothing left.
    """
    options: dict[str, Any] = {
        "max_length": max_length,
        "max_prompt_length": max_prompt_length,
        "max_completion_length": max_completion_length,
        "truncation_mode": truncation_mode,
    }
    rule = encoder.format.rule
    policies = _Policies(on_bad_row, on_empty_completion, on_long_prompt, on_identical)
    _check_options(rule, options, group_size, policies)
    if rule == "chat":
        completion_texts.require_template(encoder)
        options |= {"truncate_together": truncate_together, "ends": reward_pad_id is None}
    else:
        options |= {"cut_prompts_together": cut_prompts_together}
    if not isinstance(records, Records):
        records = Records(records)

    dropped = {reason: list(places) for reason, places in records.dropped.items()}
    noted = {reason: list(places) for reason, places in records.noted.items()}
    formed = [group for record in records.rows for group in _groups(record, group_size, rule)]
    sound = [group for group in formed if not _filed(_text_fault(group, policies), group, dropped, noted, policies)]
    kept: list[_Group] = []
    ids: list[np.ndarray] = []
    facts: list[tuple[int, int, int, bool]] = []
    example = None
    for start in range(0, len(sound), _CHUNK):
        chunk = sound[start : start + _CHUNK]
        for group, rows in zip(chunk, _build(encoder, chunk, options, policies), strict=True):
            if isinstance(rows, completion_texts.Refused):
                dropped.setdefault(rows.reason, []).append(group.source)
                continue
            if reward_pad_id is not None:
                rows = [reward_row(row, encoder, reward_pad_id) for row in rows]
            if _filed(_row_fault(group, rows, policies, max_length), group, dropped, noted, policies):
                continue
            kept.append(group)
            ids.extend(np.asarray(row.ids, np.int32) for row in rows)
            facts.extend((row.prompt_length, row.prompt_cut, row.completion_cut, row.merged) for row in rows)
            example = example or _example(group, rows[0], encoder)
    rows_read = len(records.rows) + sum(map(len, records.dropped.values()))
    if not kept:
        why = ", ".join(f"{reason} {len(places)}" for reason, places in dropped.items()) or "there were none"
        raise ValueError(f"no group is left of {rows_read} rows read: {why}")
    sound_groups = len(kept)
    if most is not None and most < sound_groups:
        taken = [number * sound_groups // most for number in range(most)]
        rows = [group * group_size + k for group in taken for k in range(group_size)]
        kept, ids, facts = [kept[group] for group in taken], [ids[row] for row in rows], [facts[row] for row in rows]
    prepared = _store(kept, ids, facts, _pad_id(encoder, vocab_size))
    _check_vocabulary(prepared, vocab_size)
    report = audits.audit(
        prepared,
        np.asarray(facts, np.int64),
        encoder,
        example=example,
        rows_read=rows_read,
        groups_formed=len(formed),
        dropped=dropped,
        noted=noted,
        buckets=buckets or (max_length,),
        left_out=sound_groups - len(kept),
    )
    return prepared, report


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


def best_only(records: Records) -> Records:
    """Return the records with the completion of highest reward alone (the first among equals): demonstrations."""

    def best(record: Record) -> Record:
        index = max(range(len(record.rewards)), key=lambda k: record.rewards[k])
        return record._replace(completions=[record.completions[index]], rewards=[record.rewards[index]])

    return records._replace(rows=[best(record) for record in records.rows])


def masked_sample(prepared: Prepared, tokenizer: PreTrainedTokenizerFast, group: int = 0) -> str:
    """Decode completion 0 of a group, its scored tokens between ⟦ and ⟧, special tokens spelt out.

    What is shown is what the model is given: decoded from the stored ids, not from the record.
    """
    if not 0 <= group < prepared.groups:
        raise ValueError(f"group={group} is outside the {prepared.groups} groups prepared")
    ids, prompt_length = prepared.row(group * prepared.group_size)
    whole, prompt = _decode(tokenizer, ids), _decode(tokenizer, ids[:prompt_length])
    if not whole.startswith(prompt):  # the bytes of one character lie on both sides of the boundary
        return f"{prompt}⟦{_decode(tokenizer, ids[prompt_length:])}⟧"
    return f"{prompt}⟦{whole[len(prompt) :]}⟧"


class _Policies(NamedTuple):
    on_bad_row: str
    on_empty_completion: str
    on_long_prompt: str
    on_identical: str


def _check_options(rule: str, options: dict[str, Any], group_size: int, policies: _Policies) -> None:
    choices.check("on_bad_row", policies.on_bad_row, ["error", "skip"])
    choices.check("on_empty_completion", policies.on_empty_completion, ["drop", "error"])
    choices.check("on_long_prompt", policies.on_long_prompt, ["truncate", "drop", "error"])
    choices.check("on_identical", policies.on_identical, ["drop", "keep"])
    needed = {"raw": "max_completion_length", "chat": "max_prompt_length"}[rule]
    if options[needed] is None:
        raise ValueError(f"rule={rule!r} needs {needed}, a number of tokens below max_length={options['max_length']}")
    if group_size < 1:
        raise ValueError(f"group_size={group_size} is no number of completions; use at least 1")
    truncation.check_lengths(
        max_length=options["max_length"],
        max_prompt_length=options["max_prompt_length"],
        max_completion_length=options["max_completion_length"],
    )


def _groups(record: Record, group_size: int, rule: str) -> list[_Group]:
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
    starts = range(0, count, group_size)
    return [
        _Group(
            record.prompt,
            record.completions[start : start + group_size],
            record.rewards[start : start + group_size],
            record.source if len(starts) == 1 else f"{record.source}#{number}",
        )
        for number, start in enumerate(starts)
    ]


def _text_fault(group: _Group, policies: _Policies) -> str:
    texts = _texts(group)
    empty = [index for index, text in enumerate(texts) if not text.strip()]
    if empty and policies.on_empty_completion == "error":
        raise ValueError(
            f"{group.source}: completion {empty[0]} is empty; remove the row, or on_empty_completion='drop'"
        )
    if empty:
        return "empty_completion"
    return "identical" if len(texts) > 1 and len(set(texts)) == 1 else ""


def _texts(group: _Group) -> list[str]:
    return [completion if isinstance(completion, str) else completion["content"] for completion in group.completions]


def _row_fault(group: _Group, rows: Sequence[tokenization.Row], policies: _Policies, max_length: int) -> str:
    """Name why a tokenised group cannot be used as it is, or return an empty text."""
    if any(row.prompt_length == 0 for row in rows):
        return "empty_prompt"
    if any(len(row.ids) <= row.prompt_length + row.header for row in rows):
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


def _filed(
    reason: str, group: _Group, dropped: dict[str, list[str]], noted: dict[str, list[str]], policies: _Policies
) -> bool:
    """File a group under the reason against it; tell whether it is dropped."""
    if not reason:
        return False
    keep = reason.startswith("identical") and policies.on_identical == "keep"
    (noted if keep else dropped).setdefault(reason, []).append(group.source)
    return not keep


def _build(
    encoder: tokenization.Encoder, groups: Sequence[_Group], options: dict[str, Any], policies: _Policies
) -> Sequence[list[tokenization.Row] | completion_texts.Refused]:
    """Tokenise groups; an error names the group it is about, and stands in its place where it shall be skipped."""
    make: Callable[..., list[list[tokenization.Row]]] = {"raw": tokenization.raw_rows, "chat": tokenization.chat_rows}[
        encoder.format.rule
    ]
    try:
        return make(encoder, [group.prompt for group in groups], [group.completions for group in groups], **options)
    except ValueError as error:
        if len(groups) > 1:
            return [rows for group in groups for rows in _build(encoder, [group], options, policies)]
        if isinstance(error, completion_texts.Refused) and policies.on_bad_row == "skip":
            return [error]
        raise ValueError(f"{groups[0].source}: {error}") from error


def _example(group: _Group, row: tokenization.Row, encoder: tokenization.Encoder) -> dict[str, Any] | None:
    """Return a conversation of the training and its ids, by which an export is checked; None if this one is no measure.

    A row that was cut, in which a token straddles the boundary, or whose text spells a control token or a thought has
    other ids elsewhere for a reason.
    """
    prompt, completion = group.prompt, group.completions[0]
    spoken = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    spelt = [*spoken, *_texts(group)]
    odd = any(map(encoder.pattern.search, spelt)) or any(map(thinking.held, spelt))
    if odd or row.prompt_cut or row.completion_cut or row.merged:
        return None
    ids = {"prompt_ids": row.ids[: row.prompt_length], "ids": list(row.ids)}
    if encoder.format.rule == "raw":
        return {"prompt": prompt, "completion": completion, **ids}
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    answer = {"role": "assistant", "content": completion} if isinstance(completion, str) else completion
    return {"messages": [*messages, answer], **ids}


def _store(
    groups: list[_Group], ids: list[np.ndarray], facts: list[tuple[int, int, int, bool]], pad_id: int
) -> Prepared:
    lengths_N = np.asarray([len(row) for row in ids], np.int32)
    return Prepared(
        tokens_S=np.concatenate(ids),
        starts_N=np.concatenate([[0], np.cumsum(lengths_N[:-1], dtype=np.int64)]),
        lengths_N=lengths_N,
        prompt_lengths_N=np.asarray([fact[0] for fact in facts], np.int32),
        rewards_BK=np.asarray([group.rewards for group in groups], np.float32),
        sources=tuple(group.source for group in groups),
        pad_id=pad_id,
    )


def _pad_id(encoder: tokenization.Encoder, vocab_size: int | None) -> int:
    """The tokenizer's pad id, or EOS where it has none or the model has no such row; filler only, masks are lengths."""
    pad_id = encoder.tokenizer.pad_token_id
    if not isinstance(pad_id, int) or (vocab_size is not None and pad_id >= vocab_size):
        return encoder.eos_id
    return pad_id


def _decode(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _check_vocabulary(prepared: Prepared, vocab_size: int | None) -> None:
    largest = int(prepared.tokens_S.max())
    if vocab_size is not None and largest >= vocab_size:
        place = int(np.searchsorted(prepared.starts_N, int(prepared.tokens_S.argmax()), side="right")) - 1
        raise ValueError(
            f"{prepared.sources[place // prepared.group_size]}: token id {largest} is outside the model's "
            f"vocabulary of {vocab_size}; the tokenizer belongs to another model"
        )
