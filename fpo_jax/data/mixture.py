"""Several sources as one: the first part of each, one after the other, in one shuffled order.

An entry of a mixture is "source=fraction" or "source@split=fraction". A fraction keeps the first floor(fraction * rows)
rows of its source, of the decimal that was written: 0.29 of 100 rows are 29. The original, alignment-handbook's mixer,
takes int() of the product in binary floating point, so 28. The order is fixed by a seed of its own, not the run's.
"""

import fractions
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fpo_jax.data import loading, record_file, sampler
from fpo_jax.data.formats import Records

ORDER_SEED = 42


class Part(NamedTuple):
    """One source of a mixture."""

    source: str
    split: str
    fraction: float


def parse(entry: str) -> Part:
    """Read one entry.

    >>> parse("HuggingFaceH4/ultrafeedback_binarized@train_prefs=0.5")
    Part(source='HuggingFaceH4/ultrafeedback_binarized', split='train_prefs', fraction=0.5)

    Raises:
        ValueError: not of that form, or a fraction outside (0, 1].
    """
    parts = loading.entry(entry)
    try:
        fraction = float(parts[2]) if parts else 0.0
    except ValueError:
        fraction = 0.0
    if parts is None or not 0 < fraction <= 1:
        raise ValueError(f"{entry!r} is not source=fraction or source@split=fraction with a fraction in (0, 1].")
    return Part(parts[0], parts[1] or "", fraction)


def mixture(parts: Sequence[Part], read: Callable[[Part], Records]) -> Records:
    """Return the records of all parts in one order; what each source dropped or noted is kept.

    Args:
        parts: the sources; one may stand twice.
        read: gives all records of a part.

    Raises:
        ValueError: a part keeps no row.
    """
    kept_rows, dropped, noted = [], {}, {}
    formats: dict[str, None] = {}
    for part in parts:
        found = read(part)
        kept = int(fractions.Fraction(repr(part.fraction)) * len(found.rows))  # repr is the shortest decimal
        if kept == 0:
            raise ValueError(
                f"{part.source}: a fraction of {part.fraction:g} keeps none of {len(found.rows)} rows; raise it or"
                " leave the source out."
            )
        kept_rows.append(found.rows[:kept])
        formats |= {found.format: None} if found.format else {}
        for mine, theirs in ((dropped, found.dropped), (noted, found.noted)):
            for reason, places in theirs.items():
                mine.setdefault(reason, []).extend(places)
    rows = record_file.join(kept_rows)
    order_N = sampler.order(len(rows), seed=ORDER_SEED, epoch=0)
    return Records(record_file.take(rows, order_N), dropped, noted, "; ".join(formats))
