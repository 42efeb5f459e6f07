"""Paired differences against SciPy's paired t-test and closed forms."""

import math

import numpy as np
import pytest
from scipy import stats

from cramjax.scaling.compare.paired import paired_difference, pairs_to_settle


@pytest.mark.parametrize("pairs", [2, 5, 30])
def test_mean_and_interval_are_those_of_the_paired_t_test(pairs: int):
    a, b = np.random.default_rng(pairs).normal([[1.3], [1.28]], 0.01, (2, pairs))
    found = paired_difference(list(b - a))
    expected = stats.ttest_rel(b, a)
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-12)
    assert found.mean == pytest.approx(b.mean() - a.mean(), rel=1e-12)
    assert found.settled == (expected.pvalue < 0.05)


def test_three_differences_by_hand():
    found = paired_difference([1.0, 2.0, 3.0])
    assert (found.pairs, found.mean, found.std) == (3, 2.0, 1.0)
    half = 4.302652729696 / math.sqrt(3)  # the table's t for 2 degrees of freedom
    assert found.interval == pytest.approx((2 - half, 2 + half), rel=1e-9)
    assert not found.settled


def test_one_pair_has_a_mean_and_no_interval():
    found = paired_difference([-0.5])
    assert (found.pairs, found.mean, found.std, found.interval, found.pairs_to_settle) == (1, -0.5, None, None, None)
    assert not found.settled


@pytest.mark.parametrize("ratio", [10.0, 1.0, -0.3, 0.05])
def test_pairs_to_settle_is_the_smallest_number_whose_interval_excludes_zero(ratio: float):
    def excludes(pairs: int) -> bool:
        low, high = stats.t.interval(0.95, pairs - 1, loc=ratio, scale=1 / math.sqrt(pairs))
        return low > 0 or high < 0

    found = pairs_to_settle(ratio, 1.0)
    assert found == next(n for n in range(2, 10_000) if excludes(n))
    assert pairs_to_settle(ratio * 1e-3, 1e-3) == found  # units do not matter


def test_pairs_to_settle_at_the_edges():
    assert pairs_to_settle(1.0, 1.0) == 7  # t = 2.447 < √7, but 2.571 > √6
    assert pairs_to_settle(0.0, 1.0) is None and pairs_to_settle(0.0, 0.0) is None
    assert pairs_to_settle(1e-30, 1.0) is None
    assert pairs_to_settle(-0.1, 0.0) == 2
    # Far out Student's t is the normal distribution, and n = (1.96 · s / d)².
    assert pairs_to_settle(1e-4, 1.0) == pytest.approx((stats.norm.ppf(0.975) / 1e-4) ** 2, rel=1e-6)


def test_settled_exactly_when_no_more_pairs_are_wanted():
    random = np.random.default_rng(0)
    for _ in range(50):
        found = paired_difference(list(random.normal(0.5, 1.0, 8)))
        assert found.pairs_to_settle is not None
        assert found.settled == (found.pairs_to_settle <= found.pairs)
