"""Records -> token rows in flat NumPy storage, with an audit of everything cut, dropped or odd.

What flows in: `Records`, a tokenizer, the rule and its limits. What flows out: `Prepared`, from which batches are
sliced, and its `Audit`. Every group of `Prepared` has K rows, and every row at least one prompt token and one scored
token, so no loss ever divides by zero.

Letters used only here: S tokens of all rows together; B and N count the whole set, not a batch.
"""

import itertools
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from fpo_jax import tokenization
from fpo_jax.config import choices
from fpo_jax.data import audit as audits
from fpo_jax.data import growing_array, worker_pool
from fpo_jax.data import record_chunks as chunks
from fpo_jax.data.audit import Audit
from fpo_jax.data.formats import Records
from fpo_jax.data.record_chunks import reward_row
from fpo_jax.data.record_file import Record, RecordFile
from fpo_jax.data.tokenized import Prepared, starts
from fpo_jax.distributed import progress
from fpo_jax.tokenization import completion_texts, truncation

__all__ = ["Prepared", "best_only", "masked_sample", "prepare", "reward_row"]

_CHUNK = 256  # records tokenised at once: enough to keep the Rust threads busy, little to hold in memory
SAID_EVERY_S = 60.0
log = logging.getLogger("fpo_jax")
_NO_TOKENS = np.zeros(0, np.int32)


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
    assistant_turns: str = "all",
    most: int | None = None,
    workers: int = 1,
    tokens_file: Path | None = None,
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
        assistant_turns: which of a completion of several messages are scored, `all` or the `last`; for `chat` only.
        most: groups to keep, at equal distances, so that they represent a sorted set too; None = all.
        workers: processes that tokenise; they make the same rows, however many they are.
        tokens_file: where the tokens of all rows go, to be mapped and not held; None = they stay in memory.

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
    policies = chunks.Policies(on_bad_row, on_empty_completion, on_long_prompt, on_identical)
    _check_options(rule, options, group_size, policies)
    if rule == "chat":
        completion_texts.require_template(encoder)
        options |= {"truncate_together": truncate_together, "ends": reward_pad_id is None}
        options |= {"assistant_turns": assistant_turns}
    else:
        options |= {"cut_prompts_together": cut_prompts_together}
    if not isinstance(records, Records):
        records = Records(records)

    found = _run(
        records, chunks.Job(records.rows, encoder, options, policies, group_size, reward_pad_id), workers, tokens_file
    )
    dropped, noted, facts_N4 = found.dropped, found.noted, found.facts_N4
    rows_read = len(records.rows) + sum(map(len, records.dropped.values()))
    sound_groups = len(found.sources)
    if not sound_groups:
        why = ", ".join(f"{reason} {len(places)}" for reason, places in dropped.items()) or "there were none"
        raise ValueError(f"no group is left of {rows_read} rows read: {why}")
    lengths_N = found.lengths_N
    prepared = Prepared(
        tokens_S=found.tokens_S,
        starts_N=starts(lengths_N),
        lengths_N=lengths_N,
        prompt_lengths_N=facts_N4[:, 0].astype(np.int32),
        rewards_BK=found.rewards_BK,
        sources=found.sources,
        pad_id=_pad_id(encoder, vocab_size),
        scored_S=found.scored_S,
    )
    if most is not None and most < sound_groups:
        taken_B = np.arange(most) * sound_groups // most
        facts_N4 = facts_N4.reshape(sound_groups, group_size, 4)[taken_B].reshape(-1, 4)
        prepared = prepared.take(taken_B)
    _check_vocabulary(prepared, vocab_size)
    report = audits.audit(
        prepared,
        facts_N4,
        encoder,
        example=found.example,
        rows_read=rows_read,
        groups_formed=found.formed,
        dropped=dropped,
        noted=noted,
        buckets=buckets or (max_length,),
        left_out=sound_groups - prepared.groups,
        format=records.format,
    )
    return prepared, report


def best_only(records: Records) -> Records:
    """Return the records with the completion of highest reward alone (the first among equals): demonstrations."""
    rows = records.rows
    return records._replace(rows=rows.changed(_best) if isinstance(rows, RecordFile) else [_best(row) for row in rows])


def _best(record: Record) -> Record:
    index = max(range(len(record.rewards)), key=lambda k: record.rewards[k])
    return record._replace(completions=[record.completions[index]], rewards=[record.rewards[index]])


def masked_sample(prepared: Prepared, tokenizer: PreTrainedTokenizerFast, group: int = 0) -> str:
    """Decode completion 0 of a group, its scored tokens between ⟦ and ⟧, special tokens spelt out.

    A completion of several turns has a pair of them for each turn that is scored.

    What is shown is what the model is given: decoded from the stored ids, not from the record.
    """
    if not 0 <= group < prepared.groups:
        raise ValueError(f"group={group} is outside the {prepared.groups} groups prepared")
    ids, prompt_length = prepared.row(group * prepared.group_size)
    places = prepared.loss_places(group * prepared.group_size)
    if len(places) < len(ids) - prompt_length:
        scored = np.isin(np.arange(len(ids)), places)
        cuts = [0, *(np.flatnonzero(scored[1:] != scored[:-1]) + 1).tolist(), len(ids)]
        parts = [(_decode(tokenizer, ids[a:b]), scored[a]) for a, b in itertools.pairwise(cuts)]
        return "".join(f"⟦{text}⟧" if is_scored else text for text, is_scored in parts)
    whole, prompt = _decode(tokenizer, ids), _decode(tokenizer, ids[:prompt_length])
    if not whole.startswith(prompt):  # the bytes of one character lie on both sides of the boundary
        return f"{prompt}⟦{_decode(tokenizer, ids[prompt_length:])}⟧"
    return f"{prompt}⟦{whole[len(prompt) :]}⟧"


def _check_options(rule: str, options: dict[str, Any], group_size: int, policies: chunks.Policies) -> None:
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


class _Found(NamedTuple):
    tokens_S: np.ndarray
    lengths_N: np.ndarray
    facts_N4: np.ndarray
    rewards_BK: np.ndarray
    sources: tuple[str, ...]
    formed: int
    dropped: chunks.Places
    noted: chunks.Places
    example: dict[str, Any] | None
    scored_S: np.ndarray | None


def _run(records: Records, job: chunks.Job, workers: int, tokens_file: Path | None) -> _Found:
    """Check the texts of all records, then tokenise them, and put the chunks together in their order."""
    count = len(records.rows)
    numbers = [range(first, min(first + _CHUNK, count)) for first in range(0, count, _CHUNK)]
    tasks = [(kind, chunk) for kind in ("check", "tokenise") for chunk in numbers]
    tokens = growing_array.GrowingArray(tokens_file)
    made: list[chunks.Chunk] = []
    said = time.monotonic()
    done = worker_pool.in_order(chunks.work, job, tasks, workers=workers)
    for chunk in progress.bar(done, "tokenising", total=len(tasks), unit="chunk"):
        if chunk is not None:
            tokens.append(chunk.tokens_S)
            made.append(chunk._replace(tokens_S=_NO_TOKENS))
        if time.monotonic() - said > SAID_EVERY_S:
            log.info("tokenised %d of %d records", min(len(made) * _CHUNK, count), count)
            said = time.monotonic()
    merged: list[chunks.Places] = []
    for before, after in ((records.dropped, [c.dropped for c in made]), (records.noted, [c.noted for c in made])):
        places = {reason: list(found) for reason, found in before.items()}
        for stage in range(2):
            for chunk_places in after:
                for reason, found in chunk_places[stage].items():
                    places.setdefault(reason, []).extend(found)
        merged.append(places)
    return _Found(
        tokens_S=tokens.finish(),
        lengths_N=np.concatenate([np.zeros(0, np.int32), *(chunk.lengths_N for chunk in made)]),
        facts_N4=np.concatenate([np.zeros((0, 4), np.int64), *(chunk.facts_N4 for chunk in made)]),
        rewards_BK=np.concatenate([np.zeros((0, job.group_size), np.float32), *(chunk.rewards_BK for chunk in made)]),
        sources=tuple(source for chunk in made for source in chunk.sources),
        formed=sum(chunk.formed for chunk in made),
        dropped=merged[0],
        noted=merged[1],
        example=next((chunk.example for chunk in made if chunk.example is not None), None),
        scored_S=_scored(made),
    )


def _scored(made: Sequence[chunks.Chunk]) -> np.ndarray | None:
    """Return which tokens are scored; None where that is all after each prompt."""
    if all(chunk.scored_S is None for chunk in made):
        return None
    found = []
    for chunk in made:
        ends_N = np.cumsum(chunk.lengths_N, dtype=np.int64)
        prompts_N = np.repeat(ends_N - chunk.lengths_N + chunk.facts_N4[:, 0], chunk.lengths_N)
        found.append(np.arange(len(prompts_N)) >= prompts_N if chunk.scored_S is None else chunk.scored_S)
    return np.concatenate(found)


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
