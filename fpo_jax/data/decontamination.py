"""Training records that repeat a benchmark are dropped.

What flows in: the texts of the benchmarks and `Records`. What flows out: the records without those that share WORDS
words in a row with a benchmark text, as GPT-3's data were cleaned (arXiv 2005.14165, appendix C). A benchmark text of
fewer words counts if the whole of it recurs, one of fewer than SHORTEST not at all: `return x + y` is nobody's.

Words are runs of letters and digits in lower case, so neither layout, punctuation nor indentation hides a copy. The
original's recipe (alignment-handbook) compares with HumanEval's docstrings and solutions alone, character by character.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from fpo_jax.data import sources
from fpo_jax.data.records import Record, Records

WORDS = 13
SHORTEST = 8
REASON = "contaminated"
_WORD = re.compile(r"[^\W_]+")


def check(entry: str) -> None:
    """Refuse what is not "source=column" or "source@split=column".

    Raises:
        ValueError: not of that form.
    """
    if sources.entry(entry) is None:
        raise ValueError(f"{entry!r} is not source=column or source@split=column.")


def texts(entry: str) -> list[str]:
    """Read the texts of one benchmark; a column may hold a text, or a list of texts (the turns of MT-Bench).

    Args:
        entry: "source=column" or "source@split=column"; the source is a file, a directory or a hub name.

    Raises:
        ValueError: no such source or column, or a value of another kind.
    """
    check(entry)
    parts = sources.entry(entry)
    assert parts is not None
    source, split, column = parts
    found: list[str] = []
    for where, row in sources.rows(source, split=split, data_dir=None, revision=None):
        value = row.get(column) if isinstance(row, dict) else row
        values = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
        if not values or (isinstance(value, list) and len(values) < len(value)):
            columns = f"; it has {', '.join(row)}" if isinstance(row, dict) else ""
            raise ValueError(f"{where}: the column {column!r} is neither a text nor a list of texts{columns}")
        found += values
    return found


def clean(records: Records, benchmarks: Iterable[str]) -> Records:
    """Return the records that repeat none of the benchmark texts; the others are among the dropped.

    Args:
        records: what was read; the prompt and every response are compared.
        benchmarks: the texts.

    Raises:
        ValueError: no text is long enough to compare with.
    """
    runs: dict[int, set[str]] = {}  # by their number of words
    for text in benchmarks:
        words = _words(text)
        if len(words) >= SHORTEST:
            length = min(WORDS, len(words))
            runs.setdefault(length, set()).update(_runs(words, length))
    if not runs:
        raise ValueError(f"no benchmark text has {SHORTEST} words or more; decontamination would compare nothing")
    kept, dropped = [], list(records.dropped.get(REASON, ()))
    for record in records.rows:
        if any(_repeats(text, runs) for text in _texts_of(record)):
            dropped.append(record.source)
        else:
            kept.append(record)
    return Records(kept, {**records.dropped, **({REASON: dropped} if dropped else {})}, records.noted)


def _repeats(text: str, runs: Mapping[int, set[str]]) -> bool:
    words = _words(text)
    return any(run in known for length, known in runs.items() for run in _runs(words, length))


def _texts_of(record: Record) -> list[str]:
    turns = [*(record.prompt if isinstance(record.prompt, list) else [record.prompt]), *record.responses]
    return [turn if isinstance(turn, str) else turn["content"] for turn in turns]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _runs(words: Sequence[str], length: int) -> Iterator[str]:
    return (" ".join(words[start : start + length]) for start in range(len(words) - length + 1))
