"""QMoE's code: 2¹⁶ words, each of up to 14 pairs of ternary values, the likeliest where most values are zero.

Every prefix of a word is a word, so the longest that a row goes on with is found by walking down a tree, and any row
can be written. Rows are written each by itself: they are read, and multiplied, independently.

Source: Frantar and Alistarh 2023, QMoE: Practical Sub-1-Bit Compression of Trillion-Parameter Models, arXiv:2310.16795,
section 4 and appendix A.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Int32, UInt8, UInt16, UInt32

WORDS = 1 << 16
MOST_PAIRS = 14
"""Of a word: 28 values of 2 bits, and its length, in 64 bits."""
ZEROS = 0.885
"""Share of zeros for which the words are the likeliest (section 4.3)."""
_ROOT = WORDS


@dataclass(frozen=True)
class Dictionary:
    """The words."""

    values: np.ndarray
    """uint64 (65536,): a word's values, 2 bits each from the lowest up; 0 past its end."""
    pairs: np.ndarray
    """uint8 (65536,): how many pairs of values it has."""
    longer: np.ndarray
    """int32 (65537, 9): the word with one more pair; -1: there is none. The last row is of the empty word."""

    @property
    def table(self) -> UInt32[np.ndarray, "65536 2"]:
        """What kernels read: 16 values in the first number; 12 in the second, and the pairs in its highest 4 bits."""
        low = self.values & np.uint64(0xFFFFFFFF)
        high = (self.values >> np.uint64(32)) | (self.pairs.astype(np.uint64) << np.uint64(28))
        return np.stack([low, high], axis=1).astype(np.uint32)


@cache
def dictionary() -> Dictionary:
    """The 2¹⁶ likeliest sequences of pairs whose values are 0 with probability `ZEROS`, else 1 or 2.

    Sequences of one likelihood are taken in the order of their values.
    """
    # The likelihood is told by how many values are zero and how many are not: find the last such class that has room.
    likelihood: dict[tuple[int, int], float] = {}
    for values in range(2, 2 * MOST_PAIRS + 1, 2):
        for others in range(values + 1):
            chance = (values - others) * math.log(ZEROS) + others * math.log((1 - ZEROS) / 2)
            likelihood[values, others] = chance
    least, room = 0.0, WORDS
    for (values, others), chance in sorted(likelihood.items(), key=lambda item: -item[1]):
        least, room = chance, room - math.comb(values, others) * 2**others
        if room <= 0:
            break
    # A word's first pairs are likelier than it is: growing what is likely enough finds all.
    grown = [(np.zeros(1, np.uint64), np.zeros(1, np.int64))]
    for pair in range(MOST_PAIRS):
        before, others_before = grown[-1]
        first, second = np.divmod(np.arange(9), 3)
        own = (first | second << 2).astype(np.uint64) << np.uint64(4 * pair)
        values = (before[:, None] | own).ravel()
        others = (others_before[:, None] + (first > 0) + (second > 0)).ravel()
        chances = np.asarray([likelihood.get((2 * (pair + 1), n), -math.inf) for n in range(2 * (pair + 1) + 1)])
        likely = chances[others] >= least
        grown.append((values[likely], others[likely]))
    values = np.concatenate([own for own, _ in grown[1:]])
    pairs = np.concatenate([np.full(len(own), n, np.uint8) for n, (own, _) in enumerate(grown[1:], 1)])
    chances = np.concatenate(
        [
            np.asarray([likelihood[2 * n, k] for k in range(2 * n + 1)])[others]
            for n, (_, others) in enumerate(grown[1:], 1)
        ]
    )
    order = np.lexsort((values, pairs, -chances))[:WORDS]
    values, pairs = values[order], pairs[order]
    return Dictionary(values, pairs, _tree(values, pairs))


def _tree(values: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    keys = values | pairs.astype(np.uint64) << np.uint64(4 * MOST_PAIRS)
    order = np.argsort(keys)
    last = (pairs - 1).astype(np.uint64)
    shorter = values & ~(np.uint64(15) << (np.uint64(4) * last))
    parents = order[np.searchsorted(keys, shorter | last << np.uint64(4 * MOST_PAIRS), sorter=order) % WORDS]
    parents = np.where(pairs == 1, _ROOT, parents)
    pair = (values >> (np.uint64(4) * last)) & np.uint64(15)
    longer = np.full((WORDS + 1, 9), -1, np.int32)
    longer[parents, (pair & np.uint64(3)) * np.uint64(3) + (pair >> np.uint64(2))] = np.arange(WORDS)
    return longer


def encode(
    values: UInt8[np.ndarray, "rows columns"],
) -> tuple[UInt16[np.ndarray, " words"], Int32[np.ndarray, " ends"]]:
    """Write each row with the longest words that it goes on with.

    Args:
        values: 0, 1 or 2 each. Rows of an odd length are written with a 0 after them.

    Returns:
        The words of all rows, one row after the other, and where each begins, with the end (rows + 1,).
    """
    rows, columns = values.shape
    if columns % 2:
        values = np.pad(values, ((0, 0), (0, 1)))
    pairs = (3 * values[:, ::2] + values[:, 1::2]).T.astype(np.int32)
    longer = dictionary().longer
    words = np.zeros((len(pairs), rows), np.uint16)
    there = np.zeros((len(pairs), rows), bool)  # at the pair after a word's last one
    word = longer[_ROOT, pairs[0]]
    for place, pair in enumerate(pairs[1:]):
        grown = longer[word, pair]
        ended = grown < 0
        words[place], there[place] = word, ended
        word = np.where(ended, longer[_ROOT, pair], grown)
    words[-1], there[-1] = word, True
    starts = np.concatenate([[0], np.cumsum(there.sum(axis=0))]).astype(np.int32)
    return words.T[there.T], starts


def decode(words: UInt16[np.ndarray, " words"], rows: int, columns: int) -> UInt8[np.ndarray, "rows columns"]:
    """The values of `rows` rows of `columns` values, from their words, one row after the other.

    Raises:
        ValueError: the words are not those of so many values.
    """
    book = dictionary()
    lengths = 2 * book.pairs[words].astype(np.int64)
    even = columns + columns % 2
    if lengths.sum() != rows * even:
        raise ValueError(f"{len(words)} words hold {lengths.sum()} values, and {rows} rows of {even} are wanted")
    which = np.repeat(np.arange(len(words)), lengths)
    place = np.arange(rows * even) - (np.cumsum(lengths) - lengths)[which]
    values = book.values[words[which]] >> (2 * place).astype(np.uint64) & np.uint64(3)
    return values.astype(np.uint8).reshape(rows, even)[:, :columns]
