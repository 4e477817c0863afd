"""95 % intervals: of a success rate, of a mean, and of the change between two answers to the same questions."""

import math
from collections.abc import Sequence

Z95 = 1.959963984540054  # standard normal quantile of 97.5 %


def wilson(successes: int, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a proportion; unlike the normal one it is sound near 0 and 1.

        (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)

    Args:
        successes: in [0, count].
        count: independent trials, > 0.

    Raises:
        ValueError: successes outside its range.

    >>> tuple(round(bound, 4) for bound in wilson(8, 10))
    (0.4902, 0.9433)
    """
    if not 0 <= successes <= count or count < 1:
        raise ValueError(f"{successes} successes of {count} trials; need 0 <= successes <= count and count >= 1.")
    rate, weight = successes / count, Z95**2 / count
    centre = rate + weight / 2
    spread = Z95 * math.sqrt(rate * (1 - rate) / count + weight / (4 * count))
    # The bounds are exactly 0 and 1 at the ends, where rounding would leave them a little inside.
    low = (centre - spread) / (1 + weight) if successes else 0.0
    high = (centre + spread) / (1 + weight) if successes < count else 1.0
    return low, high


def paired_difference(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Return (mean, low, high) of after - before over the same questions, by the normal interval of the differences.

    Args:
        before: outcome of each question, a number or right (1) and wrong (0); at least two.
        after: the same questions in the same order.

    Raises:
        ValueError: the two do not pair.

    >>> tuple(round(number, 4) for number in paired_difference([True, False, False, False], [True, True, True, False]))
    (0.5, -0.0658, 1.0658)
    """
    count = len(before)
    if count != len(after) or count < 2:
        raise ValueError(f"{count} outcomes before and {len(after)} after; need the same number, at least 2.")
    return mean_interval([float(b) - float(a) for a, b in zip(before, after, strict=True)])


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return (mean, low, high) of a mean by the normal interval.

    Args:
        values: of independent units, at least two.

    Raises:
        ValueError: fewer.

    >>> tuple(round(number, 4) for number in mean_interval([1.0, 2.0, 4.0]))
    (2.3333, 0.6048, 4.0619)
    """
    count = len(values)
    if count < 2:
        raise ValueError(f"an interval of {count} values; need at least 2.")
    mean = sum(values) / count
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    spread = Z95 * math.sqrt(variance / count)
    return mean, mean - spread, mean + spread
