"""Training records that repeat a benchmark are dropped.

What flows in: the texts of the benchmarks and `Records`. What flows out: the records without those that share WORDS
words in a row with a benchmark text, as GPT-3's data were cleaned (arXiv 2005.14165, appendix C). A benchmark text of
fewer words counts if the whole of it recurs, one of fewer than SHORTEST not at all: `return x + y` is nobody's.

Words are runs of letters and digits in lower case, so neither layout, punctuation nor indentation hides a copy; nor do
accents, full-width forms or how Unicode composes them. Scripts that put no spaces between words (Chinese, Japanese,
Thai, Lao, Khmer, Burmese, Tibetan) are compared character by character: PER_WORD of them count as a word, so that a
text of such characters needs twice as many in a row. The original's recipe (alignment-handbook) compares with
HumanEval's docstrings and solutions alone, character by character.
"""

import functools
import logging
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence

from fpo_jax.data import loading, record_file, worker_pool
from fpo_jax.data.formats import Record, Records
from fpo_jax.tokenization import messages

log = logging.getLogger("fpo_jax")

WORDS = 13
SHORTEST = 8
REASON = "contaminated"
_CHUNK = 256  # records compared at once
PER_WORD = 2  # characters of a script without spaces that say as much as a word
_UNSPACED = (
    "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Tibetan, Burmese, Khmer
    "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"  # Japanese and Chinese
)
_CHARACTER = re.compile(f"[{_UNSPACED}]")
_WORD = re.compile(rf"[^\W_{_UNSPACED}]+|(?=\w)[{_UNSPACED}]")


def check(entry: str) -> None:
    """Refuse what is not "source=column" or "source@split=column".

    Raises:
        ValueError: not of that form.
    """
    if loading.entry(entry) is None:
        raise ValueError(f"{entry!r} is not source=column or source@split=column.")


def texts(entry: str) -> list[str]:
    """Read the texts of one benchmark; a column may hold a text, or a list of texts (the turns of MT-Bench).

    Args:
        entry: "source=column" or "source@split=column"; the source is a file, a directory or a hub name.

    Raises:
        ValueError: no such source or column, or a value of another kind.
    """
    check(entry)
    parts = loading.entry(entry)
    assert parts is not None
    source, split, column = parts
    found: list[str] = []
    for where, row in loading.rows(source, split=split, data_dir=None, revision=None):
        value = row.get(column) if isinstance(row, dict) else row
        values = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
        if not values or (isinstance(value, list) and len(values) < len(value)):
            columns = f"; it has {', '.join(row)}" if isinstance(row, dict) else ""
            raise ValueError(f"{where}: the column {column!r} is neither a text nor a list of texts{columns}")
        found += values
    return found


def comparable(entry: str) -> list[str]:
    """Read the texts of one benchmark that are long enough to compare with, and say how many are not.

    Raises:
        ValueError: as `texts`; or none is.
    """
    found = texts(entry)
    kept = [text for text in found if _long_enough(text)]
    least = f"{SHORTEST} words, or {SHORTEST * PER_WORD} characters of a script without spaces"
    if not kept:
        raise ValueError(f"data.decontaminate: no text of {entry!r} has {least}; name a column of whole texts.")
    if len(kept) < len(found):
        log.info("data.decontaminate: %d of %d texts of %s have fewer than %s and are not compared.",
                 len(found) - len(kept), len(found), entry, least)  # fmt: skip
    return kept


def clean(records: Records, benchmarks: Iterable[str], *, workers: int = 1) -> Records:
    """Return the records that repeat none of the benchmark texts; the others are among the dropped.

    Args:
        records: what was read; the prompt and every completion are compared.
        benchmarks: the texts.
        workers: processes that compare.

    Raises:
        ValueError: no text is long enough to compare with.
    """
    runs: dict[int, set[str]] = {}  # by their number of words
    for text in filter(_long_enough, benchmarks):
        words = _words(text)
        length = min(WORDS * _per_word(words), len(words))
        runs.setdefault(length, set()).update(_runs(words, length))
    if not runs:
        raise ValueError(f"no benchmark text has {SHORTEST} words or more; decontamination would compare nothing")
    count, dropped = len(records.rows), list(records.dropped.get(REASON, ()))
    chunks = [range(first, min(first + _CHUNK, count)) for first in range(0, count, _CHUNK)]
    repeating: set[int] = set()
    for found in worker_pool.in_order(_repeating, (records.rows, runs), chunks, workers=workers):
        repeating |= found.keys()
        dropped += found.values()
    rows = record_file.take(records.rows, [number for number in range(count) if number not in repeating])
    return records._replace(rows=rows, dropped={**records.dropped, **({REASON: dropped} if dropped else {})})


def _repeating(state: tuple[Sequence[Record], Mapping[int, set[str]]], numbers: range) -> dict[int, str]:
    """Return the number and the source of each record that repeats a benchmark."""
    rows, runs = state
    records = [(number, rows[number]) for number in numbers]
    return {
        number: record.source for number, record in records if any(_repeats(text, runs) for text in _texts_of(record))
    }


def _repeats(text: str, runs: Mapping[int, set[str]]) -> bool:
    words = _words(text)
    return any(run in known for length, known in runs.items() for run in _runs(words, length))


def _texts_of(record: Record) -> list[str]:
    prompt = record.prompt if isinstance(record.prompt, list) else [record.prompt]
    turns = [turn for one in record.completions for turn in (one if isinstance(one, list) else [one])]
    return [messages.said(turn) for turn in [*prompt, *turns]]


def _long_enough(text: str) -> bool:
    """Tell whether a text is compared at all."""
    words = _words(text)
    return len(words) >= SHORTEST * _per_word(words)


def _per_word(words: Sequence[str]) -> int:
    """Return how many of these make a word: most of them may be characters of a script without spaces."""
    characters = sum(map(bool, map(_CHARACTER.match, words)))
    return PER_WORD if 2 * characters > len(words) else 1


def _words(text: str) -> list[str]:
    if not text.isascii():
        text = unicodedata.normalize("NFKD", text).translate(_marks())
    return _WORD.findall(text.lower())


@functools.cache
def _marks() -> dict[int, None]:
    """Return what takes accents, vowel signs and other marks away, which `re` counts among no word."""
    return dict.fromkeys(code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "M")


def _runs(words: Sequence[str], length: int) -> Iterator[str]:
    return (" ".join(words[start : start + length]) for start in range(len(words) - length + 1))
