"""Packed leaves: rounding against its bounds, products and gradients against float64, and that they pass for arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cramjax.errors import ConfigError, ModelError
from cramjax.kernels.dense import dense, projections
from cramjax.kernels.packed import Quantised, from_arrays, quantise, tiled
from cramjax.model.stack import unstack

# What is rounded once, or is a sum of float32 terms: relative to the sum of the terms' sizes.
_ROUNDING = {"float32": 2**-20, "bfloat16": 2**-8}

KINDS = [(8, True), (8, False), (4, True), (4, False)]
FEW = [(3, True), (3, False), (2, True), (2, False)]


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.float32(np.random.default_rng(seed).normal(size=shape))


def float64(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def grouped(x: jax.Array, groups: int) -> np.ndarray:
    return float64(x).reshape(*x.shape[:-2], groups, -1, x.shape[-1])


@pytest.mark.parametrize(("bits", "symmetric"), KINDS + FEW)
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_no_weight_is_off_by_more_than_half_a_step(bits: int, symmetric: bool, scale_dtype: str) -> None:
    w = normal(2, 96, 40) + jnp.linspace(-1, 1, 40)  # columns that are not centred, too
    leaf = quantise(w, bits, 32, symmetric=symmetric, scale_dtype=scale_dtype)
    assert leaf.scale.dtype == scale_dtype and leaf.scale.shape == (2, 3, 40)
    errors = np.abs(grouped(leaf.unpacked() - w, 3)) / float64(leaf.scale)[..., None, :]
    # Codes reach the largest weight, however the scale is rounded; the quotient is, in float32.
    assert 0.49 < errors.max() <= 0.5 + 1e-4
    codes = np.asarray(leaf.codes())
    assert codes.min() >= -(2 ** (bits - 1)) + symmetric and codes.max() <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.01), (4, 0.03)])
def test_the_error_is_that_of_a_uniform_quantiser(bits: int, tolerance: float) -> None:
    w = normal(64 * 32, 64)
    leaf = quantise(w, bits, 64)
    steps = grouped(leaf.unpacked() - w, 32) / float64(leaf.scale)[:, None]
    # Even over a step, but for the largest of each group, which has no error; at 4 bits steps are coarse for a normal.
    assert np.sqrt(np.mean(steps**2)) == pytest.approx(12**-0.5 * (1 - 1 / 64) ** 0.5, rel=tolerance)
    if bits == 4:  # measured elsewhere for N(0, 1) in blocks of 64: 0.1081 with codes from -8 to 7, of which -8 is lost
        assert np.sqrt(np.mean(float64(leaf.unpacked() - w) ** 2)) == pytest.approx(0.1081, rel=0.06)


@settings(max_examples=40, deadline=None, database=None)
@given(st.integers(0, 2**31), st.sampled_from([4, 8]), st.booleans(), st.sampled_from([1, 3]))
def test_what_a_leaf_holds_packs_into_the_same_leaf(seed: int, bits: int, symmetric: bool, groups: int) -> None:
    """Weights that codes stand for come back as they are: packing loses nothing, and again changes nothing."""
    rng = np.random.default_rng(seed)
    most = 2 ** (bits - 1) - 1
    codes = rng.integers(-most, most + 1, size=(groups, 8, 3))
    codes[:, 0], codes[:, 1] = most, -most  # so that both ends of each group are taken
    scale = 2.0 ** rng.integers(-8, 8, size=(groups, 1, 3))
    w = jnp.float32((codes * scale).reshape(-1, 3))
    leaf = quantise(w, bits, 8)
    np.testing.assert_array_equal(leaf.unpacked(), w)
    np.testing.assert_array_equal(np.asarray(leaf.codes()).reshape(codes.shape), codes)
    again = quantise(normal(8 * groups, 3, seed=seed), bits, 8, symmetric=symmetric)
    np.testing.assert_array_equal(np.asarray(pair_up(again.codes(), bits)), np.asarray(again.q))


def pair_up(codes: jax.Array, bits: int) -> np.ndarray:
    """Codes as bytes, by NumPy."""
    codes = np.asarray(codes)
    return codes if bits == 8 else ((codes[0::2] + 8) | (codes[1::2] + 8) << 4).astype(np.uint8)


@pytest.mark.parametrize("bits", [3, 2])
def test_codes_of_three_and_two_bits_lie_where_they_are_said_to(bits: int) -> None:
    leaf = quantise(normal(2, 48, 5), bits, 16, symmetric=False)
    shifted = np.asarray(leaf.codes(), np.int64).reshape(2, 3, 16, 5) + 2 ** (bits - 1)
    row = np.arange(16)[:, None]
    if bits == 2:
        words = (shifted << (2 * row)).sum(2).astype(np.uint32)
    else:
        planes = [(((shifted >> bit) & 1) << row).sum(2) for bit in range(3)]
        words = np.stack(planes, axis=2).reshape(2, 9, 5).astype(np.uint16)
    assert leaf.q.dtype == words.dtype and leaf.bytes == 2 * 5 * (48 * bits // 8 + 3 * 8)
    np.testing.assert_array_equal(leaf.q, words)
    arrays = {"w.q": leaf.q, "w.scale": leaf.scale, "w.zero": leaf.zero}
    np.testing.assert_array_equal(from_arrays(arrays)["w"].unpacked(), leaf.unpacked())
    with pytest.raises(ModelError, match="these shapes do not fit one another"):
        from_arrays({**arrays, "w.q": leaf.q[:, :-1]})


def test_zero_stays_zero_and_groups_of_zeros_too() -> None:
    w = normal(16, 5).at[::3].set(0.0).at[8:, 2].set(0.0)
    for bits, symmetric in KINDS:
        leaf = quantise(w, bits, 8, symmetric=symmetric)
        assert not np.asarray(leaf.unpacked())[np.asarray(w) == 0].any()
        assert np.isfinite(float64(leaf.unpacked())).all()


@pytest.mark.parametrize(
    ("bits", "symmetric", "scale_dtype", "bytes_of_scales"),
    [(8, True, "float32", 4), (8, False, "bfloat16", 4), (4, True, "bfloat16", 2), (4, False, "float32", 8)],
)
def test_bytes_are_those_of_its_parts(bits: int, symmetric: bool, scale_dtype: str, bytes_of_scales: int) -> None:
    leaf = quantise(normal(3, 128, 24), bits, 32, symmetric=symmetric, scale_dtype=scale_dtype)
    assert leaf.bytes == 3 * (128 * 24 * bits // 8 + 4 * 24 * bytes_of_scales)
    assert leaf.bytes == sum(part.nbytes for part in jax.tree.leaves(leaf))
    assert (leaf.shape, leaf.ndim, leaf.dtype, leaf.group) == ((3, 128, 24), 3, jnp.float32, 32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("bits", "symmetric"), [*KINDS, (3, False), (2, True)])
@pytest.mark.parametrize("tile", [4 << 20, 1024])  # whole, and in tiles of a group each
@pytest.mark.parametrize("batch", [(1,), (2, 5), (150,)])  # tiles are along the inputs, or with many rows outputs
def test_products_and_gradients_match_float64(
    bits: int, symmetric: bool, dtype: str, tile: int, batch: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiled, "_TILE", tile)
    leaf = quantise(normal(96, 20), bits, 16, symmetric=symmetric)
    x, g = (jnp.asarray(normal(*batch, n, seed=n), dtype) for n in (96, 20))
    b = normal(20, seed=5)
    matrix = float64(leaf.unpacked().astype(dtype))
    rows, upstream = float64(x), float64(g)

    @jax.jit
    def run(x: jax.Array, b: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        y, pull = jax.vjp(lambda x, b: dense(x, leaf, b, dtype=dtype), x, b)
        return y, *pull(g)

    y, by_x, by_b = run(x, b, g)
    assert y.dtype == by_x.dtype == dtype and y.shape == (*batch, 20)
    # The product is rounded, and what the bias makes of it, rounded too.
    within = 3 * _ROUNDING[dtype] * (np.abs(rows) @ np.abs(matrix) + np.abs(float64(b)))
    assert (np.abs(float64(y) - (rows @ matrix + float64(b))) <= within).all()
    within = _ROUNDING[dtype] * (np.abs(upstream) @ np.abs(matrix).T)
    assert (np.abs(float64(by_x) - upstream @ matrix.T) <= within).all()
    summed = upstream.reshape(-1, 20)
    assert (np.abs(float64(by_b) - summed.sum(0)) <= len(summed) * _ROUNDING[dtype] * np.abs(summed).sum(0)).all()


def test_matrices_of_an_unrolled_stack_are_not_unpacked_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """As XLA's CPU backend would, which runs first what waits for nothing."""
    monkeypatch.setattr(tiled, "_TILE", 1 << 16)
    stack, x = quantise(jnp.ones((8, 256, 256)), 8), jnp.ones((4, 256))

    def walk(x: jax.Array, stack: Quantised) -> jax.Array:
        for layer in unstack(stack, 8):
            x = x + jnp.tanh(dense(x, layer))
        return jnp.sum(x)

    for function in (walk, jax.grad(walk)):
        memory = jax.jit(function).lower(x, stack).compile().memory_analysis()
        assert memory.temp_size_in_bytes < stack.bytes + 2 * 256 * 256 * 4  # of eight float32 matrices


def test_projections_are_the_columns_apart() -> None:
    leaf, x = quantise(normal(32, 24), 4, 16), normal(3, 5, 32, seed=1)
    parts = projections(x, leaf, (8, 4, 12))
    assert [part.shape for part in parts] == [(3, 5, 8), (3, 5, 4), (3, 5, 12)]
    wanted = float64(x) @ float64(leaf.unpacked())
    np.testing.assert_allclose(np.concatenate(parts, -1), wanted, rtol=0, atol=1e-5)
    by_x = jax.grad(lambda x: sum(jnp.sum(jnp.sin(part)) for part in projections(x, leaf, (8, 4, 12))))(x)
    np.testing.assert_allclose(by_x, np.cos(wanted) @ float64(leaf.unpacked()).T, rtol=0, atol=1e-4)


def test_a_packed_matrix_is_a_constant() -> None:
    leaf, x = quantise(normal(32, 8), 8, 16, symmetric=False), normal(4, 32)
    gradient = jax.grad(lambda leaf: jnp.sum(dense(x, leaf)), allow_int=True)(leaf)
    assert gradient.q.dtype == jax.dtypes.float0
    assert not gradient.scale.any() and not gradient.zero.any()
    # Derivatives of derivatives, which Sophia takes, are those of an array.
    twice = jax.grad(lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(dense(x, leaf) ** 3))(x)))
    as_array = jax.grad(lambda x: jnp.sum(jax.grad(lambda x: jnp.sum((x @ leaf.unpacked()) ** 3))(x)))
    np.testing.assert_allclose(twice(x), as_array(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bits", [8, 4])
def test_stacked_leaves_are_scanned_mapped_indexed_and_unstacked_like_arrays(bits: int) -> None:
    leaf, x = quantise(normal(3, 32, 8), bits, 16), normal(4, 32, seed=1)
    wanted = np.stack([float64(x) @ float64(w) for w in leaf.unpacked()])
    scanned = jax.lax.scan(lambda carry, w: (carry, dense(x, w)), None, leaf)[1]
    mapped = jax.vmap(lambda w: dense(x, w))(leaf)
    layers = [layer["w"] for layer in unstack({"w": leaf}, 3)]
    indexed = [leaf[1], jax.jit(lambda i: leaf[i])(1)]
    for each in layers:
        assert isinstance(each, Quantised) and each.shape == (32, 8)
    for got, reference in (
        (scanned, wanted),
        (mapped, wanted),
        (jnp.stack([dense(x, w) for w in layers]), wanted),
        (jnp.stack([dense(x, w) for w in indexed]), wanted[[1, 1]]),
    ):
        np.testing.assert_allclose(got, reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ((32, 8), {"bits": 5}, "8, 4, 3 or 2 bits, got 5"),
        ((96, 8), {"group": 64}, r"divide the 96 inputs .* got 64: 48 would do"),
        ((96, 8), {"group": 0}, "got 0: 1 would do"),
        ((33, 8), {"group": 11, "bits": 4}, "this matrix has 33: use 8 bits"),
        ((48, 8), {"group": 24, "bits": 3}, "this matrix has 48 in groups of 24: use 4 or 8 bits, or groups of a mul"),
        ((24, 8), {"group": 24, "bits": 2}, "this matrix has 24 in groups of 24"),
    ],
)
def test_what_cannot_be_quantised_is_said(shape: tuple[int, ...], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        quantise(jnp.ones(shape), **options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a/k.q": None}, r"a quantised matrix has \.q"),
        ({"a/k.scale": None}, r"a quantised matrix has \.q"),
        ({"a/k.offset": np.zeros((2, 3), np.float32)}, r"a/k\.offset \(float32\)"),
        ({"a/k.q": np.zeros((8, 3), np.int32)}, r"a/k\.q \(int32\)"),
        ({"a/k.scale": np.zeros((3, 3), np.float32)}, "do not fit one another"),
        ({"a/k.scale": np.zeros((2, 4), np.float32)}, "do not fit one another"),
        ({"a/k.scale": np.zeros(3, np.float32)}, "do not fit one another"),
        ({"a/k": np.zeros((8, 3), np.float32)}, "both as an array and in parts"),
        ({"a": np.zeros(3, np.float32)}, "the file is damaged"),
        ({"a/": np.zeros(3, np.float32)}, "cannot be a parameter's name"),
    ],
)
def test_names_that_make_no_parameters_are_said(change: dict[str, Any], words: str) -> None:
    arrays = {"a/k.q": np.zeros((8, 3), np.int8), "a/k.scale": np.zeros((2, 3), np.float32)} | change
    with pytest.raises(ModelError, match=words):
        from_arrays({name: array for name, array in arrays.items() if array is not None})
