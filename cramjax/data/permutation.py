"""A pseudo-random permutation of 0 … n-1 computed point by point, in no memory: what shuffling is made of here."""

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6


def permute(indices: NDArray[np.int64], size: int, seed: int, epochs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Images of indices under the permutation of 0 … size-1 that belongs to (seed, epoch).

    A balanced Feistel network on the smallest even number of bits that holds `size`, walked until it lands below `size`
    (cycle walking: Black & Rogaway 2002, section 3).

    Args:
        indices: Each in 0 … size-1.
        size: Length of the permutation.
        seed: Any integer.
        epochs: One for each index.

    Returns:
        Same shape as `indices`.
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    keys = _mix(_mix(np.uint64(seed % 2**64)) ^ epochs.astype(np.uint64))
    values = indices.astype(np.uint64)
    outside = np.ones(values.shape, bool)
    while outside.any():
        values[outside] = _feistel(values[outside], keys[outside], half)
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], keys: NDArray[np.uint64], half: np.uint64) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for round_number in range(ROUNDS):
        left, right = right, left ^ (_mix(right + _mix(keys + np.uint64(round_number))) & mask)
    return left << half | right


def _mix(values: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014), on arrays: arithmetic is modulo 2⁶⁴."""
    mixed = np.atleast_1d(np.asarray(values, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
