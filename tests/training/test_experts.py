"""Models of experts by every training method, with savings of memory: all of a cell at once, which is one program."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.config import DataConfig, ModelConfig, RunConfig
from cramjax.experts import ExpertsConfig
from cramjax.recipes import validate
from cramjax.training.methods import step_program
from cramjax.training.parts import Vocabulary, build_parts
from cramjax.training.step import Batch

RATE, STEPS = 0.05, 5  # an odd number: loads that swing over and back leave biases where they were
CELLS: dict[str, dict[str, Any]] = {
    "adamw, plain": {},
    "adamw, accumulated, recomputed, fsdp": {"microbatch": 4, "train": {"remat": "full", "fsdp": 2}},
    "adamw, selective": {"train": {"remat": "selective"}},
    "adamw on the host, accumulated, delayed, fsdp": {
        "microbatch": 4,
        "train": {"offload_optimizer": True, "delay_update": 0.5, "fsdp": 2},
    },
    "adamw, capacity, data parallel": {"train": {"data_parallel": 2}, "experts": {"capacity": 4.0}},
    "muon, fsdp": {"optim": {"name": "muon"}, "train": {"fsdp": 2}},
    "adafactor": {"optim": {"name": "adafactor"}},
    "adalomo, recomputed, fsdp": {"optim": {"name": "adalomo", "lr": 0.1}, "train": {"remat": "full", "fsdp": 2}},
    "lomo, clipped": {"optim": {"name": "lomo", "clip": 1.0, "lr": 0.1}},
}

FAST = "adamw, accumulated, recomputed, fsdp"


@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, marks=() if cell == FAST else pytest.mark.slow) for cell in CELLS],
)
def test_every_method_trains_experts_and_levels_their_loads(cell: str) -> None:
    asked = CELLS[cell]
    experts = ExpertsConfig(**{"number": 4, "active": 2, "every": 2, "balance_rate": RATE, **asked.get("experts", {})})
    config = RunConfig(
        budget="10steps",
        data=DataConfig(sequence_length=16),
        model=ModelConfig(layers=2, width=16, heads=2, mlp=32, experts=experts),
    )
    train = {"data_parallel": 1, "compute_dtype": "float32", **asked.get("train", {})}
    config = replace(
        config,
        batch=replace(config.batch, size=8, microbatch=asked.get("microbatch")),
        train=replace(config.train, **train),
        optim=replace(config.optim, **{"lr": 1e-2, "schedule": "constant", "warmup": 0.0, **asked.get("optim", {})}),
    )
    validate(config)
    devices = config.train.fsdp * (config.train.data_parallel or 1)
    program = step_program(config, build_parts(config, Vocabulary(64, 0, 1), jax.devices()[:devices]))
    state, step = program.create(), program.step.compile()
    rows = np.random.default_rng(0).integers(2, 64, program.batch.tokens.shape, np.int32)
    batch = Batch(jax.device_put(rows, program.batch.tokens.sharding), jnp.int32(len(rows)))  # pyright: ignore
    losses = []
    for number in range(STEPS):
        state, metrics = step(state, batch, np.float32((number + 1) / 20))
        losses.append(float(metrics.loss))
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    # The first loss is the same, whatever is saved; weights in bfloat16 or sums of other orders change it little.
    assert losses[0] == pytest.approx(4.17, abs=0.02)
    bias = np.asarray(state.params["blocks"]["1"]["experts"]["router"]["bias"])
    steps = bias / RATE  # whole ones, of either sign
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
    assert 0 < np.abs(steps).max() <= STEPS
