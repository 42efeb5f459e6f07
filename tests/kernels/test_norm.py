"""Norms against their definitions in float64, in values and gradients: every implementation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.errors import ConfigError
from cramjax.kernels.norm import normalise, normalise_beside, pallas

_EPS = 1e-5
_IMPLEMENTATIONS = ("pallas", "xla", "reference")


def _defined(centred: bool, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    middle = x - x.mean(-1, keepdims=True) if centred else x
    return middle / np.sqrt((middle**2).mean(-1, keepdims=True) + _EPS) * weight + bias


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("centred", [True, False], ids=["layernorm", "rmsnorm"])
@pytest.mark.parametrize("implementation", _IMPLEMENTATIONS)
@pytest.mark.usefixtures("on_an_h100")
def test_norms_and_their_gradients_match_float64(implementation: str, centred: bool, dtype: str) -> None:
    rng = np.random.default_rng(0)
    # Rows of zeros and of one value too, whose variance is 0, and one far from 0.
    x = rng.normal(size=(2, 4, 8)) * np.array([1, 10, 0, 0])[:, None] + np.array([0, 50, 0, 0.5])[:, None]
    x, g = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x, rng.normal(size=x.shape)))
    weight, bias = rng.normal(size=8), rng.normal(size=8)

    def ours(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
        return normalise(x, weight, bias, centred=centred, eps=_EPS, implementation=implementation)

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


def _complex_step(centred: bool, g: np.ndarray, arguments: list[np.ndarray], number: int) -> np.ndarray:
    """Gradient by an argument, exact to float64: Im f(x + ih) / h (Squire & Trapp 1998)."""
    h, found = 1e-30, np.zeros_like(arguments[number])
    for column in range(found.shape[-1]):
        moved = [a.astype(complex) for a in arguments]
        moved[number][..., column] += 1j * h
        slopes = (_defined(centred, *moved) * g).imag / h
        found[..., column] = slopes.sum(-1) if number == 0 else slopes.sum()
    return found


# 96 and 768 columns pad to powers of two. 5 rows are part of a block; 9 rows of 768 are 2 visits for each of 2 programs
# where weights are learned, of which the last has 1 of 4 rows.
_CASES: dict[str, dict[str, Any]] = {
    "layernorm": {"shape": (3, 3, 768), "centred": True, "affine": (True, True), "far": 30.0},
    "layernorm beside": {"shape": (1, 9, 768), "centred": True, "affine": (True, True), "beside": True},
    "plain layernorm beside": {"shape": (5, 96), "centred": True, "beside": True, "far": 1e3},
    "rmsnorm": {"shape": (9, 768), "centred": False, "affine": (True, False)},
    "plain rmsnorm beside": {"shape": (1, 5, 96), "centred": False, "beside": True},
    "biased rmsnorm": {"shape": (1, 5, 96), "centred": False, "affine": (False, True)},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", _CASES)
@pytest.mark.parametrize("implementation", _IMPLEMENTATIONS)
@pytest.mark.usefixtures("on_an_h100")
def test_rows_of_any_width_match_float64(
    implementation: str, case: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pallas, "_PROGRAMS", 2)
    _check(implementation, dtype, **_CASES[case])


def _check(
    implementation: str,
    dtype: str,
    *,
    shape: tuple[int, ...],
    centred: bool,
    affine: tuple[bool, bool] = (False, False),
    beside: bool = False,
    far: float = 0.0,
) -> None:
    """Compare with float64, within what rounding of float32 sums and of results in `dtype` explains."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=shape) * rng.uniform(0.1, 3.0, size=(*shape[:-1], 1)) + far
    x, g, g_stream = (
        np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x, rng.normal(size=shape), rng.normal(size=shape))
    )
    wanted_both = [rng.normal(size=shape[-1]).astype(np.float32) if wanted else None for wanted in affine]
    learned = [None if a is None else jnp.asarray(a) for a in wanted_both]
    weight, bias = (
        np.full(shape[-1], default) if a is None else a.astype(np.float64)
        for a, default in zip(wanted_both, (1.0, 0.0), strict=True)
    )
    options: dict[str, Any] = {"centred": centred, "eps": _EPS, "implementation": implementation}

    @jax.jit
    def run(x: jax.Array, learned: Any, g: jax.Array, g_stream: jax.Array) -> Any:
        if beside:
            (stream, y), pullback = jax.vjp(lambda x, learned: normalise_beside(x, *learned, **options), x, learned)
            return stream, y, *pullback((g_stream, g))
        y, pullback = jax.vjp(lambda x, learned: normalise(x, *learned, **options), x, learned)
        return x, y, *pullback(g)

    given = [jnp.asarray(a, dtype) for a in (x, g, g_stream)]
    stream, y, by_x, by_learned = run(given[0], learned, *given[1:])
    assert y.dtype == by_x.dtype == dtype and (stream == given[0]).all()

    float32, rounding = 2.0**-21, 0 if dtype == "float32" else 2**-8
    middle = x - x.mean(-1, keepdims=True) if centred else x
    scale = 1 / np.sqrt((middle**2).mean(-1, keepdims=True) + _EPS)
    exact = _defined(centred, x, weight, bias)
    plain = np.abs(middle * scale)
    loss = float32 * (1 + scale * np.abs(x).max(-1, keepdims=True) + plain)  # what float32 makes of a normalised row

    def assert_near(got: Any, wanted: np.ndarray, bound: np.ndarray) -> None:
        error = np.abs(np.asarray(got, np.float64) - wanted)
        assert (error <= bound).all(), f"{(error / bound).max()} times what rounding explains"

    assert_near(y, exact, loss * np.abs(weight) + float32 * np.abs(bias) + rounding * np.abs(exact))
    arguments = [x, weight, bias]
    own = _complex_step(centred, g, arguments, 0)
    total = own + g_stream if beside else own
    steepest = np.abs(g * weight).max(-1, keepdims=True)
    bound = 4 * scale * steepest * loss * (1 + plain) + float32 * np.abs(total)
    assert_near(by_x, total, bound + rounding * (np.abs(own) + np.abs(total)))
    for number, got in enumerate(by_learned, 1):
        if got is None:
            assert learned[number - 1] is None
            continue
        assert got.dtype == jnp.float32
        rows = tuple(range(len(shape) - 1))
        factor = loss if number == 1 else np.full_like(loss, float32)
        bound = (np.abs(g) * (factor + float32 * plain)).sum(rows)
        assert_near(got, _complex_step(centred, g, arguments, number), bound)


@pytest.mark.parametrize("implementation", _IMPLEMENTATIONS)
@pytest.mark.usefixtures("on_an_h100")
def test_norms_without_weights_are_those_with_ones_and_zeros(implementation: str) -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 8)), jnp.float32)
    options: dict[str, Any] = {"centred": True, "eps": _EPS, "implementation": implementation}
    plain, pullback = jax.vjp(lambda x: normalise(x, **options), x)
    full, pullback_full = jax.vjp(lambda x: normalise(x, jnp.ones(8), jnp.zeros(8), **options), x)
    # Interpreted, the kernels' sums of terms near 1 are fused differently.
    near = {"rtol": 0, "atol": 2**-21 if implementation == "pallas" else 0}
    np.testing.assert_allclose(plain, full, **near)
    np.testing.assert_allclose(pullback(plain)[0], pullback_full(plain)[0], **near)


def test_norms_keep_their_input_and_two_numbers_a_row() -> None:
    x = jnp.zeros((4, 8), jnp.bfloat16)
    pullback = jax.vjp(lambda x: normalise(x, centred=True, eps=_EPS), x)[1]
    kept = [(x.shape, x.dtype) for x in jax.tree.leaves(pullback)]
    assert kept == [((4, 8), jnp.bfloat16), ((4, 1), jnp.float32), ((4, 1), jnp.float32)]


@pytest.mark.usefixtures("on_an_h100")
def test_kernels_keep_their_input_alone() -> None:
    x = jnp.zeros((4, 8), jnp.bfloat16)
    pullback = jax.vjp(lambda x: normalise(x, centred=True, eps=_EPS), x)[1]
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(pullback)] == [((4, 8), jnp.bfloat16)]


def test_without_a_gpu_the_kernels_say_so() -> None:
    with pytest.raises(ConfigError, match="Norm implementation 'pallas' cannot run here: .*this is a cpu"):
        normalise(jnp.zeros((2, 8)), centred=True, eps=_EPS, implementation="pallas")
