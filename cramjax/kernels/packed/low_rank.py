"""Matrices with an adapter of low rank: a constant, and a product of two thin matrices that are trained beside it.

LoRA (Hu et al. 2021, arXiv:2106.09685), with the scale of rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) and the
magnitudes of DoRA (Liu et al. 2024, arXiv:2402.09353).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from cramjax.errors import ConfigError
from cramjax.kernels.dense import dense, dense_by_constant, projections
from cramjax.kernels.dense.packed import Packed, unpacked
from cramjax.kernels.mesh import whole


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class LowRank(Packed):
    """A matrix base + scale · a b, or such matrices stacked on leading axes; the base is a constant.

    Matrices that are fused side by side have an adapter each: that of the i-th is of the i-th `rank` columns of `a`,
    and of its own columns of `b`. Any part may be None where a tree holds the others: gradients, what is frozen.
    """

    base: Any
    """(..., inner, outer): an array or a packed matrix."""
    a: Any
    """(..., inner, parts · rank), float32."""
    b: Any
    """(..., rank, outer), float32."""
    magnitude: Any = None
    """DoRA's: the length of each column of the whole, (..., 1, outer), float32; None: as long as it comes."""
    scale: float = field(default=1.0, metadata={"static": True})
    """Multiplies a b: α / rank, or with rsLoRA α / √rank."""
    widths: tuple[int, ...] = field(default=(), metadata={"static": True})
    """Columns of each matrix that has an adapter of its own; empty: it is one."""

    trained: ClassVar[tuple[str, ...]] = ("a", "b", "magnitude")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix: (..., inner, outer)."""
        if self.base is not None:
            return tuple(self.base.shape)
        if self.a is None or self.b is None:
            raise ValueError("an adapter without a base has the shape of a and b together, and one of them is missing")
        return (*self.a.shape[:-1], *self.b.shape[-1:])

    @property
    def dtype(self) -> Any:
        """Of what `unpacked` gives: float32."""
        return jnp.dtype(jnp.float32)

    @property
    def parts(self) -> int:
        """Matrices that have an adapter of their own."""
        return max(1, len(self.widths))

    @property
    def rank(self) -> int:
        """Of each matrix's adapter."""
        return self.b.shape[-2]

    def multiply(self, x: Float[Array, "rows inner"], dtype: DTypeLike) -> Float[Array, "rows outer"]:
        """The product of rows with the matrix; see `Packed.multiply`. The two summands are rounded to `dtype`."""
        result = dense_by_constant(x, self.base, dtype=dtype)
        narrow = projections(x, self.a, (self.rank,) * self.parts, dtype=dtype)
        changes = [dense(h * self.scale, b, dtype=dtype) for h, b in zip(narrow, self._columns(), strict=True)]
        result = result + _joined(changes)
        if self.magnitude is None:
            return result
        return result * (whole(self.magnitude) / self._lengths(jax.tree.map(whole, self)._sum()))[0].astype(dtype)

    def unpacked(self) -> Float[Array, "*stack inner outer"]:
        """The matrix with its adapter in it, float32."""
        matrix = self._sum()
        return matrix if self.magnitude is None else matrix * (self.magnitude / self._lengths(matrix))

    def change(self) -> Float[Array, "*stack inner outer"]:
        """What the adapter adds: scale · a b, float32."""
        pairs = zip(jnp.split(self.a, self.parts, axis=-1), self._columns(), strict=True)
        return self.scale * _joined([jnp.matmul(a, b, precision="highest") for a, b in pairs])

    def _sum(self) -> Float[Array, "*stack inner outer"]:
        return unpacked(_constant(self.base)).astype(jnp.float32) + self.change()

    def _lengths(self, matrix: Float[Array, "*stack inner outer"]) -> Float[Array, "*stack 1 outer"]:
        """Lengths of columns, a constant to gradients (section 4.3 of DoRA); 1 for columns of zeros, which stay so."""
        lengths = jax.lax.stop_gradient(_lengths(matrix))
        return jnp.where(lengths == 0, 1.0, lengths)

    def _columns(self) -> list[Array]:
        """`b` of each matrix."""
        ends = [sum(self.widths[: i + 1]) for i in range(len(self.widths) - 1)]
        return jnp.split(self.b, ends, axis=-1)


def low_rank(
    base: Float[Array, "*stack inner outer"] | Packed,
    rank: int,
    *,
    scale: float,
    key: Array,
    widths: Sequence[int] = (),
    dora: bool = False,
) -> LowRank:
    """A matrix with an adapter that changes nothing yet: `a` is uniform within ±1 / √inner, as peft's, and `b` zero.

    Args:
        base: the matrix, or matrices stacked on leading axes, packed or not.
        rank: of the adapter of each matrix.
        scale: multiplies a b.
        key: a random key, for `a`.
        widths: columns of the matrices that are fused side by side; empty: it is one.
        dora: train the lengths of columns apart from their directions. They start as those of the base.

    Raises:
        ConfigError: a rank or a scale that is not positive, or widths of another matrix.
    """
    *lead, inner, outer = base.shape
    _check(base.shape, rank, scale, widths)
    bound = 1 / math.sqrt(inner)
    parts = max(1, len(widths))
    a = jax.random.uniform(key, (*lead, inner, parts * rank), jnp.float32, -bound, bound)
    b = jnp.zeros((*lead, rank, outer), jnp.float32)
    return LowRank(base, a, b, column_lengths(base) if dora else None, float(scale), tuple(widths))


def _check(shape: Sequence[int], rank: int, scale: float, widths: Sequence[int]) -> None:
    if rank < 1:
        raise ConfigError(f"The rank of an adapter must be at least 1, got {rank}.")
    if not 0 < scale < math.inf:
        raise ConfigError(f"The scale of an adapter must be a positive number, got {scale}.")
    if widths and (min(widths) < 1 or sum(widths) != shape[-1]):
        raise ConfigError(f"Widths of matrices side by side must sum up to {shape[-1]} columns, got {tuple(widths)}.")


def column_lengths(base: Any) -> Float[Array, "*stack 1 outer"]:
    """How long the columns of a matrix are, packed or not, or of matrices stacked on leading axes; float32."""
    if base.ndim > 2:  # what is in between exists for one matrix at a time
        return jax.lax.map(column_lengths, base)
    return _lengths(unpacked(base).astype(jnp.float32))


def _lengths(matrix: Float[Array, "*stack inner outer"]) -> Float[Array, "*stack 1 outer"]:
    return jnp.sqrt(jnp.sum(jnp.square(matrix), axis=-2, keepdims=True))


def _constant(base: Any) -> Any:
    return jax.tree.map(jax.lax.stop_gradient, base)


def _joined(parts: Sequence[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
