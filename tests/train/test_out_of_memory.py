"""Running out of memory at the first step: the microbatch is halved where the planner chose it, else it is an error."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from cramjax.config import RunConfig
from cramjax.errors import OutOfMemoryError
from cramjax.recipes import from_yaml
from cramjax.train import resume, train
from cramjax.train.metrics import read_records
from cramjax.train.session import Session

Tiny = Callable[..., RunConfig]


class _Full:
    """A compiled step that needs more memory than there is, above a microbatch."""

    def __init__(self, most: int, when: str):
        self.most, self.when, self.tried = most, when, []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        compile_step = Session._on_devices
        guard = self

        def compiled(session: Session, batch: Any) -> Any:
            create, microbatch = compile_step(session, batch), session.parts.microbatch
            guard.tried.append(microbatch)
            step = session.step_function

            def run(*arguments: Any) -> Any:
                if guard.when == "first step" and microbatch > guard.most:
                    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")
                return step(*arguments)

            if guard.when == "compiling" and microbatch > guard.most:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate.")
            session.step_function = run
            return create

        monkeypatch.setattr(Session, "_on_devices", compiled)


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
    kept = from_yaml((run.path / "config.yaml").read_text())
    assert kept.batch.microbatch == 2 and kept.batch.size == 8
    monkeypatch.undo()
    assert resume(run.path, budget="8steps").config.batch.microbatch == 2


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
    def broken(session: Session, batch: Any) -> Any:
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(Session, "_on_devices", broken)
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
