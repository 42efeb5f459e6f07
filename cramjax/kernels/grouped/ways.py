"""Ways to multiply each group of rows with its matrix, and to find the matrices' gradients.

`multiply` is also the gradient of the rows, with transposed matrices. Rows of nobody are 0 among the operands, or their
results are not read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cramjax.kernels.dense import matmul, product, transposed
from cramjax.kernels.dense.packed import Packed
from cramjax.kernels.grouped.groups import Groups


@dataclass(frozen=True)
class Way:
    """The two products of an implementation."""

    multiply: Callable[..., Float[Array, "rows outer"]]
    """`(x, w, groups, turned) -> rows`: with matrices (groups, inner, outer), or if `turned` (groups, outer, inner)."""
    gradient: Callable[..., Float[Array, "groups inner outer"]]
    """`(x, g, groups) -> sums`, float32: of each group, of outer products of its rows with their gradients."""


# ---- in a loop over groups, and over the blocks of each: as many steps as there are rows for


def _loop_multiply(x: Array, w: Any, groups: Groups, turned: bool) -> Array:
    def group(number: Any, out: Array) -> Array:
        which, begin, end = _nonempty(groups, order, number)
        multiply = _multiply(w[which], turned)

        def block(index: Any, out: Array) -> Array:
            result = multiply(_block(x, index, groups))
            return jax.lax.dynamic_update_slice_in_dim(out, result, index * groups.block, 0)

        return jax.lax.fori_loop(begin, end, block, out)

    order, some = _occupied(groups)
    outer = w.shape[1] if turned else w.shape[2]
    return jax.lax.fori_loop(0, some, group, jnp.zeros((groups.rows, outer), x.dtype))


def _loop_gradient(x: Array, g: Array, groups: Groups) -> Array:
    def group(number: Any, sums: Array) -> Array:
        which, begin, end = _nonempty(groups, order, number)

        def block(index: Any, total: Array) -> Array:
            return total + matmul(transposed(_block(x, index, groups)), _block(g, index, groups))

        # Summed where a cache holds it, and written once.
        own = jax.lax.fori_loop(begin, end, block, jnp.zeros((x.shape[1], g.shape[1]), jnp.float32))
        return jax.lax.dynamic_update_index_in_dim(sums, own, which, 0)

    order, some = _occupied(groups)
    return jax.lax.fori_loop(0, some, group, jnp.zeros((groups.count, x.shape[1], g.shape[1]), jnp.float32))


def _multiply(w: Any, turned: bool) -> Callable[[Array], Array]:
    """What multiplies rows with one matrix, or if `turned` with its transposition."""
    if not isinstance(w, Packed):
        own = transposed(w) if turned else w
        return lambda rows: product(rows, own, rows.dtype)
    if not turned:
        return lambda rows: w.multiply(rows, rows.dtype)

    def pulled(g: Array) -> Array:
        begin = jnp.zeros((g.shape[0], w.shape[0]), g.dtype)
        return jax.vjp(lambda rows: w.multiply(rows, g.dtype), begin)[1](g)[0]

    return pulled


def _occupied(groups: Groups) -> tuple[Array, Array]:
    """Numbers of the groups that have rows, before those that have none; and how many they are."""
    empty = jnp.diff(groups.bounds) == 0
    return jnp.argsort(empty, stable=True), jnp.sum(~empty, dtype=jnp.int32)


def _nonempty(groups: Groups, order: Array, number: Any) -> tuple[Array, Array, Array]:
    """A group, its first block, and the one after its last."""
    which = order[number]
    return which, groups.bounds[which], groups.bounds[which + 1]


def _block(x: Array, index: Any, groups: Groups) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, index * groups.block, groups.block)


LOOP = Way(_loop_multiply, _loop_gradient)


# ---- in a loop over all blocks, as many as there may be: a GPU need not ask the host how many


def _scan_multiply(x: Array, w: Array, groups: Groups, turned: bool) -> Array:
    def block(_: None, item: tuple[Array, Array]) -> tuple[None, Array]:
        rows, which = item
        own = jax.lax.dynamic_index_in_dim(w, which, keepdims=False)
        return None, product(rows, transposed(own) if turned else own, x.dtype)

    rows = x.reshape(groups.blocks, groups.block, -1)
    return jax.lax.scan(block, None, (rows, groups.group_of_block))[1].reshape(groups.rows, -1)


def _scan_gradient(x: Array, g: Array, groups: Groups) -> Array:
    def block(sums: Array, item: tuple[Array, Array, Array]) -> tuple[Array, None]:
        rows, by_rows, which = item
        own = jax.lax.dynamic_index_in_dim(sums, which, keepdims=False) + matmul(transposed(rows), by_rows)
        return jax.lax.dynamic_update_index_in_dim(sums, own, which, 0), None

    rows, by_rows = (part.reshape(groups.blocks, groups.block, -1) for part in (x, g))
    begin = jnp.zeros((groups.count, x.shape[1], g.shape[1]), jnp.float32)
    return jax.lax.scan(block, begin, (rows, by_rows, groups.group_of_block))[0]


SCAN = Way(_scan_multiply, _scan_gradient)


# ---- as one batched product, of groups that all have as many rows


def _batched_multiply(x: Array, w: Array, groups: Groups, turned: bool) -> Array:
    rows = x.reshape(groups.count, -1, x.shape[-1])
    return product(rows, transposed(w) if turned else w, x.dtype).reshape(groups.rows, -1)


def _batched_gradient(x: Array, g: Array, groups: Groups) -> Array:
    return matmul(transposed(x.reshape(groups.count, -1, x.shape[-1])), g.reshape(groups.count, -1, g.shape[-1]))


BATCHED = Way(_batched_multiply, _batched_gradient)


# ---- by XLA's own grouped product


def _ragged_multiply(x: Array, w: Array, groups: Groups, turned: bool) -> Array:
    w = w.swapaxes(1, 2) if turned else w
    return jax.lax.ragged_dot(x, w, groups.sizes, preferred_element_type=jnp.float32).astype(x.dtype)


def _ragged_gradient(x: Array, g: Array, groups: Groups) -> Array:
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return jax.lax.ragged_dot_general(x, g, groups.sizes, numbers, preferred_element_type=jnp.float32)


RAGGED = Way(_ragged_multiply, _ragged_gradient)
