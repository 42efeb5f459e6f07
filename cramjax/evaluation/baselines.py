"""What the held-out text costs without a neural network: `xz -9e`, and unigram and bigram models of the same tokens.

All three are in bits per UTF-8 byte of the held-out text, as the model's own score is, so one chart compares them.
"""

import lzma
from pathlib import Path

import numpy as np
from jaxtyping import Float, Integer

from cramjax.data import PreparedData

FIT_MAX_TOKENS = 2**24
"""Most training tokens that the n-gram baselines are fit on; bounds them to about 0.5 GB and a few seconds."""


def baselines(prepared: PreparedData) -> dict[str, float]:
    """Bits per byte of the held-out text under `xz`, `unigram` and `bigram`.

    Args:
        prepared: the prepared data of a run; the n-gram models are fit on its training tokens and see the held-out
            tokens once. Of corpora with more than `FIT_MAX_TOKENS` only the first part is read, and xz sees the
            held-out text that was kept (at most 16 MiB).
    """
    train = np.asarray(prepared.train.tokens[:FIT_MAX_TOKENS])
    heldout = np.asarray(prepared.validation.tokens[:FIT_MAX_TOKENS])
    vocab = prepared.tokenizer.vocab_size
    read_bytes = prepared.validation.text_bytes * len(heldout) / len(prepared.validation.tokens)
    return {
        "xz": xz_bits_per_byte(prepared.validation_text),
        "unigram": unigram_bits(train, heldout, vocab) / read_bytes,
        "bigram": bigram_bits(train, heldout, vocab) / read_bytes,
    }


def xz_bits_per_byte(text: Path) -> float:
    """Bits per byte of a file under `xz -9e`, container included."""
    raw = text.read_bytes()
    # A dictionary longer than the text finds nothing more, and costs ten times its size in memory.
    dictionary = max(4096, min(2**26, 1 << (len(raw) - 1).bit_length()))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}]
    packed = lzma.compress(raw, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, filters=filters)
    return 8 * len(packed) / len(raw)


def unigram_bits(
    train: Integer[np.ndarray, " tokens"], heldout: Integer[np.ndarray, " heldout"], vocab_size: int
) -> float:
    """Bits that the held-out tokens after the first cost under the training tokens' frequencies.

    Frequencies are discounted and mixed with the uniform distribution (see `interpolated`).
    """
    probability = interpolated(np.bincount(train, minlength=vocab_size))
    return float(-np.log2(probability[heldout[1:]]).sum())


def bigram_bits(
    train: Integer[np.ndarray, " tokens"], heldout: Integer[np.ndarray, " heldout"], vocab_size: int
) -> float:
    """Bits that the held-out tokens after the first cost under an interpolated Kneser-Ney bigram model.

    p(w | v) = (max(c(v w) - D, 0) + D · N(v ·) · p(w)) / c(v), where N(v ·) counts the distinct successors of v and
    p(w) is proportional to the distinct predecessors of w (itself mixed with the uniform distribution). A context never
    seen in training leaves p(w).

    Source: Kneser & Ney 1995; the interpolated form is that of Chen & Goodman 1999, section 2.7.
    """
    pairs, counts = np.unique(_pairs(train, vocab_size), return_counts=True)
    contexts = np.bincount(train[:-1], minlength=vocab_size)
    successors = np.bincount(pairs // vocab_size, minlength=vocab_size)
    continuation = interpolated(np.bincount(pairs % vocab_size, minlength=vocab_size))
    discount = absolute_discount(counts)

    wanted = _pairs(heldout, vocab_size)
    at = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    count = np.where(pairs[at] == wanted, counts[at], 0)
    before, after = heldout[:-1], heldout[1:]
    seen = contexts[before]
    backoff = np.where(seen > 0, discount * successors[before], 1.0)
    probability = (np.maximum(count - discount, 0.0) + backoff * continuation[after]) / np.maximum(seen, 1)
    return float(-np.log2(probability).sum())


def interpolated(counts: Integer[np.ndarray, " vocab"]) -> Float[np.ndarray, " vocab"]:
    """A distribution from counts: what absolute discounting takes from the seen is shared out uniformly."""
    discount = absolute_discount(counts)
    taken = discount * np.count_nonzero(counts)
    return (np.maximum(counts - discount, 0.0) + taken / len(counts)) / counts.sum()


def absolute_discount(counts: Integer[np.ndarray, " types"]) -> float:
    """The discount n₁ / (n₁ + 2 n₂), from how many types occur once and twice; kept within [0.1, 0.9].

    Source: Ney, Essen & Kneser 1994, equation 17.
    """
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    return float(np.clip(once / max(once + 2 * twice, 1), 0.1, 0.9))


def _pairs(tokens: Integer[np.ndarray, " tokens"], vocab_size: int) -> Integer[np.ndarray, " tokens-1"]:
    wide = tokens.astype(np.int64)
    return wide[:-1] * vocab_size + wide[1:]
