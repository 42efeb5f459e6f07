"""Runs of a model whose blocks take turns: every way to update them, and their checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from cramjax.config import RunConfig
from cramjax.training import load_run, train

Tiny = Callable[..., RunConfig]
_PATTERN = [{"window": 8}, {"rotary": False}]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"optim.name": "adamw"},
        {"optim.name": "muon"},
        {"optim.name": "lomo"},
        {"optim.name": "adalomo"},
        {"optim.name": "adafactor"},
        {"optim.name": "adamw", "train.offload_optimizer": True},
    ],
    ids=str,
)
def test_a_patterned_model_trains_and_comes_back(tiny: Tiny, tmp_path: Path, options: dict[str, Any]) -> None:
    named = {name.replace(".", "__"): value for name, value in options.items()}
    rate = 0.3 if options["optim.name"] == "lomo" else 1e-2
    config = tiny(
        budget="30steps",
        model__layers=4,
        model__pattern=_PATTERN,
        evaluate__points=1,
        checkpoint__points=1,
        optim__lr=rate,
        optim__ema=0.0,
        **named,
    )
    run = train(config, tmp_path / "run")
    assert set(run.params["blocks"]) == {"0", "1"}
    start = run.model.init(jax.random.key(config.seed))
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), run.params, start)
    assert all(value > 0 for path, value in jax.tree_util.tree_leaves_with_path(moved))
    assert run.summary["loss"] < 0.95 * np.log(run.tokenizer.vocab_size)
    jax.tree.map(np.testing.assert_array_equal, load_run(tmp_path / "run").params, run.params)
