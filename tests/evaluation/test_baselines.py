"""Baselines against the xz format itself, brute-force counting, and the laws of probability."""

import lzma
import math
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cramjax.evaluation.baselines import bigram_bits, unigram_bits, xz_bits_per_byte


def test_xz_equals_the_preset(tmp_path: Path):
    raw = (Path(lzma.__file__).read_bytes() + Path(subprocess.__file__).read_bytes())[:90_000]
    path = tmp_path / "text"
    path.write_bytes(raw)
    assert xz_bits_per_byte(path) == 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / len(raw)


@pytest.mark.skipif(shutil.which("xz") is None, reason="needs the xz command")
def test_xz_equals_the_command(tmp_path: Path):
    raw = Path(subprocess.__file__).read_bytes()
    path = tmp_path / "text"
    path.write_bytes(raw)
    packed = subprocess.run(["xz", "-9e", "--stdout", str(path)], check=True, capture_output=True).stdout
    assert abs(xz_bits_per_byte(path) - 8 * len(packed) / len(raw)) <= 8 * 16 / len(raw)


def brute_force_bigram(train: list[int], heldout: list[int], vocab: int) -> float:
    """Interpolated Kneser-Ney written from its definition, one token at a time."""

    def discount(counts: list[int]) -> float:
        once, twice = counts.count(1), counts.count(2)
        return min(0.9, max(0.1, once / max(once + 2 * twice, 1)))

    pairs = Counter(zip(train, train[1:], strict=False))
    predecessors = Counter(w for _, w in pairs)
    followers = Counter(v for v, _ in pairs)
    context = Counter(train[:-1])
    d1, d2 = discount(list(predecessors.values())), discount(list(pairs.values()))

    def lower(w: int) -> float:
        return (max(predecessors[w] - d1, 0) + d1 * len(predecessors) / vocab) / len(pairs)

    bits = 0.0
    for v, w in zip(heldout, heldout[1:], strict=False):
        if context[v]:
            p = (max(pairs[v, w] - d2, 0) + d2 * followers[v] * lower(w)) / context[v]
        else:
            p = lower(w)
        bits -= math.log2(p)
    return bits


@pytest.mark.parametrize("seed", range(4))
def test_bigram_equals_brute_force(seed: int):
    rng = np.random.default_rng(seed)
    vocab = 17
    train = np.minimum(rng.geometric(0.3, size=300), vocab - 2).astype(np.uint16)
    heldout = np.minimum(rng.geometric(0.25, size=200), vocab - 1).astype(np.uint16)
    expected = brute_force_bigram(train.tolist(), heldout.tolist(), vocab)
    np.testing.assert_allclose(bigram_bits(train, heldout, vocab), expected, rtol=1e-12)


def test_bigram_is_a_distribution_in_every_context():
    train = np.random.default_rng(0).integers(0, 9, size=60).astype(np.uint32)
    vocab = 12
    for context in range(vocab):
        bits = [bigram_bits(train, np.array([context, word], np.uint32), vocab) for word in range(vocab)]
        assert math.isclose(sum(2.0**-x for x in bits), 1.0, rel_tol=1e-12)


def test_unigram_is_the_cross_entropy_of_the_frequencies():
    # Every type occurs often, so the discount is its floor of 0.1 and the mixture is known in closed form.
    train = np.repeat(np.arange(4, dtype=np.uint16), [400, 300, 200, 100])
    probability = (np.array([400, 300, 200, 100]) - 0.1 + 0.1 * 4 / 4) / 1000
    heldout = np.array([3, 0, 0, 1, 2], np.uint16)
    expected = -np.log2(probability[[0, 0, 1, 2]]).sum()
    assert math.isclose(unigram_bits(train, heldout, 4), expected, rel_tol=1e-12)


def test_unseen_tokens_cost_finite_bits():
    train = np.zeros(100, np.uint16)
    heldout = np.array([0, 9, 9, 5], np.uint16)
    assert math.isfinite(unigram_bits(train, heldout, 10))
    assert math.isfinite(bigram_bits(train, heldout, 10))


def test_order_of_strength_on_real_text():
    """On text with structure a bigram beats a unigram: both orders fit on one half of a file, scored on the other."""
    raw = np.frombuffer(Path(subprocess.__file__).read_bytes(), np.uint8).astype(np.uint16)
    half = len(raw) // 2
    assert bigram_bits(raw[:half], raw[half:], 256) < 0.85 * unigram_bits(raw[:half], raw[half:], 256)
