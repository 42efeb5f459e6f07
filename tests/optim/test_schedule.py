"""Schedules against their closed forms, computed with Python floats."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cramjax.config import BatchConfig, OptimConfig
from cramjax.errors import ConfigError
from cramjax.optim.schedule import batch_size_at, schedule

GRID = np.linspace(0.0, 1.0, 41)
# The schedule is float32: two roundings of numbers below 4.
TOLERANCE = 1e-6


def closed_form(name, x, warmup=0.0, decay=0.5, final=0.0):
    up = min(x / warmup, 1.0) if warmup else 1.0
    if name == "triangle":
        return min(0.25 + x, final + (1 - final) * min(4 * (1 - x), 1.0))
    if name == "one_cycle":
        return up if x < warmup else final + (1 - final) * (1 - x) / (1 - warmup)
    if name == "cosine":
        return up if x < warmup else final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (x - warmup) / (1 - warmup)))
    if name == "wsd":
        return up if x < 1 - decay else final + (1 - final) * (1 - x) / decay
    return up


@pytest.mark.parametrize("name", ["triangle", "one_cycle", "cosine", "wsd", "constant"])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_schedule_equals_its_closed_form(name, final):
    config = OptimConfig(schedule=name, warmup=0.2, decay=0.4, final_lr=final)
    got = jax.vmap(schedule(config))(GRID)
    want = [closed_form(name, x, 0.2, 0.4, final) for x in GRID]
    np.testing.assert_allclose(got, want, atol=TOLERANCE)


def test_triangle_is_crammings():
    f = schedule(OptimConfig(schedule="triangle"))
    for x in GRID:
        np.testing.assert_allclose(f(x), min(0.25 + x, 4 * (1 - x)), atol=TOLERANCE)
    assert f(0.75) == 1.0
    assert f(0.0) == 0.25


@pytest.mark.parametrize("name", ["triangle", "one_cycle", "cosine", "wsd"])
@pytest.mark.parametrize("final", [0.0, 0.1, 0.3])
def test_schedule_ends_exactly_at_final_lr(name, final):
    f = jax.jit(schedule(OptimConfig(schedule=name, warmup=0.1, decay=0.5, final_lr=final)))
    assert f(1.0) == np.float32(final)
    # A clock may report that a little more than the budget was spent.
    assert f(1.5) == np.float32(final)


@pytest.mark.parametrize("name", ["triangle", "one_cycle", "cosine", "wsd", "constant"])
def test_schedule_reaches_its_peak_and_stays_within_bounds(name):
    values = np.asarray(jax.vmap(schedule(OptimConfig(schedule=name, warmup=0.25, decay=0.5)))(GRID))
    assert values.max() == 1.0
    assert values.min() >= 0.0


def test_no_warmup_starts_at_the_peak():
    for name in ("cosine", "wsd", "constant", "one_cycle"):
        assert schedule(OptimConfig(schedule=name))(0.0) == 1.0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"schedule": "wsd", "warmup": 0.6, "decay": 0.6}, r"0\.6 \+ 0\.6"),
        ({"schedule": "wsd", "decay": 0.0}, "constant"),
        ({"schedule": "cosine", "warmup": 1.0}, "below 1"),
        ({"final_lr": 2.0}, r"final_lr must be from 0 to 1, got 2"),
        ({"warmup": -0.1}, r"warmup.*-0\.1"),
    ],
)
def test_impossible_schedules_are_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        schedule(OptimConfig(**fields))


def test_batch_ramp_of_crammed_bert():
    """RECIPES.md: the batch ramps linearly to 8192 sequences at 60% of the budget (microbatch 128 here)."""
    config = BatchConfig(size=8192, microbatch=128, ramp=0.6)
    assert batch_size_at(config, 0.0) == 128
    assert batch_size_at(config, 0.3) == 4096  # half-way: 128 + 8064 / 2 = 4160, in whole microbatches
    assert batch_size_at(config, 0.59999) < 8192
    assert batch_size_at(config, 0.6) == 8192
    assert batch_size_at(config, 1.0) == 8192


@given(st.integers(1, 64), st.integers(2, 64), st.floats(0.01, 1.0), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_batch_ramp_grows_in_whole_microbatches(microbatch, count, ramp, x, y):
    config = BatchConfig(size=microbatch * count, microbatch=microbatch, ramp=ramp)
    low, high = (batch_size_at(config, f) for f in sorted((x, y)))
    assert microbatch <= low <= high <= config.size
    assert low % microbatch == high % microbatch == 0


def test_batch_without_ramp_is_constant():
    assert [batch_size_at(BatchConfig(size=48, microbatch=16), x) for x in (0.0, 0.5, 1.0)] == [48, 48, 48]
    assert batch_size_at(BatchConfig(size=48), 0.0) == 48


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BatchConfig(size=100, microbatch=32), "size 100 and microbatch 32; the nearest sizes are 96 and 128"),
        (BatchConfig(size=16, microbatch=32), "nearest sizes are 32 and 64"),
        (BatchConfig(size=32, microbatch=0), "at least 1"),
        (BatchConfig(size=32, ramp=0.5), "nothing to grow"),
        (BatchConfig(size=32, microbatch=8, ramp=1.5), r"\[0, 1\], got 1\.5"),
    ],
)
def test_impossible_batches_are_refused(config, words):
    with pytest.raises(ConfigError, match=words):
        batch_size_at(config, 0.1)
