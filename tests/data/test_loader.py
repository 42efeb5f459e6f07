"""Sequences by position, and reading ahead of them."""

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cramjax.data import loader
from cramjax.data.loader import Prefetcher, Sequences, require_sequences
from cramjax.data.store import TokenFile
from cramjax.errors import DataError


def stream(tokens: int, ends: tuple[int, ...] = ()) -> TokenFile:
    return TokenFile(np.arange(tokens, dtype=np.uint16), text_bytes=4 * tokens, sentence_ends=ends)


@given(st.integers(20, 500), st.integers(1, 19), st.sampled_from([0, 1]), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_every_sequence_once(tokens: int, length: int, extra: int, epoch: int):
    sequences = Sequences(stream(tokens), length, extra, seed=5)
    count = len(sequences)
    rows = sequences.take(epoch * count, count)
    expected = [list(range(i * length, i * length + length + extra)) for i in range(count)]
    assert sorted(rows.tolist()) == expected
    assert expected[-1][-1] <= tokens - 1 < expected[-1][-1] + length  # nothing but an incomplete sequence is left out
    assert rows.dtype == np.int32


@given(st.lists(st.integers(1, 40), min_size=1, max_size=10), st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_taking_does_not_depend_on_the_batch_split(counts: list[int], start: int):
    sequences = Sequences(stream(300), 7, 1, seed=2)
    positions = start + np.concatenate([[0], np.cumsum(counts)])
    parts = [sequences.take(int(position), count) for position, count in zip(positions, counts, strict=False)]
    np.testing.assert_array_equal(np.concatenate(parts), sequences.take(start, sum(counts)))


def test_epochs_and_seeds_shuffle_anew():
    sequences = Sequences(stream(1000), 10)
    assert not np.array_equal(sequences.take(0, 100), sequences.take(100, 100))
    assert not np.array_equal(sequences.take(0, 100), Sequences(stream(1000), 10, seed=1).take(0, 100))


def test_curriculum_goes_from_short_sentences_to_long_ones():
    # Token 9 ends a sentence. Ends per sequence of four: 0, 2, 1, 4, 2.
    tokens = np.array([1, 2, 3, 4, 9, 2, 9, 4, 1, 2, 3, 9, 9, 9, 9, 9, 5, 9, 9, 6], np.uint16)
    sequences = Sequences(TokenFile(tokens, 20, sentence_ends=(9,)), 4, order="sentence_length")
    expected = tokens.reshape(5, 4)[[3, 1, 4, 2, 0]]
    np.testing.assert_array_equal(sequences.take(0, 5), expected)
    np.testing.assert_array_equal(sequences.take(5, 10), np.concatenate([expected, expected]))


def test_curriculum_in_chunks_equals_one_stable_sort(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(loader, "CHUNK_SEQUENCES", 13)
    tokens = np.random.default_rng(0).integers(0, 6, 1000).astype(np.uint16)
    file = TokenFile(tokens, 1000, path=tmp_path / "train.tokens", sentence_ends=(1, 4))
    rows = tokens[:996].reshape(-1, 6)
    expected = rows[np.argsort(-np.isin(rows, [1, 4]).sum(axis=1), kind="stable")]
    for _ in range(2):  # Made, then read back from its file.
        np.testing.assert_array_equal(Sequences(file, 6, order="sentence_length").take(0, 166), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["train.order-166x6.npy"]


def test_sixteen_and_thirty_two_bit_ids():
    wide = TokenFile(np.array([70000, 1, 2, 3], np.uint32), 4)
    assert Sequences(wide, 4).take(0, 1).tolist() == [[70000, 1, 2, 3]]


def test_too_little_data_for_a_batch():
    sequences = Sequences(stream(100), 10, 1)
    require_sequences(sequences, 9)
    with pytest.raises(
        DataError, match=r"makes 9 sequences of 10 tokens \(100 tokens\), fewer than the 10 of one batch"
    ):
        require_sequences(sequences, 10)
    with pytest.raises(DataError, match="makes 0 sequences"):
        Sequences(stream(10), 10, 1).take(0, 1)


def test_prefetcher_yields_what_take_does():
    sequences = Sequences(stream(300), 7, 1, seed=2)
    with Prefetcher(sequences, start=5, microbatch=4, depth=3) as batches:
        for step in range(30):
            np.testing.assert_array_equal(next(batches), sequences.take(5 + 4 * step, 4))
    assert next(batches, None) is None


def test_prefetcher_leaves_no_thread_behind():
    before = threading.active_count()
    Prefetcher(Sequences(stream(300), 7), 0, 4, depth=1).close()
    assert threading.active_count() == before


def test_an_error_while_reading_ahead_is_raised_by_next():
    with Prefetcher(Sequences(stream(3), 7), 0, 4) as batches, pytest.raises(DataError, match="makes 0 sequences"):
        next(batches)
