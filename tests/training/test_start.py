"""A start that takes much of a time budget says so, once, with what would help. No real time passes on its clock."""

import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cramjax.budget import Clock
from cramjax.config import RunConfig
from cramjax.errors import RunError
from cramjax.training import checkpoint, opening, resume, session, train
from cramjax.training.meter import Meter
from cramjax.training.methods import step_program
from cramjax.training.metrics import read_records

Tiny = Callable[..., RunConfig]
HELP = (
    "Most of that is compiling, and compiled programs are kept: a second run of the same recipe starts faster. For the "
    "first, --train.layer_loop=scan, a smaller recipe or a larger --budget helps."
)


class Times:
    """A clock on which compiling, making the state, reading it and a step take so many seconds, and all else none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now, self.compiling, self.making, self.reading, self.step = 0.0, 0.0, 0.0, 0.0, 1.0

        def lasting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                self.now += getattr(self, name)
                return function(*arguments)

            return call

        def program(*arguments: Any) -> Any:
            made = step_program(*arguments)
            return made._replace(create=lasting("making", made.create))

        now = self.monotonic
        monkeypatch.setattr(session, "time", types.SimpleNamespace(monotonic=now))
        monkeypatch.setattr(opening, "Clock", functools.partial(Clock, now=now))
        monkeypatch.setattr(opening, "Meter", functools.partial(Meter, now=now))
        monkeypatch.setattr(session, "step_program", lasting("compiling", program))
        monkeypatch.setattr(checkpoint, "restore", lasting("reading", checkpoint.restore))
        monkeypatch.setattr(session.Session, "dispatch", lasting("step", session.Session.dispatch))

    def monotonic(self) -> float:
        """Seconds."""
        return self.now


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    """Of the runs of a test."""
    return Times(monkeypatch)


def _said(path: Path) -> list[str]:
    return [r["message"] for r in read_records(path) if r.get("name") == "start"]


def test_a_long_start_is_told_once(tiny: Tiny, tmp_path: Path, times: Times) -> None:
    times.compiling, times.making = 3.0, 1.0
    train(tiny(budget="30s"), tmp_path / "run")
    assert _said(tmp_path / "run") == [f"starting took 4.0 s, 13% of the budget. {HELP}"]


def test_a_short_start_is_not_told(tiny: Tiny, tmp_path: Path, times: Times) -> None:
    times.compiling, times.making = 1.5, 1.5
    train(tiny(budget="30s"), tmp_path / "time")  # a tenth, and not more
    assert _said(tmp_path / "time") == []
    train(tiny(budget="2steps"), tmp_path / "steps")  # nothing to tell a share of
    assert _said(tmp_path / "steps") == []


def test_a_budget_that_is_over_before_the_first_step(tiny: Tiny, tmp_path: Path, times: Times) -> None:
    times.compiling = 1.5
    with pytest.raises(RunError, match=f"the budget of 1s was over before the first step: starting took 1.5 s. {HELP}"):
        train(tiny(budget="1s"), tmp_path / "run")


def test_what_is_scanned_already_is_not_advised(tiny: Tiny, tmp_path: Path, times: Times) -> None:
    times.compiling = 1.0
    with pytest.raises(RunError, match="For the first, a smaller recipe or a larger --budget helps"):
        train(tiny(budget="1s", train__layer_loop="scan"), tmp_path / "run")


def test_a_state_that_takes_longer_than_compiling(tiny: Tiny, tmp_path: Path, times: Times) -> None:
    times.compiling, times.making = 1.0, 2.0
    advice = "Most of that is making the first state: a smaller recipe or a larger --budget helps."
    with pytest.raises(RunError, match=advice):
        train(tiny(budget="1s"), tmp_path / "run")


def test_a_checkpoint_that_takes_longer_than_compiling(tiny: Tiny, tmp_path: Path, times: Times) -> None:
    train(tiny(budget="4steps"), tmp_path / "run")
    times.compiling, times.reading = 1.0, 4.0
    resume(tmp_path / "run", budget="20s")
    (message,) = _said(tmp_path / "run")
    assert message == (
        "starting took 5.0 s, 25% of the budget. Most of that is reading the checkpoint: a larger --budget helps."
    )
