"""What a judge is asked and what its reply says: templates, fences, verdicts, and a store of replies.

A question shows a prompt and two answers, A and B. Each part stands between lines with a mark that none of the texts
contains, so that no answer can end its own part or open another. The mark follows from the texts: the same question has
the same key, and a reply that was paid for once is never asked for again.
"""

import collections
import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fpo_jax.distributed import workdir_lock
from fpo_jax.io import json_digest, jsonl

FOLDER = Path(__file__).parent / "templates"
PLACES = ("prompt", "first", "second")
WIN, TIE, LOSS = 1.0, 0.5, 0.0  # of the candidate

_VERDICT = re.compile(r"^\W*verdict\W*:\W*(A|B|tie)\W*$", re.IGNORECASE | re.MULTILINE)
# what an answer says that wants to be chosen rather than to answer
_STEERING = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\bverdict\W{0,3}:",
        r"\[\[\s*(A|B|C|tie)\s*[<>=ABC]*\s*\]\]",
        r"\b(ignore|disregard|forget)\b.{0,40}\b(instructions?|above|previous|prior)\b",
        r"\b(answer|completion|assistant|summary) (A|B)\b.{0,20}\b(is|was) (\w+ )?(better|best|preferred|superior)\b",
        r"\b(this|my) (answer|completion|summary) (is|should be|must be) (\w+ )?(better|best|preferred|chosen)\b",
        r"\b(BEGIN|END) (PROMPT|ANSWER)\b",
        r"\byou (must|should|have to) (select|pick|prefer|select|favou?r)\b",
    )
)


class Pair(NamedTuple):
    """Two answers to one prompt."""

    index: int
    prompt: str | list[dict[str, str]]
    candidate: str
    baseline: str


class Question(NamedTuple):
    """One comparison in one order."""

    key: str
    text: str


class Decision(NamedTuple):
    """What both orders together say; `outcome` is None where there is no verdict, and `why` says what is missing."""

    outcome: float | None
    why: str = ""  # "" | same_text | position | failed | unparsable


def template(name: str) -> str:
    """Return a template by name or path.

    Raises:
        ValueError: no such template, or one without a place for a part.
    """
    path = FOLDER / f"{name}.txt" if re.fullmatch(r"\w+", name) else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(one.stem for one in FOLDER.glob("*.txt")))
        raise ValueError(f"--template={name!r} is none of {known}, nor a file.")
    text = path.read_text(encoding="utf-8")
    if wrong := [place for place in PLACES if text.count(f"{{{place}}}") != 1]:
        raise ValueError(f"{path} must have {{{'} and {'.join(wrong)}}} exactly once.")
    return text


def question(pair: Pair, *, form: str, turned: bool, judge: Mapping[str, Any]) -> Question:
    """Return what is asked.

    Args:
        pair: the prompt and the answers.
        form: the template's text.
        turned: show the baseline's answer first.
        judge: who is asked, and how: everything else that a reply depends on, as JSON values.
    """
    answers = (pair.baseline, pair.candidate) if turned else (pair.candidate, pair.baseline)
    texts = [shown(pair.prompt), *(answer.strip() for answer in answers)]
    mark = _mark(texts)
    parts = {
        place: f"BEGIN {name} {mark}\n{text}\nEND {name} {mark}"
        for place, name, text in zip(PLACES, ("PROMPT", "ANSWER A", "ANSWER B"), texts, strict=True)
    }
    # in one pass: a place that stands in an answer stays text
    text = re.sub(r"\{(prompt|first|second)\}", lambda match: parts[match[1]], form)
    key = json_digest.of([text, dict(judge)])
    return Question(key, text)


def shown(prompt: str | list[dict[str, str]]) -> str:
    """Return a prompt as a judge reads it: without the header of the answer to come."""
    if isinstance(prompt, list):
        return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content'].strip()}" for turn in prompt)
    text = prompt.strip()
    for header in ("Assistant:", "TL;DR:"):
        text = text.removesuffix(header).rstrip()
    return text


def _mark(texts: Iterable[str]) -> str:
    """Return a mark for the fences: no text holds a digest of itself."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def verdict(reply: str) -> str | None:
    r"""Return A, B or tie; None where the reply has no verdict, or two that differ.

    >>> verdict("Both are short, but B is wrong.\n**Verdict: A**")
    'A'
    >>> verdict("Verdict: A\nVerdict: B") is None
    True
    """
    found = {match.lower() for match in _VERDICT.findall(reply)}
    return {"a": "A", "b": "B", "tie": "tie"}[found.pop()] if len(found) == 1 else None


def same(pair: Pair) -> bool:
    """Whether both answers are one text, which nobody need be asked about."""
    return pair.candidate.strip() == pair.baseline.strip()


def decide(pair: Pair, replies: tuple[str | None, str | None]) -> Decision:
    """Return what the replies of both orders, the candidate first and then second, say together.

    Orders that disagree are a tie: the judge saw the place and not the answer.
    """
    if same(pair):
        return Decision(TIE, "same_text")
    straight, turned = replies
    if straight is None or turned is None:
        return Decision(None, "failed")
    first, second = verdict(straight), verdict(turned)
    if first is None or second is None:
        return Decision(None, "unparsable")
    outcomes = {"A": WIN, "B": LOSS, "tie": TIE}[first], {"A": LOSS, "B": WIN, "tie": TIE}[second]
    return Decision(outcomes[0]) if outcomes[0] == outcomes[1] else Decision(TIE, "position")


def steers(answer: str) -> bool:
    """Whether an answer speaks to the judge."""
    return any(pattern.search(answer) for pattern in _STEERING)


class Store:
    """Replies by key, in a file that is only ever appended to; a half-written last line is cut off and asked again."""

    def __init__(self, path: Path):
        """Read what there is.

        Raises:
            ValueError: a line that is no reply, elsewhere than at the end.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        found = jsonl.read_appended(path)
        for number, one in enumerate(found.rows, 1):
            if not isinstance(one.get("key"), str) or not isinstance(one.get("reply"), str):
                raise ValueError(f"{path}:{number}: not a judge's reply; put it right, or delete the file.")
        self._replies: dict[str, str] = {one["key"]: one["reply"] for one in found.rows}
        self._file = path.open("ab")
        self._file.truncate(found.whole)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._replies

    def get(self, key: str) -> str | None:
        """Return a reply, or None."""
        return self._replies.get(key)

    def add(self, key: str, reply: str) -> None:
        """Keep a reply."""
        workdir_lock.verify()
        jsonl.append(self._file, {"key": key, "reply": reply})
        self._replies[key] = reply


def counts(decisions: Iterable[Decision]) -> dict[str, int]:
    """Count wins, losses, ties and their kinds, and failures."""
    found = collections.Counter()
    for decision in decisions:
        if decision.outcome is None:
            found["failures"] += 1
        else:
            found[{WIN: "wins", TIE: "ties", LOSS: "losses"}[decision.outcome]] += 1
        if decision.why:
            found[decision.why] += 1
    names = ("wins", "ties", "losses", "failures", "same_text", "position", "failed", "unparsable")
    return {name: found[name] for name in names}
