r"""Movie reviews (IMDB): the beginning of a review is the prompt, the rest the completion, its label the reward.

What flows in: rows with `text` and `label`. What flows out: the text as the original cleans it (`<br />` is a line end,
nothing stands at the end), cut after its first ten tokens, and the rows in an order that a slice can be taken of.

The original cuts by GPT-2's tokens; here it is the tokens of the run's own model, which is GPT-2 in that recipe. It
orders the test set alone; here every set comes so, because all are sorted by label at the source.
"""

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from fpo_jax import tokenization

PREFIX_TOKENS = 10  # of a review: its prompt
SEED = 42  # the original's
LABELS = {0: 0.0, 1: 1.0, "neg": 0.0, "pos": 1.0}  # the hub's numbers and the original's words
UNLABELLED = -1  # in the hub's split `unsupervised`


def clean(text: str) -> str:
    r"""Return a review with line ends for its markup.

    >>> clean("Good.<br /><br />Very. \n")
    'Good.\n\nVery.'
    """
    return text.replace("<br />", "\n").rstrip()


def split(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    """Cut each text after its first ten tokens; a character that the tenth token begins stays whole, in the prompt.

    Args:
        texts: cleaned reviews.
        tokenizer: of the model.

    Returns:
        (prompt, completion) of each; the completion is empty where a text has no more tokens.
    """
    backend = tokenization.encoder(tokenizer).backend
    ends = [
        encoding.offsets[:PREFIX_TOKENS][-1][1] if encoding.offsets else 0
        for encoding in backend.encode_batch(list(texts), add_special_tokens=False)
    ]
    return [(text[:end], text[end:]) for text, end in zip(texts, ends, strict=True)]


def alternating(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield (place, row), a positive and another one by turns, both shuffled; what is left of the longer kind is last.

    >>> [row["label"] for _, row in alternating([("a", {"label": 0}), ("b", {"label": 0}), ("c", {"label": "pos"})])]
    ['pos', 0, 0]
    """
    kinds: tuple[list, list] = [], []
    for place, row in rows:
        label = row.get("label") if isinstance(row, dict) else None
        kinds[label not in (1, "pos")].append((place, row))
    generator = random.Random(SEED)  # Python promises the stream of random(), not the one of shuffle()
    shuffled = [sorted(kind, key=lambda _: generator.random()) for kind in kinds]
    for pair in itertools.zip_longest(*shuffled):
        yield from (row for row in pair if row is not None)
