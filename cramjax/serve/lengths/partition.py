"""Which texts go together: the cheapest runs of texts sorted by length, by dynamic programming.

With costs that grow with the longest text of a batch, some best set of batches is made of such runs (TurboTransformers;
Fang et al. 2020, section 5, algorithm 2).
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

Cost = Callable[
    [Int[np.ndarray, "*ends"], Int[np.ndarray, "*ends"], Int[np.ndarray, "*ends"]], Float[np.ndarray, "*ends"]
]
"""`(longest, texts, tokens) -> seconds` of batches; infinity where a batch cannot be."""

_ENDS = 1024
"""Ends of runs whose costs are looked up together."""


def partition(lengths: Sequence[int], cost: Cost, most: int) -> list[tuple[int, int]]:
    """The runs [start, stop) of texts whose costs add up to the least.

    With S(i) the least cost of the first i texts, S(i) = min over j of S(j) + cost of the texts from j to i. Of equals
    it takes the fewest texts in the last run.

    Args:
        lengths: tokens of each text, rising.
        cost: of batches; at least that of a single text is finite.
        most: texts of a batch.

    Raises:
        ValueError: lengths that fall.
    """
    sizes = np.asarray(lengths, np.int64)
    if (np.diff(sizes) < 0).any():
        raise ValueError("lengths must not fall: sort them")
    before = np.concatenate([[0], np.cumsum(sizes)])
    least, begins = np.zeros(len(sizes) + 1), np.zeros(len(sizes) + 1, np.int64)
    for first in range(1, len(sizes) + 1, _ENDS):
        stops = np.arange(first, min(first + _ENDS, len(sizes) + 1))[:, None]
        counts = np.arange(1, min(most, len(sizes)) + 1)
        starts = np.maximum(stops - counts, 0)
        seconds = cost(sizes[stops - 1] + 0 * counts, stops - starts, before[stops] - before[starts])
        for stop, own, each in zip(stops[:, 0], starts, seconds, strict=True):
            whole = least[own] + each
            at = int(np.argmin(whole))
            least[stop], begins[stop] = whole[at], own[at]
    runs, stop = [], len(sizes)
    while stop:
        runs.append((int(begins[stop]), stop))
        stop = runs[-1][0]
    return runs[::-1]
