"""An entropy code for ternary values, for files: within a few percent of what their shares say, whatever these are.

Five values are a symbol of 243. A stream holds the symbols of some rows, in turn by eight states of a range coder
(rANS: Duda 2013, arXiv:1311.2540, section 3, with the interleaving of Giesen 2014, arXiv:1402.3392): 32 bits each,
renewed by 16 at a time. States cost 256 bits a stream, so several rows share one. All streams are written and read side
by side.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8, UInt16, UInt32

TOGETHER = 5
"""Values of a symbol."""
SYMBOLS = 3**TOGETHER
LANES = 8
"""States of a stream."""
VALUES = 1 << 16
"""Of a stream, or of 32 rows if these have more: its states and its beginning are then less than 1% of it."""
_SCALE = 12
"""Frequencies sum up to 2 to this power."""
_LEAST = np.uint64(1 << 16)
"""Of a state."""
_POWERS = 3 ** np.arange(TOGETHER)


@dataclass(frozen=True)
class Coded:
    """Values as written."""

    words: UInt16[np.ndarray, " words"]
    """Of all streams, one after the other."""
    starts: UInt32[np.ndarray, " streams"]
    """Where each stream begins."""
    states: UInt32[np.ndarray, "streams 8"]
    """With which each is read."""
    frequencies: UInt16[np.ndarray, " 243"]
    """Of the symbols, out of 4096."""

    @property
    def bits(self) -> int:
        """Of all parts."""
        return 8 * sum(part.nbytes for part in (self.words, self.starts, self.states, self.frequencies))


def encode(values: UInt8[np.ndarray, "rows columns"]) -> Coded:
    """Write rows of 0, 1 and 2."""
    symbols = _symbols(values)
    frequencies = _frequencies(np.bincount(symbols.ravel(), minlength=SYMBOLS))
    starts = (np.cumsum(frequencies) - frequencies).astype(np.uint64)
    often = frequencies.astype(np.uint64)
    streams, steps, _ = symbols.shape
    state = np.full((streams, LANES), _LEAST, np.uint64)
    words = np.zeros(symbols.shape, np.uint16)
    there = np.zeros(symbols.shape, bool)
    for step in reversed(range(steps)):
        own = symbols[:, step]
        full = state >= often[own] << np.uint64(32 - _SCALE)
        words[:, step], there[:, step] = state & np.uint64(0xFFFF), full
        state = np.where(full, state >> np.uint64(16), state)
        whole, rest = np.divmod(state, often[own])
        state = (whole << np.uint64(_SCALE)) + rest + starts[own]
    ends = np.cumsum(there.sum(axis=(1, 2)))
    begins = np.concatenate([[0], ends[:-1]]).astype(np.uint32)
    return Coded(words[there], begins, state.astype(np.uint32), frequencies)


def decode(coded: Coded, rows: int, columns: int) -> UInt8[np.ndarray, "rows columns"]:
    """The values of `rows` rows of `columns` values.

    Raises:
        ValueError: they are not what was written.
    """
    frequencies = coded.frequencies.astype(np.uint64)
    streams = -(-rows // _rows(columns))
    if len(frequencies) != SYMBOLS or frequencies.sum() != 1 << _SCALE or coded.states.shape != (streams, LANES):
        raise ValueError("frequencies or states are not those of an entropy code of so many rows")
    of_slot = np.repeat(np.arange(SYMBOLS), frequencies.astype(np.int64))
    starts = np.cumsum(frequencies) - frequencies
    symbols = np.zeros((streams, _steps(columns), LANES), np.int64)
    state, at = coded.states.astype(np.uint64), coded.starts.astype(np.int64)
    words = np.append(coded.words, np.uint16(0)).astype(np.uint64)
    for step in range(symbols.shape[1]):
        slot = state & np.uint64((1 << _SCALE) - 1)
        own = of_slot[slot.astype(np.int64)]
        symbols[:, step] = own
        state = frequencies[own] * (state >> np.uint64(_SCALE)) + slot - starts[own]
        empty = state < _LEAST
        place = np.minimum(at[:, None] + np.cumsum(empty, axis=1) - empty, len(coded.words))
        state = np.where(empty, state << np.uint64(16) | words[place], state)
        at = at + empty.sum(axis=1)
    if (state != _LEAST).any() or (at != np.append(coded.starts[1:], len(coded.words))).any():
        raise ValueError("words do not end where their streams do")
    values = (symbols[..., None] // _POWERS % 3).astype(np.uint8)
    return values.reshape(streams, -1)[:, : _rows(columns) * columns].reshape(-1, columns)[:rows]


def entropy(share: float) -> float:
    """Bits of a value that is 0 with a probability, and else one of two that are as likely."""
    others = 1 - share
    return float(-share * np.log2(share) - others * np.log2(others / 2)) if 0 < share < 1 else float(others)


def _rows(columns: int) -> int:
    """Of a stream."""
    return max(32, -(-VALUES // columns))


def _steps(columns: int) -> int:
    return -(-_rows(columns) * columns // (TOGETHER * LANES))


def _symbols(values: UInt8[np.ndarray, "rows columns"]) -> np.ndarray:
    """Of each stream, those of each step (streams, steps, 8); zeros fill up the last one."""
    rows, columns = values.shape
    together = _rows(columns)
    streams, size = -(-rows // together), _steps(columns) * LANES * TOGETHER
    padded = np.zeros((streams, size), np.uint8)
    full = np.zeros((streams * together, columns), np.uint8)
    full[:rows] = values
    padded[:, : together * columns] = full.reshape(streams, -1)
    return (padded.reshape(streams, -1, LANES, TOGETHER) * _POWERS).sum(axis=-1)


def _frequencies(counts: np.ndarray) -> np.ndarray:
    """Shares of symbols in parts of 4096; those that are there have one at least."""
    there = counts > 0
    given = np.maximum(there, np.round(counts / counts.sum() * (1 << _SCALE))).astype(np.int64)
    while over := int(given.sum()) - (1 << _SCALE):  # what is too much, those give back that lose least by it
        able = np.flatnonzero(given > 1 if over > 0 else there)
        change = able[np.argsort(np.sign(over) * counts[able] / given[able], kind="stable")][: abs(over)]
        given[change] -= np.sign(over)
    return given.astype(np.uint16)
