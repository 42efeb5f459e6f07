"""Budgets are read as people write them, and the clock spends them exactly once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cramjax.budget import Budget, Clock, Spent
from cramjax.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("24h", 86_400, "seconds"),
        ("10min", 600, "seconds"),
        ("90s", 90, "seconds"),
        ("1.5d", 129_600, "seconds"),
        ("300Mtok", 300e6, "tokens"),
        ("2Btok", 2e9, "tokens"),
        ("5000 tokens", 5000, "tokens"),
        ("1.5e18flop", 1.5e18, "flops"),
        ("3PFLOPs", 3e15, "flops"),
        ("500steps", 500, "steps"),
        ("1step", 1, "steps"),
    ],
)
def test_parse(text: str, amount: float, unit: str) -> None:
    assert Budget.parse(text) == Budget(amount, unit)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("text", ["10", "10parsecs", "min", "-5min", "0h", "", "1e999s", "ten min"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match="24h"):
        Budget.parse(text)


def test_a_budget_prints_as_it_is_written() -> None:
    assert [str(Budget.parse(t)) for t in ("24h", "10min", "90s", "500steps")] == ["24h", "10min", "90s", "500 steps"]


class FakeTime:
    """Monotonic seconds that a test moves."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_seconds_count_only_while_the_clock_runs() -> None:
    now = FakeTime()
    clock = Clock(Budget.parse("10s"), now=now)
    now.seconds += 5
    assert clock.fraction() == 0
    clock.start()
    now.seconds += 4
    assert clock.fraction() == pytest.approx(0.4)
    clock.pause()
    now.seconds += 100
    assert clock.fraction() == pytest.approx(0.4)
    clock.start()
    now.seconds += 1
    assert clock.spent.seconds == pytest.approx(5)
    now.seconds += 100
    assert clock.fraction() == 1.0


def test_a_restored_clock_goes_on_where_it_was() -> None:
    clock = Clock(Budget.parse("1000tok"))
    clock.record_step(300, 1.5)
    again = Clock(clock.budget, Spent(**clock.spent.to_dict()))  # pyright: ignore[reportArgumentType]
    again.record_step(300, 1.5)
    assert again.spent == Spent(0.0, 600, 3.0, 2)
    assert again.fraction() == pytest.approx(0.6)


@given(total=st.integers(1, 5000), step=st.integers(1, 500))
def test_token_runs_end_within_half_a_step_at_fraction_one(total: int, step: int) -> None:
    clock = Clock(Budget(float(total), "tokens"))
    fractions = []
    while not fractions or fractions[-1] < 1.0:
        fractions.append(clock.fraction_after(Spent(0.0, step, 0.0, 1)))
        clock.record_step(step, 0.0)
    assert fractions == sorted(fractions)
    assert abs(clock.spent.tokens - total) <= max(step / 2, step - total)


@given(speeds=st.lists(st.floats(0.05, 2.0), min_size=400, max_size=400))
def test_time_runs_end_within_a_step_and_a_half_however_speed_varies(speeds: list[float]) -> None:
    now = FakeTime()
    clock = Clock(Budget.parse("20s"), now=now)
    clock.start()
    last = 0.0
    for seconds in speeds:
        fraction = clock.fraction_after(Spent(last, 0, 0.0, 1))
        now.seconds += seconds
        last = seconds
        if fraction == 1.0:
            break
    assert abs(clock.spent.seconds - 20) <= 1.5 * max(speeds)  # half a step mispredicted, and the step itself
