"""Packs examples into rows, and deals rows out: any position of a run, in any batch split, without state."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Int32
from numpy.typing import NDArray

from cramjax.data.permutation import permute

PACKING_SEED = 0
"""Of the order in which examples are packed, which is the same for all runs: they shuffle rows."""


def first_fit(lengths: Sequence[int], capacity: int) -> NDArray[np.int64]:
    """The row of each item, if each in turn is put into the first row that has room for it.

    A tournament tree of the room in rows finds it in logarithmic time (Johnson 1973, "Near-optimal bin packing
    algorithms", section 2.1).

    Args:
        lengths: Of the items, each at most `capacity`.
        capacity: Room in a row.
    """
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room, found = [capacity] * (2 * leaves), np.zeros(len(lengths), np.int64)
    for item, length in enumerate(lengths):
        node = 1
        while node < leaves:
            node *= 2
            node += room[node] < length
        room[node] -= length
        found[item] = node - leaves
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return found


def pack(numbers: NDArray[np.int64], lengths: NDArray[np.int64], capacity: int) -> tuple[NDArray, NDArray]:
    """Examples by row: their numbers in the order of the rows, and where in it each row begins and the last one ends.

    Args:
        numbers: Of the examples.
        lengths: Their tokens.
        capacity: Tokens in a row.
    """
    count = len(numbers)
    shuffled = permute(np.arange(count), count, PACKING_SEED, np.zeros(count, np.int64))
    rows = first_fit(lengths[shuffled].tolist(), capacity)
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows))]).astype(np.int64)
    return numbers[shuffled[np.argsort(rows, kind="stable")]], starts


class RowFile(Protocol):
    """What rows come from: packed examples, or labelled ones."""

    @property
    def length(self) -> int:
        """Tokens that the model sees of a row."""
        ...

    @property
    def token_count(self) -> int:
        """Tokens of all examples."""
        ...

    def __len__(self) -> int:
        """Rows."""
        ...

    def row(self, number: int) -> Int32[np.ndarray, "3 tokens"]:
        """One row."""
        ...


@dataclass(frozen=True)
class ExampleRows:
    """The rows of a file over epochs without end; as `cramjax.data.Sequences` are those of a token file.

    Of n rows, position p of a run is in epoch p // n. Each epoch has an order of its own.

    Args:
        file: Where rows come from.
        seed: Of the shuffles.
    """

    file: RowFile
    seed: int = 0

    def __len__(self) -> int:
        """Rows per epoch."""
        return len(self.file)

    @property
    def sequence_length(self) -> int:
        """Tokens that the model sees of a row."""
        return self.file.length

    @property
    def tokens(self) -> int:
        """Tokens of all examples."""
        return self.file.token_count

    def take(self, position: int, count: int) -> Int32[np.ndarray, "batch 3 tokens"]:
        """The rows at `position` to `position + count - 1`, counted from the start of the run: int32 (count, 3, length
        + 1), each as of the file's `row`.
        """
        epochs, indices = np.divmod(np.arange(position, position + count, dtype=np.int64), len(self))
        return np.stack([self.file.row(int(row)) for row in permute(indices, len(self), self.seed, epochs)])
