"""A plan compiles, and times, the program that a run then asks for."""

import re
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from cramjax.config import RunConfig
from cramjax.planning.steps import compile_here, program_here, vocabulary_of
from cramjax.training.display import QuietDisplay
from cramjax.training.opening import open_run
from cramjax.training.session import Session

Tiny = Callable[..., RunConfig]

_OFFLOADED = {"optim__name": "adamw", "train__offload_optimizer": True, "train__param_dtype": "bfloat16"}
_CASES = {"plain": {}, "accumulated": {"batch__microbatch": 4}, "shared": {"train__fsdp": 2}, "offloaded": _OFFLOADED}
_CASES |= {"layer by layer": {"optim__name": "adalomo", "optim__ema": 0.0}}


def _instructions(text: str) -> str:
    """A program's text without the tables of where its lines come from, whose order varies."""
    text = re.sub(r", metadata=\{[^}]*\}", "", text)
    return "\n".join(
        line for line in text.splitlines() if not re.match(r"\d|FileNames|Fun.*Names|.*Locations|Stack", line)
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", _CASES)
def test_a_plans_program_is_the_runs(case: str, tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(**_CASES[case])
    display = QuietDisplay()
    (tmp_path / "run").mkdir()
    session = Session(open_run(config, tmp_path / "run", None, display.message), display)
    session.close()
    planned = program_here(config, vocabulary_of(config))
    ran = _instructions(session.step_function.as_text())
    assert _instructions(planned.step.compile().as_text()) == ran
    assert _instructions(compile_here(config).text) == ran
    made = planned.create()
    assert jax.tree.structure(made) == jax.tree.structure(session.state)
    for mine, its, like in zip(*map(jax.tree.leaves, (made, session.state, planned.like)), strict=True):
        assert mine.sharding == its.sharding == like.sharding and (mine == its).all()
