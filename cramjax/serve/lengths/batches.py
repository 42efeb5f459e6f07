"""Texts as batches: which go together, and each batch as one buffer."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from cramjax.model.ragged import Ragged, ragged
from cramjax.serve.lengths.costs import Costs
from cramjax.serve.lengths.partition import partition
from cramjax.serve.lengths.shapes import Shape, shape_of

MOST_TEXTS = 256
"""Of a batch."""


class Batch(NamedTuple):
    """Some of the texts that were given, by their numbers, and the shape of the buffer that holds them."""

    texts: tuple[int, ...]
    shape: Shape


def batches(lengths: Sequence[int], costs: Costs) -> Iterator[Batch]:
    """All texts in the batches that take the least time together, the longest texts first.

    So a batch that is too large for the machine's memory is found at once.

    Args:
        lengths: tokens of each text, at least one.
        costs: of batches.
    """
    order = np.argsort(np.asarray(lengths), kind="stable")
    sizes = np.asarray(lengths, np.int64)[order]
    for start, stop in reversed(partition(sizes.tolist(), costs.seconds, MOST_TEXTS)):
        own = sizes[start:stop]
        shape = shape_of(int(own[-1]), len(own), int(own.sum()), costs.context)
        yield Batch(tuple(order[start:stop].tolist()), Shape(*map(int, shape)))


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
