"""The kernel for a few rows against float64, for shapes that are multiples of nothing; and machines that cannot build
it.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.kernels import native
from cramjax.kernels.dense.few_rows import SOURCE, few_rows, refusal
from cramjax.kernels.packed import Streamed, quantise, table_of

needs_kernel = pytest.mark.skipif(refusal() is not None, reason=f"the kernel cannot run here: {refusal()}")


def of_shape(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(got: jax.Array, x: np.ndarray, w: np.ndarray) -> None:
    """As near to the product in float64 as sums of float32 in any order are: a rounding for each term."""
    exact = x.astype(np.float64) @ w.astype(np.float64)
    terms = np.abs(x).astype(np.float64) @ np.abs(w).astype(np.float64)
    assert np.all(np.abs(np.asarray(got, np.float64) - exact) <= 2**-23 * (4 + np.sqrt(x.shape[1])) * terms)


@needs_kernel
@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_floats(rows: int, dtype: str):
    """Of a stack, the layer that is meant."""
    x, w = of_shape(rows, 37), jnp.asarray(of_shape(3, 37, 301, seed=1), dtype)
    for layer in (0, 2):
        got = jax.jit(lambda layer: few_rows(jnp.asarray(x), w, layer))(layer)
        close(got, x, np.asarray(w[layer], np.float32))


@needs_kernel
@pytest.mark.parametrize("rows", [1, 3, 8, 19])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes(rows: int, bits: int, symmetric: bool):
    """Groups of six inputs, with a zero of their own or not."""
    x = of_shape(rows, 42)
    w = quantise(jnp.asarray(of_shape(2, 42, 147, seed=1)) + 0.5, bits, 6, symmetric=symmetric)
    matrix = np.asarray(w.unpacked(), np.float64)
    got = Streamed(w).at(1).multiply(jnp.asarray(x), jnp.float32)
    exact = x @ matrix[1]
    # Codes are up to 15 and their zeros are taken off the sums, so terms cancel: they are up to 2 · 15 steps.
    terms = np.abs(x).sum(1, keepdims=True) * float(w.scale.max()) * (30 if bits == 4 else 256)
    assert np.all(np.abs(np.asarray(got) - exact) <= 2**-23 * 8 * terms)


@needs_kernel
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounded_rows(rows: int, bits: int, symmetric: bool):
    """Exactly the product of the codes with the rows as they are rounded, within float32's sums: columns that are no
    multiple of a vector, groups of twelve, a row of zeros, and one whose inputs are of many sizes.
    """
    x = of_shape(rows, 48) * np.exp(of_shape(rows, 48, seed=2))
    x[rows // 2, :24] = 0
    w = quantise(jnp.asarray(of_shape(2, 48, 147, seed=1)) + 0.5, bits, 12, symmetric=symmetric)
    got = Streamed(w, rounds=True).at(1).multiply(jnp.asarray(x), jnp.float32)
    groups = x.reshape(rows, -1, 12)
    step = np.abs(groups).max(-1, keepdims=True) / np.float32(127)
    inverse = np.where(step > 0, np.float32(127) / np.maximum(np.abs(groups).max(-1, keepdims=True), 1e-30), 0)
    as_rounded = np.rint(groups * inverse.astype(np.float32)).astype(np.float64) * step
    assert np.abs(as_rounded - groups).max() <= step.max() * 0.501
    close_to = as_rounded.reshape(rows, -1) @ np.asarray(w.unpacked(), np.float64)[1]
    terms = np.abs(x).sum(1, keepdims=True) * float(w.scale.max()) * (30 if bits == 4 else 256)
    assert np.all(np.abs(np.asarray(got) - close_to) <= 2**-23 * 8 * terms)


@needs_kernel
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rounded_rows_that_are_not_finite_stay_so(bits: int, bad: float):
    """Theirs alone, wherever it is among finite inputs."""
    x = of_shape(3, 48)
    x[1, 17] = bad
    w = Streamed(quantise(jnp.asarray(of_shape(1, 48, 147, seed=1)), bits, 12), rounds=True).at(0)
    got = np.asarray(w.multiply(jnp.asarray(x), jnp.float32))
    assert not np.isfinite(got[1]).any() and np.isfinite(got[[0, 2]]).all()


@needs_kernel
def test_wide_and_long():
    """More columns than a chunk, columns that no vector divides, and more rows than are multiplied at once."""
    w = of_shape(1027, 2053, seed=1)
    for x in (of_shape(8, 1027), of_shape(20, 1027)):
        close(few_rows(jnp.asarray(x), jnp.asarray(w)), x, w)


@needs_kernel
def test_streamed_is_the_matrix():
    """Few rows, many rows, lookups and the matrix itself agree."""
    w = of_shape(24, 50, seed=1)
    streamed = Streamed(jnp.asarray(w))
    assert streamed.shape == (24, 50)
    np.testing.assert_array_equal(streamed.unpacked(), w)
    np.testing.assert_array_equal(streamed.outputs(jnp.asarray([[3, 49], [0, 60]])), w.T[[[3, 49], [0, 49]]])
    for rows in (5, 12, 37):
        x = of_shape(rows, 24)
        close(streamed.multiply(jnp.asarray(x), jnp.float32), x, w)


@needs_kernel
def test_codes_are_looked_up():
    w = quantise(jnp.asarray(of_shape(24, 50)), 8, 8)
    found = Streamed(w).outputs(jnp.asarray([[3, 49]]))
    np.testing.assert_array_equal(found[0], np.asarray(w.unpacked()).T[[3, 49]])


@needs_kernel
def test_a_stack_is_not_copied():
    """A walk over layers holds nothing as large as one of its matrices beside the stack."""
    w = jax.ShapeDtypeStruct((4, 256, 1024), jnp.float32)

    def walk(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.map(lambda layer: few_rows(x, w, layer), jnp.arange(4))

    compiled = jax.jit(walk).lower(jax.ShapeDtypeStruct((1, 256), jnp.float32), w).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None and analysis.temp_size_in_bytes < 4 * 256 * 1024 / 4


@needs_kernel
def test_a_table_of_bfloat16_is_not_widened():
    """A loop that multiplies with a table and looks up in it holds no other one."""
    w = jnp.asarray(of_shape(64, 4096), jnp.bfloat16)
    table = table_of(w)
    assert table.dtype == jnp.bfloat16 and table.shape == (64, 4096)
    np.testing.assert_array_equal(table.unpacked(), w)
    np.testing.assert_array_equal(table.outputs(jnp.asarray([3, 5000])), w.T[jnp.asarray([3, 4095])])
    x = of_shape(12, 64)
    for rows in (x, x[:3]):
        close(table.multiply(jnp.asarray(rows), jnp.float32), rows, np.asarray(w, np.float32))

    def walk(table: Streamed, number: jax.Array) -> jax.Array:
        def step(_: int, number: jax.Array) -> jax.Array:
            return jnp.argmax(table.multiply(table.outputs(number).astype(jnp.float32), jnp.float32), axis=-1)

        return jax.lax.fori_loop(0, 3, step, number)

    analysis = jax.jit(walk).lower(table, jnp.zeros(1, jnp.int32)).compile().memory_analysis()
    assert analysis is not None and analysis.temp_size_in_bytes < 64 * 4096


def test_shapes_that_do_not_fit():
    x, w = jnp.ones((1, 6)), jnp.ones((5, 4))
    with pytest.raises(ValueError, match="does not fit"):
        few_rows(x, w)
    with pytest.raises(ValueError, match="got float16"):
        few_rows(x, jnp.ones((6, 4), jnp.float16))


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CRAMJAX_CACHE", str(tmp_path))
    assert refusal() == "there is no C++ compiler (c++, g++, clang++)"


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What it said is the reason, and nothing half written stays."""
    compiler = tmp_path / "bin" / "c++"
    compiler.parent.mkdir()
    compiler.write_text('#!/bin/sh\necho "x.cpp:1: error: no such thing" >&2\nexit 1\n', encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(compiler.parent))
    monkeypatch.setenv("CRAMJAX_CACHE", str(tmp_path / "cache"))
    reason = native.register(SOURCE, "cramjax_few_rows")
    assert reason is not None and reason.endswith("error: no such thing")
    assert list((tmp_path / "cache" / "native").iterdir()) == []
