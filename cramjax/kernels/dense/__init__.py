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
from cramjax.kernels.mesh import whole


def dense(
    x: Float[Array, "*batch inner"],
    w: Float[Array, "inner outer"],
    bias: Float[Array, " outer"] | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*batch outer"]:
    """Multiply activations with a weight matrix, and add a bias.

    Args:
        x: activations (..., inner).
        w: weights (inner, outer), in any precision; they are rounded to `dtype` for the product.
        bias: added to each row of the product (outer,), before it is rounded.
        dtype: precision of the operands and of the result. Sums are float32.

    Returns:
        The product (..., outer) in `dtype`.
    """
    # As one plain product: XLA's CPU backend runs the derivative of a batched one a third slower.
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)
    product: Array = _dense(jnp.dtype(dtype), rows, w, bias)
    return product.reshape(*x.shape[:-1], w.shape[1])


def projections(
    x: Float[Array, "*batch inner"],
    w: Float[Array, "inner outer"],
    widths: Sequence[int],
    bias: Float[Array, " outer"] | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "*batch width"], ...]:
    """Multiply activations with matrices that are kept side by side in one.

    A CPU multiplies once and cuts the result up. A GPU multiplies by each, so that nothing is cut out of a result, or
    glued together for its gradient; `cramjax.compiling` keeps XLA from merging the products again.

    Args:
        x: activations (..., inner).
        w: weights (inner, outer).
        widths: columns of each matrix; their sum is `outer`.
        bias: added to each row of the products (outer,).
        dtype: precision of the operands and of the results. Sums are float32.

    Returns:
        A product (..., width) in `dtype` for each matrix.
    """
    offsets = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
    if devices.target().platform == "cpu":
        # Splits, not slices: their derivative is one concatenation instead of a sum of paddings.
        return tuple(jnp.split(dense(x, w, bias, dtype=dtype), offsets, axis=-1))
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)
    biases = [None] * len(widths) if bias is None else jnp.split(bias, offsets)
    products: Any = _projections(jnp.dtype(dtype), rows, tuple(jnp.split(w, offsets, axis=1)), tuple(biases))
    return tuple(product.reshape(*x.shape[:-1], product.shape[-1]) for product in products)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _projections(dtype: Any, x: Array, ws: tuple[Array, ...], biases: tuple[Array | None, ...]) -> tuple[Array, ...]:
    return tuple(_dense(dtype, x, w, bias) for w, bias in zip(ws, biases, strict=True))


def _projections_forward(
    dtype: Any, x: Array, ws: tuple[Array, ...], biases: tuple[Array | None, ...]
) -> tuple[tuple[Array, ...], Any]:
    return _projections(dtype, x, ws, biases), (x, ws, biases)


def _projections_backward(dtype: Any, residuals: Any, gs: tuple[Array, ...]) -> tuple[Any, ...]:
    x, ws, biases = residuals
    by_x, by_w, by_bias = None, [], []
    for w, bias, g in zip(ws, biases, gs, strict=True):
        own, *others = _backward(dtype, (x, w, bias), g)
        # Each product adds what is there in its own kernel. XLA looks for that in the first operand of the sum, and
        # would add two of them up elsewhere if it saw all three at once.
        by_x = own if by_x is None else jax.lax.optimization_barrier(own + by_x)
        by_w.append(others[0])
        by_bias.append(others[1])
    return by_x, tuple(by_w), tuple(by_bias)


_projections.defvjp(_projections_forward, _projections_backward)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense(dtype: Any, x: Array, w: Array, bias: Array | None) -> Array:
    w = whole(w.astype(dtype))
    if bias is None:
        return product(x, w, dtype)
    if devices.target().platform == "cpu":
        return (matmul(x, w) + bias).astype(dtype)
    return product(x, w, dtype) + bias.astype(dtype)  # cuBLAS adds it before it rounds


def _forward(dtype: Any, x: Array, w: Array, bias: Array | None) -> tuple[Array, tuple[Array, Array, Array | None]]:
    return _dense(dtype, x, w, bias), (x, w, bias)


def _backward(dtype: Any, residuals: tuple[Array, Array, Array | None], g: Array) -> tuple[Array, Array, Array | None]:
    x, w, bias = residuals
    by_x = product(g, transposed(whole(w.astype(dtype))), x.dtype)
    by_w = matmul(transposed(x), g).astype(w.dtype)
    by_bias = None
    if bias is not None:
        # A product with ones: as exact as XLA's sum over rows, and faster.
        by_bias = matmul(jnp.ones((8, len(g)), dtype), g)[0].astype(bias.dtype)
    return by_x, by_w, by_bias


_dense.defvjp(_forward, _backward)
