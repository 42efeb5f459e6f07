"""FP8 and MXFP4 against their definitions in NumPy and ml_dtypes, products, and names."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from cramjax.errors import ConfigError, ModelError
from cramjax.kernels.dense import dense
from cramjax.kernels.packed import float8, from_arrays, microscaled, tiled, to_arrays
from cramjax.kernels.packed.floats import nearest_e2m1, nearest_e4m3
from cramjax.kernels.packed.tiled import unpaired

TYPES: dict[str, tuple[Any, Any, float]] = {
    "e4m3": (nearest_e4m3, ml_dtypes.float8_e4m3fn, 448.0),
    "e2m1": (nearest_e2m1, ml_dtypes.float4_e2m1fn, 6.0),
}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * np.exp(rng.normal(size=(1, shape[-1])))).astype(np.float32)


@pytest.mark.parametrize("kind", TYPES)
def test_numbers_are_the_nearest(kind: str) -> None:
    """All numbers of the type, all that lie between two, what is next to these, and random ones."""
    nearest, dtype, most = TYPES[kind]
    codes = np.arange(256 if kind == "e4m3" else 16, dtype=np.uint8)
    numbers = codes.view(ml_dtypes.float8_e4m3fn) if kind == "e4m3" else codes.astype(ml_dtypes.uint4).view(dtype)
    exact = np.unique(numbers.astype(np.float32)[np.isfinite(numbers.astype(np.float32))])
    middles = (exact[1:] + exact[:-1]) / 2
    more = np.random.default_rng(0).normal(size=4000).astype(np.float32) * np.float32(most / 3)
    x = np.concatenate([exact, middles, np.nextafter(middles, np.float32(9e9)), np.nextafter(middles, 0), more])
    x = np.concatenate([x, np.float32([0, 1e-30, -1e-30, 1e30, -1e30])]).astype(np.float32)
    wanted = np.clip(x, -most, most).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(nearest)(x), wanted)
    # And that type is what it is said to be: of float64's distances none is less.
    np.testing.assert_array_equal(np.abs(wanted - np.float64(x)), np.abs(exact[None] - np.float64(x)[:, None]).min(1))


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_fp8_is_as_defined(group: int | None, scale_dtype: Any) -> None:
    w = normal(64, 12)
    w[:16, 3] = 0
    leaf = float8(jnp.asarray(w), group, scale_dtype=scale_dtype)
    groups = w.reshape(-1, group or 64, 12)
    exact = np.abs(groups).max(1).astype(np.float64) / 448
    scale = np.where(exact == 0, 1, exact).astype(np.float32).astype(scale_dtype)
    np.testing.assert_allclose(np.float64(leaf.scale), np.float64(scale), rtol=1e-6)
    scale = np.asarray(leaf.scale).astype(np.float32)[:, None]
    numbers = np.clip(groups / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(np.asarray(leaf.fp8), numbers.view(np.uint8).reshape(64, 12))
    np.testing.assert_allclose(leaf.unpacked(), (numbers.astype(np.float32) * scale).reshape(64, 12), rtol=1e-6)
    assert leaf.bytes == 64 * 12 + 12 * (64 // (group or 64)) * jnp.dtype(scale_dtype).itemsize


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_fp8_of_next_to_nothing_is_a_number(scale_dtype: str) -> None:
    w = jnp.asarray([[0.0], [1e-44], [1e-36], [0.0]], jnp.float32)  # over 448, they are no normal numbers
    made = np.asarray(float8(w, 2, scale_dtype=scale_dtype).unpacked())
    assert np.isfinite(made).all() and np.abs(made).max() < 2e-36


def test_mxfp4_is_as_specified() -> None:
    w = normal(96, 12)
    w[:32, 3] = 0
    w[32, 4] = 7.9 * 2.0 ** np.floor(np.log2(np.abs(w[32:64, 4]).max()) + 1)  # beyond 6 in its block's units
    leaf = microscaled(jnp.asarray(w))
    blocks = w.reshape(3, 32, 12).astype(np.float64)
    largest = np.abs(blocks).max(1)
    power = np.floor(np.log2(np.where(largest == 0, 1, largest))) - 2  # section 6.3; e2m1's largest exponent is 2
    real = largest > 0
    np.testing.assert_array_equal(np.asarray(leaf.exponent)[real], power[real] + 127)
    e8m0 = np.asarray(leaf.exponent).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    np.testing.assert_array_equal(e8m0[real], 2.0 ** power[real])
    numbers = np.clip(blocks / 2.0 ** power[:, None], -6, 6).astype(ml_dtypes.float4_e2m1fn)
    wanted = (numbers.astype(np.float64) * 2.0 ** power[:, None]).reshape(96, 12)
    np.testing.assert_array_equal(np.float64(leaf.unpacked()), wanted)
    codes = np.asarray(unpaired(leaf.mxfp4)).astype(ml_dtypes.uint4).view(ml_dtypes.float4_e2m1fn)
    np.testing.assert_array_equal(codes.astype(np.float64), numbers.astype(np.float64).reshape(96, 12))
    assert 8 * leaf.bytes / w.size == 4.25


@pytest.mark.parametrize("tile", [4 << 20, 1024])
@pytest.mark.parametrize("make", [float8, microscaled])
def test_products_gradients_and_names(make: Any, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "_TILE", tile)
    leaf = make(jnp.asarray(normal(96, 20)), 32)
    x, g = normal(3, 96, seed=1), normal(3, 20, seed=2)
    y, pull = jax.vjp(jax.jit(lambda x: dense(x, leaf)), jnp.asarray(x))
    matrix = np.float64(leaf.unpacked())
    size = np.abs(np.float64(x) @ matrix).max()
    np.testing.assert_allclose(y, np.float64(x) @ matrix, rtol=0, atol=1e-5 * size)
    wanted = np.float64(g) @ matrix.T
    np.testing.assert_allclose(pull(jnp.asarray(g))[0], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    stack = make(jnp.stack([normal(96, 20), normal(96, 20, seed=3)]), 32)
    np.testing.assert_array_equal(stack[0].unpacked(), leaf.unpacked())
    again = leaf.repacked(leaf.unpacked())
    np.testing.assert_allclose(again.unpacked(), leaf.unpacked(), rtol=1e-6)
    named = to_arrays({"up": {"kernel": stack}})
    back = from_arrays(named)["up"]["kernel"]
    assert type(back) is type(leaf) and back.shape == (2, 96, 20)
    first = next(iter(named))
    with pytest.raises(ModelError, match="do not fit one another"):
        from_arrays({**named, first: named[first][:, :40]})
    with pytest.raises(ModelError, match="one of FP8 .fp8 "):
        from_arrays({**named, first: named[first].astype(np.int8)})


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ConfigError, match="must divide the 24 inputs of .*, got 9: 8 would do"):
        float8(jnp.ones((24, 4)), 9)
    with pytest.raises(ConfigError, match="32 weights share an exponent, and this matrix .* has 24 inputs"):
        microscaled(jnp.ones((24, 4)))
    assert not np.isfinite(microscaled(jnp.ones((32, 4)).at[3, 1].set(jnp.nan)).unpacked()).all()
