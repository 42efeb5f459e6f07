"""Non-linearities against their definitions in float64, in values and gradients: every implementation."""

import math
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.config import Activation
from cramjax.errors import ConfigError
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
_GATES = {"geglu": "gelu", "geglu_tanh": "gelu_tanh", "swiglu": "silu"}
_WAYS = [
    (implementation, activation)
    for implementation in ("pallas", "xla", "reference")
    for activation in get_args(Activation)
    if implementation != "pallas" or activation in _GATES
]


def _defined(activation: str, h: np.ndarray) -> np.ndarray:
    if activation in _GATES:
        gate, x = np.split(h, 2, axis=-1)
        return _DEFINITIONS[_GATES[activation]](gate) * x
    return _DEFINITIONS[activation](h)


def _check(activation: Any, h: np.ndarray, dtype: str, implementation: str | None) -> None:
    """Compare with float64: results, and gradients by its central differences."""
    h = np.asarray(jnp.asarray(h, dtype), np.float64)
    y, pullback = jax.vjp(lambda h: activate(activation, h, implementation), jnp.asarray(h, dtype))
    (gradient,) = pullback(jnp.ones_like(y))
    assert y.dtype == gradient.dtype == dtype
    step = 1e-5
    # Each result depends on one number, or on one in each half.
    parts = [slice(None)]
    if activation in _GATES:
        parts = [slice(0, h.shape[1] // 2), slice(h.shape[1] // 2, None)]
    differences = np.zeros_like(h)
    for part in parts:
        shift = np.zeros_like(h)
        shift[:, part] = step
        differences[:, part] = (_defined(activation, h + shift) - _defined(activation, h - shift)) / (2 * step)
    # Rounded once to bfloat16; central differences of float64 are good to about 1e-6 here.
    near = {"rtol": 2**-8, "atol": 1e-3} if dtype == "bfloat16" else {"rtol": 1e-5, "atol": 1e-4}
    np.testing.assert_allclose(np.asarray(y, np.float64), _defined(activation, h), **near)
    np.testing.assert_allclose(np.asarray(gradient, np.float64), differences, **near)


# Far from 0 too, where a careless formula gives inf · 0. Halves of 33 columns pad to 64.
_VALUES = np.concatenate([np.linspace(-6, 6, 61), [-200.0, -20.0, 20.0, 200.0, 0.5]])
_ROWS = np.stack([_VALUES, np.roll(_VALUES, 5)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", get_args(Activation))
def test_activations_and_their_gradients_match_float64(activation: Any, dtype: str) -> None:
    _check(activation, _ROWS, dtype, None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("implementation", "activation"), _WAYS)
@pytest.mark.usefixtures("on_an_h100")
def test_on_a_gpu_they_match_float64(implementation: str, activation: Any, dtype: str) -> None:
    _check(activation, _ROWS, dtype, implementation)


@pytest.mark.parametrize("activation", _GATES)
@pytest.mark.usefixtures("on_an_h100")
def test_halves_wider_than_a_block_match_float64(activation: Any) -> None:
    # 9 rows of 600 columns: two blocks of either, the second of each incomplete.
    _check(activation, np.random.default_rng(0).normal(scale=3.0, size=(9, 1200)), "float32", "pallas")


@pytest.mark.usefixtures("on_an_h100")
def test_what_is_not_gated_is_not_for_the_kernels() -> None:
    with pytest.raises(ConfigError, match="Activation implementation 'pallas' cannot run here: .* relu2 once"):
        activate("relu2", jnp.zeros((2, 8)), "pallas")


def test_activations_keep_only_what_they_read() -> None:
    h = jnp.zeros((4, 8), jnp.bfloat16)
    pullback = jax.vjp(lambda h: activate("gelu_tanh", h), h)[1]
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(pullback)] == [((4, 8), jnp.bfloat16)]


@pytest.mark.usefixtures("on_an_h100")
def test_kernels_keep_only_what_they_read() -> None:
    h = jnp.zeros((4, 8), jnp.bfloat16)
    pullback = jax.vjp(lambda h: activate("geglu", h), h)[1]
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(pullback)] == [((4, 8), jnp.bfloat16)]
