"""The matrix products of the model: operands in the compute precision, accumulation in float32.

Backward passes are written out. Gradients of weights stay float32. What CPUs and GPUs are fast with differs: CPUs have
fast bfloat16 products for row-major operands only, and give float32; GPUs round what leaves a product for nothing, and
take a pass over memory for every conversion, slice and concatenation beside it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cramjax import devices
from cramjax.kernels.dense.packed import Packed
from cramjax.kernels.mesh import whole


def dense(
    x: Float[Array, "*batch inner"],
    w: Float[Array, "inner outer"] | Packed,
    bias: Float[Array, " outer"] | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*batch outer"]:
    """Multiply activations with a weight matrix, and add a bias.

    Args:
        x: activations (..., inner).
        w: weights (inner, outer), in any precision; they are rounded to `dtype` for the product. Packed ones multiply
            themselves, and give a gradient to what of them is trained.
        bias: added to each row of the product (outer,); by CPUs, and where cuBLAS adds it, before that is rounded.
            To a packed matrix's it is added after.
        dtype: precision of the operands and of the result. Sums are float32.

    Returns:
        The product (..., outer) in `dtype`.
    """
    # As one plain product: XLA's CPU backend runs the derivative of a batched one a third slower.
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)
    if isinstance(w, Packed):
        own = w.multiply(rows, dtype)
        results = (own if bias is None else own + w.offset(bias).astype(dtype),)
    else:
        results: tuple[Array, ...] = _products(jnp.dtype(dtype), (w.shape[1],), rows, w, bias)
    return results[0].reshape(*x.shape[:-1], w.shape[1])


def dense_by_constant(
    x: Float[Array, "rows inner"], w: Float[Array, "inner outer"] | Packed, *, dtype: DTypeLike
) -> Float[Array, "rows outer"]:
    """Multiply rows with a matrix that has no gradient, as `stop_gradient` of it would have none.

    What that gives is another array, which a scan keeps for its backward pass: a copy of every layer's matrix.

    Args:
        x: rows (rows, inner).
        w: weights (inner, outer), packed or not.
        dtype: precision of the operands and of the result. Sums are float32.
    """
    rows = x.astype(dtype)
    return w.multiply(rows, dtype) if isinstance(w, Packed) else _by_constant(jnp.dtype(dtype), rows, w)


def projections(
    x: Float[Array, "*batch inner"],
    w: Float[Array, "inner outer"] | Packed,
    widths: Sequence[int],
    bias: Float[Array, " outer"] | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "*batch width"], ...]:
    """Multiply activations with matrices that are kept side by side in one.

    A CPU multiplies once and cuts the result up. A GPU multiplies by each, so that nothing is cut out of a result, or
    glued together for its gradient; `cramjax.compiling` keeps XLA from merging the products again. A packed matrix
    multiplies once.

    Args:
        x: activations (..., inner).
        w: weights (inner, outer), packed or not.
        widths: columns of each matrix; their sum is `outer`.
        bias: added to each row of the products (outer,).
        dtype: precision of the operands and of the results. Sums are float32.

    Returns:
        A product (..., width) in `dtype` for each matrix.
    """
    if isinstance(w, Packed) or devices.target().platform == "cpu":
        # Splits, not slices: their derivative is one concatenation instead of a sum of paddings.
        return tuple(jnp.split(dense(x, w, bias, dtype=dtype), _ends(widths), axis=-1))
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)
    results: tuple[Array, ...] = _products(jnp.dtype(dtype), tuple(widths), rows, w, bias)
    return tuple(result.reshape(*x.shape[:-1], result.shape[-1]) for result in results)


def product(
    a: Float[Array, "*batch rows inner"], b: Float[Array, "*batch inner columns"], dtype: DTypeLike
) -> Float[Array, "*batch rows columns"]:
    """A product of matrices of one precision, summed in float32 and rounded to `dtype`.

    GPUs round it where it is summed. CPUs give float32, and round it in a pass that XLA fuses with what reads it.
    """
    if devices.target().platform == "cpu":
        return matmul(a, b).astype(dtype)
    return jnp.matmul(a, b, preferred_element_type=dtype)


@jax.custom_vjp
def matmul(
    a: Float[Array, "*batch rows inner"], b: Float[Array, "*batch inner columns"]
) -> Float[Array, "*batch rows columns"]:
    """Products of matrices of one precision, summed and returned in float32.

    Args:
        a: matrices (..., rows, inner).
        b: matrices (..., inner, columns). An operand that is a transposition goes through `transposed`.
    """
    product = jnp.matmul(a, b, preferred_element_type=jnp.float32)
    # Were a transposition of the product folded into it, the operands would change places and be transposed.
    return jax.lax.optimization_barrier(product) if _wants_rows(a) else product


def _matmul_forward(a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return matmul(a, b), (a, b)


def _matmul_backward(operands: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    a, b = operands
    g = g.astype(a.dtype)
    return matmul(g, transposed(b)).astype(a.dtype), matmul(transposed(a), g).astype(b.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def transposed(x: Float[Array, "*batch rows columns"]) -> Float[Array, "*batch columns rows"]:
    """Transposed matrices, to be an operand of `matmul`."""
    if _wants_rows(x):
        x = jax.lax.optimization_barrier(x)
    return row_major(x.swapaxes(-1, -2))


def row_major(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The same array, written out row after row where products of another layout are slow: in bfloat16 on a CPU.

    XLA folds a transposition into the product that reads it, and its CPU backend then multiplies in float32, at a third
    of the speed or less; between barriers the transposition is a copy, which costs a few percent. GPUs read either.
    """
    if not _wants_rows(x):
        return x
    return jax.lax.optimization_barrier(with_layout_constraint(x, Layout(tuple(range(x.ndim)))))


def _wants_rows(x: Array) -> bool:
    return x.dtype == jnp.bfloat16 and devices.target().platform == "cpu"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _products(dtype: Any, widths: tuple[int, ...], x: Array, w: Array, bias: Array | None) -> tuple[Array, ...]:
    """Products of rows with the matrices that `w` holds side by side."""
    matrices = jnp.split(whole(w.astype(dtype)), _ends(widths), axis=1)
    if bias is None:
        return tuple(product(x, matrix, dtype) for matrix in matrices)
    pairs = zip(matrices, jnp.split(bias, _ends(widths)), strict=True)
    if devices.target().platform == "cpu":
        return tuple((matmul(x, matrix) + own).astype(dtype) for matrix, own in pairs)
    return tuple(product(x, matrix, dtype) + own.astype(dtype) for matrix, own in pairs)  # cuBLAS adds, then rounds


def _forward(
    dtype: Any, widths: tuple[int, ...], x: Array, w: Array, bias: Array | None
) -> tuple[tuple[Array, ...], tuple[Array, Array, Array | None]]:
    return _products(dtype, widths, x, w, bias), (x, w, bias)


def _backward(
    dtype: Any, widths: tuple[int, ...], residuals: tuple[Array, Array, Array | None], gs: tuple[Array, ...]
) -> tuple[Array, Array, Array | None]:
    x, w, bias = residuals
    by_x, by_w, by_bias = None, [], []
    for matrix, g in zip(jnp.split(whole(w.astype(dtype)), _ends(widths), axis=1), gs, strict=True):
        own = product(g, transposed(matrix), x.dtype)
        # Each product adds what is there in its own kernel: XLA looks for it in the first operand of the sum.
        by_x = own if by_x is None else own + by_x
        by_w.append(matmul(transposed(x), g))
        if bias is not None:
            # A product with ones: as exact as XLA's sum over rows, and faster.
            by_bias.append(matmul(jnp.ones((8, len(g)), dtype), g)[0])
    assert by_x is not None
    return by_x, _joined(by_w).astype(w.dtype), None if bias is None else _joined(by_bias).astype(bias.dtype)


_products.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_constant(dtype: Any, x: Array, w: Array) -> Array:
    results: tuple[Array, ...] = _products(dtype, (w.shape[1],), x, w, None)
    return results[0]


def _by_constant_backward(dtype: Any, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = residuals
    return product(g, transposed(whole(w.astype(dtype))), x.dtype), jnp.zeros_like(w)


_by_constant.defvjp(lambda dtype, x, w: (_by_constant(dtype, x, w), (x, w)), _by_constant_backward)


def _ends(widths: Sequence[int]) -> list[int]:
    """Where each of the columns' groups but the last one ends."""
    return [sum(widths[: i + 1]) for i in range(len(widths) - 1)]


def _joined(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
