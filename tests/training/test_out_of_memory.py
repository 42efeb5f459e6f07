"""Running out of memory at the first step: the microbatch is halved where the planner chose it, else it is an error."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from cramjax.cache import write_atomically
from cramjax.config import RunConfig
from cramjax.errors import OutOfMemoryError, RunError
from cramjax.recipes import from_yaml, to_yaml
from cramjax.training import loop, resume, session, train
from cramjax.training.methods import step_program
from cramjax.training.metrics import read_records
from cramjax.training.opening import Opened
from cramjax.training.program import Parts, Program

Tiny = Callable[..., RunConfig]


class _Full:
    """A compiled step that needs more memory than there is, above a microbatch."""

    def __init__(self, most: int, when: str, seconds: float = 0.0):
        self.most, self.when, self.seconds, self.tried = most, when, seconds, []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        guard = self

        class Guarded:
            def __init__(self, lowered: Any, microbatch: int):
                self.lowered, self.microbatch = lowered, microbatch

            def compile(self) -> Any:
                guard.tried.append(self.microbatch)
                if guard.when == "compiling" and self.microbatch > guard.most:
                    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate.")
                time.sleep(guard.seconds)
                self.step = self.lowered.compile()
                return self

            def __call__(self, *arguments: Any) -> Any:
                if guard.when == "first step" and self.microbatch > guard.most:
                    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")
                return self.step(*arguments)

        def guarded(config: RunConfig, parts: Parts) -> Program:
            made = step_program(config, parts)
            return made._replace(step=Guarded(made.step, parts.microbatch))

        monkeypatch.setattr(session, "step_program", guarded)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["compiling", "first step"])
def test_the_microbatch_is_halved_until_it_fits(
    when: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = _Full(2, when)
    full.install(monkeypatch)
    config = tiny(budget="6steps", train__memory="auto", train__nonfinite="rollback")
    run = train(config, tmp_path / "run")
    assert full.tried == [8, 4, 2]
    said = [r["message"] for r in read_records(run.path) if r.get("name") == "memory"]
    what = "out of memory at the first step with microbatches of"
    assert said == [f"{what} 8: starting again with 4.", f"{what} 4: starting again with 2."]
    assert run.summary["steps"] == 6 and run.summary["tokens"] == 6 * 8 * 32  # the batch stays
    kept = from_yaml((run.path / "config.yaml").read_text(encoding="utf-8"))
    assert kept.batch.microbatch == 2 and kept.batch.size == 8
    monkeypatch.undo()
    assert resume(run.path, budget="8steps").config.batch.microbatch == 2


@pytest.mark.slow
def test_failed_starts_are_charged_and_undone(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = _Full(2, "first step", seconds=2.0)
    full.install(monkeypatch)
    out = tmp_path / "run"
    damaged = out / "checkpoints" / "step_00000009"  # of a run that is resumed from its start
    damaged.mkdir(parents=True)
    (damaged / "meta.json").write_text("{}", encoding="utf-8")
    config = tiny(budget="60s", train__memory="auto", train__nonfinite="rollback", checkpoint__points=1)
    write_atomically(out / "config.yaml", to_yaml(config))
    started: list[tuple[float, set[str]]] = []
    make = session.Session

    def watched(opened: Opened, *arguments: Any) -> session.Session:
        started.append((opened.clock.spent.seconds, {path.name for path in damaged.parent.iterdir()}))
        if len(started) == 3:
            raise RunError("that is enough")
        return make(opened, *arguments)

    monkeypatch.setattr(loop, "Session", watched)
    with pytest.raises(RunError, match="that is enough"):
        resume(out)
    assert full.tried == [8, 4]
    first, second, third = (seconds for seconds, _ in started)
    assert first == 0.0 and second >= 2.0 and third >= second + 2.0
    assert all(names == {damaged.name} for _, names in started)
    said = [r["message"] for r in read_records(out) if r.get("name") == "checkpoint"]
    assert [damaged.name in said[0], said[1:]] == [True, ["no checkpoint is intact: training again from the start."]]


def test_nothing_smaller_than_one_sequence_is_tried(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = _Full(0, "first step")
    full.install(monkeypatch)
    with pytest.raises(OutOfMemoryError, match="microbatches of 1 and train.remat=none"):
        train(tiny(budget="6steps", train__memory="auto"), tmp_path / "run")
    assert full.tried == [8, 4, 2, 1]


def test_a_microbatch_that_was_given_is_kept(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = _Full(2, "first step")
    full.install(monkeypatch)
    with pytest.raises(OutOfMemoryError, match="or let train.memory=auto choose them"):
        train(tiny(budget="6steps"), tmp_path / "run")
    assert full.tried == [8]


def test_other_troubles_are_not_taken_for_it(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: RunConfig, parts: Parts) -> Any:
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(session, "step_program", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        train(tiny(budget="6steps", train__memory="auto"), tmp_path / "run")


def test_lomo_cannot_halve_what_it_does_not_accumulate(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = _Full(2, "first step")
    full.install(monkeypatch)
    config = tiny(budget="6steps", train__memory="auto", optim__name="adalomo")
    with pytest.raises(OutOfMemoryError):
        train(config, tmp_path / "run")
    assert full.tried == [8]
