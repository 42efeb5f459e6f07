"""The few shapes that buffers come in, so that few programs are compiled: a shape that holds some texts, rounded up."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

MOST_PLACES = 8192
"""Of a buffer, unless a single text is longer."""
_MOST_PADDED = 2 * MOST_PLACES
"""Places of the rows that attention reads, likewise."""
_LEAST_LENGTH = 16
_UNIT = 64
"""Places come in multiples of so many, or of an eighth of the power of two below them."""

Number = int | Int[np.ndarray, "*batches"]


class Shape(NamedTuple):
    """The shape of a buffer, or arrays of such."""

    places: Number
    """Tokens in the buffer: what everything but attention computes on."""
    rows: Number
    longest: Number
    """Texts, and tokens of each, that attention computes on."""

    @property
    def padded(self) -> Number:
        """Places of the rows that attention reads."""
        return self.rows * self.longest

    @property
    def pairs(self) -> Number:
        """Pairs of query and key, padding included."""
        return self.padded * self.longest

    def holds(self, other: "Shape") -> bool:
        """Whether what lies in a buffer of another shape could lie in one of this."""
        room = self.places >= other.places or self.places == self.padded
        return bool(room and self.rows >= other.rows and self.longest >= other.longest)

    @property
    def fits(self) -> bool | np.ndarray:
        """Whether it is not too large for several texts."""
        return (self.places <= MOST_PLACES) & (self.padded <= _MOST_PADDED)


def shape_of(longest: Number, texts: Number, tokens: Number, context: int) -> Shape:
    """The least shape that holds some texts: a padded batch where that is no larger.

    Args:
        longest: tokens of the longest of them.
        texts: how many.
        tokens: of all.
        context: most tokens of any text.
    """
    length = np.minimum(np.maximum(_rounded(longest, 2), _LEAST_LENGTH), context)
    rows = _rounded(texts, 2)
    unit = np.maximum(_power_below(tokens) // 8, _UNIT)
    return Shape(np.minimum(-(-np.asarray(tokens) // unit) * unit, rows * length), rows, length)


def _power_below(number: Number) -> np.ndarray:
    """The greatest power of two that is not above a number from 1 on."""
    return np.left_shift(1, np.frexp(np.asarray(number, np.float64))[1].astype(np.int64) - 1)


def _rounded(number: Number, steps: int) -> np.ndarray:
    """The least number not below one, of so many evenly spaced between each power of two and the next."""
    unit = np.maximum(_power_below(number) // steps, 1)
    return -(-np.asarray(number, np.int64) // unit) * unit
