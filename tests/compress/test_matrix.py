"""One matrix by each method, against the papers in float64."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.compress.grid import find_grid
from cramjax.compress.matrix import Rewritten, rewrite
from cramjax.compress.solve import factor
from cramjax.compression import CompressConfig, resolved
from cramjax.errors import ModelError

from . import plain

INNER, OUTER, SAMPLES = 192, 24, 400  # more than 128 inputs, and not a multiple of them


def layer(seed: int = 0, inner: int = INNER) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and the Hessian of inputs that are correlated and of very different sizes; as float32 has them."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(SAMPLES, inner)) @ (np.eye(inner) + rng.normal(size=(inner, inner)) / inner**0.5)
    inputs = mixed * np.exp(rng.normal(size=inner))
    w, hessian = rng.normal(size=(inner, OUTER)), inputs.T @ inputs / SAMPLES
    return w.astype(np.float32).astype(float), hessian.astype(np.float32).astype(float)


def made(w: np.ndarray, hessian: np.ndarray | None, **options: Any) -> Rewritten:
    config = resolved(CompressConfig(data="text", **options))
    return rewrite(jnp.float32(w), None if hessian is None else jnp.float32(hessian), config)


def of_each(part: Any, inner: int = INNER) -> np.ndarray:
    """A scale or zero for each weight."""
    return np.repeat(np.asarray(part, float), inner // part.shape[0], axis=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_gptq_is_that_of_the_paper(bits: int, group: int | None, act_order: bool, symmetric: bool) -> None:
    w, hessian = layer(seed=bits)
    options = {"bits": bits, "group": group, "symmetric": symmetric}
    got = made(w, hessian, method="gptq", act_order=act_order, **options)
    scale, zero = of_each(got.leaf.scale), 0 * w if symmetric else of_each(got.leaf.zero)
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(INNER)
    wanted, ties = plain.gptq(w[order], hessian[np.ix_(order, order)], 0.01, scale[order], zero[order], bits)
    codes = np.asarray(got.leaf.codes())[order]
    differs = codes != wanted
    # Of each output all is equal, until float32 rounds a weight in the middle of two codes to the other one.
    columns = np.flatnonzero(differs.any(0))
    first = differs.argmax(0)
    assert all(ties[first[column], column] < 1e-3 * 2 ** (bits - 4) for column in columns)
    assert len(columns) <= OUTER // 6
    # It is better than the nearest codes by what that implementation is.
    nearest = made(w, hessian, method="rtn", **options)
    np.testing.assert_array_equal(nearest.leaf.scale, got.leaf.scale)  # of the same grid
    exact = plain.output_error(w[order], (wanted - zero[order]) * scale[order], hessian[np.ix_(order, order)])
    assert got.error == pytest.approx(exact, rel=0.02)
    assert got.error < 0.7 * nearest.error
    assert got.error == pytest.approx(plain.output_error(w, np.asarray(got.weights, float), hessian), rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [{"sparsity": 0.5}, {"sparsity": 0.7}, {"pattern": "2:4"}, {"pattern": "4:8"}, {"sparsity": 0.5, "bits": 4}],
    ids=str,
)
def test_sparsegpt_is_that_of_the_paper(options: dict[str, Any]) -> None:
    w, hessian = layer(seed=7)
    got = made(w, hessian, method="sparsegpt", group=64, **options)
    config = resolved(CompressConfig(data="text", method="sparsegpt", **options))

    def rounded(i: int, row: np.ndarray) -> np.ndarray:
        scale = of_each(got.leaf.scale)[i]
        return np.clip(np.rint(row / scale), -8, 7) * scale

    rounding = {"rounded": rounded} if config.bits else {}
    wanted, gone = plain.sparsegpt(w, hessian, 0.01, sparsity=config.sparsity, kept=config.kept, **rounding)
    weights = np.asarray(got.weights, float)
    if not config.bits:
        np.testing.assert_array_equal(weights == 0, gone)
        np.testing.assert_allclose(weights, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
        assert got.zeros == pytest.approx(gone.mean())
    else:  # a weight in the middle of two codes may be rounded otherwise, and what follows it in its column
        assert (np.abs(weights - wanted) < 1e-4).all(0).mean() > 0.8
        assert not weights[gone].any()
    others = [made(w, hessian, method=name, group=64, **options) for name in ("wanda", "magnitude")]
    assert got.error < others[0].error < others[1].error


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("options", [{"sparsity": 0.6}, {"pattern": "1:4"}], ids=str)
def test_the_least_weights_are_set_to_zero(method: Any, options: dict[str, Any]) -> None:
    w, hessian = layer(seed=3)
    got = np.asarray(made(w, hessian, method=method, **options).weights)
    score = np.abs(w) * (np.sqrt(np.diag(hessian))[:, None] if method == "wanda" else 1)
    if "pattern" in options:
        parts = score.reshape(-1, 4, OUTER)
        kept = parts == parts.max(1, keepdims=True)
    elif method == "wanda":
        kept = score >= np.sort(score, axis=0)[int(INNER * 0.6)]
    else:
        kept = score >= np.sort(score, axis=None)[int(score.size * 0.6)]
    np.testing.assert_array_equal(got, np.where(kept.reshape(w.shape), w, 0).astype(np.float32))


@pytest.mark.parametrize("symmetric", [True, False])
def test_grids_are_as_defined(symmetric: bool) -> None:
    w = np.random.default_rng(0).normal(size=(64, 5)) + [[0, 0, 3, -9, 0]]
    w[32:, 4] = 0
    grid = find_grid(jnp.float32(w), bits=4, group=32, symmetric=symmetric, mse=False, scale_dtype="float32")
    groups = w.reshape(2, 32, 5)
    low, high = np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0)
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    low[1, 4], high[1, 4] = -1, 1  # of zeros alone
    np.testing.assert_allclose(grid.scale, (high - low) / 15, rtol=1e-6)
    if not symmetric:
        wanted = np.rint(-low / ((high - low) / 15)) - 8
        wanted[1, 4] = np.asarray(grid.zero)[1, 4]  # between two codes
        np.testing.assert_array_equal(grid.zero, wanted)
    assert not np.asarray(grid.leaf(jnp.float32(w)).unpacked())[w == 0].any()


def test_a_searched_range_is_the_best_of_eighty() -> None:
    w = np.random.default_rng(1).standard_t(3, size=(32, 40))
    grid = find_grid(jnp.float32(w), bits=3, group=32, symmetric=False, mse=True, scale_dtype="float32")
    low, high = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
    errors, scales = [], []
    for shrink in 1 - np.arange(80) / 100:
        scale = (high - low) * shrink / 7
        zero = np.rint(-low * shrink / scale)
        errors.append((np.abs((np.clip(np.rint(w / scale) + zero, 0, 7) - zero) * scale - w) ** 2.4).sum(0))
        scales.append(scale)
    best = np.argmin(errors, axis=0)
    assert len(set(best)) > 5
    np.testing.assert_allclose(np.asarray(grid.scale)[0], np.asarray(scales)[best, np.arange(40)], rtol=1e-5)


def test_scales_are_rounded_before_codes_are_found() -> None:
    w, hessian = layer()
    got = made(w, hessian, method="gptq", scale_dtype="bfloat16", act_order=False)
    assert got.leaf.scale.dtype == jnp.bfloat16
    wanted, _ = plain.gptq(w, hessian, 0.01, of_each(got.leaf.scale), 0 * w, 4)
    assert (np.asarray(got.leaf.codes()) == wanted).all(0).mean() > 0.8


def test_inputs_that_are_never_there_lose_their_weights() -> None:
    w, hessian = layer()
    hessian[5] = hessian[:, 5] = 0
    got = made(w, hessian, method="gptq", bits=4, group=32)
    assert got.dead == 1 and not np.asarray(got.weights)[5].any()
    assert np.isfinite(np.asarray(got.weights)).all() and got.damp == 0.01


def test_damping_grows_until_the_hessian_can_be_factored() -> None:
    w, hessian = layer()
    few = np.random.default_rng(0).normal(size=(8, INNER))
    assert made(w, few.T @ few, method="gptq", damp=0.0).damp in (0.01, 0.02)
    assert made(w, hessian, method="gptq", damp=0.0).damp == 0.0
    with pytest.raises(ModelError, match="192 inputs cannot be factored, even with 1 of the mean"):
        factor(jnp.eye(INNER) - 3.0, 0.01)


def test_the_factor_is_that_of_the_inverse() -> None:
    _, hessian = layer()
    u = np.asarray(factor(jnp.float32(hessian), 0.01).u, float)
    assert not np.tril(u, -1).any()
    wanted = plain.inverse(hessian, 0.01)
    np.testing.assert_allclose(u.T @ u, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
