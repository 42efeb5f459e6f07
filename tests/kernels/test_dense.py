"""The matrix products against float64: values, gradients, and the layouts that CPUs are fast with."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cramjax.kernels.dense import dense, matmul, projections, transposed
from cramjax.kernels.norm import normalise_beside
from cramjax.model.layers import added
from cramjax.planning import compile_for, missing

# What is rounded once, or is a sum of float32 terms: relative to the sum of the terms' sizes.
_ROUNDING = {"float32": 2**-20, "bfloat16": 2**-8}


def _rounded(*shape: int, dtype: str, seed: int = 0) -> np.ndarray:
    return np.asarray(jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype), np.float64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_operands_are_rounded_and_sums_are_float32(dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 3, 2000)), rng.normal(size=(2000, 5))
    got = dense(jnp.float32(x), jnp.float32(w), dtype=dtype)
    rounded = [np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x, w)]
    assert got.dtype == dtype
    # The result is rounded once (2^-8 relative in bfloat16); sums kept in bfloat16 would be off by whole units here.
    np.testing.assert_allclose(
        np.asarray(got, np.float64), rounded[0] @ rounded[1], rtol=4e-3 if dtype == "bfloat16" else 1e-5, atol=1e-3
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 3, 40, 24), (1, 1, 7, 1), (1, 1, 1, 5), (4, 1, 1, 1)])
def test_gradients_of_dense_match_float64(shape: tuple[int, ...], dtype: str) -> None:
    *batch, inner, outer = shape
    x, w, b = (_rounded(*s, dtype=dtype, seed=i) for i, s in enumerate([(*batch, inner), (inner, outer), (outer,)]))
    g = _rounded(*batch, outer, dtype=dtype, seed=3)

    @jax.jit
    def run(x: jax.Array, w: jax.Array, b: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        y, pullback = jax.vjp(lambda *a: dense(*a, dtype=dtype), x, w, b)
        return y, *pullback(g)

    got = run(jnp.asarray(x, dtype), jnp.float32(w), jnp.float32(b), jnp.asarray(g, dtype))
    rows, upstream = x.reshape(-1, inner), g.reshape(-1, outer)
    wanted = (x @ w + b, g @ w.T, rows.T @ upstream, upstream.sum(0))
    a = np.abs
    sizes = (a(x) @ a(w) + a(b), a(g) @ a(w.T), a(rows.T) @ a(upstream), a(upstream).sum(0))
    # Gradients of weights are float32 sums: they are never rounded to bfloat16.
    kinds = (dtype, dtype, "float32", "float32")
    assert [str(x.dtype) for x in got] == list(kinds)
    for mine, reference, size, kind in zip(got, wanted, sizes, kinds, strict=True):
        assert (np.abs(np.asarray(mine, np.float64) - reference) <= _ROUNDING[kind] * size).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batched_products_and_their_derivatives_match_float64(dtype: str) -> None:
    a, b, g = (_rounded(2, 3, *s, dtype=dtype, seed=i) for i, s in enumerate([(5, 7), (4, 7), (4, 5)]))

    @jax.jit
    def run(a: jax.Array, b: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        # Transposed on both sides of the product.
        y, pullback = jax.vjp(lambda a, b: matmul(a, transposed(b)).swapaxes(-1, -2), a, b)
        return y, *pullback(g)

    got = run(jnp.asarray(a, dtype), jnp.asarray(b, dtype), jnp.float32(g))
    wanted = (b @ a.swapaxes(-1, -2), g.swapaxes(-1, -2) @ b, g @ a)
    assert [str(x.dtype) for x in got] == ["float32", dtype, dtype]
    for mine, reference in zip(got, wanted, strict=True):
        # Sums of up to seven terms near 1, of operands that are exact.
        np.testing.assert_allclose(np.asarray(mine, np.float64), reference, rtol=0, atol=20 * _ROUNDING[dtype])


def test_derivatives_of_derivatives_exist_in_bfloat16() -> None:
    x, w = jnp.asarray(_rounded(6, 4, dtype="bfloat16"), jnp.bfloat16), jnp.float32(_rounded(4, 3, dtype="bfloat16"))

    def loss(w: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(dense(x, w, dtype="bfloat16").astype(jnp.float32)))

    curvature = jax.jit(jax.grad(lambda w: jnp.sum(jax.grad(loss)(w))))(w)
    exact = 2 * np.asarray(x, np.float64).T @ np.asarray(x, np.float64) @ np.ones((4, 3))
    np.testing.assert_allclose(np.asarray(curvature, np.float64), exact, atol=0.1)


_INFO = Path("/proc/cpuinfo")
_HAS_BFLOAT16 = _INFO.exists() and bool(re.search("avx512_bf16|amx_bf16", _INFO.read_text(encoding="utf-8")))


@pytest.mark.skipif(not _HAS_BFLOAT16, reason="needs a CPU with bfloat16 instructions; others multiply in float32")
def test_all_products_of_a_bfloat16_dense_stay_in_bfloat16() -> None:
    x, w = jnp.zeros((32, 16), jnp.bfloat16), jnp.zeros((16, 48))

    def run(x: jax.Array, w: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        return jax.vjp(lambda x, w: dense(x, w, dtype="bfloat16"), x, w)[1](g)

    text = jax.jit(run).lower(x, w, jnp.zeros((32, 48), jnp.bfloat16)).compile().as_text()
    for part in re.split(r"\n(?=%|ENTRY)", text):
        types = dict(re.findall(r"%([\w.\-]+) = (\w+)\[", part))
        for operands in re.findall(r" dot\(%([\w.\-]+), %([\w.\-]+)\)", part):
            assert {types[operand] for operand in operands} == {"bf16"}
    assert text.count(" dot(") == 2


_WIDTHS = (8, 4, 12)
needs_compiler = pytest.mark.skipif(missing() is not None, reason=f"no ahead-of-time compiler for GPUs: {missing()}")


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_projections_are_the_columns_of_one_product(
    device: str, dtype: str, with_bias: bool, request: pytest.FixtureRequest
) -> None:
    if device == "gpu":
        request.getfixturevalue("on_an_h100")
    x, w, b = (_rounded(*s, dtype=dtype, seed=i) for i, s in enumerate([(2, 3, 40), (40, 24), (24,)]))
    b = b if with_bias else 0 * b
    g = _rounded(2, 3, 24, dtype=dtype, seed=3)
    offsets = np.cumsum(_WIDTHS)[:-1]

    @jax.jit
    def run(x: jax.Array, w: jax.Array, b: jax.Array | None, gs: list[jax.Array]) -> tuple[jax.Array, ...]:
        ys, pullback = jax.vjp(lambda x, w, b: projections(x, w, _WIDTHS, b, dtype=dtype), x, w, b)
        by_x, by_w, by_b = pullback(tuple(gs))
        return *ys, by_x, by_w, by_b

    bias = jnp.float32(b) if with_bias else None
    *ys, by_x, by_w, by_b = run(
        jnp.asarray(x, dtype), jnp.float32(w), bias, jnp.split(jnp.asarray(g, dtype), offsets, -1)
    )
    assert [y.shape for y in ys] == [(2, 3, width) for width in _WIDTHS]
    assert {str(y.dtype) for y in (*ys, by_x)} == {dtype} and by_w.dtype == jnp.float32
    rows, upstream, a = x.reshape(-1, 40), g.reshape(-1, 24), np.abs
    # GPUs round a bias before they add it, and gradients of the input after each of three products.
    several = 3 if device == "gpu" else 1
    checks = [
        (np.concatenate(ys, axis=-1), x @ w + b, (a(x) @ a(w) + a(b)) * _ROUNDING[dtype] * 2),
        (by_x, g @ w.T, a(g) @ a(w.T) * _ROUNDING[dtype] * several),
        (by_w, rows.T @ upstream, a(rows.T) @ a(upstream) * _ROUNDING["float32"]),
    ]
    assert (by_b is not None) == with_bias
    if by_b is not None:
        assert by_b.dtype == jnp.float32
        checks.append((by_b, upstream.sum(0), a(upstream).sum(0) * _ROUNDING["float32"]))
    for got, wanted, bound in checks:
        assert (np.abs(np.asarray(got, np.float64) - wanted) <= bound).all()


def _gemms(text: str) -> list[str]:
    """The products of a compiled program."""
    return re.findall(r".* custom-call\(.*custom_call_target=\"__cublas.*", text)


@needs_compiler
def test_on_a_gpu_projections_stay_apart_and_sum_their_gradients_as_they_multiply() -> None:
    x, w = jax.ShapeDtypeStruct((2, 512, 256), jnp.bfloat16), jax.ShapeDtypeStruct((256, 768), jnp.float32)
    gs = [jax.ShapeDtypeStruct((2, 512, 256), jnp.bfloat16)] * 3

    def forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
        return projections(x, w, (256, 256, 256), dtype="bfloat16")

    def both(x: jax.Array, w: jax.Array, gs: list[jax.Array]) -> Any:
        ys, pullback = jax.vjp(forward, x, w)
        return ys, pullback(tuple(gs))

    assert len(_gemms(compile_for("h100", forward, x, w).text)) == 3
    text = compile_for("h100", both, x, w, gs).text
    gemms = _gemms(text)
    assert len(gemms) == 9
    # Of the three gradients of the input, the second and third add what is there.
    assert sum('"beta":1' in gemm for gemm in gemms) == 2
    activations = r"\[(?:2,512|1024),\d+\]"
    assert not re.findall(rf"= \w+{activations}\S* (?:slice|concatenate|copy|add)\(", text)


@needs_compiler
def test_on_a_gpu_the_last_product_of_a_branch_adds_the_stream() -> None:
    def stack(x: jax.Array, ups: list[jax.Array], downs: list[jax.Array]) -> jax.Array:
        for up, down in zip(ups, downs, strict=True):
            x, read = normalise_beside(x, centred=False, eps=1e-5)
            x = added(x, dense(dense(read, up, dtype="bfloat16"), down, dtype="bfloat16"))
        return x

    def both(x: jax.Array, ups: list[jax.Array], downs: list[jax.Array], g: jax.Array) -> Any:
        y, pullback = jax.vjp(stack, x, ups, downs)
        return y, pullback(g)

    x = jax.ShapeDtypeStruct((2, 384, 256), jnp.bfloat16)
    ups, downs = ([jax.ShapeDtypeStruct(shape, jnp.float32)] * 2 for shape in ((256, 1024), (1024, 256)))
    text = compile_for("h100", both, x, ups, downs, x).text
    # Two products forward and four backward in each layer, of which the last forward adds.
    assert len(_gemms(text)) == 12 and sum('"beta":1' in gemm for gemm in _gemms(text)) == 2
    assert not re.findall(r"= \w+\[(?:2,384|768),256\]\S* (?:copy|add)\(", text)
