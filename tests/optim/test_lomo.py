"""AdaLomo's direction against its definition in float64, and stochastic rounding against its expectation."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cramjax.config import OptimConfig
from cramjax.errors import ConfigError
from cramjax.optim import make_fused
from cramjax.optim.lomo import adalomo_direction, initial_moment, rounded


def _defined(p: np.ndarray, gradients: list[np.ndarray], clip: float) -> np.ndarray:
    """The direction after some gradients, as AdaLomo's algorithm 1 says it, in float64."""
    row, column, full = np.zeros(p.shape[:1]), np.zeros(p.shape[-1:]), np.zeros(p.shape)
    direction = p
    for t, g in enumerate(gradients, start=1):
        beta = 1 - t**-0.8
        if p.ndim == 2:
            row = beta * row + (1 - beta) * (g**2).mean(1)
            column = beta * column + (1 - beta) * (g**2).mean(0)
            second = np.outer(row, column) / row.mean()
        else:
            second = full = beta * full + (1 - beta) * g**2
        u = g / np.sqrt(second)
        u /= max(1, np.sqrt((u**2).mean()) / clip)
        direction = u * max(1e-3, np.sqrt((p**2).mean()))
    return direction


@pytest.mark.parametrize("shape", [(7, 5), (5,), ()])
@pytest.mark.parametrize("clip", [0.3, 10.0])
def test_direction_is_the_papers(shape: tuple[int, ...], clip: float) -> None:
    rng = np.random.default_rng(0)
    p = rng.normal(size=shape)
    gradients = [rng.normal(size=shape) * scale for scale in (1e-3, 3.0, 0.1)]
    moment = initial_moment(jnp.asarray(p, jnp.float32))
    for step, gradient in enumerate(gradients):
        direction, moment = adalomo_direction(
            jnp.asarray(p, jnp.float32), jnp.asarray(gradient, jnp.float32), moment, jnp.int32(step), clip=clip
        )
    np.testing.assert_allclose(direction, _defined(p, gradients, clip), rtol=2e-5)  # float32 roundings of ten terms


def test_matrices_along_leading_axes_are_tensors_of_their_own() -> None:
    p, g = (jnp.asarray(np.random.default_rng(i).normal(size=(3, 4, 5)), jnp.float32) for i in (0, 1))
    p = p * jnp.asarray([1.0, 10.0, 100.0])[:, None, None]
    together, moments = adalomo_direction(p, g, initial_moment(p), jnp.int32(0))
    for i in range(3):
        alone, moment = adalomo_direction(p[i], g[i], initial_moment(p[i]), jnp.int32(0))
        np.testing.assert_allclose(together[i], alone, rtol=1e-6)
        np.testing.assert_allclose(moments["row"][i], moment["row"], rtol=1e-6)


@settings(deadline=None, max_examples=50)
@given(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), st.integers(0, 2**32 - 1))
def test_rounding_goes_to_a_neighbour_and_leaves_what_is_representable(x: float, seed: int) -> None:
    draws = np.asarray(rounded(jnp.full(64, x, jnp.float32), jnp.bfloat16, jax.random.key(seed)), np.float32)
    nearest = np.float32(ml_dtypes.bfloat16(x))
    spacing = float(ml_dtypes.finfo(ml_dtypes.bfloat16).eps) * max(abs(x), 2.0**-126)
    assert np.all(np.abs(draws.astype(np.float64) - x) <= spacing)
    again = rounded(jnp.full(64, nearest), jnp.bfloat16, jax.random.key(seed))
    np.testing.assert_array_equal(np.asarray(again, np.float32), np.full(64, nearest))


@pytest.mark.parametrize("x", [1.001, -1.001, 3.14159, -2.7e-5, 1.2345e20])
def test_rounding_is_right_on_average(x: float) -> None:
    count = 200_000
    draws = np.asarray(rounded(jnp.full(count, x, jnp.float32), jnp.bfloat16, jax.random.key(0)), np.float64)
    values = np.unique(draws)
    assert len(values) == 2
    # Five standard errors of the mean of so many draws of two values.
    assert abs(draws.mean() - np.float32(x)) <= 5 * draws.std() / np.sqrt(count)
    assert draws.std() > 0


def test_rounding_leaves_what_is_not_finite_and_float32() -> None:
    x = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan])
    np.testing.assert_array_equal(np.asarray(rounded(x, jnp.bfloat16, jax.random.key(0)), np.float32), x)
    x = jnp.asarray([1.001, 1e-40])
    np.testing.assert_array_equal(rounded(x, jnp.float32, jax.random.key(0)), x)


def test_other_optimizers_and_averages_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be lomo or adalomo"):
        make_fused(OptimConfig(name="adamw"), {})
    with pytest.raises(ConfigError, match="another copy of the weights"):
        make_fused(OptimConfig(name="lomo", ema=0.9), {})
