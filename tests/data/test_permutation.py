"""The shuffle is a permutation for every size, and looks like a random one."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cramjax.data.permutation import permute


def whole(size: int, seed: int, epoch: int) -> np.ndarray:
    return permute(np.arange(size), size, seed, np.full(size, epoch))


@given(st.integers(1, 3000), st.integers(-(2**63), 2**64), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_is_a_bijection(size: int, seed: int, epoch: int):
    np.testing.assert_array_equal(np.sort(whole(size, seed, epoch)), np.arange(size))


@given(st.integers(1, 2**40), st.lists(st.integers(0, 2**40), min_size=1, max_size=20, unique=True))
@settings(max_examples=40, deadline=None)
def test_huge_sizes_stay_in_range_and_distinct(size: int, indices: list[int]):
    indices = sorted({index % size for index in indices})
    images = permute(np.array(indices), size, 3, np.zeros(len(indices), np.int64))
    assert images.min() >= 0 and images.max() < size
    assert len(set(images.tolist())) == len(indices)


def test_a_point_does_not_depend_on_its_company():
    epochs = np.array([0, 1, 2, 1])
    together = permute(np.array([5, 5, 7, 0]), 1000, 11, epochs)
    alone = [permute(np.array([i]), 1000, 11, np.array([e]))[0] for i, e in zip([5, 5, 7, 0], epochs, strict=True)]
    np.testing.assert_array_equal(together, alone)


def test_every_seed_and_epoch_has_its_own_order():
    orders = {tuple(whole(64, seed, epoch)) for seed in range(8) for epoch in range(8)}
    assert len(orders) == 64


def test_looks_random():
    # Of a random permutation: mean displacement size/3, half of the neighbours ascending, one fixed point.
    size, repeats = 1000, 50
    orders = np.stack([whole(size, seed, 0) for seed in range(repeats)])
    displacement = np.abs(orders - np.arange(size)).mean()
    ascending = (np.diff(orders, axis=1) > 0).mean()
    fixed = (orders == np.arange(size)).sum(axis=1).mean()
    assert abs(displacement - size / 3) < 5  # standard error of the mean is about 1
    assert abs(ascending - 0.5) < 0.01  # … about 0.0013
    assert abs(fixed - 1) < 0.6  # … about 0.14


def test_places_are_uniform_over_epochs():
    # Where index 0 of 10 goes in 5000 epochs: chi-squared with 9 degrees of freedom exceeds 33.7 once in 10,000.
    images = permute(np.zeros(5000, np.int64), 10, 0, np.arange(5000))
    counts = np.bincount(images, minlength=10)
    assert ((counts - 500) ** 2 / 500).sum() < 33.7
