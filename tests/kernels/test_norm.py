"""Norms against their definitions in float64, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.kernels.norm import normalise

_EPS = 1e-5


def _defined(centred: bool, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    middle = x - x.mean(-1, keepdims=True) if centred else x
    return middle / np.sqrt((middle**2).mean(-1, keepdims=True) + _EPS) * weight + bias


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("centred", [True, False], ids=["layernorm", "rmsnorm"])
def test_norms_and_their_gradients_match_float64(centred: bool, dtype: str) -> None:
    rng = np.random.default_rng(0)
    # Rows of zeros and of one value too, whose variance is 0, and one far from 0.
    x = rng.normal(size=(2, 4, 8)) * np.array([1, 10, 0, 0])[:, None] + np.array([0, 50, 0, 0.5])[:, None]
    x, g = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x, rng.normal(size=x.shape)))
    weight, bias = rng.normal(size=8), rng.normal(size=8)

    def ours(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
        return normalise(x, weight, bias, centred=centred, eps=_EPS)

    w32, b32 = jnp.asarray(weight, jnp.float32), jnp.asarray(bias, jnp.float32)
    y, pullback = jax.vjp(ours, jnp.asarray(x, dtype), w32, b32)
    gradients = pullback(jnp.asarray(g, dtype))
    assert y.dtype == dtype and [a.dtype for a in gradients] == [dtype, jnp.float32, jnp.float32]
    # Rounded to bfloat16 once; float32 loses digits to the mean of 50 and to the root of eps.
    near = {"rtol": 2**-8, "atol": 2e-2} if dtype == "bfloat16" else {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(np.asarray(y, np.float64), _defined(centred, x, weight, bias), **near)
    arguments = [x, weight, bias]
    for number, gradient in enumerate(gradients):
        differences, step = np.zeros_like(arguments[number]), 1e-5
        for place in np.ndindex(differences.shape):
            values = []
            for sign in (1, -1):
                moved = [a.copy() for a in arguments]
                moved[number][place] += sign * step
                values.append((_defined(centred, *moved) * g).sum())
            differences[place] = (values[0] - values[1]) / (2 * step)
        # Gradients by a row of variance 0 are up to eps^-½ = 316 large.
        np.testing.assert_allclose(
            np.asarray(gradient, np.float64), differences, rtol=near["rtol"], atol=2 * near["atol"]
        )


def test_norms_without_weights_are_those_with_ones_and_zeros() -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 8)), jnp.float32)
    plain, pullback = jax.vjp(lambda x: normalise(x, centred=True, eps=_EPS), x)
    full, pullback_full = jax.vjp(lambda x: normalise(x, jnp.ones(8), jnp.zeros(8), centred=True, eps=_EPS), x)
    np.testing.assert_array_equal(plain, full)
    np.testing.assert_array_equal(pullback(plain)[0], pullback_full(plain)[0])


def test_norms_keep_their_input_and_two_numbers_a_row() -> None:
    x = jnp.zeros((4, 8), jnp.bfloat16)
    pullback = jax.vjp(lambda x: normalise(x, centred=True, eps=_EPS), x)[1]
    kept = [(x.shape, x.dtype) for x in jax.tree.leaves(pullback)]
    assert kept == [((4, 8), jnp.bfloat16), ((4, 1), jnp.float32), ((4, 1), jnp.float32)]
