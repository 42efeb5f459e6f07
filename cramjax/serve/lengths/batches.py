"""Texts as batches: which go together, and each batch as one buffer."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from cramjax.model.ragged import Ragged, ragged
from cramjax.serve.lengths.costs import Costs
from cramjax.serve.lengths.partition import partition
from cramjax.serve.lengths.shapes import Shape, shape_of

MOST_TEXTS = 256
"""Of a batch."""
COMPILING = 2.0
"""Seconds to compile a program: 1.6 for six layers, scanned, on 2 cores."""


class Batch(NamedTuple):
    """Some of the texts that were given, by their numbers, and the shape of the buffer that holds them."""

    texts: tuple[int, ...]
    shape: Shape


class Programs:
    """The shapes that have programs, for one who asks again and again, and what lacking others has cost."""

    def __init__(self, compiling: float = COMPILING):
        """None yet.

        Args:
            compiling: seconds that a program takes to compile. 0: each batch has the least shape that holds it.
        """
        self._compiling = compiling
        self._kept: set[Shape] = set()
        self._paid: defaultdict[Shape, float] = defaultdict(float)

    def given(self, shapes: Sequence[Shape], costs: Costs) -> dict[Shape, Shape]:
        """The shape that each gets: one that there is, until that has cost more than to compile its own.

        Args:
            shapes: the least of each batch.
            costs: of batches.
        """
        given: dict[Shape, Shape] = {}
        for shape, count in sorted(Counter(shapes).items(), reverse=True):
            others = [(float(costs.of_shape(kept)), kept) for kept in self._kept if kept.holds(shape)]
            seconds, other = min(others, default=(np.inf, shape))
            more = count * max(0.0, seconds - float(costs.of_shape(shape)))
            if others and self._paid[shape] + more < self._compiling:
                self._paid[shape] += more
                given[shape] = other
            else:
                self._kept.add(shape)
                given[shape] = shape
        return given


def batches(lengths: Sequence[int], costs: Costs, programs: Programs | None = None) -> list[Batch]:
    """All texts in the batches that take the least time together, the longest texts first.

    So a batch that is too large for the machine's memory is found at once.

    Args:
        lengths: tokens of each text, at least one.
        costs: of batches.
        programs: that there are. Default: none yet, so that a batch's shape depends on nothing else.
    """
    order = np.argsort(np.asarray(lengths, np.int64), kind="stable")
    sizes = np.asarray(lengths, np.int64)[order]
    runs = partition(sizes.tolist(), costs.seconds, MOST_TEXTS)[::-1]
    least = [Shape(*map(int, shape_of(*_totals(sizes[slice(*run)]), costs.context))) for run in runs]
    given = (programs or Programs()).given(least, costs)
    return [Batch(tuple(order[slice(*run)].tolist()), given[shape]) for run, shape in zip(runs, least, strict=True)]


def _totals(sizes: Int[np.ndarray, " texts"]) -> tuple[int, int, int]:
    return int(sizes.max()), len(sizes), int(sizes.sum())


def ragged_of(batch: Batch, texts: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None) -> Ragged:
    """A batch's buffer.

    Args:
        batch: from `batches`.
        texts: all texts that were given, as ids.
        types: which of two texts each token of each is of. Default: none are told apart.
    """
    places, rows, longest = batch.shape
    own = None if types is None else [types[text] for text in batch.texts]
    return ragged([texts[n] for n in batch.texts], places=places, rows=rows, longest=longest, types=own)  # pyright: ignore[reportArgumentType]
