"""Rows of a table by number, where each device of a mesh holds some rows of the table and some of the numbers."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cramjax.kernels.mesh import by_token, mesh_axes, whole
from cramjax.kernels.packed import Packed, Streamed, unpacked


def lookup(
    table: Float[Array, "*stack rows embed"] | Packed, rows: Int[Array, "batch seq"]
) -> Float[Array, "*stack batch seq embed"]:
    """Look up rows of each table of a stack; a number past the end reads the last one.

    The gradient is summed in float32: in the precision of a bfloat16 table, a common token's sum would stop growing.

    Args:
        table: tables (*stack, rows, embed), or a packed one; or one that is read as the head, (embed, rows).
        rows: numbers (batch, seq).
    """
    if isinstance(table, Streamed):
        return table.outputs(rows)
    table = unpacked(table)
    return _lookup_shared(table, rows) if mesh_axes() or table.dtype != jnp.float32 else _lookup(table, rows)


def add_rows(
    table: Float[Array, "rows embed"], rows: Int[Array, "batch seq"], values: Float[Array, "batch seq embed"]
) -> Float[Array, "rows embed"]:
    """A table with values added to its rows, in place where the table is not read again: the gradient of a lookup, on
    top of another gradient of the same table.

    Args:
        table: float32 (rows, embed).
        rows: numbers (batch, seq).
        values: what is added to each of them.
    """
    if mesh_axes():
        return table + _backward((table, rows), values)[0]
    return table.at[rows].add(values.astype(table.dtype), mode="clip")


@jax.custom_vjp
def _lookup_shared(table: Array, rows: Array) -> Array:
    return _lookup(whole(table), rows)


def _forward(table: Array, rows: Array) -> tuple[Array, tuple[Array, Array]]:
    return _lookup_shared(table, rows), (table, rows)


def _backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, None]:
    table, rows = residuals
    shape = table.shape
    by_sequence = jnp.moveaxis(g.astype(jnp.float32), -3, 0)

    def scatter(_: tuple[()], own: tuple[Array, Array]) -> tuple[Array, tuple[()]]:
        rows, g = own
        pull: Any = jax.vjp(lambda table: _lookup(table, rows), jnp.zeros(shape, jnp.float32))[1]
        return pull(jnp.moveaxis(g, 0, -3))[0], ()

    return by_token(scatter, (), (rows, by_sequence))[0].astype(table.dtype), None


_lookup_shared.defvjp(_forward, _backward)


def _lookup(table: Array, rows: Array) -> Array:
    return table.at[(*[slice(None)] * (table.ndim - 2), rows)].get(mode="clip")
