"""Loading a run reads the weights and nothing else; the end of a run reads nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from cramjax.config import RunConfig
from cramjax.training import load_run, train

Tiny = Callable[..., RunConfig]

# Copies of the weights that are read for each: of themselves, of their average, or of what both are made of.
_COPIES = {
    "adamw": ({"optim__name": "adamw"}, 1),
    "averaged": ({"optim__name": "adamw", "optim__ema": 0.9}, 1),
    "schedule-free": ({"optim__name": "schedule_free_adamw", "optim__ema": 0.0, "optim__schedule": "constant"}, 2),
    "adalomo": ({"optim__name": "adalomo", "optim__ema": 0.0}, 1),
}


def _nbytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree) if x is not ocp.PLACEHOLDER)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of what the checkpoint library has read, at each call."""
    restore, found = ocp.PyTreeCheckpointer.restore, []

    def counted(*arguments: Any, **keywords: Any) -> Any:
        arrays = restore(*arguments, **keywords)
        found.append(_nbytes(arrays))
        return arrays

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "restore", counted)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", _COPIES)
def test_a_run_is_loaded_without_its_optimizer(case: str, tiny: Tiny, tmp_path: Path, read: list[int]) -> None:
    fields, copies = _COPIES[case]
    run = train(tiny(budget="6steps", **fields), tmp_path / "run")
    assert read == []  # the weights in memory are handed on
    again = load_run(run.path)
    for mine, its in zip(jax.tree.leaves(run.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(mine, its)
        assert mine.sharding.device_set == its.sharding.device_set and mine.dtype == its.dtype
    size = _nbytes(run.params)
    assert read == [pytest.approx(copies * size, abs=8)]  # and two scalars at most
