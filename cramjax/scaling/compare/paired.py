"""Statistics of paired differences: their mean, its interval, and how many pairs it would take to settle the sign.

Pure functions of numbers; `cramjax.scaling.compare.comparison` applies them to runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from cramjax.show.numbers import Interval

LEVEL = 0.95
"""Of the intervals."""
_MOST_PAIRS = 2**50


@dataclass(frozen=True)
class PairedDifference:
    """The mean of paired differences, and what is known of it."""

    pairs: int
    mean: float
    std: float | None
    """Standard deviation of one difference (n − 1 in the denominator); None for one pair."""
    interval: Interval | None
    """Student's t interval of the mean, 95%; None for one pair."""
    pairs_to_settle: int | None
    """Fewest pairs whose expected interval excludes 0 if mean and standard deviation stay; None: no number does, or one
    pair cannot say."""

    @property
    def settled(self) -> bool:
        """Whether the interval excludes 0."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


def paired_difference(differences: Sequence[float]) -> PairedDifference:
    """The mean of differences with its 95% interval.

    Args:
        differences: one for each pair, at least one, finite.
    """
    values = np.asarray(differences, np.float64)
    pairs, mean = len(values), float(values.mean())
    if pairs == 1:
        return PairedDifference(1, mean, None, None, None)
    std = float(values.std(ddof=1))
    margin = half_width(pairs, std)
    return PairedDifference(pairs, mean, std, (mean - margin, mean + margin), pairs_to_settle(mean, std))


def half_width(pairs: int, std: float) -> float:
    """Half of the 95% interval of a mean: t · s / √n, t the 97.5% quantile of Student's t with n − 1 degrees."""
    return float(stats.t.ppf((1 + LEVEL) / 2, pairs - 1)) * std / math.sqrt(pairs)


def pairs_to_settle(mean: float, std: float) -> int | None:
    """The fewest pairs, two at least, at which an interval of this mean and standard deviation excludes 0.

    Args:
        mean: of the differences.
        std: of one difference.

    Returns:
        The number of pairs; None when the mean is 0, or so near that no number is in reach.
    """
    if mean == 0 or half_width(_MOST_PAIRS, std) >= abs(mean):
        return None
    low, high = 1, 2  # the width falls with the number: the answer is in (low, high] once high is enough
    while half_width(high, std) >= abs(mean):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if half_width(middle, std) >= abs(mean) else (low, middle)
    return high
