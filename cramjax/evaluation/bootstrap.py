"""Measures of items, and how far they would vary with other items: percentile intervals of the bootstrap.

Of one seed, measures of equally many items are resampled alike. So two models that are scored on the same items are
compared item by item: the difference is taken within each resample.

Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, sections 13.3 (percentile intervals) and 16.4.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from cramjax.show.numbers import Interval

LEVEL = 0.95
"""Of the intervals."""
RESAMPLES = 2000
_AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False)
class Measure:
    """A score as a ratio of sums over items, such as right answers per item, or bits per byte."""

    name: str
    above: Float[np.ndarray, " items"]
    below: Float[np.ndarray, " items"]
    exponential: bool = False
    """Whether the score is exp of the ratio."""
    higher_is_better: bool = True

    @property
    def value(self) -> float:
        """The score."""
        return float(self._of(self.above.sum(), self.below.sum()))

    def interval(self, seed: int) -> Interval | None:
        """Its 95% interval; None for one item.

        Args:
            seed: of the resamples.
        """
        return None if len(self.above) < 2 else _percentiles(self._resampled(seed))

    def difference(self, other: "Measure", seed: int) -> tuple[float, Interval | None]:
        """How much more the other's score of the same items is, and the 95% interval of that; None for one item."""
        if len(self.above) != len(other.above):
            raise ValueError(f"measures of the same items are compared, got {len(self.above)} and {len(other.above)}")
        more = other.value - self.value
        if len(self.above) < 2:
            return more, None
        return more, _percentiles(other._resampled(seed) - self._resampled(seed))

    def _resampled(self, seed: int) -> Float[np.ndarray, " resamples"]:
        sums = [(self.above[items].sum(-1), self.below[items].sum(-1)) for items in _draws(len(self.above), seed)]
        above, below = (np.concatenate(parts) for parts in zip(*sums, strict=True))
        return self._of(above, below)

    def _of(self, above: np.ndarray, below: np.ndarray) -> np.ndarray:
        ratio = above / below
        return np.exp(np.minimum(ratio, 700.0)) if self.exponential else ratio


def share(name: str, right: list[bool]) -> Measure:
    """The share of items that are right."""
    return Measure(name, np.array(right, np.float64), np.ones(len(right)))


def interval_of(
    statistic: Callable[[np.ndarray, np.ndarray], np.ndarray], a: np.ndarray, b: np.ndarray, *, seed: int
) -> Interval | None:
    """The 95% interval of any score of pairs; None for one item.

    Args:
        statistic: `(a, b) -> score`, along the last axis.
        a: of each item one number.
        b: the other.
        seed: of the resamples.
    """
    if len(a) < 2:
        return None
    return _percentiles(np.concatenate([statistic(a[items], b[items]) for items in _draws(len(a), seed)]))


def interval_of_difference(
    statistic: Callable[[np.ndarray, np.ndarray], np.ndarray],
    given: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    *,
    seed: int,
) -> Interval | None:
    """The 95% interval of how much more the score of `b` is than that of `a`, of the same items; None for one.

    Args:
        statistic: `(given, a) -> score`, along the last axis.
        given: of each item what is right.
        a: what one says.
        b: what the other says.
        seed: of the resamples.
    """
    if len(given) < 2:
        return None
    draws = _draws(len(given), seed)
    return _percentiles(np.concatenate([statistic(given[n], b[n]) - statistic(given[n], a[n]) for n in draws]))


def _draws(items: int, seed: int) -> Iterator[np.ndarray]:
    """Places of the items of each resample, some resamples at a time."""
    generator = np.random.default_rng(seed)
    left = RESAMPLES
    while left:
        count = min(left, max(1, _AT_ONCE // items))
        yield generator.integers(items, size=(count, items))
        left -= count


def _percentiles(values: Float[np.ndarray, " resamples"]) -> Interval:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
