"""`kill -9` at random moments: what was killed and resumed equals what was left alone."""

import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from cramjax.config import RunConfig
from cramjax.recipes import to_yaml
from cramjax.training import load_run, train
from cramjax.training.checkpoint import list_checkpoints, read_meta
from cramjax.training.metrics import read_records

Tiny = Callable[..., RunConfig]

_CHILD = """
import sys
from pathlib import Path
from cramjax.recipes import from_yaml
from cramjax.training import resume, train
config, out = Path(sys.argv[1]), Path(sys.argv[2])
if not (out / "config.yaml").exists():
    train(from_yaml(config.read_text(encoding="utf-8")), out)
elif not (out / "summary.json").exists():
    resume(out)
"""


def moments(latest: float, number: int) -> list[float | None]:
    """When to kill: while starting (None), at random fractions of the run, and after its last step (1)."""
    return [None, *sorted(random.uniform(0.0, latest) for _ in range(number)), 1.0]


def progress(out: Path) -> float:
    """The fraction that the newest line of a live run's log names; 1 once the last checkpoint is there."""
    newest = list_checkpoints(out / "checkpoints")[-1:]
    try:
        if newest and read_meta(newest[0]).final_fraction == 1.0:
            return 1.0
        return max((r["fraction"] for r in read_records(out) if r["kind"] == "train"), default=0.0)
    except (OSError, ValueError):  # being written, or pruned, at this moment
        return 0.0


def killed_and_resumed(config: RunConfig, folder: Path, kills: list[float | None]) -> Path:
    """Train in processes that are killed at these moments, and at last let be."""
    out, recipe = folder / "killed", folder / "config.yaml"
    recipe.write_text(to_yaml(config), encoding="utf-8")

    def child() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", _CHILD, recipe, out], stderr=subprocess.DEVNULL)

    killed = 0
    for moment in kills:
        with child() as process:
            if moment is None:
                time.sleep(random.uniform(0.5, 3.0))
            while moment is not None and process.poll() is None and progress(out) < moment:
                time.sleep(0.002)
            killed += process.poll() is None
            process.kill()
    assert killed >= len(kills) - 2
    with child() as process:
        assert process.wait() == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "number"), [("quickstart", 3), ("crammed-bert", 1)])
def test_killed_at_random_a_token_budget_ends_bit_identical(
    tiny: Tiny, tmp_path: Path, recipe: str, number: int
) -> None:
    config = tiny(recipe, budget="500ktok", train__log_points=400, checkpoint__points=60, evaluate__points=7)
    whole = train(config, tmp_path / "whole")
    kills = moments(latest=1.0, number=number)
    out = killed_and_resumed(config, tmp_path, kills)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(load_run(out).params), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=f"killed at {kills}")
    meta = read_meta(list_checkpoints(out / "checkpoints")[-1])
    assert meta.position == read_meta(list_checkpoints(whole.path / "checkpoints")[-1]).position
    assert load_run(out).summary["bits_per_byte"] == whole.summary["bits_per_byte"]
    steps = [r["step"] for r in read_records(out) if r["kind"] == "train"]
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_killed_at_random_a_time_budget_is_spent_once(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny(budget="2steps"), tmp_path / "warm")  # so that compiling does not eat the budget
    config = tiny(budget="40s", train__log_points=400, checkpoint__points=60, checkpoint__keep=1000)
    out = killed_and_resumed(config, tmp_path, moments(latest=0.85, number=3))  # a restart costs seconds of the budget
    metas = [read_meta(path) for path in list_checkpoints(out / "checkpoints")]
    # Every step of the run took the batch that its number says: nothing was read twice, nothing left out.
    assert [m.position for m in metas] == [m.step * config.batch.size for m in metas]
    spent = [m.spent["seconds"] for m in metas]
    assert spent == sorted(spent)
    summary = load_run(out).summary
    assert metas[-1].step == summary["steps"]
    assert summary["final_fraction"] == 1.0
    assert summary["final_lr"] == 0.0
    # What came after the last step is charged to nobody; how close to 40 s it ends is for benchmarks/time_budget.py.
    assert summary["train_seconds"] == spent[-1]
