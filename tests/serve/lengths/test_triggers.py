"""When what waits is computed."""

import math

from hypothesis import given
from hypothesis import strategies as st

from cramjax.serve.lengths.triggers import Hungry, Lazy

TIMES = st.lists(st.floats(0, 100), max_size=40).map(sorted)


@given(TIMES, st.floats(100, 200))
def test_a_hungry_one_never_waits(arrivals: list[float], now: float):
    assert Hungry().wait(arrivals, now) == (0.0 if arrivals else math.inf)


@given(TIMES, st.floats(100, 200), st.floats(0, 100), st.integers(1, 50))
def test_a_lazy_one_waits_for_company_but_not_for_ever(arrivals: list[float], now: float, patience: float, enough: int):
    wait = Lazy(patience, enough).wait(arrivals, now)
    if not arrivals:
        assert wait == math.inf
    elif len(arrivals) >= enough or now - arrivals[0] >= patience:
        assert wait == 0
    else:
        assert 0 < wait <= patience
        later = now + wait
        assert Lazy(patience, enough).wait(arrivals, later) <= math.ulp(later)
