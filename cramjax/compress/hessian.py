"""Sums of the outer products of a matrix's inputs: its Hessian.

They are symmetric, so that a stretch of columns is multiplied with those before it and its own only: 5/9 of the
arithmetic with nine stretches. Sums are float32, in one buffer. What is bfloat16 is multiplied so: its products are
exact in float32.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cramjax.compress.watch import Inputs
from cramjax.kernels.dense import matmul, transposed
from cramjax.kernels.grouped import outer_products

_STRETCH, _MOST = 192, 9
"""Least columns of a stretch, and most stretches."""


def empty(inputs: Inputs) -> Float[Array, "*experts inner inner"]:
    """Sums before the first rows.

    Args:
        inputs: of the matrix, or what stands for them.
    """
    inner = inputs.rows.shape[-1]
    return jnp.zeros((inner, inner) if inputs.groups is None else (inputs.groups.count, inner, inner), jnp.float32)


def share(inner: int) -> float:
    """Of the arithmetic of a whole sum, what is done."""
    count = _stretches(inner)
    return (count + 1) / (2 * count)


@functools.partial(jax.jit, donate_argnums=0)
def added(
    sums: Mapping[str, Float[Array, "*experts inner inner"]], found: Mapping[str, Inputs]
) -> dict[str, Float[Array, "*experts inner inner"]]:
    """Sums with the outer products of some more rows. Of one matrix (not of experts) they are above the diagonal only.

    Args:
        sums: by the names of matrices; they are gone after it.
        found: inputs by the same names.
    """
    return {
        name: _added_upper(sums[name], own.rows)
        if own.groups is None
        else sums[name] + outer_products(own.rows, own.groups)
        for name, own in found.items()
    }


@functools.partial(jax.jit, donate_argnums=0)
def means(sums: Float[Array, "*experts inner inner"], count: Float[Array, ""]) -> Float[Array, "*experts inner inner"]:
    """Whole Hessians from sums.

    Args:
        sums: from `added`; they are gone after it.
        count: rows.
    """
    whole = sums if sums.ndim == 3 else jnp.triu(sums) + jnp.triu(sums, 1).T
    return whole / count


def _added_upper(total: Array, rows: Array) -> Array:
    inner = rows.shape[-1]
    count = _stretches(inner)
    ends = [inner * (number + 1) // count for number in range(count)]
    if rows.dtype == jnp.bfloat16:
        turned = transposed(rows)

        def product(start: int, end: int) -> Array:
            return matmul(turned[:end], rows[:, start:end])
    else:
        rows = rows.astype(jnp.float32)

        def product(start: int, end: int) -> Array:
            return jnp.matmul(rows[:, :end].T, rows[:, start:end], precision="highest")

    for start, end in zip([0, *ends], ends, strict=False):
        total = total.at[:end, start:end].add(product(start, end))
    return total


def _stretches(inner: int) -> int:
    return max(1, min(_MOST, inner // _STRETCH))
