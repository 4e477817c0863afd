"""What a tokenizer's files may ask of the library that reads them: bounded ids, pieces, steps and growth.

The tokenizers library makes a table as long as the largest id, a tree of all pieces and what a `Replace` says of every
text, in our process and without a limit. So its files are looked at first, which takes less time than loading them.
Every limit is several times what published tokenizers need (Gemma-3: 262,145 pieces, 33 MB).
"""

import base64
import contextlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LARGEST_FILE = 2**27  # bytes; the largest published tokenizer.json have a quarter of it
_TEXT_SUFFIXES = (".json", ".jinja", ".model", ".txt")
_OF_THE_LIBRARY = ("tokenizer.json", "vocab.json", "added_tokens.json", "tokenizer_config.json")
LARGEST_ID = 2**22
LONGEST_PIECE, LONGEST_VOCABULARY = 2**12, 2**23  # characters, of one piece and of all
MOST_VALUES = 2**23  # of a file: commas and brackets
LONGEST_SETTINGS = 2**22  # characters of all but the vocabulary; the longest table of characters has 330,000
MOST_STEPS = 64
MOST_GROWTH = 2**12  # characters that one may become
MOST_REPEATS = 10**5  # of counts within counts in a regular expression
_BYTES = 2  # what a step that writes bytes as characters makes of one


def check(path: Path) -> None:
    """Refuse a tokenizer's file, or a directory with one, that would take memory or time without bounds.

    Raises:
        ValueError: a file is huge, unbounded, or none to be read to its end; says what.
    """
    for entry in sorted(path.iterdir()) if path.is_dir() else [path]:
        if entry.suffix not in _TEXT_SUFFIXES or entry.is_dir() or not entry.exists():
            continue
        if not entry.is_file():
            raise ValueError(f"{entry.name} is no regular file")
        if (size := entry.stat().st_size) > LARGEST_FILE:
            raise ValueError(f"{entry.name} has {size:,} bytes, and at most {LARGEST_FILE:,} are read")
        if entry.name in _OF_THE_LIBRARY or (entry == path and entry.suffix == ".json"):
            _check_file(entry)


def _check_file(path: Path) -> None:
    content = path.read_bytes()
    if (values := sum(map(content.count, (b",", b"[", b"{")))) > MOST_VALUES:
        raise ValueError(f"{path.name} holds {values:,} values, and at most {MOST_VALUES:,} are read")
    try:
        found = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is not a tokenizer.json: {error}") from error
    try:
        if isinstance(found, dict):
            _check_pieces(path.name, found)
            _check_steps(path.name, found)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{path.name} has not the form of its kind ({error})") from error


@contextlib.contextmanager
def no_panic() -> Iterator[None]:
    """Make a panic of the library, which no `except Exception` sees, a ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # which the library does not export
            raise
        cause = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the tokenizer's own rules cannot be applied to a text ({cause}); take another tokenizer.json"
        ) from None


def _check_pieces(name: str, found: dict[str, Any]) -> None:
    """Refuse ids and pieces that no vocabulary has."""
    pieces, ids = [], []
    vocabulary = found if name in ("vocab.json", "added_tokens.json") else (found.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, dict):
        pieces, ids = list(vocabulary), list(vocabulary.values())
    else:  # [[piece, score], ...]: a place is an id
        pieces = [piece for piece, _ in vocabulary]
    added = found.get("added_tokens") or []
    pieces += [token["content"] for token in added]
    ids += [token["id"] for token in added]
    decoded = found.get("added_tokens_decoder") or {}  # of tokenizer_config.json: {"0": {"content": ...}}
    ids += map(int, decoded)
    pieces += [token["content"] for token in decoded.values()]
    if wrong := [one for one in ids if not (isinstance(one, int) and 0 <= one <= LARGEST_ID)]:
        raise ValueError(f"{name} has the id {str(wrong[0])[:40]}, and ids up to {LARGEST_ID:,} are read")
    longest, total = max(map(len, pieces), default=0), sum(map(len, pieces))
    if longest > LONGEST_PIECE or total > LONGEST_VOCABULARY:
        raise ValueError(
            f"{name} has pieces of up to {longest:,} characters, {total:,} together; at most {LONGEST_PIECE:,} and"
            f" {LONGEST_VOCABULARY:,} are read"
        )


def _check_steps(name: str, found: dict[str, Any]) -> None:
    """Refuse steps from a text to its tokens and back that let the text grow, or are too many."""
    if not isinstance(model := found.get("model"), dict):
        return
    rest = {key: value for key, value in found.items() if key not in ("model", "added_tokens")}
    rest["model"] = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
    if (size := len(json.dumps(rest))) > LONGEST_SETTINGS:
        raise ValueError(f"{name} has {size:,} characters of settings, and at most {LONGEST_SETTINGS:,} are read")
    if (longest := max((len(value) for value in rest["model"].values() if isinstance(value, str)), default=0)) > 256:
        raise ValueError(f"{name} has a setting of {longest:,} characters in its model, and at most 256 are read")
    if isinstance(padding := found.get("padding"), dict) and _number(padding) > LARGEST_ID:
        raise ValueError(f"{name} fills every text up to {_number(padding):,} tokens; at most {LARGEST_ID:,} are made")
    there = [*_steps(found.get("normalizer")), *_steps(found.get("pre_tokenizer"))]
    for kind, steps in (("encoding", there), ("decoding", [*_steps(found.get("decoder"))])):
        growth = math.prod(map(_growth, steps))
        if len(steps) > MOST_STEPS or growth > MOST_GROWTH:
            raise ValueError(
                f"{name}: {kind} takes {len(steps)} steps that may make {growth:,} characters of one; at most"
                f" {MOST_STEPS} and {MOST_GROWTH:,} are taken"
            )
        for pattern in (step["pattern"]["Regex"] for step in steps if "Regex" in (step.get("pattern") or ())):
            counts = map(int, re.findall(r"\{(?:\d*,)?(\d+)\}", pattern))
            if math.prod(max(1, count) for count in counts) > MOST_REPEATS:
                raise ValueError(f"{name} has the regular expression {pattern[:80]!r}, whose counts are too large")


def _steps(step: Any) -> Iterator[dict[str, Any]]:
    """Yield the steps of a normalizer, a pre-tokenizer or a decoder, those of sequences one by one."""
    if not isinstance(step, dict):
        return
    parts = [one for key in ("normalizers", "pretokenizers", "decoders") for one in step.get(key) or ()]
    if step.get("type") != "Sequence":
        yield step
    for part in parts:
        yield from _steps(part)


def _growth(step: dict[str, Any]) -> int:
    """Return how many characters a step makes of one at most."""
    kind = step.get("type")
    if kind == "Replace":
        literal, content = (step.get("pattern") or {}).get("String"), len(step["content"])
        # what matches nothing matches between any two characters
        return max(1, -(-content // len(literal))) if literal else 1 + content
    if kind == "Prepend":
        return max(1, len(step["prepend"]))
    if kind == "Precompiled":  # the length of a table, the table, and the texts that it names, with zeros between
        table = base64.b64decode(step.get("precompiled_charsmap") or "")
        return max(1, *map(len, table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")))
    return _BYTES if kind == "ByteLevel" else 1


def _number(padding: dict[str, Any]) -> int:
    """Return the largest number of how texts are filled up."""
    strategy = padding.get("strategy")
    fixed = strategy.get("Fixed", 0) if isinstance(strategy, dict) else 0
    return max(int(fixed), int(padding.get("pad_to_multiple_of") or 0))
