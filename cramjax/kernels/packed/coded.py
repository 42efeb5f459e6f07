"""Ternary matrices in less than a bit a weight: each column is written in the words of QMoE's dictionary.

On a CPU few rows are multiplied with the words as they are, by a kernel; else a matrix is unpacked for its product.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from cramjax import devices
from cramjax.kernels.coding import dictionary
from cramjax.kernels.coding.product import MOST_ROWS, coded_product, refusal
from cramjax.kernels.dense import product, transposed
from cramjax.kernels.dense.packed import Packed
from cramjax.kernels.mesh import whole


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Coded(Packed):
    """A constant matrix whose weights are 0 or one of two levels of their column, or such matrices stacked."""

    words: Any
    """uint16 (..., 1, words): of each matrix, its columns one after the other. Matrices of a stack have room for the
    longest."""
    starts: Any
    """int32 (..., 1, outer + 1): where each column begins, and the last one ends."""
    levels: Any
    """bfloat16 (..., 2, outer): what the values 1 and 2 of a column stand for."""
    inner: int = field(metadata={"static": True})
    """Weights of a column."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix: (..., inner, outer)."""
        return (*self.levels.shape[:-2], self.inner, self.levels.shape[-1])

    @property
    def dtype(self) -> Any:
        """Of what `unpacked` gives: float32."""
        return jnp.dtype(jnp.float32)

    def multiply(self, x: Float[Array, "rows inner"], dtype: DTypeLike) -> Float[Array, "rows outer"]:
        """The product of rows with the matrix; see `Packed.multiply`."""
        return _multiply(jnp.dtype(dtype), x.astype(dtype), self)

    def unpacked(self) -> Float[Array, "*stack inner outer"]:
        """The matrix, float32."""
        if len(self.shape) > 2:  # what is in between exists for one matrix at a time
            return jax.lax.map(Coded.unpacked, self)
        values = self._values().astype(jnp.int32)
        levels = jnp.concatenate([jnp.zeros((1, self.levels.shape[1])), self.levels.astype(jnp.float32)])
        return jnp.take_along_axis(levels, values, axis=0)

    def _values(self) -> UInt8[Array, "inner outer"]:
        """0, 1 or 2 for each weight."""
        book = dictionary.dictionary()
        even, outer = self.inner + self.inner % 2, self.levels.shape[1]
        words = self.words[0]
        there = jnp.arange(len(words)) < self.starts[0, -1]
        lengths = jnp.where(there, 2 * jnp.asarray(book.pairs, jnp.int32)[words], 0)
        which = jnp.repeat(jnp.arange(len(words)), lengths, total_repeat_length=even * outer)
        place = jnp.arange(even * outer) - (jnp.cumsum(lengths) - lengths)[which]
        low, high = jnp.asarray(book.table).T[:, words[which]]
        own = jnp.where(place < 16, low, high) >> (2 * (place % 16)).astype(jnp.uint32)
        return (own & 3).astype(jnp.uint8).reshape(outer, even).T[: self.inner]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(dtype: Any, x: Array, w: Coded) -> Array:
    x, w = jax.lax.optimization_barrier((x, jax.tree.map(whole, w)))
    if len(x) <= MOST_ROWS and devices.target().platform == "cpu" and refusal() is None:
        return coded_product(x, w.words, w.starts, w.levels[None]).astype(dtype)
    return product(x, w.unpacked().astype(dtype), dtype)


def _backward(dtype: Any, w: Coded, g: Array) -> tuple[Array, None]:
    g, w = jax.lax.optimization_barrier((g, jax.tree.map(whole, w)))
    return product(g, transposed(w.unpacked().astype(dtype)), dtype), None


_multiply.defvjp(lambda dtype, x, w: (_multiply(dtype, x, w), w), _backward)


def write(values: UInt8[np.ndarray, "*stack inner outer"], levels: Float[np.ndarray, "*stack 2 outer"]) -> Coded:
    """A matrix, or matrices stacked on leading axes, in words.

    Args:
        values: 0, 1 or 2 for each weight.
        levels: what 1 and 2 stand for in each column; they are rounded to bfloat16.
    """
    *lead, inner, outer = values.shape
    count = math.prod(lead)
    rows = np.moveaxis(values.reshape(count, inner, outer), 1, 2).reshape(count * outer, inner)
    flat, ends = dictionary.encode(rows)
    begins = ends[:-1].reshape(count, outer)
    last = np.append(begins[1:, 0], ends[-1])
    words = np.zeros((count, int((last - begins[:, 0]).max())), np.uint16)
    for own, begin, end in zip(words, begins[:, 0], last, strict=True):
        own[: end - begin] = flat[begin:end]
    starts = np.concatenate([begins, last[:, None]], axis=1) - begins[:, :1]
    made = (words.reshape(*lead, 1, -1), starts.astype(np.int32).reshape(*lead, 1, outer + 1))
    return Coded(*made, np.asarray(levels).astype(ml_dtypes.bfloat16).reshape(*lead, 2, outer), inner)


def read(leaf: Coded) -> UInt8[np.ndarray, "*stack inner outer"]:
    """The values that `write` wrote.

    Raises:
        ValueError: the words are not those of so many.
    """
    *lead, inner, outer = leaf.shape
    words, starts = np.asarray(leaf.words).reshape(-1, leaf.words.shape[-1]), np.asarray(leaf.starts)
    lasts = starts.reshape(len(words), -1)[:, -1]
    flat = np.concatenate([own[:last] for own, last in zip(words, lasts, strict=True)])
    rows = dictionary.decode(flat, len(words) * outer, inner)
    return np.moveaxis(rows.reshape(-1, outer, inner), 1, 2).reshape(*lead, inner, outer)


def stack(leaves: Sequence[Coded]) -> Coded:
    """Matrices of one shape, stacked on a new leading axis; in host memory."""
    most = max(leaf.words.shape[-1] for leaf in leaves)

    def padded(words: Any) -> np.ndarray:
        return np.pad(words, [(0, 0)] * (words.ndim - 1) + [(0, most - words.shape[-1])])

    words = np.stack([padded(np.asarray(leaf.words)) for leaf in leaves])
    starts, levels = (np.stack([np.asarray(getattr(leaf, part)) for leaf in leaves]) for part in ("starts", "levels"))
    return Coded(words, starts, levels, leaves[0].inner)
