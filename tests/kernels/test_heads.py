"""Norm and rotation of heads against their definitions in float64: every implementation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.errors import ConfigError
from cramjax.kernels.heads import normalise_and_rotate
from cramjax.model.layers import rotary_angles

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
}


def _defined(x: np.ndarray, eps: float | None, cos: Any, sin: Any) -> np.ndarray:
    if eps is not None:
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    if cos is None:
        return x
    pairs = np.stack(np.split(x, 2, axis=-1), axis=-1)  # (…, half, 2)
    turn = np.stack([np.stack([cos, -sin], axis=-1), np.stack([sin, cos], axis=-1)], axis=-2)
    return np.moveaxis(np.einsum("...ij,...j->...i", turn, pairs), -1, -2).reshape(x.shape)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", _CASES)
@pytest.mark.parametrize("implementation", _IMPLEMENTATIONS)
@pytest.mark.usefixtures("on_an_h100")
def test_heads_and_their_gradients_match_float64(implementation: str, case: str, dtype: str) -> None:
    shape, queries, eps, rows = (_CASES[case][key] for key in ("shape", "queries", "eps", "rows"))
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
    def run(x: jax.Array, rotary: Any, gs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        both, pullback = jax.vjp(
            lambda x: normalise_and_rotate(x, queries, rotary, eps=eps, implementation=implementation), x
        )
        return *both, *pullback(gs)

    given = jnp.asarray(g, dtype)
    q, k, by_x = run(jnp.asarray(x, dtype), rotary, (given[:, :, :queries], given[:, :, queries:]))
    assert q.dtype == k.dtype == by_x.dtype == dtype and q.shape[2] == queries
    wanted, by_wanted, h = _defined(x, eps, cos, sin), np.zeros_like(x), 1e-30
    for column in range(shape[3]):  # complex steps: exact to float64
        moved = x.astype(complex)
        moved[..., column] += 1j * h
        by_wanted[..., column] = (_defined(moved, eps, cos, sin) * g).imag.sum(-1) / h

    # Kernels and reference round to bfloat16 once; XLA rounds norm, angles, and what is turned.
    rounding = 0 if dtype == "float32" else 2**-8 if implementation != "xla" else 2**-6
    scale = 1.0 if eps is None else 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    y = np.abs(x * scale).max(-1, keepdims=True)
    got = np.concatenate([np.asarray(each, np.float64) for each in (q, k)], axis=2)
    turned = rounding * (2 * y if implementation == "xla" else np.abs(wanted))
    assert (np.abs(got - wanted) <= turned + 2**-20 * (1 + y)).all()
    steepest = scale * np.abs(g).max(-1, keepdims=True) * (2 if eps is None else 2 * (1 + y * y))
    by_rounding = rounding * (steepest if implementation == "xla" else np.abs(by_wanted))
    assert (np.abs(np.asarray(by_x, np.float64) - by_wanted) <= by_rounding + 2**-20 * steepest).all()


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
