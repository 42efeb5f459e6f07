"""Speeds and averages are those of the definition, on a clock that the test moves."""

import math

import pytest

from cramjax.budget import Budget, Spent
from cramjax.training.meter import Meter


class FakeTime:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def now() -> FakeTime:
    return FakeTime()


@pytest.fixture
def meter(now: FakeTime) -> Meter:
    return Meter(100, flops_per_token=1e6, peak_flops=1e9, bytes_per_token=4.0, now=now)


def end_step(meter: Meter, now: FakeTime, seconds: float, loss: float = 1.0, microbatches: int = 1) -> None:
    now.seconds += seconds
    meter.step_ended(microbatches, loss)


def test_window_holds_means_since_the_last_one(meter: Meter, now: FakeTime) -> None:
    end_step(meter, now, 0.5, 3.0)
    meter.take_window()
    end_step(meter, now, 0.25, 2.0)
    end_step(meter, now, 0.25, 4.0)
    window = meter.take_window()
    assert window["loss"] == 3.0
    assert window["bits_per_byte"] == pytest.approx(3.0 / math.log(2) / 4.0)
    assert window["tokens_per_second"] == pytest.approx(200 / 0.5)
    assert window["mfu"] == pytest.approx(400 * 1e6 / 1e9)


def test_time_outside_steps_is_not_counted(meter: Meter, now: FakeTime) -> None:
    end_step(meter, now, 0.5)
    now.seconds += 100
    meter.mark()
    end_step(meter, now, 0.5)
    assert meter.seconds == pytest.approx(1.0)
    assert meter.speed(meter.tokens, meter.seconds)["tokens_per_second"] == pytest.approx(200)


def test_the_cost_of_a_step_follows_a_machine_that_slows_down(meter: Meter, now: FakeTime) -> None:
    for _ in range(5):
        end_step(meter, now, 1.0, microbatches=2)
    assert meter.cost(4) == Spent(2.0, 400, 4e8, 1)
    for _ in range(20):
        end_step(meter, now, 2.0, microbatches=2)
    assert meter.cost(2).seconds == pytest.approx(2.0, rel=1e-2)


def test_forecast_counts_what_the_rest_of_the_budget_buys(meter: Meter, now: FakeTime) -> None:
    end_step(meter, now, 2.0)
    text, epochs = meter.forecast(Budget.parse("100s"), Spent(20.0, 1000, 1e9, 10), 1, tokens_per_epoch=2500)
    assert epochs == pytest.approx((1000 + 40 * 100) / 2500)
    assert "50 steps" in text


def test_an_unknown_peak_gives_no_utilisation(now: FakeTime) -> None:
    meter = Meter(100, 1e6, None, 4.0, now=now)
    end_step(meter, now, 1.0)
    assert meter.take_window()["mfu"] is None
