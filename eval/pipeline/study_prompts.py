"""The prompts of a study of objectives: chats with the pairs that people ranked, and tasks that a program checks.

What flows in: preference rows of HH and of chats, and a tokenizer. What flows out: prompts for the policy in three
splits, and pairs for two reward models and for their evaluation; no prompt is in two of them. Completions of pairs are
cut to as many tokens as a policy may write, so that a reward model reads what it will have to judge.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fpo_jax import tokenization
from fpo_jax.data import hh_rlhf

TASK, SPLITS = "task", ("train", "validation", "test")
_QUESTIONS = (
    "What is the sun?", "Why do people sleep?", "What do cats eat?", "How do birds fly?", "What is a good breakfast?",
    "Why is the sky blue?", "What is music?", "How do plants grow?", "What is snow?", "Why do we laugh?",
    "What is a friend?", "How does rain form?", "What is a library?", "Why do leaves fall?", "What is bread made of?",
    "What is the moon?", "How do fish breathe?", "Why do we read books?", "What is a bridge for?", "What is chess?",
)  # fmt: skip
_THINGS = (
    "colors", "animals", "fruits", "countries", "sports", "cities", "vegetables", "musical instruments", "birds",
    "drinks", "tools", "trees", "planets", "flowers", "languages", "rivers", "metals", "games", "insects", "desserts",
)  # fmt: skip


class Check(NamedTuple):
    """One kind of task: how it is asked, and whether a text does what was asked."""

    ask: str  # with {subject} and {count}
    subjects: Sequence[str]
    counts: Sequence[int]  # () = the task has no number
    passes: Callable[[str, int], bool]


def _is_list(text: str, count: int) -> bool:
    items = [item.strip() for item in text.strip().rstrip(".").split(",")]
    return len(items) == count and all(item and len(item.split()) <= 3 for item in items)


CHECKS: dict[str, Check] = {
    "words": Check(
        "Answer with exactly {count} words. {subject}", _QUESTIONS, (2, 3, 4, 5), lambda t, n: len(t.split()) == n
    ),
    "list": Check("List {count} {subject} separated by commas, and write nothing else.", _THINGS, (2, 3, 4), _is_list),
    "capitals": Check(
        "Reply in capital letters only. {subject}",
        _QUESTIONS,
        (),
        lambda t, n: bool(re.search("[A-Z]", t)) and t.isupper(),
    ),
    "short": Check(
        "Answer in one sentence of at most {count} words. {subject}",
        _QUESTIONS,
        (8, 12),
        lambda t, n: 0 < len(t.split()) <= n and t.strip()[-1:] in ".!?",
    ),
}


def reward(task: dict[str, Any], text: str) -> float:
    """Return 1.0 where the text does what the task asks, else 0.0.

    Args:
        task: `check`, a key of CHECKS, and `count`, its number (0 where it has none).
        text: the completion.

    >>> reward({"check": "words", "count": 3}, "A burning star."), reward({"check": "list", "count": 2}, "Red, green.")
    (1.0, 1.0)
    >>> reward({"check": "capitals", "count": 0}, "It is Hot"), reward({"check": "short", "count": 8}, "It is a star")
    (0.0, 0.0)
    """
    return float(CHECKS[task["check"]].passes(text, task["count"]))


def tasks() -> list[dict[str, Any]]:
    """Return every task once, as a row with its prompt."""
    return [
        {
            "kind": TASK,
            "task": {"check": name, "count": count},
            "prompt": [{"role": "user", "content": check.ask.format(subject=subject, count=count)}],
        }
        for name, check in CHECKS.items()
        for subject in check.subjects
        for count in check.counts or (0,)
    ]


def messages(prompt: Any) -> list[dict[str, str]] | None:
    r"""Return a prompt as messages; None for a transcript whose turns do not alternate.

    >>> messages("\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:")[2]
    {'role': 'user', 'content': 'Bye'}
    """
    if not isinstance(prompt, str):
        return list(prompt)
    if not prompt.startswith(hh_rlhf.HUMAN):
        return [{"role": "user", "content": prompt}]
    turns = re.split(r"\n\n(Human|Assistant):", prompt)[1:]
    named = [
        ("user" if name == "Human" else "assistant", text.strip())
        for name, text in zip(turns[::2], turns[1::2], strict=True)
    ]
    if [role for role, _ in named] != ["user", "assistant"] * (len(named) // 2) or not all(t for _, t in named[:-1]):
        return None
    return [{"role": role, "content": text} for role, text in named[:-1]]


class Sizes(NamedTuple):
    """How many prompts of each kind a split has, and how many pairs each reward model and their evaluation."""

    train: int
    validation: int
    test: int
    pairs: int
    judged_pairs: int


def split(
    records: dict[str, Sequence[Any]],
    encoder: tokenization.Encoder,
    *,
    sizes: Sizes,
    prompt_tokens: int,
    completion_tokens: int,
    seed: int,
) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every file of the study: three of prompts, three of pairs.

    Args:
        records: kind -> preference records with two completions, the chosen one first.
        encoder: of the start model, with a chat template.
        sizes: how many of each kind.
        prompt_tokens: longest prompt that is used, template included.
        completion_tokens: what stays of a completion of a pair.
        seed: of what goes where.

    Raises:
        ValueError: fewer short prompts than are asked for.
    """
    random = np.random.default_rng(seed)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*SPLITS, "pairs-a", "pairs-b", "pairs-judged")}
    for kind, rows in {**{kind: _pairs(kind, rows) for kind, rows in records.items()}, TASK: tasks()}.items():
        ids = tokenization.generation_prompts(encoder, [row["prompt"] for row in rows])
        short = [row for row, one in zip(rows, ids, strict=True) if len(one) <= prompt_tokens]
        short = [short[place] for place in random.permutation(len(short))]
        wanted = {name: getattr(sizes, name) for name in SPLITS}
        if len(short) < sum(wanted.values()) + (kind != TASK) * 6:
            raise ValueError(
                f"{len(short)} prompts of {kind} have up to {prompt_tokens} tokens, and {sum(wanted.values())} are"
                " asked for, and pairs of others; lower the sizes, or raise prompt_tokens."
            )
        for name, count in wanted.items():
            found[name] += [
                {key: row[key] for key in ("kind", "prompt", "task") if key in row} for row in short[:count]
            ]
            short = short[count:]
        if kind != TASK:
            judged = min(sizes.judged_pairs, len(short) // 3)
            half = min(sizes.pairs, (len(short) - judged) // 2)
            cuts = (short[:half], short[half : 2 * half], short[2 * half : 2 * half + judged])
            for name, part in zip(("pairs-a", "pairs-b", "pairs-judged"), cuts, strict=True):
                found[name] += [_cut(row, encoder, completion_tokens) for row in part]
    return found


def _pairs(kind: str, records: Sequence[Any]) -> list[dict[str, Any]]:
    """Return rows with different prompts and different completions that are plain texts."""
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        prompt, texts = messages(record.prompt), [_text(one) for one in record.completions]
        if prompt and all(texts) and len(set(texts)) == len(texts) == 2:
            best = int(record.rewards[1] > record.rewards[0])
            rows.setdefault(
                str(prompt), {"kind": kind, "prompt": prompt, "chosen": texts[best], "rejected": texts[1 - best]}
            )
    return list(rows.values())


def _text(completion: Any) -> str:
    """Return a completion of one turn as text; "" where it is several turns."""
    if isinstance(completion, dict):
        completion = completion.get("content")
    return completion.strip() if isinstance(completion, str) else ""


def _cut(row: dict[str, Any], encoder: tokenization.Encoder, tokens: int) -> dict[str, Any]:
    def begin(text: str) -> str:
        return str(encoder.tokenizer.decode(encoder.tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]))

    return {"prompt": row["prompt"], "chosen": begin(row["chosen"]), "rejected": begin(row["rejected"])}
