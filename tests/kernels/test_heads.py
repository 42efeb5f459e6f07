"""Norm and rotation of heads against their definitions in float64: every implementation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.errors import ConfigError
from cramjax.kernels.heads import normalise_and_rotate
from cramjax.model.positions import rotary_angles

_EPS = 1e-5
_IMPLEMENTATIONS = ("pallas", "xla", "reference")

# Heads of 6 and 80 pad to powers of two, whose halves do not start where the heads' do. 70 tokens of heads of 64 are
# two blocks, the second incomplete.
_CASES: dict[str, dict[str, Any]] = {
    "norm and rotation": {"shape": (1, 70, 3, 64), "queries": 2, "eps": _EPS, "rows": 1},
    "of every sequence": {"shape": (2, 9, 6, 6), "queries": 4, "eps": _EPS, "rows": 2},
    "norm": {"shape": (2, 5, 4, 6), "queries": 2, "eps": _EPS, "rows": 0},
    "rotation": {"shape": (2, 3, 5, 80), "queries": 4, "eps": None, "rows": 1},
    "rotation of every sequence": {"shape": (3, 1, 2, 64), "queries": 1, "eps": None, "rows": 3},
    "neither": {"shape": (1, 3, 5, 6), "queries": 3, "eps": None, "rows": 0},
    "weights and rotation": {"shape": (2, 9, 6, 6), "queries": 4, "eps": _EPS, "rows": 1, "weights": True},
    "weights": {"shape": (1, 5, 4, 8), "queries": 1, "eps": _EPS, "rows": 0, "weights": True},
}


def _defined(x: np.ndarray, eps: float | None, cos: Any, sin: Any, weight: Any = 1.0) -> np.ndarray:
    """Of heads times `weight`: a number of each head and column."""
    if eps is not None:
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight
    if cos is None:
        return x
    pairs = np.stack(np.split(x, 2, axis=-1), axis=-1)  # (…, half, 2)
    turn = np.stack([np.stack([cos, -sin], axis=-1), np.stack([sin, cos], axis=-1)], axis=-2)
    return np.moveaxis(np.einsum("...ij,...j->...i", turn, pairs), -1, -2).reshape(x.shape)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("implementation", "case"),
    [(i, case) for i in _IMPLEMENTATIONS for case in _CASES if i != "pallas" or "weights" not in _CASES[case]],
)
@pytest.mark.usefixtures("on_an_h100")
def test_heads_and_their_gradients_match_float64(implementation: str, case: str, dtype: str) -> None:
    shape, queries, eps, rows = (_CASES[case][key] for key in ("shape", "queries", "eps", "rows"))
    weights, each = None, np.ones((shape[2], shape[3]))
    if "weights" in _CASES[case]:
        weights = tuple(1 + 0.3 * jax.random.normal(jax.random.key(1), (2, shape[3])))
        each = np.stack([np.asarray(weights[head >= queries], np.float64) for head in range(shape[2])])
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) * rng.uniform(0.1, 3.0, size=(*shape[:-1], 1))
    x[0, 0, 0] = 0.0
    x, g = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x, rng.normal(size=shape)))
    rotary, cos, sin = None, None, None
    if rows:
        positions = jnp.arange(shape[1])[None] + 7 * jnp.arange(rows)[:, None]
        rotary = rotary_angles(positions, shape[3], 100.0)
        cos, sin = (np.asarray(each, np.float64) for each in rotary)

    @jax.jit
    def run(x: jax.Array, rotary: Any, gs: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
        both, pullback = jax.vjp(
            lambda x, w: normalise_and_rotate(x, queries, rotary, eps=eps, weights=w, implementation=implementation),
            x,
            weights,
        )
        return *both, *pullback(gs)

    given = jnp.asarray(g, dtype)
    q, k, by_x, by_weights = run(jnp.asarray(x, dtype), rotary, (given[:, :, :queries], given[:, :, queries:]))
    assert q.dtype == k.dtype == by_x.dtype == dtype and q.shape[2] == queries
    wanted, by_wanted, h = _defined(x, eps, cos, sin, each), np.zeros_like(x), 1e-30
    for column in range(shape[3]):  # complex steps: exact to float64
        moved = x.astype(complex)
        moved[..., column] += 1j * h
        by_wanted[..., column] = (_defined(moved, eps, cos, sin, each) * g).imag.sum(-1) / h

    # Kernels and reference round to bfloat16 once; XLA rounds the norm as well.
    rounding = 0 if dtype == "float32" else 2**-8 if implementation != "xla" else 2**-7
    scale = 1.0 if eps is None else 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    y = np.abs(x * scale * each).max(-1, keepdims=True)
    got = np.concatenate([np.asarray(each, np.float64) for each in (q, k)], axis=2)
    turned = rounding * (2 * y if implementation == "xla" else np.abs(wanted))
    assert (np.abs(got - wanted) <= turned + 2**-20 * (1 + y)).all()
    steepest = scale * np.abs(g).max(-1, keepdims=True) * (2 if eps is None else 2 * (1 + y * y)) * np.abs(each).max()
    by_rounding = rounding * (steepest if implementation == "xla" else np.abs(by_wanted))
    assert (np.abs(np.asarray(by_x, np.float64) - by_wanted) <= by_rounding + 2**-20 * steepest).all()
    if weights is None:
        return
    by_each = np.zeros(each.shape)
    for column in range(shape[3]):
        moved = each.astype(complex)
        moved[:, column] += 1j * h
        by_each[:, column] = (_defined(x, eps, cos, sin, moved) * g).imag.sum((0, 1, 3)) / h
    for got, heads in zip(by_weights, (by_each[:queries], by_each[queries:]), strict=True):
        # XLA rounds what comes through the rotation, and the norm's result: a part in 2^8 of each of the terms.
        near = 1e-4 + (len(x[0]) * len(x) * len(heads) * 8 * rounding if implementation == "xla" else 0)
        np.testing.assert_allclose(got, heads.sum(0), atol=near)


def test_far_positions_are_turned_as_exactly_as_near_ones() -> None:
    at = np.array([0, 3, 30_000, 32_767])
    x = np.asarray(jax.random.normal(jax.random.key(0), (1, len(at), 1, 64), jnp.bfloat16), np.float64)
    frequencies = 10_000.0 ** -(np.arange(0, 64, 2) / 64)
    angles = (at[:, None] * frequencies)[None, :, None]
    cos, sin = rotary_angles(jnp.asarray(at)[None], 64, 10_000.0)
    # Angles are float32: the frequency and the product are each rounded to 2^-24 of up to 32,767 radians.
    np.testing.assert_array_less(np.abs(cos - np.cos(angles)), 2 * 2**-24 * angles + 1e-6)
    np.testing.assert_array_less(np.abs(sin - np.sin(angles)), 2 * 2**-24 * angles + 1e-6)
    wanted = _defined(x, None, np.asarray(cos, np.float64), np.asarray(sin, np.float64))
    for implementation in ("xla", "reference"):
        got, _ = normalise_and_rotate(jnp.asarray(x, jnp.bfloat16), 1, (cos, sin), implementation=implementation)
        # Rounded once to bfloat16: by at most 2^-8 of the result, however small it is beside what was turned.
        assert (np.abs(np.asarray(got, np.float64) - wanted) <= 2**-8 * np.abs(wanted) + 1e-6).all()


@pytest.mark.usefixtures("on_an_h100")
def test_weights_are_those_of_a_norm_and_not_for_the_kernels() -> None:
    x, weights = jnp.ones((1, 2, 2, 6)), (jnp.ones(6), jnp.ones(6))
    with pytest.raises(ConfigError, match="its norm has no weights"):
        normalise_and_rotate(x, 1, eps=_EPS, weights=weights, implementation="pallas")
    with pytest.raises(ValueError, match="there is no norm"):
        normalise_and_rotate(x, 1, weights=weights)


@pytest.mark.parametrize("implementation", _IMPLEMENTATIONS)
@pytest.mark.usefixtures("on_an_h100")
def test_rotary_scores_depend_on_distance_only(implementation: str) -> None:
    positions = jnp.array([[9, 4, 105, 100, 5]])
    q, k = jax.random.normal(jax.random.key(0), (2, 16))
    x = jnp.broadcast_to(jnp.stack([q, k]), (1, 5, 2, 16))
    q, k = normalise_and_rotate(x, 1, rotary_angles(positions, 16, 10_000.0), implementation=implementation)
    scores = np.asarray(jnp.einsum("bihd,bjhd->ij", q, k))
    assert scores[0, 1] == pytest.approx(scores[2, 3], abs=1e-4)
    assert scores[0, 1] != pytest.approx(scores[0, 4], abs=1e-3)


@pytest.mark.usefixtures("on_an_h100")
def test_only_a_norm_keeps_what_it_read() -> None:
    x, rotary = jnp.zeros((1, 4, 3, 8)), rotary_angles(jnp.arange(4)[None], 8, 100.0)

    def kept(eps: float | None) -> list[tuple[int, ...]]:
        pullback = jax.vjp(lambda x: normalise_and_rotate(x, 2, rotary, eps=eps), x)[1]
        return sorted(leaf.shape for leaf in jax.tree.leaves(pullback))

    assert kept(None) == [(1, 4, 1, 4)] * 2 and kept(_EPS) == [(1, 4, 1, 4)] * 2 + [(1, 4, 3, 8)]


@pytest.mark.usefixtures("on_an_h100")
def test_heads_without_halves_are_not_for_the_kernels() -> None:
    x = jnp.ones((1, 2, 2, 5))
    with pytest.raises(ConfigError, match="it takes heads in two halves, which heads of 5 do not have"):
        normalise_and_rotate(x, 1, eps=_EPS, implementation="pallas")
    np.testing.assert_allclose(normalise_and_rotate(x, 1, eps=0.0)[0], 1.0)
