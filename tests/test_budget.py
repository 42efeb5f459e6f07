"""Budgets are read as people write them, and the clock spends them exactly once."""

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cramjax.budget import Budget, Clock, Spent
from cramjax.errors import ConfigError
from cramjax.training.meter import Meter


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


def end_of_a_run(budget: float, durations: Iterable[float]) -> float:
    """Seconds spent by a run of steps that take so long, each planned as the loop plans it near the end."""
    now = FakeTime()
    clock = Clock(Budget(budget, "seconds"), now=now)
    meter = Meter(1, 1.0, None, 1.0, now=now)
    clock.start()
    for seconds in durations:
        fraction = clock.fraction_after(meter.cost(1), longest_seconds=meter.longest_seconds(1))
        now.seconds += seconds
        meter.step_ended(1, 0.0)
        if fraction == 1.0:
            break
    return clock.spent.seconds


@given(pattern=st.lists(st.floats(0.01, 2.0), min_size=1, max_size=16), budget=st.floats(40.0, 80.0))
def test_time_runs_end_within_one_step_however_speed_varies(pattern: list[float], budget: float) -> None:
    assert abs(end_of_a_run(budget, itertools.cycle(pattern)) - budget) <= max(pattern) + 1e-9


@given(durations=st.lists(st.floats(0.05, 2.0), min_size=1, max_size=60), budget=st.floats(5.0, 40.0))
def test_time_runs_whose_last_steps_are_the_slowest_yet_end_at_most_two_late(
    durations: list[float], budget: float
) -> None:
    assert -max(durations) <= end_of_a_run(budget, itertools.cycle(durations)) - budget <= 2 * max(durations)
