"""Non-linearities against their definitions in float64, in values and gradients."""

import math
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.config import Activation
from cramjax.kernels.activation import activate

_erf = np.vectorize(math.erf)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


_DEFINITIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": lambda x: x * (1 + _erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x * _sigmoid(x),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}
_GATES = {"geglu": "gelu", "swiglu": "silu"}


def _defined(activation: str, h: np.ndarray) -> np.ndarray:
    if activation in _GATES:
        gate, x = np.split(h, 2, axis=-1)
        return _DEFINITIONS[_GATES[activation]](gate) * x
    return _DEFINITIONS[activation](h)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", get_args(Activation))
def test_activations_and_their_gradients_match_float64(activation: Any, dtype: str) -> None:
    # Far from 0 too, where a careless formula gives inf · 0.
    values = np.concatenate([np.linspace(-6, 6, 61), [-200.0, -20.0, 20.0, 200.0, 0.5]])
    h = np.asarray(jnp.asarray(np.stack([values, np.roll(values, 5)]), dtype), np.float64)
    y, pullback = jax.vjp(lambda h: activate(activation, h), jnp.asarray(h, dtype))
    (gradient,) = pullback(jnp.ones_like(y))
    assert y.dtype == gradient.dtype == dtype
    step = 1e-5
    differences = np.zeros_like(h)
    for column in range(h.shape[1]):
        shift = np.zeros_like(h)
        shift[:, column] = step
        difference = (_defined(activation, h + shift) - _defined(activation, h - shift)) / (2 * step)
        differences[:, column] = difference.sum(1)
    # Rounded once to bfloat16; central differences of float64 are good to about 1e-6 here.
    near = {"rtol": 2**-8, "atol": 1e-3} if dtype == "bfloat16" else {"rtol": 1e-5, "atol": 1e-4}
    np.testing.assert_allclose(np.asarray(y, np.float64), _defined(activation, h), **near)
    np.testing.assert_allclose(np.asarray(gradient, np.float64), differences, **near)


def test_activations_keep_only_what_they_read() -> None:
    h = jnp.zeros((4, 8), jnp.bfloat16)
    pullback = jax.vjp(lambda h: activate("gelu_tanh", h), h)[1]
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(pullback)] == [((4, 8), jnp.bfloat16)]
