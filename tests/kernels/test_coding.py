"""Codes of ternary values: the paper's dictionary, the entropy code of files, and matrices written in words."""

import heapq
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cramjax.errors import ModelError
from cramjax.kernels.coding import dictionary, entropy
from cramjax.kernels.coding.product import coded_product, refusal
from cramjax.kernels.dense import dense
from cramjax.kernels.packed import Coded, adapter_settings, from_arrays, read_coded, stack_coded, to_arrays, write_coded


def ternary(*shape: int, zeros: float = 0.885, seed: int = 0) -> np.ndarray:
    chances = [zeros, (1 - zeros) / 2, (1 - zeros) / 2]
    return np.random.default_rng(seed).choice(3, size=shape, p=chances).astype(np.uint8)


def matrices(*shape: int, seed: int = 0) -> tuple[np.ndarray, Coded, np.ndarray]:
    """Values, the same in words, and the weights in float64."""
    values = ternary(*shape, zeros=0.8, seed=seed)
    drawn = np.random.default_rng(seed + 1).normal(size=(*shape[:-2], 2, shape[-1]))
    leaf = jax.tree.map(jnp.asarray, write_coded(values, drawn))
    levels = np.asarray(leaf.levels, np.float64)
    levels = np.concatenate([np.zeros_like(levels[..., :1, :]), levels], axis=-2)
    return values, leaf, np.take_along_axis(levels, values.astype(int), axis=-2)


def test_words_are_the_likeliest_by_a_heap() -> None:
    """The first 3,000, grown one pair at a time from the likeliest (the paper's way)."""
    chances = [math.log(dictionary.ZEROS)] + 2 * [math.log((1 - dictionary.ZEROS) / 2)]
    pairs = [(chances[a] + chances[b], (a, b)) for a, b in itertools.product(range(3), repeat=2)]
    heap = [(-chance, pair) for chance, pair in pairs]
    heapq.heapify(heap)
    found = []
    while len(found) < 3000:
        cost, word = heapq.heappop(heap)
        found.append(cost)
        for chance, pair in pairs if len(word) < 2 * dictionary.MOST_PAIRS else ():
            heapq.heappush(heap, (cost - chance, word + pair))
    book = dictionary.dictionary()
    values = book.values[:3000, None] >> (2 * np.arange(28, dtype=np.uint64)) & np.uint64(3)
    there = np.arange(28) < 2 * book.pairs[:3000, None].astype(int)
    costs = -(np.asarray(chances)[values.astype(int)] * there).sum(axis=1)
    np.testing.assert_allclose(costs, found, rtol=1e-12)
    whole = np.unique(book.values | book.pairs.astype(np.uint64) << np.uint64(56))
    assert len(whole) == len(book.values) == 65536


@pytest.mark.parametrize(
    ("zeros", "bits"),
    [
        (0.84, (0.956, 0.931, 0.925)),
        (0.87, (0.827, 0.800, 0.794)),
        (0.885, (0.771, 0.745, 0.739)),
        (0.90, (0.727, 0.699, 0.693)),
        (0.92, (0.678, 0.648, 0.641)),
    ],
)
def test_the_dictionary_takes_the_bits_of_the_papers(zeros: float, bits: tuple[float, ...]) -> None:
    """Words of rows of 192, 768 and 3072 values, by another implementation of the paper's code."""
    for columns, expected in zip((192, 768, 3072), bits, strict=True):
        values = ternary(200_000 // columns, columns, zeros=zeros)
        words, _ = dictionary.encode(values)
        assert 16 * len(words) / values.size == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("zeros", "rows", "columns"), [(0.885, 1032, 768), (0.92, 1536, 512), (0.84, 3072, 256)])
def test_files_come_near_the_entropy(zeros: float, rows: int, columns: int) -> None:
    values = ternary(rows, columns, zeros=zeros)
    share = float((values == 0).mean())
    assert 1 <= entropy.encode(values).bits / values.size / entropy.entropy(share) < 1.03


@given(st.integers(1, 40), st.integers(1, 70), st.sampled_from([0.0, 0.3, 0.9, 1.0]), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_what_is_written_is_read(rows: int, columns: int, zeros: float, seed: int) -> None:
    values = ternary(rows, columns, zeros=zeros, seed=seed)
    words, starts = dictionary.encode(values)
    assert (dictionary.decode(words, rows, columns) == values).all()
    some = rows // 2  # a row is read by itself
    own = words[starts[some] : starts[some + 1]]
    assert (dictionary.decode(own, 1, columns)[0] == values[some]).all()
    coded = entropy.encode(values)
    assert (entropy.decode(coded, rows, columns) == values).all()


def test_damage_is_seen() -> None:
    coded = entropy.encode(ternary(40, 64))
    coded.words[3] ^= 1 << 7
    with pytest.raises(ValueError, match="do not end where"):
        entropy.decode(coded, 40, 64)
    with pytest.raises(ValueError, match="not those of an entropy code"):
        entropy.decode(coded, 40_000, 64)
    words, _ = dictionary.encode(ternary(4, 64))
    with pytest.raises(ValueError, match="4 rows of 64 are wanted"):
        dictionary.decode(words[:-1], 4, 64)


@pytest.mark.parametrize("shape", [(40, 24), (2, 3, 33, 16)])
def test_matrices_are_what_was_written(shape: tuple[int, ...]) -> None:
    values, leaf, weights = matrices(*shape)
    assert leaf.shape == shape and (read_coded(leaf) == values).all()
    np.testing.assert_array_equal(leaf.unpacked(), weights)
    lead = shape[:-2]
    if lead:
        np.testing.assert_array_equal(leaf[1].unpacked(), weights[1])


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 12])
@pytest.mark.parametrize("shape", [(64, 24), (33, 16), (29, 5)])
def test_products_and_gradients_equal_those_of_the_weights(shape: tuple[int, int], rows: int) -> None:
    _, leaf, weights = matrices(*shape)
    x = np.float32(np.random.default_rng(2).normal(size=(rows, shape[0])))
    exact = np.float64(x) @ weights
    np.testing.assert_allclose(jax.jit(dense)(x, leaf), exact, atol=1e-5)
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(dense(x, leaf))))(jnp.asarray(x))
    np.testing.assert_allclose(gradient, np.cos(exact) @ weights.T, atol=1e-5)


@pytest.mark.skipif(refusal() is not None, reason=f"no kernel here: {refusal()}")
def test_the_kernel_reads_the_matrix_that_is_meant() -> None:
    _, leaf, weights = matrices(3, 40, 16)
    x = np.float32(np.random.default_rng(2).normal(size=(2, 40)))
    parts = (leaf.words[:, 0], leaf.starts[:, 0], leaf.levels)
    for which in range(3):
        made = jax.jit(coded_product)(x, *parts, which)
        np.testing.assert_allclose(made, np.float64(x) @ weights[which], atol=1e-5)


def test_names_settings_and_stacks() -> None:
    first, second = matrices(40, 16)[1], matrices(40, 16, seed=5)[1]
    stacked = stack_coded([first, second])
    for one, leaf in enumerate((first, second)):
        np.testing.assert_array_equal(stacked[one].unpacked(), leaf.unpacked())
    params = {"up": {"kernel": stacked}}
    arrays, own = to_arrays(params), adapter_settings(params)
    assert own == {"up/kernel": {"inner": 40}}
    np.testing.assert_array_equal(from_arrays(arrays, own)["up"]["kernel"].unpacked(), stacked.unpacked())
    with pytest.raises(ModelError, match="needs the setting `inner`"):
        from_arrays(arrays)
    with pytest.raises(ModelError, match="do not fit one another"):
        from_arrays({**arrays, "up/kernel.starts": np.zeros((2, 1, 9), np.int32)}, own)
