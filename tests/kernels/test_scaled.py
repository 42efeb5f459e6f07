"""Factors of inputs and results (IA3), and adapters merged into their matrices."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.errors import ConfigError, ModelError
from cramjax.kernels.dense import dense
from cramjax.kernels.packed import (
    LowRank,
    Scaled,
    adapter_settings,
    from_arrays,
    is_packed,
    low_rank,
    merge,
    normal_float,
    quantise,
    scaled,
    to_arrays,
    unpacked,
)

INNER, OUTER, START = 32, 24, 10


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.float32(np.random.default_rng(seed).normal(size=shape))


def float64(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def drawn(leaf: Scaled) -> Scaled:
    """One whose factors are random."""
    parts = {name: part for name in leaf.trained if (part := getattr(leaf, name)) is not None}
    return replace(leaf, **{name: normal(*part.shape, seed=len(name)) for name, part in parts.items()})


@pytest.mark.parametrize("start", [None, 0, START])
@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("bits", [None, 8])
def test_products_and_gradients_match_float64(bits: int | None, inputs: bool, start: int | None) -> None:
    if not inputs and start is None:
        return
    w = normal(INNER, OUTER)
    leaf = drawn(scaled(w if bits is None else quantise(w, bits, 16), inputs=inputs, start=start))
    x, bias, g = normal(5, INNER, seed=1), normal(OUTER, seed=2), normal(5, OUTER, seed=3)
    y, pull = jax.vjp(jax.jit(lambda x, bias, leaf: dense(x, leaf, bias)), x, bias, leaf)
    by_x, by_bias, by_leaf = pull(g)
    factors = np.ones(OUTER)
    if leaf.outputs is not None:
        factors[leaf.start :] = float64(leaf.outputs)[0]
    scales = np.ones(INNER) if leaf.inputs is None else float64(leaf.inputs)[:, 0]
    matrix, rows, up = float64(unpacked(leaf.base)), float64(x), float64(g)
    result = (rows * scales) @ matrix + float64(bias)
    wanted = {"y": result * factors, "x": (up * factors) @ matrix.T * scales, "bias": (up * factors).sum(0)}
    got: dict[str, Any] = {"y": y, "x": by_x, "bias": by_bias}
    if leaf.outputs is not None:
        wanted["outputs"], got["outputs"] = (up * result).sum(0)[None, leaf.start :], by_leaf.outputs
    if leaf.inputs is not None:
        wanted["inputs"], got["inputs"] = ((up * factors) @ matrix.T * rows).sum(0)[:, None], by_leaf.inputs
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=0, atol=2e-6 * np.abs(value).max(), err_msg=name)
    for part in jax.tree.leaves(by_leaf.base):
        assert part.dtype == jax.dtypes.float0 or not part.any()
    np.testing.assert_allclose(leaf.unpacked(), scales[:, None] * matrix * factors, rtol=0, atol=1e-5)


def test_factors_start_as_ones() -> None:
    base = normal(2, INNER, OUTER)
    leaf = scaled(base, inputs=True, start=START)
    np.testing.assert_array_equal(leaf.unpacked(), base)
    assert leaf.inputs.shape == (2, INNER, 1) and leaf.outputs.shape == (2, 1, OUTER - START)
    assert leaf.shape == base.shape and leaf[1].shape == (INNER, OUTER)
    with pytest.raises(ConfigError, match="inputs of a matrix or its results: choose one"):
        scaled(base)
    with pytest.raises(ConfigError, match="one of 24 columns, from 0, got 24"):
        scaled(base, start=OUTER)


def named() -> dict[str, Any]:
    return {
        "qkv": {"kernel": drawn(scaled(normal(2, INNER, OUTER), start=START)), "bias": normal(2, OUTER)},
        "down": {"kernel": drawn(scaled(normal_float(normal(2, INNER, OUTER), 32), inputs=True))},
    }


def test_factors_are_named() -> None:
    params = named()
    arrays, settings = to_arrays(params), adapter_settings(params)
    assert settings == {"qkv/kernel": {"start": START}, "down/kernel": {"start": 0}}
    assert {"qkv/kernel.outputs", "down/kernel.inputs"} < set(arrays)
    back = from_arrays(arrays, settings)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ModelError, match="down/kernel: factors need the setting `start`"):
        from_arrays(arrays)
    with pytest.raises(ModelError, match="do not fit one another"):
        from_arrays(arrays, settings | {"qkv/kernel": {"start": 0}})


def adapted(base: Any, widths: tuple[int, ...] = (), dora: bool = False) -> LowRank:
    leaf = low_rank(base, 2, scale=0.5, key=jax.random.key(0), widths=widths, dora=dora)
    return replace(leaf, b=0.2 * normal(*leaf.b.shape, seed=3))


def test_merged_matrices_compute_what_theirs_with_adapters_do() -> None:
    params = {
        "plain": {"kernel": normal(4, 4), "bias": normal(4)},
        "up": {"kernel": adapted(normal(2, INNER, OUTER), (20, 4), dora=True), "bias": normal(2, OUTER)},
        "qkv": {"kernel": drawn(scaled(normal(2, INNER, OUTER), start=START)), "bias": normal(2, OUTER)},
        "down": {"kernel": drawn(scaled(normal(2, INNER, OUTER), inputs=True))},
        "head": {"kernel": adapted(normal(INNER, OUTER).astype(jnp.bfloat16))},
    }
    merged = merge(params)
    assert not any(map(is_packed, jax.tree.leaves(merged.params, is_leaf=is_packed)))
    assert merged.changes.keys() == {f"{name}/kernel" for name in ("up", "qkv", "down", "head")}
    for name in ("up", "qkv", "down"):
        assert merged.changes[f"{name}/kernel"] == 0
        x, own, other = normal(3, INNER), params[name], merged.params[name]
        for layer in range(2):
            bias = own["bias"][layer] if "bias" in own else None
            after = other["bias"][layer] if "bias" in own else None
            got, wanted = dense(x, other["kernel"][layer], after), dense(x, own["kernel"][layer], bias)
            np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5)
    assert merged.params["head"]["kernel"].dtype == jnp.bfloat16
    assert 1e-4 < merged.changes["head/kernel"] < 2**-8
    assert merged.params["plain"]["kernel"] is params["plain"]["kernel"]


@pytest.mark.parametrize(
    "base",
    [
        quantise(normal(2, INNER, OUTER), 8, 16, symmetric=False, scale_dtype="bfloat16"),
        quantise(normal(2, INNER, OUTER), 4, 8),
        normal_float(normal(2, INNER, OUTER), 16),
    ],
    ids=["int8", "int4", "nf4"],
)
def test_packed_bases_are_packed_again_and_what_it_costs_is_told(base: Any) -> None:
    leaf = adapted(base, dora=True)
    merged = merge({"up": {"kernel": leaf}})
    made = merged.params["up"]["kernel"]
    assert jax.tree.structure(made) == jax.tree.structure(base)
    assert [part.dtype for part in jax.tree.leaves(made)] == [part.dtype for part in jax.tree.leaves(base)]
    off = float64(made.unpacked()) - float64(leaf.unpacked())
    costs = np.linalg.norm(off, axis=(1, 2)) / np.linalg.norm(float64(leaf.unpacked()), axis=(1, 2))
    assert merged.changes["up/kernel"] == pytest.approx(costs.max(), rel=1e-4)
    assert 0.001 < costs.max() < 0.2
