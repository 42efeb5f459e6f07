"""Intervals against scipy's bootstrap and the binomial distribution, differences against resampling by hand."""

import numpy as np
import pytest
from scipy import stats

from cramjax.evaluation.bootstrap import RESAMPLES, Measure, share


def a_ratio(seed: int, items: int = 80) -> Measure:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(20, 200, items).astype(np.float64)
    return Measure("bits_per_byte", sizes * rng.uniform(1, 3, items), sizes)


@pytest.mark.parametrize("right", [50, 150, 197])
def test_a_share_varies_as_the_binomial_does(right: int):
    """Resampling n items of which k are right is drawing from the binomial of n and k / n."""
    measure = share("acc", [True] * right + [False] * (200 - right))
    low, high = measure.interval(0)  # pyright: ignore[reportGeneralTypeIssues]
    expected = stats.binom.ppf([0.025, 0.975], 200, right / 200) / 200
    assert measure.value == right / 200
    # A quantile of 2,000 draws is off by a place or two of 200.
    np.testing.assert_allclose([low, high], expected, atol=0.0101)


def test_a_ratio_of_sums_varies_as_scipy_says():
    measure = a_ratio(0)

    def ratio(above: np.ndarray, below: np.ndarray, axis: int) -> np.ndarray:
        return above.sum(axis) / below.sum(axis)

    expected = stats.bootstrap(
        (measure.above, measure.below), ratio, paired=True, method="percentile", n_resamples=20_000, rng=1
    ).confidence_interval
    interval = measure.interval(0)
    assert interval is not None and measure.value == pytest.approx(measure.above.sum() / measure.below.sum())
    np.testing.assert_allclose(interval, expected, atol=0.1 * (expected.high - expected.low))


def test_a_perplexity_is_exp_of_a_ratio():
    nats = a_ratio(3)
    plain, exponential = Measure("x", nats.above, nats.below), Measure("x", nats.above, nats.below, exponential=True)
    assert exponential.value == pytest.approx(np.exp(plain.value))
    np.testing.assert_allclose(exponential.interval(5), np.exp(plain.interval(5)))  # pyright: ignore[reportArgumentType]


def test_a_difference_is_taken_within_each_resample():
    a, b = a_ratio(1), a_ratio(2)
    more, interval = a.difference(b, seed=7)
    generator = np.random.default_rng(7)
    items = generator.integers(80, size=(RESAMPLES, 80))
    by_hand = [b.above[i].sum() / b.below[i].sum() - a.above[i].sum() / a.below[i].sum() for i in items]
    assert more == pytest.approx(b.value - a.value)
    np.testing.assert_allclose(interval, np.quantile(by_hand, [0.025, 0.975]))  # pyright: ignore[reportArgumentType]


def test_pairing_narrows_the_interval():
    """Two models that fail at the same items: each varies widely with the items, and their difference hardly does."""
    rng = np.random.default_rng(0)
    a = rng.random(300) < 0.5
    b = a.copy()
    b[np.flatnonzero(~a)[:12]] = True
    one, other = share("acc", a.tolist()), share("acc", b.tolist())
    _, interval = one.difference(other, 0)
    alone = other.interval(0)
    assert interval is not None and alone is not None
    assert interval[0] > 0 and interval[1] - interval[0] < 0.5 * (alone[1] - alone[0])
    assert one.difference(one, 0) == (0.0, (0.0, 0.0))


def test_a_seed_gives_the_same_and_another_something_else():
    measure = a_ratio(4)
    assert measure.interval(0) == measure.interval(0) != measure.interval(1)


def test_blocks_of_resamples_do_not_change_them(monkeypatch: pytest.MonkeyPatch):
    measure = a_ratio(5)
    whole = measure.interval(0)
    monkeypatch.setattr("cramjax.evaluation.bootstrap._AT_ONCE", 80 * 333)
    assert measure.interval(0) == whole


def test_one_item_has_no_interval():
    measure = share("acc", [True])
    assert measure.interval(0) is None and measure.difference(share("acc", [False]), 0) == (-1.0, None)
    with pytest.raises(ValueError, match="the same items"):
        measure.difference(share("acc", [True, True]), 0)
