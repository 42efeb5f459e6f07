"""A run that is killed again and again ends where an uninterrupted one does."""

import json
import os
import random
import signal
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
from cramjax.train import load_run
from cramjax.train.checkpoint import list_checkpoints, read_meta
from cramjax.train.metrics import read_records

KILLS = 10


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start `cramjax train` in a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "cramjax.cli", "train", *arguments], stderr=log.open("ab"))


def logged_steps(run: Path) -> int:
    """The newest step in the run's log."""
    return max((record.get("step", 0) for record in read_records(run)), default=0)


def run_with_kills(recipe: Path, run: Path, log: Path, seed: int) -> int:
    """Train, killing the process at random moments and resuming; the number of kills."""
    rng, kills = random.Random(seed), 0
    while True:
        process = start(["--resume", str(run)] if run.exists() else [str(recipe), "--out", str(run)], log)
        if kills < KILLS:
            before, deadline = logged_steps(run), time.monotonic() + 120
            while process.poll() is None and logged_steps(run) == before and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.8))
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        if process.wait(timeout=300) == 0:
            return kills
        assert process.returncode == -signal.SIGKILL, log.read_text()


@pytest.mark.slow
def test_ten_kills_change_no_bit(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = tiny(
        budget="4000steps", checkpoint__points=150, train__log_points=400, evaluate__points=1, model__width=64
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(config))
    log = tmp_path / "log.txt"
    assert start([str(recipe), "--out", str(tmp_path / "whole")], log).wait(timeout=600) == 0, log.read_text()
    assert run_with_kills(recipe, tmp_path / "killed", log, seed=1) == KILLS
    whole, killed = load_run(tmp_path / "whole"), load_run(tmp_path / "killed")
    for x, y in zip(jax.tree.leaves(whole.params), jax.tree.leaves(killed.params), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    assert killed.summary["tokens"] == whole.summary["tokens"]


@pytest.mark.slow
def test_a_killed_time_budget_is_spent_once_and_its_data_read_in_order(
    tiny: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = tiny(budget="30s", checkpoint__points=60, train__log_points=400, evaluate__points=1)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(config))
    run, log = tmp_path / "run", tmp_path / "log.txt"
    assert run_with_kills(recipe, run, log, seed=2) >= 3
    meta = read_meta(list_checkpoints(run / "checkpoints")[-1])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["final_fraction"] == 1.0
    assert meta.spent["seconds"] == pytest.approx(30, abs=1.5)
    # The position is the sum of the batches of the steps that count: none is repeated, none skipped.
    assert meta.position == meta.spent["steps"] * config.batch.size == summary["tokens"] / config.data.sequence_length
