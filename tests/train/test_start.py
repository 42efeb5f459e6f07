"""A start that takes much of a time budget says so, once, with what would help."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cramjax.config import RunConfig
from cramjax.errors import RunError
from cramjax.train import session, train
from cramjax.train.metrics import read_records
from cramjax.train.program import step_program

Tiny = Callable[..., RunConfig]
HELP = "a second run of the same recipe starts faster. For the first, --train.layer_loop=scan, a smaller recipe or"


def _slow(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*arguments: Any) -> Any:
        time.sleep(seconds)
        return step_program(*arguments)

    monkeypatch.setattr(session, "step_program", slow)


def _said(path: Path) -> list[str]:
    return [r["message"] for r in read_records(path) if r.get("name") == "start"]


@pytest.mark.slow
def test_a_long_start_is_told_once(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _slow(3.0, monkeypatch)
    monkeypatch.setattr(session, "_LONG_START", 3.0 / 30)
    train(tiny(budget="30s"), tmp_path / "run")
    (message,) = _said(tmp_path / "run")
    took = float(message.split(" s, ")[0].removeprefix("starting took "))
    assert took >= 3.0 and f"{took / 30:.0%} of the budget" in message  # to the rounding of what is said
    assert HELP in message


@pytest.mark.slow
def test_a_short_start_is_not_told(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_LONG_START", 0.99)
    train(tiny(budget="20s"), tmp_path / "time")
    assert _said(tmp_path / "time") == []
    _slow(1.0, monkeypatch)
    monkeypatch.setattr(session, "_LONG_START", 0.0)
    train(tiny(budget="2steps"), tmp_path / "steps")  # nothing to tell a share of
    assert _said(tmp_path / "steps") == []


def test_a_budget_that_is_over_before_the_first_step(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _slow(1.0, monkeypatch)
    with pytest.raises(RunError, match=f"the budget of 1s was over before the first step: starting took .* {HELP}"):
        train(tiny(budget="1s"), tmp_path / "run")


def test_what_is_scanned_already_is_not_advised(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _slow(1.0, monkeypatch)
    with pytest.raises(RunError, match="For the first, a smaller recipe or a larger --budget helps"):
        train(tiny(budget="1s", train__layer_loop="scan"), tmp_path / "run")
