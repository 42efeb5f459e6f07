"""Codes of a few bits packed into 32-bit words, the lowest bits first, as GPTQ and compressed-tensors keep them.

A run of codes is one stream of bits: of 3 bits, some codes straddle two words.
"""

import numpy as np
from jaxtyping import Int32, UInt8


def packed(codes: UInt8[np.ndarray, "rows codes"], bits: int) -> Int32[np.ndarray, "rows words"]:
    """Each row in words of its own; zeros fill up the last one.

    Args:
        codes: from 0 to 2^bits - 1.
        bits: of a code.
    """
    rows, count = codes.shape
    stream = codes[..., None] >> np.arange(bits, dtype=np.uint8) & 1
    stream = np.pad(stream.reshape(rows, -1), ((0, 0), (0, -count * bits % 32)))
    return np.packbits(stream, axis=1, bitorder="little").view("<i4")


def unpacked_codes(words: Int32[np.ndarray, "rows words"], bits: int, count: int) -> UInt8[np.ndarray, "rows codes"]:
    """The first `count` codes of each row."""
    stream = np.unpackbits(np.ascontiguousarray(words, "<i4").view(np.uint8), axis=1, bitorder="little")
    stream = stream[:, : count * bits].reshape(len(words), count, bits)
    return (stream << np.arange(bits, dtype=np.uint8)).sum(axis=-1, dtype=np.uint8)
