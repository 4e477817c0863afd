r"""Preference records from local files, saved data sets or the hub.

What flows in: a source and the name of its format. What flows out: `Records`, each with its prompt, its K completions,
their rewards and the file and line it came from, beside a list of what was dropped and why.

    hh          columns chosen, rejected: whole transcripts ("\n\nHuman: ...\n\nAssistant: ...")
    chat_pairs  columns chosen, rejected (and prompt, unused): message lists; the prompt is what both begin with, the
                completions begin with the first assistant turn in which they differ
    chat_groups columns prompt, all_generated_responses, all_rm_scores: the answers of princeton-nlp's sets, rewarded
    json        columns prompt, chosen, rejected (a pair), or prompt, completions, rewards (a group): texts or messages;
                a row that has chosen and rejected is a pair, whatever else it has
    tldr        columns info, summaries, choice: comparisons of summarize-from-feedback
    tldr_sft    columns subreddit, title, post, summary: a demonstration
    imdb        columns text, label: a review, cut into prompt and completion, rewarded with 1 if it is positive, or 0
    messages    column messages: a conversation (UltraChat); each of its assistant turns is a demonstration, given what
                came before, so that all of them are trained on
    demonstrations  columns prompt and completion (or chosen), texts or messages
    prompts     column prompt: for generation, without completions
    sharegpt, alpaca, text, labelled, liked, rankings, scored_pairs, text_pairs, transcript_chats: see `common_formats`
    auto        the one of them that fits the columns of the first rows, under other names too: see `auto_format`

Demonstrations have one completion and are for fine-tuning (data.group_size=1); every other format serves it too, with
the best completion of each record.

A text in a column `system` is read by every format whose prompt is messages: it becomes their first turn, unless they
have a system turn. A column `tools` is read by every format: JSON schemas, which the chat template shows. All other
columns are noted as "column_not_used:NAME", with their rows.

A file is JSON Lines, one JSON list, CSV or TSV (gzipped or not), Parquet or Arrow. Readers judge form only; what is
empty, identical or too long is the business of `prepare`.
"""

import array
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from fpo_jax.config import choices
from fpo_jax.data import auto_format, columns, common_formats, hh_rlhf, imdb, loading, record_file, values
from fpo_jax.data.record_file import Record
from fpo_jax.io.jsonl import BadRow
from fpo_jax.tokenization.messages import Message

MAX_PROBLEMS = 10  # bad rows named before giving up
MAX_BAD_FRACTION = 0.001  # of the rows read; more than this is a wrong format, not damage
_WRITTEN = 1000  # records in memory before they are written, where they are


class Records(NamedTuple):
    """What a reader made of a source: the records, the rows it dropped or remarked on, by reason, and the format."""

    rows: Sequence[Record]
    dropped: Mapping[str, Sequence[str]] = MappingProxyType({})  # reason -> sources
    noted: Mapping[str, Sequence[str]] = MappingProxyType({})  # odd, dropped or not
    format: str = ""  # that was found, and why; "" where it was named


def read(
    source: str | Path | Iterable[Mapping[str, Any]],
    *,
    format: str,
    split: str | None = None,
    hh_split: str = "last_turn",
    on_bad_row: str = "error",
    start: int = 0,
    stop: int | None = None,
    data_dir: str | None = None,
    revision: str | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    writer: record_file.Writer | None = None,
    wants: str = "any",
    rule: str = "",
    turns: str = "all",
    name: str = "rows",
) -> Records:
    """Read preference records.

    Args:
        source: a file; a directory (its files of one kind in the order of their names; where it has none, those in
            folders below it, as in a copy of a hub data set; or what `datasets.save_to_disk` wrote); or a hub name
            `owner/name`; or rows in memory, of which each is a mapping. A path that does not exist is an error.
        format: one of those above.
        split: of a hub name or saved data set; in a directory, the files named `split.*` or `split-*`, or in a folder
            named `split`.
        hh_split: `last_turn` or `first_difference` (see `hh_rlhf`); for format `hh` only.
        on_bad_row: `error` stops, naming the first ten; `skip` drops and counts them, up to one in a thousand
            (a single one always).
        start: first row to use, counted from 0 over the whole source.
        stop: row before which to end; None = all.
        data_dir: folder inside the hub repository ("helpful-base").
        revision: commit of the hub repository; pin it for a run that must be repeatable.
        tokenizer: of the model; format `imdb` counts a prompt's tokens with it, and nothing else does.
        writer: of the file that the records stand in while they are used; None = they stay in memory, as those of
            `imdb` do, which are drawn in an order of their own.
        wants: what the records are for, which decides between formats that `auto` could take; see `auto_format.WANTS`.
        rule: of the run; see `auto_format.find`.
        turns: which assistant turns of a conversation are demonstrations, `all` or the `last`.
        name: of rows in memory, in messages.

    Returns:
        The records in the order of the source; reviews in that of `imdb.alternating`, from `start` to `stop` of it.

    Raises:
        ValueError: no such source, a damaged file, bad rows (each as "file:line: fact"), no rows at all; no tokenizer
            for reviews.
    """
    choices.check("format", format, [auto_format.AUTO, *_PARSERS])
    choices.check("hh_split", hh_split, list(hh_rlhf.SPLITS))
    choices.check("on_bad_row", on_bad_row, ["error", "skip"])
    choices.check("turns", turns, ["all", "last"])
    if format != "hh" and hh_split != "last_turn":
        raise ValueError(f"hh_split={hh_split!r} applies to format='hh' only, and format is {format!r}; leave it out")
    if start < 0 or (stop is not None and stop <= start):
        raise ValueError(f"start={start}, stop={stop} selects no rows; need 0 <= start < stop")
    if format == "imdb" and tokenizer is None:
        raise ValueError("format='imdb' cuts reviews by a model's tokens, and none is at hand; give a file of prompts")
    described, found_rows = name, _in_memory(source, name)
    if isinstance(source, str | Path):
        described = str(source)
        found_rows = loading.rows(described, split=split, data_dir=data_dir, revision=revision)
    settled = None
    if format == auto_format.AUTO:
        first = list(itertools.islice(found_rows, auto_format.LOOKED_AT))
        if not first:
            raise ValueError(f"{described}: no rows")
        try:
            settled = auto_format.find([row for _, row in first], wants=wants, rule=rule)
        except ValueError as error:
            raise ValueError(f"{described}: {error}") from error
        format, found_rows = settled.format, itertools.chain(first, found_rows)
    if format == "text" and rule == "chat":
        raise ValueError(
            f"{described} holds plain texts, and data.rule='chat' renders conversations; set --config.data.rule=raw and"
            " --config.data.max_completion_length."
        )
    parse, column_sets = _PARSERS[format]
    rows: list[Record] = []
    starts = array.array("q")  # of those in the file
    writer = None if format == "imdb" else writer
    dropped: dict[str, list[str]] = {}
    noted: dict[str, list[str]] = {}
    problems: list[str] = []
    count = 0
    for where, row in itertools.islice(imdb.alternating(found_rows) if format == "imdb" else found_rows, start, stop):
        count += 1
        try:
            row = values.columns_of(row if settled is None else settled.row(row))
            used = columns.used(row, column_sets)
            tools = values.tools(row.get("tools"))
            found = _with_system(parse(used, hh_split), row.get("system"))
        except BadRow as problem:
            problems.append(f"{where}: {problem}")
            dropped.setdefault("bad_row", []).append(where)
            if on_bad_row == "error" and len(problems) == MAX_PROBLEMS:
                break
            continue
        if found.note:
            noted.setdefault(found.note, []).append(where)
        if isinstance(found, hh_rlhf.Dropped):
            dropped.setdefault(found.reason, []).append(where)
            continue
        if turns == "last" and found.more:
            found = found.more[-1]
        also = ["system"] if _says(found.prompt, row.get("system")) else []
        for column in columns.unused(row, *used, *also, "tools"):
            noted.setdefault(columns.NOT_USED + column, []).append(where)
        if found.more:
            parts = [found, *found.more]
            rows += [Record(*part[:3], f"{where}#{number}", tools) for number, part in enumerate(parts)]
        else:
            rows.append(Record(found.prompt, found.completions, found.rewards, where, tools))
        if writer is not None and len(rows) >= _WRITTEN:
            writer.write(rows, starts)
            rows = []
    if settled is None and format != "prompts" and count > 1 and _all_lack_columns(problems, count):
        raise ValueError(
            f"{problems[0]}, and the first {count} rows are alike: the format {format!r} is not theirs; name another,"
            " or auto, which looks at the columns."
        )
    _check_problems(problems, count, on_bad_row)
    columns.warn(described, format, noted)
    if count == 0:
        raise ValueError(f"{described}: no rows" + (f" from row {start} on" if start else ""))
    why = "" if settled is None else f"{format}: {settled.why}"
    if format == "imdb" and tokenizer is not None:
        rows = _cut_reviews(rows, tokenizer, dropped)
    if writer is None:
        return Records(rows, dropped, noted, why)
    writer.write(rows, starts)
    return Records(writer.records(starts), dropped, noted, why)


def _in_memory(rows: Any, name: str) -> Iterator[tuple[str, Any]]:
    for index, row in enumerate(rows):
        yield f"{name}[{index}]", dict(row) if isinstance(row, Mapping) else row


def _with_system(found: values.Parsed | hh_rlhf.Dropped, system: Any) -> values.Parsed | hh_rlhf.Dropped:
    """Open prompts of messages without a system turn with the text of the row's column `system`."""
    if isinstance(found, hh_rlhf.Dropped) or not isinstance(system, str) or not system.strip():
        return found
    if isinstance(found.prompt, str) or any(turn["role"] == "system" for turn in found.prompt):
        return found
    first = {"role": "system", "content": values.text(system, "system")}
    opened, *more = (part._replace(prompt=[first, *part.prompt]) for part in (found, *found.more))
    return opened._replace(more=more)


def _says(prompt: str | list[Message], system: Any) -> bool:
    """Return whether a prompt has the system turn."""
    return isinstance(prompt, list) and {"role": "system", "content": system} in prompt


def _parse_hh(row: dict[str, Any], hh_split: str) -> values.Parsed | hh_rlhf.Dropped:
    chosen, rejected = values.text(row["chosen"], "chosen"), values.text(row["rejected"], "rejected")
    try:
        pair = hh_rlhf.SPLITS[hh_split](chosen, rejected)
    except ValueError as error:
        raise BadRow(str(error)) from error
    note = "odd_turns" if hh_rlhf.has_odd_turns(chosen) or hh_rlhf.has_odd_turns(rejected) else ""
    if isinstance(pair, hh_rlhf.Dropped):
        return pair._replace(note=note)
    return values.Parsed(pair.prompt, [pair.chosen, pair.rejected], [1.0, 0.0], note)


def _parse_chat_pairs(row: dict[str, Any], _: str) -> values.Parsed | hh_rlhf.Dropped:
    chosen, rejected = (values.messages(row[name], name) for name in ("chosen", "rejected"))
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if len(turns) < 2 or turns[-1]["role"] != "assistant":
            roles = ", ".join(turn["role"] for turn in turns)
            raise BadRow(f"{name} must be a prompt and an assistant turn last, but its turns are {roles}")
    turns = enumerate(zip(chosen, rejected, strict=False))
    shared = len(chosen) - 1 if chosen == rejected else next((at for at, (a, b) in turns if a != b), 0)
    if not shared or {chosen[shared]["role"], rejected[shared]["role"]} != {"assistant"}:
        return hh_rlhf.Dropped("prompts_differ")
    read = [values.answer(turns[shared:], name) for turns, name in ((chosen, "chosen"), (rejected, "rejected"))]
    return values.Parsed(chosen[:shared], read, [1.0, 0.0])


def _parse_json(row: dict[str, Any], _: str) -> values.Parsed:
    if "completions" in row:
        completions, rewards = row["completions"], row["rewards"]
        if not isinstance(completions, list) or not isinstance(rewards, list) or len(completions) != len(rewards):
            raise BadRow("completions and rewards must be lists of one length")
        if len(completions) < 2:
            raise BadRow(f"{len(completions)} completions; a group needs at least 2")
    else:
        completions, rewards = [row["chosen"], row["rejected"]], [1.0, 0.0]
    prompt = values.prompt(row["prompt"])
    read_completions = [values.completion(completion, prompt, index) for index, completion in enumerate(completions)]
    if len({isinstance(completion, str) for completion in read_completions}) > 1:
        raise BadRow("some completions are texts and some are messages")
    return values.Parsed(
        prompt, read_completions, [values.reward(reward, index) for index, reward in enumerate(rewards)]
    )


def _parse_chat_groups(row: dict[str, Any], _: str) -> values.Parsed:
    return _parse_json(
        {"prompt": row["prompt"], "completions": row["all_generated_responses"], "rewards": row["all_rm_scores"]}, _
    )


def _tldr_prompt(post: dict[str, Any], name: str) -> str:
    columns.require(post, "subreddit", "title", "post")
    subreddit, title, text = (values.text(post[key], f"{name}{key}") for key in ("subreddit", "title", "post"))
    return f"SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {text}\nTL;DR:"


def _parse_tldr(row: dict[str, Any], _: str) -> values.Parsed | hh_rlhf.Dropped:
    """Summaries follow the prompt after one space, stripped."""
    summaries, choice = row["summaries"], row["choice"]
    if not isinstance(row["info"], dict):
        raise BadRow(f"info must be an object, not {values.kind(row['info'])}")
    if row["info"].get("post") is None:  # news articles of the same set have none
        return hh_rlhf.Dropped("no_post")
    if not isinstance(summaries, list) or len(summaries) != 2 or not all(isinstance(one, dict) for one in summaries):
        raise BadRow("summaries must be a list of two objects with text")
    if type(choice) is not int or choice not in (0, 1):
        raise BadRow(f"choice must be 0 or 1, not {choice!r}")
    texts = [
        " " + values.text(one.get("text"), f"summaries[{index}].text").strip() for index, one in enumerate(summaries)
    ]
    return values.Parsed(_tldr_prompt(row["info"], "info."), [texts[choice], texts[1 - choice]], [1.0, 0.0])


def _parse_tldr_sft(row: dict[str, Any], _: str) -> values.Parsed:
    """The summary follows after one space, as in the comparisons; the original adds none."""
    note = "leading_space" if values.text(row["summary"], "summary").startswith(" ") else ""
    return values.Parsed(_tldr_prompt(row, ""), [" " + row["summary"].strip()], [1.0], note)


def _parse_imdb(row: dict[str, Any], _: str) -> values.Parsed | hh_rlhf.Dropped:
    """The whole review is the completion until `_cut_reviews` cuts it."""
    text, label = imdb.clean(values.text(row["text"], "text")), row["label"]
    if type(label) is int and label == imdb.UNLABELLED:
        return hh_rlhf.Dropped("unlabelled")
    if type(label) not in (int, str) or label not in imdb.LABELS:
        raise BadRow(f"label must be 0, 1, neg or pos, not {label!r}")
    return values.Parsed("", [text], [imdb.LABELS[label]])


def _cut_reviews(
    rows: Sequence[Record], tokenizer: PreTrainedTokenizerFast, dropped: dict[str, list[str]]
) -> list[Record]:
    """Give each review its prompt; one that is no longer than a prompt is dropped."""
    cut = []
    for row, (prompt, completion) in zip(
        rows, imdb.split([str(row.completions[0]) for row in rows], tokenizer), strict=True
    ):
        if completion:
            cut.append(row._replace(prompt=prompt, completions=[completion]))
        else:
            dropped.setdefault("short_review", []).append(row.source)
    return cut


def _parse_messages(row: dict[str, Any], _: str) -> values.Parsed:
    return common_formats.demonstrations(values.messages(row["messages"], "messages"))


def _parse_demonstrations(row: dict[str, Any], _: str) -> values.Parsed:
    name = "completion" if "completion" in row else "chosen"
    prompt = values.prompt(row["prompt"])
    return values.Parsed(prompt, [values.completion(row[name], prompt, 0)], [1.0])


def _parse_prompts(row: dict[str, Any], _: str) -> values.Parsed:
    return values.Parsed(values.prompt(row["prompt"]), [], [])


class _Parser(NamedTuple):
    parse: Callable[[dict[str, Any], str], values.Parsed | hh_rlhf.Dropped]  # is given these columns and no other
    columns: Sequence[tuple[str, ...]]  # sets of columns; the first of which a row has all says what it is


_PARSERS: dict[str, _Parser] = {
    "hh": _Parser(_parse_hh, [("chosen", "rejected")]),
    "chat_pairs": _Parser(_parse_chat_pairs, [("chosen", "rejected")]),
    "chat_groups": _Parser(_parse_chat_groups, [("prompt", "all_generated_responses", "all_rm_scores")]),
    "json": _Parser(_parse_json, [("prompt", "chosen", "rejected"), ("prompt", "completions", "rewards")]),
    "tldr": _Parser(_parse_tldr, [("info", "summaries", "choice")]),
    "tldr_sft": _Parser(_parse_tldr_sft, [("subreddit", "title", "post", "summary")]),
    "imdb": _Parser(_parse_imdb, [("text", "label")]),
    "messages": _Parser(_parse_messages, [("messages",)]),
    "demonstrations": _Parser(_parse_demonstrations, [("prompt", "completion"), ("prompt", "chosen")]),
    "sharegpt": _Parser(common_formats.sharegpt, [("conversations",)]),
    "alpaca": _Parser(common_formats.alpaca, [("instruction", "input", "output"), ("instruction", "output")]),
    "text": _Parser(common_formats.plain_text, [("text",)]),
    "labelled": _Parser(common_formats.labelled, [("prompt", "completion", "label")]),
    "liked": _Parser(common_formats.liked, [("prompt", "completion", "label")]),
    "rankings": _Parser(common_formats.rankings, [("prompt", "completions", "ranks")]),
    "scored_pairs": _Parser(
        common_formats.scored_pairs, [("prompt", "chosen", "rejected", "score_chosen", "score_rejected")]
    ),
    "text_pairs": _Parser(common_formats.text_pairs, [("chosen", "rejected")]),
    "transcript_chats": _Parser(common_formats.transcript_chats, [("chosen", "rejected")]),
    "prompts": _Parser(_parse_prompts, [("prompt",)]),
}
FORMATS = (auto_format.AUTO, *(name for name in _PARSERS if name != "prompts"))  # that one can train on


def _all_lack_columns(problems: Sequence[str], count: int) -> bool:
    """Whether each of the rows that were read lacks a column of the format."""
    return len(problems) == count and all(f": {columns.MISSING}" in problem for problem in problems)


def _check_problems(problems: list[str], count: int, on_bad_row: str) -> None:
    many = len(problems) > max(1, MAX_BAD_FRACTION * count)
    if not problems or (on_bad_row == "skip" and not many):
        return
    if len(problems) == 1:
        raise ValueError(problems[0])
    head = (
        f"{len(problems)} of the first {count} rows are bad"
        if on_bad_row == "error"
        else (f"{len(problems)} of {count} rows are bad, and on_bad_row='skip' allows {MAX_BAD_FRACTION:.1%}")
    )
    raise ValueError("\n  ".join([f"{head}:", *problems[:MAX_PROBLEMS]]))
