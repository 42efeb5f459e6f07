"""Adapters of low rank: products and gradients against float64, their start, and their parts in trees and files."""

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
    adapter_settings,
    from_arrays,
    low_rank,
    on_base,
    quantise,
    to_arrays,
    unpacked,
)
from cramjax.model.stack import unstack

INNER, OUTER, RANK, SCALE = 32, 24, 3, 1.5
WIDTHS = [(), (8, 12, 4)]


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.float32(np.random.default_rng(seed).normal(size=shape))


def float64(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def adapter(base: Any, widths: tuple[int, ...] = (), dora: bool = False) -> LowRank:
    """One whose trained parts are all random."""
    leaf = low_rank(base, RANK, scale=SCALE, key=jax.random.key(0), widths=widths, dora=dora)
    magnitude = None if leaf.magnitude is None else 1 + jnp.abs(normal(*leaf.magnitude.shape, seed=4))
    return replace(leaf, a=normal(*leaf.a.shape, seed=2), b=normal(*leaf.b.shape, seed=3), magnitude=magnitude)


def columns(widths: tuple[int, ...]) -> list[slice]:
    ends = np.cumsum((0, *(widths or (OUTER,))))
    return [slice(start, stop) for start, stop in zip(ends[:-1], ends[1:], strict=True)]


def factors(leaf: LowRank) -> list[tuple[np.ndarray, np.ndarray, slice]]:
    """Each matrix's a and b, and its columns."""
    return [
        (float64(leaf.a)[..., i * RANK : (i + 1) * RANK], float64(leaf.b)[..., own], own)
        for i, own in enumerate(columns(leaf.widths))
    ]


def defined(leaf: LowRank) -> tuple[np.ndarray, np.ndarray]:
    """The sum of base and adapter, and by what DoRA multiplies its columns, by NumPy in float64."""
    matrix = float64(unpacked(leaf.base)).copy()
    for a, b, own in factors(leaf):
        matrix[..., own] += SCALE * a @ b
    if leaf.magnitude is None:
        return matrix, np.ones((*matrix.shape[:-2], 1, matrix.shape[-1]))
    return matrix, float64(leaf.magnitude) / np.linalg.norm(matrix, axis=-2, keepdims=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
def test_products_and_gradients_match_float64(
    bits: int | None, dora: bool, widths: tuple[int, ...], dtype: str
) -> None:
    w = normal(INNER, OUTER, seed=1)
    leaf = adapter(w if bits is None else quantise(w, bits, 16), widths, dora)
    x, g = (jnp.asarray(normal(2, 5, n, seed=n), dtype) for n in (INNER, OUTER))
    trained = {name: getattr(leaf, name) for name in leaf.trained if getattr(leaf, name) is not None}

    @jax.jit
    def run(x: jax.Array, trained: Any, bias: jax.Array, g: jax.Array) -> Any:
        y, pull = jax.vjp(lambda x, t, bias: dense(x, replace(leaf, **t), bias, dtype=dtype), x, trained, bias)
        return y, pull(g)

    y, (by_x, by_trained, by_bias) = run(x, trained, normal(OUTER, seed=5), g)
    assert y.dtype == by_x.dtype == dtype and y.shape == (2, 5, OUTER)
    rows, up = float64(x).reshape(-1, INNER), float64(g).reshape(-1, OUTER)
    matrix, factor = defined(leaf)
    wanted = {"x": up @ (matrix * factor).T, "bias": up.sum(0)}
    got: dict[str, Any] = {"x": by_x.reshape(-1, INNER), "bias": by_bias, **by_trained}
    # The lengths of columns are constants to gradients.
    wanted["a"] = np.concatenate([SCALE * rows.T @ (up * factor)[:, own] @ b.T for _, b, own in factors(leaf)], axis=1)
    wanted["b"] = np.concatenate([SCALE * (rows @ a).T @ (up * factor)[:, own] for a, _, own in factors(leaf)], axis=1)
    if dora:
        wanted["magnitude"] = np.sum(up * (rows @ matrix), 0)[None] * factor / float64(leaf.magnitude)
    wanted["y"] = rows @ (matrix * factor) + float64(normal(OUTER, seed=5))
    got["y"] = y.reshape(-1, OUTER)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        # Operands and summands are rounded: of bfloat16 a few of 2^-8 each, of terms as large as the largest results.
        within = {"float32": 2e-6, "bfloat16": 2e-2}[dtype] * np.abs(value).max()
        np.testing.assert_allclose(float64(got[name]), value, rtol=0, atol=within, err_msg=name)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("widths", WIDTHS)
def test_the_matrix_is_the_sum(dora: bool, widths: tuple[int, ...]) -> None:
    leaf = adapter(normal(2, INNER, OUTER), widths, dora)
    matrix, factor = defined(leaf)
    np.testing.assert_allclose(leaf.unpacked(), matrix * factor, rtol=0, atol=1e-5)
    if dora:  # columns are as long as their magnitudes say
        lengths = np.linalg.norm(float64(leaf.unpacked()), axis=1, keepdims=True)
        np.testing.assert_allclose(lengths, leaf.magnitude, rtol=1e-5)
    assert (leaf.shape, leaf.ndim, leaf.parts, leaf.rank) == ((2, INNER, OUTER), 3, max(1, len(widths)), RANK)
    assert leaf.bytes == sum(part.nbytes for part in jax.tree.leaves(leaf))


@pytest.mark.parametrize("base", [normal(INNER, OUTER), quantise(normal(INNER, OUTER), 8, 16, symmetric=False)])
def test_the_base_is_a_constant(base: Any) -> None:
    leaf, x = adapter(base, (16, 8), dora=True), normal(4, INNER)
    for loss in (lambda leaf: jnp.sum(dense(x, leaf) ** 2), lambda leaf: jnp.sum(leaf.unpacked() ** 3)):
        gradient = jax.grad(loss, allow_int=True)(leaf)
        for part in jax.tree.leaves(gradient.base):
            assert part.dtype == jax.dtypes.float0 or not part.any()
        assert all(getattr(gradient, name).any() for name in leaf.trained)


def test_it_starts_without_a_change() -> None:
    base = normal(2, INNER, OUTER).at[1, :, 5].set(0.0)  # a column of zeros has no direction
    for dora in (False, True):
        leaf = low_rank(base, 200, scale=2.0, key=jax.random.key(1), widths=(20, 4), dora=dora)
        np.testing.assert_allclose(leaf.unpacked(), base, rtol=1e-6)
        np.testing.assert_allclose(dense(normal(3, INNER), leaf[1]), normal(3, INNER) @ base[1], atol=1e-5)
        assert leaf.a.shape == (2, INNER, 400) and not leaf.b.any()
        # Uniform: as wide as peft's, and with the variance of that width.
        assert 0.999 < float(jnp.abs(leaf.a).max()) * INNER**0.5 <= 1
        assert float(jnp.var(leaf.a)) * INNER == pytest.approx(1 / 3, rel=0.02)


def test_stacked_leaves_are_scanned_mapped_indexed_and_unstacked_like_arrays() -> None:
    leaf, x = adapter(quantise(normal(3, INNER, OUTER), 4, 16), (16, 8), dora=True), normal(4, INNER, seed=1)
    matrix, factor = defined(leaf)
    wanted = float64(x) @ (matrix * factor)
    scanned = jax.lax.scan(lambda carry, w: (carry, dense(x, w)), None, leaf)[1]
    mapped = jax.vmap(lambda w: dense(x, w))(leaf)
    layers = jnp.stack([dense(x, layer["w"]) for layer in unstack({"w": leaf}, 3)])
    for got, reference in ((scanned, wanted), (mapped, wanted), (layers, wanted), (dense(x, leaf[1]), wanted[1])):
        np.testing.assert_allclose(got, reference, rtol=0, atol=2e-5)


def test_halves_of_a_leaf_come_together_again() -> None:
    """What is trained and what is not lie in two trees, each with nothing in the other's places."""
    leaf = adapter(quantise(normal(2, INNER, OUTER), 8, 16), dora=True)
    trained, frozen = replace(leaf, base=None), replace(leaf, a=None, b=None, magnitude=None)
    assert len(jax.tree.leaves(trained)) == 3 and len(jax.tree.leaves(frozen)) == 2
    assert trained.shape == frozen.shape == leaf.shape
    both = jax.tree.map(lambda t, f: f if t is None else t, trained, frozen, is_leaf=lambda part: part is None)
    assert jax.tree.structure(both) == jax.tree.structure(leaf)
    shapes = jax.eval_shape(lambda leaf: leaf, leaf)
    assert shapes.shape == leaf.shape and shapes.bytes == leaf.bytes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank of an adapter must be at least 1, got 0"),
        ({"scale": 0.0}, "scale of an adapter must be a positive number, got 0.0"),
        ({"widths": (8, 8)}, r"sum up to 24 columns, got \(8, 8\)"),
    ],
)
def test_what_cannot_be_an_adapter_is_said(options: dict[str, Any], words: str) -> None:
    given = {"rank": 2, "scale": 1.0} | options
    with pytest.raises(ConfigError, match=words):
        low_rank(normal(INNER, OUTER), key=jax.random.key(0), **given)


def named() -> dict[str, Any]:
    """Parameters of which some have adapters."""
    return {
        "blocks": {
            "up": {"kernel": adapter(quantise(normal(2, INNER, OUTER), 4, 16), (20, 4)), "bias": normal(2, OUTER)},
            "down": {"kernel": adapter(normal(2, INNER, OUTER), dora=True)},
        },
        "head": {"kernel": normal(4, 4)},
    }


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(one, other)


def test_parameters_with_adapters_are_named_and_read_back() -> None:
    params = named()
    arrays, settings = to_arrays(params), adapter_settings(params)
    assert {"blocks/up/kernel.base.q", "blocks/up/kernel.a", "blocks/down/kernel.base", "head/kernel"} <= set(arrays)
    assert settings == {
        "blocks/down/kernel": {"scale": SCALE, "widths": []},
        "blocks/up/kernel": {"scale": SCALE, "widths": [20, 4]},
    }
    assert_same(from_arrays(dict(reversed(arrays.items())), settings), params)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"up/kernel.a": None}, r"up/kernel\.b \(float32\), .*: a quantised matrix has"),
        ({"up/kernel.c": np.zeros(2)}, r"up/kernel\.c \(float64\)"),
        ({"up/kernel.a": np.zeros((INNER, 3), np.int32)}, r"up/kernel\.a \(int32\)"),
        ({"up/kernel.a": np.zeros(0, np.float32)}, r"up/kernel\.a is empty, as .* ZeRO-3"),
        ({"up/kernel.a": np.zeros((2, INNER, 5), np.float32)}, r"up/kernel\.a \(2, 32, 5\), .* do not fit one another"),
        ({"up/kernel.a": np.zeros((2, INNER + 1, 6), np.float32)}, r"base \(2, 32, 24\).* or of another model"),
        ({"up/kernel.b": np.zeros(3, np.float32)}, "do not fit one another"),
    ],
)
def test_arrays_that_are_no_adapters_of_a_model_are_said(change: dict[str, Any], words: str) -> None:
    params = {"up": {"kernel": adapter(normal(2, INNER, OUTER), (20, 4))}}
    arrays = {name: array for name, array in (to_arrays(params) | change).items() if array is not None}
    with pytest.raises(ModelError, match=words):
        from_arrays(arrays, adapter_settings(params))


def test_settings_belong_to_adapters() -> None:
    params = {"up": {"kernel": adapter(normal(2, INNER, OUTER))}}
    arrays, settings = to_arrays(params), adapter_settings(params)
    with pytest.raises(ModelError, match=r"up/kernel: .* needs the settings `scale` and `widths`, got \{\}"):
        from_arrays(arrays)
    with pytest.raises(ModelError, match="down/kernel: settings of adapters that have no arrays"):
        from_arrays(arrays, {**settings, "down/kernel": settings["up/kernel"]})
    with pytest.raises(ModelError, match="up/kernel has an adapter already"):
        on_base("up/kernel", params["up"]["kernel"], params["up"]["kernel"])
    with pytest.raises(ModelError, match="up/kernel is no adapter, but a whole array"):
        on_base("up/kernel", normal(INNER, OUTER), normal(INNER, OUTER))


def test_a_scan_keeps_no_copy_of_bases() -> None:
    """Gradients of adapters in a scan: what they hold beside their operands is less than the bases."""
    base = normal(16, 256, 256)
    leaf = low_rank(base, RANK, scale=SCALE, key=jax.random.key(0))
    trained, frozen = leaf.only(leaf.trained), leaf.only(leaf.constant)

    def loss(trained: LowRank, frozen: LowRank, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, own: tuple[LowRank, LowRank]) -> tuple[jax.Array, None]:
            adapter, matrix = own
            return dense(x, replace(matrix, a=adapter.a, b=adapter.b)), None

        return jnp.sum(jax.lax.scan(layer, x, (trained, frozen))[0])

    compiled = jax.jit(jax.grad(loss)).lower(trained, frozen, normal(8, 256)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < base.nbytes / 2
